"""Letting PEFT's own loading find its place for anchors, so that a Trainer resumes by itself.

A ``Trainer`` resumes by ``model.load_adapter(folder, name)``. On a model that :func:`headstart.initialize_` prepared,
the anchors are parameters like others and are loaded like others. On a fresh one they would have no place, and PEFT
drops what has no place without a word. PEFT sorts an adapter's tensors in one documented step of its tuner class
before it loads them; that step is extended here to make the place first.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn

from headstart.errors import CheckpointError
from headstart.layers.adapter import split
from headstart.layers.anchored import ANCHORED_MARK, anchor_kind, set_anchors
from headstart.layers.find import lora_layers

_STEP = "_remap_adapter_state_dict_for_load"


def prepare(model: nn.Module, config: Any, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Give the layers of a fresh model the anchors that ``tensors`` holds values for.

    Raises:
        CheckpointError: the tensors belong to a residual base model, and this model's base is untouched.
    """
    found, _ = split(tensors, config)
    for target in lora_layers(model, adapter):
        layer = found.get(target.name)
        if layer is None or layer.A0 is None or layer.B0 is None:
            continue
        kind = anchor_kind(target.module, adapter)
        if layer.kind == "residual" and kind != "residual":
            raise CheckpointError(
                f"layer {target.name!r}: this checkpoint was trained on residual weights, which PEFT's loading can't "
                'restore; load it with headstart.load_checkpoint, or call initialize_(..., base="residual") first.'
            )
        if kind is None:
            set_anchors(target.module, adapter, layer.A0, layer.B0, "anchored")
            config.init_lora_weights = ANCHORED_MARK


def register() -> None:
    """Extend PEFT's step, once."""
    original = getattr(LoraModel, _STEP)
    if getattr(original, "prepares_anchors", False):
        return

    @functools.wraps(original.__func__)
    def step(
        cls: type[LoraModel], model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> Any:
        if any(".lora_anchor_" in key or ".lora_residual_" in key for key in state_dict):
            prepare(model, config, adapter_name, state_dict)
        return original.__func__(cls, model=model, config=config, adapter_name=adapter_name, state_dict=state_dict)

    step.prepares_anchors = True  # type: ignore[attr-defined]
    setattr(LoraModel, _STEP, classmethod(step))
