"""Which layers read one input, and of what shape: a forward pass that keeps no tensor."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class InputsSeen:
    """What the layers' first calls showed; layers that weren't called are missing.

    Attributes:
        shapes: by layer, of its input.
        readers: by layer, the first one that read the same tensor, which may be the layer itself.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict)

    def groups(self, names: list[str]) -> dict[str, int]:
        """Return by layer the number of its group: of those that read one tensor, else of its own."""
        places = {name: place for place, name in enumerate(names)}
        return {name: places[self.readers.get(name, name)] for name in names}


@contextlib.contextmanager
def inputs_seen(modules: Mapping[str, nn.Module]) -> Iterator[InputsSeen]:
    """Within the block, watch what the modules read, tensors being told while they live."""
    seen = InputsSeen()
    living: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name in seen.shapes:
                return
            inputs = args[0]
            tensor, reader = living.get(id(inputs), (None, name))
            if tensor is None or tensor() is not inputs:
                living[id(inputs)] = weakref.ref(inputs), name
                reader = name
            seen.shapes[name], seen.readers[name] = tuple(inputs.shape), reader

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
