"""Steps of PEFT that must know of forms, extended so that nothing is dropped or misread in silence.

Building: an adapter whose config is marked gets layers of the form that the mark says, before any tensor is read. So
``add_adapter`` with a prepared adapter's config, ``load_adapter``, ``PeftModel.from_pretrained`` and
``inject_adapter_in_model`` work as for a plain LoRA.

Loading: tensors of another form than the layers', or on another base model's weights, are refused; what an earlier
version wrote is read, and gives its layers their form where the mark doesn't say it.

Combining: ``add_weighted_adapter`` reads B A, which of an anchored adapter is not what it does; it is refused.

Hot-swapping: ``hotswap_adapter`` copies factors into a live adapter and sets to zero what a file lacks, such as a
core's R or the anchors of a residual base model; into any but a plain adapter it is refused.

Merging: a weight that is another layer's as well (tied embeddings) would change there, too; it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from headstart.errors import CheckpointError, LayerError
from headstart.layers.adapter import renewed, split
from headstart.layers.anchored import Formed, set_anchors
from headstart.layers.checkpoint import check_form
from headstart.layers.core import form_of, set_core
from headstart.layers.experts import stacks_in
from headstart.layers.factors import both
from headstart.layers.find import MERGED_TIED, TargetLayer, check_untied, lora_layers, record, residual_owner
from headstart.layers.install import mark_config
from headstart.layers.mark import marked_form, marked_form_of
from headstart.layers.watch import watch


class FromConfig(Formed):
    """Stands in a layer's place for a form until PEFT calls :meth:`init`, with the config that says which."""

    def init(self, module: LoraLayer, adapter_name: str | None = None, **given: Any) -> None:
        """Make the place for what the form needs, empty, and for a plain layer nothing.

        Until something is loaded into it, an anchored layer is a plain LoRA layer by what it computes, and a core layer
        adds nothing. PEFT tells a parameter's layer neither its adapter's name nor its own: the first is where this
        object is, and of the second the parameter's name is enough where the adapter has one form for all of that name.
        """
        mark = given["config"].init_lora_weights
        if adapter_name is None:
            adapter_name = next(name for name, variant in module.lora_variant.items() if variant is self)
        del module.lora_variant[adapter_name]
        name = str(given.get("target_name") or "")
        if isinstance(module, ParamWrapper):
            name, form = module.parameter_name, marked_form_of(mark, module.parameter_name)
        else:
            form = marked_form(mark, name)
        A, B = both(module, adapter_name)
        if form == "core":
            with torch.no_grad():
                # On FP8 weights, PEFT's factors are FP8 for this moment, which nothing can be drawn in.
                B.copy_(nn.init.kaiming_uniform_(torch.empty_like(B, dtype=torch.float32), a=math.sqrt(5)))
            set_core(module, adapter_name, A.new_zeros(len(A), len(A)))
        elif form is not None:
            set_anchors(module, adapter_name, torch.zeros_like(A), torch.zeros_like(B), form)
        if form in ("core", "anchored"):
            watch(module, adapter_name, name)


def build(arguments: dict[str, Any]) -> None:
    """Let a layer whose config is marked be drawn as a plain one, and leave the form to :class:`FromConfig`."""
    arguments["init_lora_weights"] = True
    arguments["self"].lora_variant[arguments["adapter_name"]] = FromConfig()


def load(arguments: dict[str, Any]) -> None:
    """Check what is loaded; read what an earlier version wrote, and give its layers their form."""
    tensors = arguments["state_dict"] = renewed(arguments["state_dict"])
    prepare(arguments["model"], arguments["config"], arguments["adapter_name"], tensors)


def prepare(model: Any, config: Any, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Check an adapter's tensors against the form of the layers, and give layers without one the form they need.

    Raises:
        CheckpointError: the tensors are of another form than the layers, or belong to a residual base model while this
            one's is untouched or was made residual with another start.
    """
    targets = list(lora_layers(model, adapter))
    formed = any(form_of(target.module, adapter) for target in targets)
    if not formed and not any(
        ours in key for key in tensors for ours in (".lora_start_", ".lora_residual_", ".lora_core.")
    ):
        return
    layers, _ = split(tensors, config, stacks_in(model, adapter))
    fresh = False
    for target in targets:
        layer = layers.get(target.name)
        if layer is None:
            continue
        check_form(target, layer)
        if layer.kind == "residual" and residual_owner(target.module) is None:
            raise CheckpointError(
                f"layer {target.name!r}: this checkpoint was trained on residual weights, which PEFT's loading can't "
                'restore; load it with headstart.load_checkpoint, or call initialize_(..., form="residual") first.'
            )
        if layer.kind != "lora" and form_of(target.module, adapter) is None:
            _set_form(target, layer.A0, layer.B0, layer.core, layer.kind)
            fresh = True
    if fresh:
        mark_config(model, adapter, ExitStack())


def _set_form(target: TargetLayer, A0: Tensor | None, B0: Tensor | None, core: Tensor | None, kind: str) -> None:
    if core is not None:
        set_core(target.module, target.adapter, core)
    elif A0 is not None and B0 is not None:
        set_anchors(target.module, target.adapter, A0, B0, kind)
    if kind != "residual":  # which is W x + s B A x, whoever computes it
        watch(target.module, target.adapter, target.name)


def refuse_forms(model: nn.Module, adapters: Sequence[str], why: str) -> None:
    """Raise LayerError, which ends in ``why``, where one of the adapters is anchored, residual or a core."""
    for adapter in adapters:
        for target in lora_layers(model, adapter):
            kind = form_of(target.module, adapter)
            if kind is not None:
                raise LayerError(f"adapter {adapter!r} is {kind} (layer {target.name!r}), {why}")


def combine(arguments: dict[str, Any]) -> None:
    """Refuse to combine adapters that are no plain LoRA."""
    why = "PEFT combines B A alone: write it with save_lora, load that, and combine it."
    refuse_forms(arguments["self"], arguments["adapters"], why)


def swap(arguments: dict[str, Any]) -> None:
    """Refuse to swap tensors into an adapter that is no plain LoRA."""
    why = "PEFT swaps A and B alone: write the adapters with save_lora, load one of those, and swap the others in."
    refuse_forms(arguments["model"], [arguments["adapter_name"]], why)


def merge(arguments: dict[str, Any]) -> None:
    """Refuse to merge an adapter that headstart started into a weight that is another layer's as well."""
    tuner = arguments["self"]
    started = [
        target for adapter in tuner.peft_config for target in lora_layers(tuner.model, adapter) if record(target)
    ]
    check_untied(tuner.model, started, MERGED_TIED)
