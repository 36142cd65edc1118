"""Anchored LoRA layers: the frozen weight stays as it is, and what trains is how far the factors are from their start.

A start with s B0 A0 != 0 is usually made harmless by subtracting that product from the weight. An anchored layer
keeps A0 and B0 beside its factors, and ``lora_A`` and ``lora_B`` hold the differences dA = A - A0 and dB = B - B0,
both zero at the start. It computes

    y = W x + s [ dB (A0 + dA) x + B0 dA x ]

which equals W x + s (B A - B0 A0) x, is exactly W x at the start, in any precision, and gives A and B the gradients of
the subtracted form. A cast rounds the differences relative to themselves, and weight decay draws them to the anchor.

The form lives in PEFT's own place for what a LoRA layer computes (its variants). All four matrices are read through
modules, so that whatever shards, offloads or watches modules sees the read. (An embedding's own A and B are parameters
of the layer in PEFT itself.)
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn
from torch.nn import functional

from headstart import compat
from headstart.errors import LayerError
from headstart.layers.factors import FACTORS, both, by_adapter, factor, is_embedding
from headstart.layers.formats import NUMBERS
from headstart.layers.frozen_convolutions import frozen_copy
from headstart.layers.frozen_lookups import FrozenLookup, looked_up
from headstart.layers.stacks import AnchoredParamWrapper, stacked
from headstart.layers.weights import fitted, oriented, product, whole

# The names of the modules that hold A0 and B0. Files tell the two forms apart by them.
START_NAMES: dict[str, tuple[str, str]] = {
    "anchored": ("lora_start_A", "lora_start_B"),
    "residual": ("lora_residual_A", "lora_residual_B"),
}


LoraVariant: type[Any] = compat.lora_variant()


class Formed(LoraVariant):
    """What headstart's forms share: they merge what :meth:`delta` returns.

    Attributes:
        has_run: whether the layer has ever computed with it.
        compiled: whether it has in compiled code, where calls can't be told apart.
        running: the threads in which it has, in a call that isn't over; see :mod:`headstart.layers.watch`.
    """

    def __init__(self) -> None:
        self.has_run = False
        self.compiled = False
        self.running: set[int] = set()

    def note_run(self) -> None:
        """Note that the layer computes with this form."""
        self.has_run = True
        if torch.compiler.is_compiling():
            self.compiled = True
        else:
            self.running.add(threading.get_ident())

    def init(self, module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Nothing is left to do when PEFT builds a layer: headstart sets a form only on what is built."""

    def delta(self, module: LoraLayer, adapter: str) -> Tensor:
        """Return what the adapter adds to the layer's weight, in the orientation in which that is stored."""
        return delta_weight(module, adapter)

    def supports_lora_conversion(self) -> bool:
        """Say no to PEFT's conversion, which reads B A alone and knows no anchors; ``save_lora`` does it."""
        return False

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the adapter in it."""
        _check_numbers(orig_weight)
        return orig_weight + self.delta(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: nn.Parameter) -> None:
        """Add the adapter to the weight in place."""
        _check_numbers(orig_weight)
        orig_weight.data += self.delta(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the adapter taken out."""
        return orig_weight.data - self.delta(module, active_adapter).to(orig_weight.dtype)


def _check_numbers(weight: Tensor) -> None:
    """Refuse to merge into codes: of quantised weights, PEFT gives forms either what the codes stand for, or these."""
    if weight.dtype not in NUMBERS:
        raise LayerError(
            f"a layer holds its weight as {str(weight.dtype).removeprefix('torch.')} codes, to which nothing can be "
            "added: write the adapter with headstart.save_lora, and merge it into the unquantised base model."
        )


class FormedTorchaoLinear(TorchaoLoraLinear):
    """PEFT's layer on a weight of torchao's, some adapter of which has a form: PEFT's own merges s B A of all."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what the adapter adds to the weight."""
        variant = self.lora_variant.get(adapter)
        return variant.delta(self, adapter) if isinstance(variant, Formed) else super().get_delta_weight(adapter)


FormedTorchaoLinear.__name__ = TorchaoLoraLinear.__name__  # as the layer prints itself


class Start(nn.Linear):
    """A frozen factor of a start, of shape (d_out, d_in); it stays as it is even where a program unfreezes it."""

    def __init__(self, value: Tensor) -> None:
        # Built without numbers, so that none are drawn at random, and the generators stay where they are.
        super().__init__(value.shape[1], value.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(value, requires_grad=False)

    def reset_parameters(self) -> None:
        """Leave the factor as it is: there is nothing to draw."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with x (..., d_in), in the factor's own precision; under autocast, in that one's."""
        # Detached, because programs that unfreeze whatever is called lora_ would train it.
        return functional.linear(fitted(x, self.weight), self.weight.detach())


class AnchoredVariant(Formed):
    """The anchored form; see the module's docstring."""

    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Add the adapter's part to the base layer's output."""
        self.note_run()
        x = module.lora_dropout[active_adapter](x)
        moved = module.lora_A[active_adapter](x)
        inner = moved + module.lora_start_A[active_adapter](x).to(moved.dtype)
        added = module.lora_B[active_adapter](inner) + module.lora_start_B[active_adapter](moved)
        # Scaled as it is added: on a GPU, small models wait for the launches of such small operations.
        return torch.add(result, added, alpha=module.scaling[active_adapter])


class ResidualVariant(Formed):
    """The papers' form: the frozen weight is W - s B0 A0, and the layer is a plain LoRA layer on it.

    The anchors are kept beside the factors, unused by the layer, because a plain LoRA for the untouched base model
    can't be written without them. ``lora_A`` and ``lora_B`` are A and B themselves here, and so the names of the
    anchors are others than an anchored layer's.
    """

    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Compute what a plain LoRA layer computes."""
        self.note_run()
        inner = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        return torch.add(result, module.lora_B[active_adapter](inner), alpha=module.scaling[active_adapter])


class AnchoredEmbeddingVariant(Formed):
    """The anchored form of an embedding, which looks tokens up in A and A0."""

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Add the adapter's part to the rows of the tokens x."""
        self.note_run()
        A, B = both(module, active_adapter)
        moved = looked_up(x, A, module.get_base_layer())
        inner = moved + module.lora_start_A[active_adapter](x).to(moved.dtype)
        added = functional.linear(fitted(inner, B), B) + module.lora_start_B[active_adapter](moved)
        return torch.add(result, _scaled_as_base(module, added), alpha=module.scaling[active_adapter])


class ResidualEmbeddingVariant(Formed):
    """The residual form of an embedding: a plain adapter on W - s (B0 A0)'."""

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Compute what a plain embedding's adapter computes."""
        self.note_run()
        A, B = both(module, active_adapter)
        inner = looked_up(x, A, module.get_base_layer())
        added = functional.linear(fitted(inner, B), B)
        return torch.add(result, _scaled_as_base(module, added), alpha=module.scaling[active_adapter])


def _scaled_as_base(module: Any, added: Tensor) -> Tensor:
    """Return what is added to an embedding's rows, multiplied as some models' embeddings multiply these."""
    scale = module._get_embed_scale()
    return added if scale is None else added * scale.to(added.dtype)


# Of embeddings the second, of all others the first.
VARIANTS: dict[str, tuple[type[Formed], type[Formed]]] = {
    "anchored": (AnchoredVariant, AnchoredEmbeddingVariant),
    "residual": (ResidualVariant, ResidualEmbeddingVariant),
}


def anchor_kind(module: LoraLayer, adapter: str) -> str | None:
    """Return "anchored" or "residual", None for a plain LoRA layer."""
    for kind, (name, _) in START_NAMES.items():
        if adapter in getattr(module, name, ()):
            return kind
    return None


def anchors(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor] | None:
    """Return (A0, B0) of an anchored or residual layer, None for a plain one."""
    kind = anchor_kind(module, adapter)
    if kind is None:
        return None
    name_A, name_B = START_NAMES[kind]
    return getattr(module, name_A)[adapter].weight, getattr(module, name_B)[adapter].weight


@torch.no_grad()
def current_factors(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return (A, B) as they are now, detached: what the layer holds, or in an anchored one A0 + dA and B0 + dB.

    These sums are float32 at least: half precision has not the digits of both.
    """
    A, B = (part.detach() for part in both(module, adapter))
    if anchor_kind(module, adapter) != "anchored":
        return A, B
    A0, B0 = (module.lora_start_A[adapter].weight.detach(), module.lora_start_B[adapter].weight.detach())
    A, B, A0, B0 = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (whole(A), whole(B), A0, B0))
    return A0 + A, B0 + B


@torch.no_grad()
def set_anchors(module: LoraLayer, adapter: str, A0: Tensor, B0: Tensor, kind: str) -> None:
    """Give a LoRA layer its anchors and the variant that computes with them.

    A0 (r, d_in) and B0 (d_out, r) are held as frozen modules in the dtype and on the device of the factors; ``kind`` is
    "anchored" or "residual". The factors are left as they are.
    """
    for name, value, which in zip(START_NAMES[kind], (A0, B0), FACTORS, strict=True):
        if not hasattr(module, name):
            setattr(module, name, nn.ModuleDict())
            # PEFT moves and deletes what these names list, and does not make it trainable.
            module.other_param_names = (*module.other_param_names, name)
        like = factor(module, adapter, which)
        # FSDP2 gathers the factors for the forward pass, so anchors beside them are held whole.
        start = whole(value.detach()).to(device=like.device, dtype=like.dtype).clone()
        part = by_adapter(module, which)[adapter]
        if is_embedding(module) and which == "lora_A":
            getattr(module, name)[adapter] = FrozenLookup(start)
        elif is_embedding(module) or isinstance(part, nn.Linear):
            getattr(module, name)[adapter] = Start(start)
        else:
            getattr(module, name)[adapter] = frozen_copy(part, start)
    set_variant(module, adapter, VARIANTS[kind][is_embedding(module)]())


def set_variant(module: LoraLayer, adapter: str, variant: Formed) -> None:
    """Let a layer compute with a form, and be of a class that asks it everywhere."""
    module.lora_variant[adapter] = variant
    if isinstance(module, ParamWrapper):
        module.__class__ = AnchoredParamWrapper  # PEFT's asks no variant what it computes
    elif isinstance(module, TorchaoLoraLinear):
        module.__class__ = FormedTorchaoLinear  # PEFT's asks no variant what it merges


@torch.no_grad()
def start_at(module: LoraLayer, adapter: str) -> None:
    """Make a layer that holds a start's factors an anchored one that has not moved: its differences are zero."""
    A, B = both(module, adapter)
    set_anchors(module, adapter, A, B, "anchored")
    A.zero_()
    B.zero_()


def drop_anchors(module: LoraLayer, adapter: str) -> None:
    """Make the layer a plain LoRA layer again (the inverse of :func:`set_anchors`)."""
    for names in START_NAMES.values():
        for name in names:
            if adapter in getattr(module, name, ()):
                del getattr(module, name)[adapter]
    module.lora_variant.pop(adapter, None)


def delta_weight(module: LoraLayer, adapter: str) -> Tensor:
    """Return what the adapter adds to the layer's own frozen weight, in the orientation in which that is stored.

    That is s (B A - B0 A0) in an anchored layer, and s B A in a residual one, whose weight is W - s B0 A0.
    """
    if anchor_kind(module, adapter) == "residual":
        return module.get_delta_weight(adapter)
    A0, B0 = module.lora_start_A[adapter].weight, module.lora_start_B[adapter].weight
    A, B = both(module, adapter)
    parts = (part.flatten(1) for part in (A, B, A0, B0))
    A_out, B_out = stacked(*parts)
    delta = oriented(module, product(B_out, A_out) * module.scaling[adapter])
    return delta.reshape(*delta.shape[:1], *A.shape[1:]) if A0.ndim > 2 else delta
