"""Putting factors into the layers: all of them, or none."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from headstart._version import __version__
from headstart.errors import LayerError, MethodError
from headstart.layers.anchored import ANCHORED_MARK, drop_anchors, set_anchors
from headstart.layers.core import drop_core, set_core
from headstart.layers.find import TargetLayer, set_record, set_residual_owner
from headstart.layers.formats import quantisation
from headstart.layers.frozen import freeze_factors, frozen_factors, thaw_factors
from headstart.layers.weights import (
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

Base = Literal["anchored", "residual"]


def check_base(base: str) -> None:
    """Raise MethodError unless ``base`` is a form that the frozen weight can take."""
    if base not in get_args(Base):
        raise MethodError(f"base={base!r} is not one of 'anchored', 'residual'.")


def check_factors(target: TargetLayer, factors: Factors) -> None:
    """Raise LayerError, naming the layer, where factors have the wrong shape or are not finite."""
    for name, matrix, shape in (
        ("A", factors.A, (target.r, target.d_in)),
        ("B", factors.B, (target.d_out, target.r)),
    ):
        if tuple(matrix.shape) != shape:
            raise LayerError(f"layer {target.name!r}: {name} has shape {tuple(matrix.shape)}, not {shape}.")
        if not bool(torch.isfinite(matrix).all()):
            raise LayerError(f"layer {target.name!r}: the method gave NaN or infinity in {name}.")
    if factors.core is not None:
        _check_core(target, factors)
    freezes_A = "lora_A" in frozen_factors(target.module, target.adapter)
    if freezes_A and (factors.core is not None or not factors.A.count_nonzero()):
        raise LayerError(
            f"layer {target.name!r}: LoRA-FA has frozen its A and trains B, but the method "
            + ("freezes B as well, for a core." if factors.core is not None else "starts A at zero, so B can't matter.")
            + " Use another method, or one without lora_fa_."
        )
    if factors.offset == "subtract" and is_dora(target):
        raise LayerError(
            f"layer {target.name!r} uses DoRA, whose norms leave no place for a start that is subtracted again; use a "
            "method that keeps it, such as lora-da or lora-one."
        )


def _check_core(target: TargetLayer, factors: Factors) -> None:
    core = factors.core
    if core is None or tuple(core.shape) != (target.r, target.r) or not bool(torch.isfinite(core).all()):
        raise LayerError(f"layer {target.name!r}: the method gave a core that is not a finite {target.r} x {target.r}.")
    if is_dora(target):
        raise LayerError(
            f"layer {target.name!r} uses DoRA, which trains A and B, and a core layer freezes them; use one of the two."
        )
    if factors.offset != "keep":
        raise LayerError(f"layer {target.name!r}: a core layer keeps its start, and the method subtracts it.")


def is_dora(target: TargetLayer) -> bool:
    """Return whether the layer splits its weight into magnitude and direction."""
    return target.adapter in getattr(target.module, "lora_magnitude_vector", ())


@torch.no_grad()
def install(model: Any, starts: Sequence[tuple[TargetLayer, Factors]], base: Base, note: dict[str, object]) -> None:
    """Install every layer's factors; whatever goes wrong, Ctrl-C included, the model is put back as it was.

    Args:
        model: the PEFT model that holds the layers; its config is marked where layers get anchors.
        starts: the layers with their factors.
        base: "anchored" leaves the frozen weights alone, "residual" subtracts s B A from them. In the second form the
            old weights are held until all layers are done, so that they can be put back.
        note: of :func:`start_note` (see :func:`headstart.layers.find.set_record`).
    """
    with ExitStack() as undo:
        prints = {target.name: fingerprint(target.module.get_base_layer()) for target, _ in starts}
        for target, factors in starts:
            with full_precision([target.module]):
                _install_one(target, factors, base, undo)
            undo.callback(set_record, target, None)
            frozen = {"frozen": list(factors.frozen)} if factors.frozen else {}
            seen = {} if prints[target.name] is None else {"weight": prints[target.name]}
            set_record(target, {**note, "offset": factors.offset, **seen, **frozen})
        if any(factors.offset == "subtract" or factors.core is not None for _, factors in starts):
            mark_config(model, starts[0][0].adapter, undo)
        undo.pop_all()


def start_note(method: Method, seed: int, base: Base) -> dict[str, object]:
    """Return what to remember with each layer of a start: how it was made."""
    return {"method": str(method), "seed": seed, "base": base, "version": __version__}


def mark_config(model: Any, adapter: str, undo: ExitStack) -> None:
    """Let a copy of the adapter's config say that it is no plain LoRA; the user's own object may serve other models."""
    config = model.peft_config[adapter]
    undo.callback(model.peft_config.__setitem__, adapter, config)
    marked = copy.copy(config)
    marked.init_lora_weights = ANCHORED_MARK
    model.peft_config[adapter] = marked


def _install_one(target: TargetLayer, factors: Factors, base: Base, undo: ExitStack) -> None:
    module, adapter = target.module, target.adapter
    give_values(module, adapter, undo)
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    for parameter, value in ((A, factors.A), (B, factors.B)):
        before = parameter.detach().clone()
        undo.callback(_copy, parameter, before)
        assign(parameter, value)
    if factors.frozen:
        undo.callback(thaw_factors, module, adapter, B.requires_grad)
        freeze_factors(module, adapter, factors.frozen)
    if factors.core is not None:
        undo.callback(drop_core, module, adapter)
        set_core(module, adapter, factors.core)
    if is_dora(target):
        magnitude = module.lora_magnitude_vector[adapter].weight
        undo.callback(_copy, magnitude, magnitude.detach().clone())
        assign(magnitude, row_norms(module, adapter))
    if factors.offset == "keep":
        return
    undo.callback(drop_anchors, module, adapter)
    set_anchors(module, adapter, A, B, base)
    if base == "residual":
        subtract_product(target, undo)


@torch.no_grad()
def subtract_product(target: TargetLayer, undo: ExitStack) -> None:
    """Replace the frozen weight by W - s B A, from the factors as the layer holds them, in float32 or better.

    Raises:
        LayerError: another adapter lives on the same weight, and would be changed with it; or the weight is quantised,
            sharded over processes, or kept elsewhere by accelerate.
    """
    module, adapter = target.module, target.adapter
    others = [name for name in module.lora_A if name != adapter]
    if others:
        raise LayerError(
            f"layer {target.name!r} holds adapter {others[0]!r} as well, which residual weights would change; use "
            'base="anchored".'
        )
    weight = module.get_base_layer().weight
    if kind := quantisation(module.get_base_layer()):
        raise LayerError(
            f"layer {target.name!r} is quantised ({kind}), and nothing can be subtracted from its weight; use "
            'base="anchored", which leaves it alone.'
        )
    if isinstance(weight, DTensor):
        raise LayerError(
            f"layer {target.name!r} is sharded over processes, and residual weights have to be made before that; "
            'initialise before fully_shard, or use base="anchored".'
        )
    if weight.device.type == "meta":
        raise LayerError(
            f"layer {target.name!r}: accelerate keeps its weight elsewhere, and nothing is subtracted there; use "
            'base="anchored", which leaves it alone.'
        )
    undo.callback(set_residual_owner, module, None)
    set_residual_owner(module, adapter)
    undo.callback(setattr, weight, "data", weight.data)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    start = product(module.lora_B[adapter].weight.to(dtype), module.lora_A[adapter].weight.to(dtype))
    residual = weight.data.to(dtype) - oriented(module, start * target.scaling)
    weight.data = residual.to(weight.dtype)


@torch.no_grad()
def row_norms(module: Any, adapter: str) -> torch.Tensor:
    """Return the norms of the rows of W + s B A (d_out,): DoRA's magnitude for which nothing is rescaled."""
    A, B = (whole(factor[adapter].weight.detach()).float() for factor in (module.lora_A, module.lora_B))
    return torch.linalg.vector_norm(base_weight(module) + module.scaling[adapter] * (B @ A), dim=1)


@torch.no_grad()
def _copy(parameter: nn.Parameter, value: torch.Tensor) -> None:
    parameter.copy_(value)
