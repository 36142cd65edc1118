"""Putting factors into the layers: all of them, or none."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch.distributed.tensor import DTensor

from headstart._version import __version__
from headstart.errors import LayerError, MethodError
from headstart.layers.anchored import drop_anchors, set_anchors, start_at
from headstart.layers.core import drop_core, form_of, set_core
from headstart.layers.experts import stacks_in
from headstart.layers.factors import both, by_adapter
from headstart.layers.find import TargetLayer, lora_layers, set_record, set_residual_owner
from headstart.layers.frozen import freeze_factors, thaw_factors
from headstart.layers.kinds import is_dora
from headstart.layers.mark import PLAIN, make_mark
from headstart.layers.quantised import quantisation
from headstart.layers.stacks import product_of_stack
from headstart.layers.watch import watch
from headstart.layers.weights import (
    adapted_parameter,
    assign,
    base_weight,
    fingerprint,
    full_precision,
    give_values,
    oriented,
    product,
    whole,
)
from headstart.methods.base import Factors, Method
from headstart.processes import split_by_deepspeed

# What "anchored" methods may be given: the frozen weight untouched, or with the start subtracted.
Subtracting = Literal["anchored", "residual"]
# How a start lives in its layer.
LayerForm = Literal["kept", "anchored", "residual", "core"]


def check_form(form: str) -> None:
    """Raise MethodError unless ``form`` is one that the frozen weight can take."""
    if form not in get_args(Subtracting):
        raise MethodError(f"form={form!r} is not one of 'anchored', 'residual'.")


@torch.no_grad()
def install(
    model: Any,
    starts: Sequence[tuple[TargetLayer, Factors]],
    forms: Mapping[str, LayerForm],
    notes: Mapping[str, Mapping[str, object]],
) -> None:
    """Install every layer's factors; whatever goes wrong, Ctrl-C included, the model is put back as it was.

    Args:
        model: the PEFT model that holds the layers; its config is marked where layers get anchors.
        starts: the layers with their factors.
        forms: by layer, "kept", "core", "anchored", which leaves the frozen weight alone, or "residual", which
            subtracts s B A from it: then the old weights are held until all layers are done, so that they can be put
            back.
        notes: by layer, of :func:`start_note` (see :func:`headstart.layers.find.set_record`).
    """
    with ExitStack() as undo:
        for target, factors in starts:
            sample = fingerprint(target.module.get_base_layer(), adapted_parameter(target.module))
            with full_precision([target.module]):
                _install_one(target, factors, forms[target.name], undo)
            undo.callback(set_record, target, None)
            frozen = {"frozen": list(factors.frozen)} if factors.frozen else {}
            weight = {} if sample is None else {"weight": sample}
            set_record(target, {**notes[target.name], "form": forms[target.name], **weight, **frozen})
        if any(forms[target.name] != "kept" for target, _ in starts):
            mark_config(model, starts[0][0].adapter, undo)
        undo.pop_all()


def start_note(method: Method | str, seed: int) -> dict[str, object]:
    """Return what to remember with each layer of a start: how it was made."""
    return {"method": str(method), "seed": seed, "version": __version__}


def mark_config(model: Any, adapter: str, undo: ExitStack, forms: Mapping[str, str | None] | None = None) -> None:
    """Let a copy of the adapter's config say which forms its layers have; the user's own object may serve other models.

    ``forms`` is by layer name, None for a plain one; by default it is read from the model.
    """
    if forms is None:
        forms = {target.name: form_of(target.module, adapter) for target in lora_layers(model, adapter)}
    config = model.peft_config[adapter]
    undo.callback(model.peft_config.__setitem__, adapter, config)
    marked = copy.copy(config)
    named = {name: form or PLAIN for name, form in forms.items()}
    marked.init_lora_weights = make_mark(named, stacks_in(model, adapter))
    model.peft_config[adapter] = marked


def _install_one(target: TargetLayer, factors: Factors, form: LayerForm, undo: ExitStack) -> None:
    module, adapter = target.module, target.adapter
    give_values(module, adapter, undo)
    A, B = both(module, adapter)
    for parameter, value in ((A, factors.A), (B, factors.B)):
        undo.callback(assign, parameter, parameter.detach().clone())
        assign(parameter, value.reshape(parameter.shape))
    if factors.frozen:
        undo.callback(thaw_factors, module, adapter, B.requires_grad)
        freeze_factors(module, adapter, factors.frozen)
    if factors.core is not None:
        undo.callback(drop_core, module, adapter)
        set_core(module, adapter, factors.core)
        undo.callback(watch(module, adapter, target.name))
    if is_dora(target.module, target.adapter):
        magnitude = module.lora_magnitude_vector[adapter].weight
        undo.callback(assign, magnitude, magnitude.detach().clone())
        assign(magnitude, row_norms(module, adapter))
    if form in ("kept", "core"):
        return
    undo.callback(drop_anchors, module, adapter)
    if form == "residual":
        set_anchors(module, adapter, A, B, form)
        subtract_product(target, undo)
    else:
        start_at(module, adapter)
        undo.callback(watch(module, adapter, target.name))


@torch.no_grad()
def subtract_product(target: TargetLayer, undo: ExitStack) -> None:
    """Replace the frozen weight by W - s B A, from the factors as the layer holds them, in float32 or better.

    Raises:
        LayerError: another adapter lives on the same weight, and would be changed with it; or the weight is quantised,
            sharded over processes, or kept elsewhere by accelerate.
    """
    module, adapter = target.module, target.adapter
    others = [name for name in by_adapter(module, "lora_A") if name != adapter]
    if others:
        raise LayerError(
            f"layer {target.name!r} holds adapter {others[0]!r} as well, which residual weights would change; use "
            'form="anchored".'
        )
    if kind := quantisation(module.get_base_layer()):
        raise LayerError(
            f"layer {target.name!r} is quantised ({kind}), and nothing can be subtracted from its weight; use "
            'form="anchored", which leaves it alone.'
        )
    weight = getattr(module.get_base_layer(), adapted_parameter(module))
    if isinstance(weight, DTensor) or split_by_deepspeed(weight):
        raise LayerError(
            f"layer {target.name!r} is sharded over processes, and residual weights have to be made before that; "
            'initialise before fully_shard or DeepSpeed, or use form="anchored".'
        )
    if weight.device.type == "meta":
        raise LayerError(
            f"layer {target.name!r}: accelerate keeps its weight elsewhere, and nothing is subtracted there; use "
            'form="anchored", which leaves it alone.'
        )
    undo.callback(set_residual_owner, module, None)
    set_residual_owner(module, adapter)
    undo.callback(setattr, weight, "data", weight.data)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = (whole(part).to(dtype) for part in both(module, adapter))
    if isinstance(module, ParamWrapper):
        start = product_of_stack(module, A, B)
    else:
        start = oriented(module, product(B.flatten(1), A.flatten(1))).reshape(weight.shape)
    residual = weight.data.to(dtype) - start * target.scaling
    weight.data = residual.to(weight.dtype)


@torch.no_grad()
def row_norms(module: Any, adapter: str) -> torch.Tensor:
    """Return the norms of the rows of W + s B A (d_out,): DoRA's magnitude for which nothing is rescaled."""
    A, B = (whole(part.detach()).float() for part in both(module, adapter))
    return torch.linalg.vector_norm(base_weight(module) + module.scaling[adapter] * (B @ A), dim=1)
