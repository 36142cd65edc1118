"""Has what a layer computes been computed by the layer?

Fused kernels and patched models read ``lora_A``, ``lora_B`` and the scaling past the layer, and compute W x + s B A x.
Of an anchored layer that is nothing, in which nothing trains, and of a core layer it is wrong by far. So every call of
such a layer must find that its form has run, and so must the first gradient of its factors; else they raise. A layer
that isn't called (unused towers, experts without tokens) gets no gradient either, and raises nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from headstart.errors import LayerError
from headstart.layers.anchored import Formed
from headstart.layers.factors import both


def watch(module: LoraLayer, adapter: str, name: str) -> Callable[[], None]:
    """Check a layer's calls, and the first gradients of its factors.

    Args:
        module: the layer, with its form set.
        adapter: the adapter's name.
        name: the layer's name, for the error.

    Returns:
        What takes the checks off again.
    """
    variant = module.lora_variant[adapter]
    calls = _Calls(adapter, name, variant)
    hooked: Any = module
    calls.handle = hooked.register_forward_hook(calls, with_kwargs=True)
    handles = ExitStack()
    handles.callback(calls.handle.remove)
    for factor in both(module, adapter):
        if factor.requires_grad:
            handles.callback(_watch_gradient(module, factor, adapter, name).remove)
    return handles.close


class _Calls:
    """The hook of a layer's calls, in each of which its form has to run. Compiled code isn't looked at."""

    handle: RemovableHandle

    def __init__(self, adapter: str, name: str, variant: Formed) -> None:
        self.adapter, self.name, self.variant = adapter, name, variant

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or self.variant.compiled:
            return
        if module.lora_variant.get(self.adapter) is not self.variant:
            self.handle.remove()
            return
        # DataParallel calls replicas of the layer, each in a thread, which share all of this.
        thread = threading.get_ident()
        if thread in self.variant.running:
            self.variant.running.discard(thread)
            return
        of_samples = kwargs.get("adapter_names")
        if module.disable_adapters or module.merged:
            return
        if of_samples is not None and self.adapter in of_samples:
            raise LayerError(
                f"layer {self.name!r}: PEFT computes batches of several adapters (adapter_names=) from this layer's A "
                f"and B alone, which is not what adapter {self.adapter!r} is: load the plain adapter that "
                "headstart.save_lora writes, or give the samples of one adapter at a time."
            )
        if of_samples is None and self.adapter in module.active_adapters:
            raise _past_the_form(self.name, self.adapter)


def _watch_gradient(module: LoraLayer, factor: nn.Parameter, adapter: str, name: str) -> RemovableHandle:
    variant: Formed = module.lora_variant[adapter]

    def check(_: Tensor) -> None:
        handle.remove()
        if module.lora_variant.get(adapter) is variant and not variant.has_run:
            raise _past_the_form(name, adapter)

    handle: RemovableHandle = factor.register_hook(unserializable_hook(check))
    return handle


def _past_the_form(name: str, adapter: str) -> LayerError:
    return LayerError(
        f"layer {name!r}: something else than the layer computes its output (a fused kernel, a patched forward) from "
        f"lora_A and lora_B alone, which is not what adapter {adapter!r} is: switch it off, take a method that keeps "
        "its start, or the plain adapter that headstart.save_lora writes."
    )
