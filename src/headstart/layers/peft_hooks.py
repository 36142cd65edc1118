"""Three steps of PEFT that must know of anchors, extended so that nothing is dropped or misread in silence.

Loading: a ``Trainer`` resumes by ``model.load_adapter(folder, name)``. On a model that ``initialize_`` prepared, the
anchors are parameters like others and are loaded like others. On a fresh one they would have no place, and PEFT drops
what has no place without a word; so the place is made first, in the step in which PEFT sorts an adapter's tensors.

Combining: ``add_weighted_adapter`` reads B A, which of an anchored adapter is not what it does; it is refused.

Hot-swapping: ``hotswap_adapter`` copies factors into a live adapter and sets to zero what a file lacks, such as a
core's R or the anchors of a residual base model; into any but a plain adapter it is refused.

These steps are PEFT's own business and may be renamed; importing headstart then fails with a sentence that says so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from peft.tuners.lora.model import LoraModel
from peft.utils import hotswap
from torch import Tensor, nn

from headstart.errors import CheckpointError, LayerError
from headstart.layers.adapter import split
from headstart.layers.anchored import set_anchors
from headstart.layers.checkpoint import check_form
from headstart.layers.core import CORE, form_of, set_core
from headstart.layers.find import lora_layers
from headstart.layers.install import mark_config

_LOADING = "_remap_adapter_state_dict_for_load"
_COMBINING = "_check_add_weighted_adapter"
_SWAPPING = "hotswap_adapter_from_state_dict"


def prepare(model: Any, config: Any, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Check an adapter's tensors against the form of the layers, and give fresh layers the anchors that they need.

    Raises:
        CheckpointError: the tensors are of another form than the layers, or belong to a residual base model while this
            one's is untouched or was made residual with another start.
    """
    targets = list(lora_layers(model, adapter))
    formed = any(form_of(target.module, adapter) for target in targets)
    if not formed and not any(
        ours in key for key in tensors for ours in (".lora_anchor_", ".lora_residual_", f".{CORE}")
    ):
        return
    found, _ = split(tensors, config)
    fresh = False
    for target in targets:
        layer = found.get(target.name)
        if layer is None:
            continue
        check_form(target, layer)
        if layer.core is not None and form_of(target.module, adapter) is None:
            set_core(target.module, adapter, layer.core)
            fresh = True
        if form_of(target.module, adapter) is not None or layer.A0 is None or layer.B0 is None:
            continue
        if layer.kind == "residual":
            raise CheckpointError(
                f"layer {target.name!r}: this checkpoint was trained on residual weights, which PEFT's loading can't "
                'restore; load it with headstart.load_checkpoint, or call initialize_(..., base="residual") first.'
            )
        set_anchors(target.module, adapter, layer.A0, layer.B0, "anchored")
        fresh = True
    if fresh:
        with ExitStack() as undo:
            mark_config(model, adapter, undo)
            undo.pop_all()


def refuse_forms(model: nn.Module, adapters: Sequence[str], why: str) -> None:
    """Raise LayerError, which ends in ``why``, where one of the adapters is anchored, residual or a core."""
    for adapter in adapters:
        for target in lora_layers(model, adapter):
            kind = form_of(target.module, adapter)
            if kind is not None:
                raise LayerError(f"adapter {adapter!r} is {kind} (layer {target.name!r}), {why}")


def register() -> None:
    """Extend PEFT's three steps, once.

    Raises:
        ImportError: this version of PEFT has no such step.
    """
    for name in (_LOADING, _COMBINING):
        if not hasattr(LoraModel, name):
            raise ImportError(f"headstart can't work with this version of PEFT, which has no LoraModel.{name}.")
    if not hasattr(hotswap, _SWAPPING):
        raise ImportError(
            f"headstart can't work with this version of PEFT, which has no peft.utils.hotswap.{_SWAPPING}."
        )
    loading, combining = getattr(LoraModel, _LOADING).__func__, getattr(LoraModel, _COMBINING)
    swapping = getattr(hotswap, _SWAPPING)
    if getattr(loading, "knows_anchors", False):
        return

    @functools.wraps(loading)
    def load(
        cls: type[LoraModel], model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> Any:
        prepare(model, config, adapter_name, state_dict)
        return loading(cls, model=model, config=config, adapter_name=adapter_name, state_dict=state_dict)

    @functools.wraps(combining)
    def combine(self: LoraModel, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        refuse_forms(self, adapters, "PEFT combines B A alone: write it with save_lora, load that, and combine it.")
        return combining(self, adapters, *args, **kwargs)

    @functools.wraps(swapping)
    def swap(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, *args: Any, **kwargs: Any) -> None:
        refuse_forms(
            model,
            [adapter_name],
            "PEFT swaps A and B alone: write the adapters with save_lora, load one of those, and swap the others in.",
        )
        swapping(model, state_dict, adapter_name, *args, **kwargs)

    load.knows_anchors = True  # type: ignore[attr-defined]
    setattr(LoraModel, _LOADING, classmethod(load))
    setattr(LoraModel, _COMBINING, combine)
    setattr(hotswap, _SWAPPING, swap)
