"""LoRA-GA: right and left singular vectors of the gradient, of different triplets, in both published conventions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import LayerError, MethodError
from headstart.linalg.svd import TruncatedSVD, truncated_svd
from headstart.methods.base import Factors, Layer, Wants, check_positive
from headstart.methods.gradient import GradientMethod, no_gradient
from headstart.methods.registry import register
from headstart.methods.zero import as_lora

_ZERO_WEIGHT = "its weight is zero, and so would both factors be at its scale; it starts as 'lora' does"


@register("lora-ga")
@dataclass(frozen=True)
class LoRAGA(GradientMethod):
    """LoRA-GA: with G = U S V', B = c U[:, r:2r] and A = c V[:, :r]', c = d_out^(1/4) / sqrt(gamma); subtracted.

    That is its authors' code with the settings below at their defaults. PEFT's code is another start under the same
    name: it leaves B's columns times their singular values of G, which with a loss's ordinary gradients makes B nearly
    zero. Results of the two can't be compared.

    Source: Wang et al. 2024 (LoRA-GA), section 3; its authors' code, and PEFT's ``init_lora_weights="lora_ga"``, both
    without the error of their randomised SVD. The rank must be at most min(d_out, d_in) / 2.

    Settings:
        samples: how many samples the gradient is averaged over. The method sets no number; ours is LoRA-DA's.
        gamma: of the scale "stable"; the published one is 16.
        convention: "authors": A and B are orthonormal, and the scale is for both. "peft": A is orthonormal, B's columns
            are those of U S, and the scale is for B (for both in "gd").
        directions: which of the 2 r leading triplets give A and B. "ArB2r": the first r A, the others B; "A2rBr": the
            other way round; "ArBr": the 1st, 3rd, ... B, the 2nd, 4th, ... A; "random": r drawn ones A and the others
            B ("authors"), or the same r drawn ones both ("peft").
        scale: "stable": times d_out^(1/4) / sqrt(gamma). "weight": times the mean of sqrt(sigma_i(W) / s) over the r
            largest singular values of W ("authors", there named weightS), or B times sigma_1(W) over the singular value
            of its first column ("peft", there named weight_svd). "gd": A and B over s. "unit": as they are.
        norm_clip: of "authors": where s B A has a larger entry than W, both factors are scaled down by the root of the
            ratio.
    """

    source: ClassVar[str] = "LoRA-GA (Wang et al. 2024), section 3"
    rate: ClassVar[float | None] = 1 / 18

    gamma: float = 16.0
    convention: Literal["authors", "peft"] = "authors"
    directions: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "weight", "gd", "unit"] = "stable"
    norm_clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, gamma=self.gamma)
        if self.norm_clip and self.convention == "peft":
            raise MethodError(f"method {self.name!r}: norm_clip is of the authors' convention; PEFT's clips nothing.")

    def wants(self, layer: Layer) -> Wants:
        """Return what to collect: the gradient, and the weight where the scale depends on it."""
        return replace(super().wants(layer), weight=self.scale == "weight" or self.norm_clip)

    def check(self, layer: Layer) -> None:
        """Refuse a rank of which the smaller side holds no two."""
        super().check(layer)
        if 2 * layer.r > min(layer.d_out, layer.d_in):
            raise LayerError(
                f"layer {layer.name!r}: method 'lora-ga' takes 2 r = {2 * layer.r} singular vectors, more than its "
                f"smaller side ({min(layer.d_out, layer.d_in)}); choose a rank of at most "
                f"{min(layer.d_out, layer.d_in) // 2} or leave the layer out of target_modules."
            )

    def factors(self, layer: Layer) -> Factors:
        """Pair right singular vectors of G with left ones."""
        svd, info = self.decompose(layer, 2 * layer.r)
        if svd is None:
            return no_gradient(layer)
        if self.wants(layer).weight and not bool(layer.require_weight().count_nonzero()):
            return as_lora(layer, _ZERO_WEIGHT)
        of_A, of_B = self._triplets(layer)
        A, B = svd.V[:, of_A].T, svd.U[:, of_B]
        if self.convention == "peft":
            A, B = self._pefts(layer, A, B, svd.S[of_B])
        else:
            size = self._size(layer)
            A, B = size * A, size * B
        if self.norm_clip:
            largest = layer.scaling * float((B @ A).abs().max())
            info["clipped"] = min(float(layer.require_weight().abs().max()) / largest, 1.0)
            A, B = A * math.sqrt(info["clipped"]), B * math.sqrt(info["clipped"])
        return Factors(A.contiguous(), B.contiguous(), info=info)

    def _triplets(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return which of the 2 r triplets, from 0, give A's rows and B's columns."""
        r = layer.r
        if self.directions == "random":
            drawn = torch.randperm(2 * r, generator=layer.generator(), dtype=torch.int64, device="cpu")
            return drawn[:r], drawn[:r] if self.convention == "peft" else drawn[r:]
        every = torch.arange(2 * r, dtype=torch.int64, device="cpu")
        if self.directions == "ArBr":
            return every[1::2], every[::2]
        return (every[:r], every[r:]) if self.directions == "ArB2r" else (every[r:], every[:r])

    def _size(self, layer: Layer) -> float:
        """Return what the authors' code multiplies both factors by."""
        if self.scale == "stable":
            return layer.d_out**0.25 / math.sqrt(self.gamma)
        if self.scale == "weight":
            return float((_leading(layer, layer.r).S / layer.scaling).sqrt().mean())
        return 1 / layer.scaling if self.scale == "gd" else 1.0

    def _pefts(self, layer: Layer, A: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors as PEFT scales them; S are the singular values of B's triplets."""
        B = B * S
        if self.scale == "stable":
            return A, B * (layer.d_out**0.25 / math.sqrt(self.gamma))
        if self.scale == "weight":
            # A first value of zero leaves B as it is, there too.
            return (A, B * (_leading(layer, 1).S[0] / S[0])) if float(S[0]) > 0 else (A, B)
        return (A / layer.scaling, B / layer.scaling) if self.scale == "gd" else (A, B)


def _leading(layer: Layer, count: int) -> TruncatedSVD:
    return truncated_svd(layer.require_weight(), count)
