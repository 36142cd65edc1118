"""Core layers, the form of LoRA-XS and LoRA-SB: y = W x + s B R A x, of which only R (r, r) is trained.

Like an anchored layer, a core layer lives in PEFT's variants: ``lora_A`` and ``lora_B`` are PEFT's own, frozen, and R
is a linear module between them that PEFT trains, moves, saves and deletes with the adapter. What it adds is a LoRA of
rank r, exactly: A and B R.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from headstart.errors import LayerError
from headstart.layers.anchored import Formed, anchor_kind, set_variant
from headstart.layers.frozen import freeze_factors, thaw_factors
from headstart.layers.weights import fitted, oriented, product, whole
from headstart.linalg.precision import double, like

# The name of the module that holds R, in layers and in files.
CORE = "lora_core"


class CoreVariant(Formed):
    """The core form; see the module's docstring."""

    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Add the adapter's part to the base layer's output."""
        self.note_run()
        R, B = getattr(module, CORE)[active_adapter], module.lora_B[active_adapter]
        inner = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        # Programs that cast what trains to half precision leave A and B as they are.
        inner = R(fitted(inner, R.weight))
        return torch.add(result, B(fitted(inner, B.weight)), alpha=module.scaling[active_adapter])

    def delta(self, module: LoraLayer, adapter: str) -> Tensor:
        """Return s B R A, in the orientation in which the base layer stores its weight."""
        parts = (module.lora_B[adapter].weight, getattr(module, CORE)[adapter].weight, module.lora_A[adapter].weight)
        B, R, A = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
        return oriented(module, product(product(B, R), A) * module.scaling[adapter])


def core_of(module: LoraLayer, adapter: str) -> nn.Parameter | None:
    """Return R of a core layer, None for any other."""
    cores = getattr(module, CORE, None)
    if cores is None or adapter not in cores:
        return None
    R: nn.Parameter = cores[adapter].weight
    return R


def form_of(module: LoraLayer, adapter: str) -> str | None:
    """Return "core", "anchored" or "residual", None for a plain LoRA layer."""
    return "core" if core_of(module, adapter) is not None else anchor_kind(module, adapter)


def set_core(module: LoraLayer, adapter: str, R: Tensor) -> None:
    """Make a LoRA layer a core layer with this R (r, r), held in the dtype and on the device of the factors."""
    if not hasattr(module, CORE):
        setattr(module, CORE, nn.ModuleDict())
        # What these names list, PEFT trains, moves and deletes with the adapter.
        module.adapter_layer_names = (*module.adapter_layer_names, CORE)
    before = core_of(module, adapter)
    trained = module.lora_B[adapter].weight.requires_grad or (before is not None and before.requires_grad)
    like = module.lora_A[adapter].weight
    value = whole(R.detach()).to(device=like.device, dtype=like.dtype).clone()
    # First R, so that drop_core finds something to undo; then A and B.
    linear = nn.Linear(len(value), len(value), bias=False, device="meta")  # without numbers: none are drawn at random
    linear.weight = nn.Parameter(value, requires_grad=trained)
    getattr(module, CORE)[adapter] = linear
    freeze_factors(module, adapter, ("lora_A", "lora_B"))
    set_variant(module, adapter, CoreVariant())


def drop_core(module: LoraLayer, adapter: str) -> None:
    """Make the layer a plain LoRA layer again (the inverse of :func:`set_core`)."""
    cores = getattr(module, CORE, {})
    if adapter not in cores:
        return
    trained = cores[adapter].weight.requires_grad
    del cores[adapter]
    module.lora_variant.pop(adapter, None)
    thaw_factors(module, adapter, trained)


@contextmanager
def optimal_gradient(model: nn.Module, adapter: str = "default") -> Iterator[None]:
    """Within the block, R's gradients are those whose B g A is the best image of the full gradient.

    That is ``g* = (B'B)^-1 g (AA')^-1 / s^2`` (LoRA-SB, Theorem 3), put in place of g as soon as backward has it, so
    that any optimizer works with it. Where B'B = AA' = s = 1, as in LoRA-SB's own start, it changes nothing.

    Raises:
        LayerError: the adapter has no core.
        LinAlgError: a layer's A or B has no full rank.
    """
    handles = []
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        R = core_of(module, adapter)
        if R is None:
            continue
        A, B = (double(whole(factor[adapter].weight.detach())) for factor in (module.lora_A, module.lora_B))
        left, right = torch.linalg.inv(B.T @ B) / module.scaling[adapter] ** 2, torch.linalg.inv(A @ A.T)

        def corrected(g: Tensor, left: Tensor = left, right: Tensor = right) -> Tensor:
            return like(left @ double(g) @ right, g)

        handles.append(R.register_hook(corrected))
    if not handles:
        raise LayerError(f"adapter {adapter!r} has no core layer: start it with lora-xs or lora-sb.")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
