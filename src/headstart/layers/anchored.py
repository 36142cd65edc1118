"""Anchored LoRA layers: the frozen weight stays as it is, and the layer remembers where its factors started.

A start with s B0 A0 != 0 is usually made harmless by subtracting that product from the weight. An anchored layer
computes

    y = W x + s [ (B - B0) (A x) + B0 ((A - A0) x) ]

instead, which equals W x + s (B A - B0 A0) x, is exactly W x while A = A0 and B = B0, in any precision, and gives A
and B the gradients of the subtracted form. It lives in a :class:`peft.tuners.lora.layer.LoraVariant`, PEFT's own way
to change what a LoRA layer computes; the anchors are frozen parameters beside ``lora_A`` and ``lora_B``, so that PEFT
moves, saves and deletes them with the adapter.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from headstart.layers.weights import oriented, product, whole

# PEFT's own loading code builds every layer before it reads the weights, and stops at a value of init_lora_weights
# that it does not know. So a program that can't read anchors says so, in these words, and does not drop them silently.
ANCHORED_MARK = "headstart: load with headstart.load_checkpoint, or make a plain LoRA with headstart.save_lora"

# The names of the parameters that hold A0 and B0. Files tell the two forms apart by them.
ANCHOR_NAMES: dict[str, tuple[str, str]] = {
    "anchored": ("lora_anchor_A", "lora_anchor_B"),
    "residual": ("lora_residual_A", "lora_residual_B"),
}


class Merging(LoraVariant):
    """What headstart's forms share: they merge what :meth:`delta` returns."""

    @staticmethod
    def delta(module: LoraLayer, adapter: str) -> Tensor:
        """Return what the adapter adds to the layer's weight, in the orientation in which that is stored."""
        return delta_weight(module, adapter)

    def supports_lora_conversion(self) -> bool:
        """Say no to PEFT's conversion, which reads B A alone and knows no anchors; ``save_lora`` does it."""
        return False

    @classmethod
    def merge_safe(cls, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the adapter in it."""
        return orig_weight + cls.delta(module, active_adapter).to(orig_weight.dtype)

    @classmethod
    def merge_unsafe(cls, module: LoraLayer, active_adapter: str, orig_weight: nn.Parameter) -> None:
        """Add the adapter to the weight in place."""
        orig_weight.data += cls.delta(module, active_adapter).to(orig_weight.dtype)

    @classmethod
    def unmerge(cls, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the adapter taken out."""
        return orig_weight.data - cls.delta(module, active_adapter).to(orig_weight.dtype)


class _Anchored(torch.autograd.Function):
    """s [(B - B0) (A x) + B0 ((A - A0) x)] for x (..., d_in), keeping for backward what a plain LoRA layer keeps.

    That is x and r numbers a token; left to autograd, the stacked factors and 2 r numbers would be kept as well. A
    second derivative, or ``torch.func``, gets an error from PyTorch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, scaling: float) -> Tensor:
        # One product with the stacked factors reads x once. Scaling in between touches 2 r numbers a token, not d_out.
        inner = functional.linear(x, torch.cat((A, A - A0))) * scaling
        _, A_trains, B_trains, *_ = ctx.needs_input_grad
        kept = inner[..., : len(A)].contiguous() if B_trains else None
        ctx.save_for_backward(x if A_trains else None, kept, A, B, A0, B0)
        ctx.scaling = scaling
        return functional.linear(inner, torch.cat((B - B0, B0), dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, A, B, A0, B0 = ctx.saved_tensors
        r = len(A)
        rows = grad.reshape(-1, grad.shape[-1])
        # Under autocast all products of the forward pass were in the gradient's type.
        grad_inner = rows @ torch.cat((B - B0, B0), dim=1).to(grad.dtype) * ctx.scaling
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_inner @ torch.cat((A, A - A0)).to(grad.dtype)).reshape(*grad.shape[:-1], A.shape[1])
        if x is not None:
            grad_A = (grad_inner[:, :r] + grad_inner[:, r:]).T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
        if inner is not None:
            grad_B = rows.T @ inner.reshape(-1, r)
        return grad_x, grad_A, grad_B, None, None, None


class AnchoredVariant(Merging):
    """The anchored form; see the module's docstring."""

    @staticmethod
    def forward(module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Add the adapter's part to the base layer's output."""
        A = module.lora_A[active_adapter].weight
        B = module.lora_B[active_adapter].weight
        # A training program may cast the trained factors; rounded alike, the anchors still cancel them exactly.
        # Detached, because programs that unfreeze whatever is called lora_ would train them.
        A0 = module.lora_anchor_A[active_adapter].detach().to(A.dtype)
        B0 = module.lora_anchor_B[active_adapter].detach().to(B.dtype)
        x = module.lora_dropout[active_adapter](x)
        return result + _Anchored.apply(x, A, B, A0, B0, module.scaling[active_adapter])


class ResidualVariant(Merging):
    """The papers' form: the frozen weight is W - s B0 A0, and the layer is a plain LoRA layer on it.

    The anchors are kept beside the factors, unused by the layer, because a plain LoRA for the untouched base model
    can't be written without them.
    """

    @staticmethod
    def forward(module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Compute what a plain LoRA layer computes."""
        inner = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        return result + module.lora_B[active_adapter](inner) * module.scaling[active_adapter]


VARIANTS: dict[str, type[LoraVariant]] = {
    "anchored": AnchoredVariant,
    "residual": ResidualVariant,
}


def anchor_kind(module: LoraLayer, adapter: str) -> str | None:
    """Return "anchored" or "residual", None for a plain LoRA layer."""
    for kind, (name, _) in ANCHOR_NAMES.items():
        if adapter in getattr(module, name, ()):
            return kind
    return None


def anchors(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor] | None:
    """Return (A0, B0) of an anchored or residual layer, None for a plain one."""
    kind = anchor_kind(module, adapter)
    if kind is None:
        return None
    name_A, name_B = ANCHOR_NAMES[kind]
    return getattr(module, name_A)[adapter], getattr(module, name_B)[adapter]


def set_anchors(module: LoraLayer, adapter: str, A0: Tensor, B0: Tensor, kind: str) -> None:
    """Give a LoRA layer its anchors and the variant that computes with them.

    A0 (r, d_in) and B0 (d_out, r) are held as frozen parameters in the dtype and on the device of the factors;
    ``kind`` is "anchored" or "residual".
    """
    name_A, name_B = ANCHOR_NAMES[kind]
    for name, value, factor in ((name_A, A0, module.lora_A), (name_B, B0, module.lora_B)):
        if not hasattr(module, name):
            setattr(module, name, nn.ParameterDict())
            # PEFT moves and deletes what these names list, and does not make it trainable.
            module.other_param_names = (*module.other_param_names, name)
        like = factor[adapter].weight
        # FSDP2 gathers the factors for the forward pass, so anchors beside them are held whole.
        held = whole(value.detach()).to(device=like.device, dtype=like.dtype).clone()
        getattr(module, name)[adapter] = nn.Parameter(held, requires_grad=False)
    module.lora_variant[adapter] = VARIANTS[kind]()


def drop_anchors(module: LoraLayer, adapter: str) -> None:
    """Make the layer a plain LoRA layer again (the inverse of :func:`set_anchors`)."""
    for name in itertools.chain(*ANCHOR_NAMES.values()):
        held = getattr(module, name, {})
        if adapter in held:
            del held[adapter]
    module.lora_variant.pop(adapter, None)


def delta_weight(module: LoraLayer, adapter: str) -> Tensor:
    """Return what the adapter adds to the layer's own frozen weight, in the orientation in which that is stored.

    That is s (B A - B0 A0) in an anchored layer, and s B A in a residual one, whose weight is W - s B0 A0.
    """
    if anchor_kind(module, adapter) == "residual":
        return module.get_delta_weight(adapter)
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    A0 = module.lora_anchor_A[adapter].to(A.dtype)
    B0 = module.lora_anchor_B[adapter].to(B.dtype)
    delta = product(torch.cat((B - B0, B0), dim=1), torch.cat((A, A - A0)))
    return oriented(module, delta * module.scaling[adapter])
