"""Starts from the mean gradient of the loss at the base model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from headstart.linalg.precision import double
from headstart.linalg.svd import TruncatedSVD, truncated_svd
from headstart.methods.base import Factors, Form, Layer, Method, Wants, check_positive
from headstart.methods.registry import register
from headstart.methods.zero import as_lora


@dataclass(frozen=True)
class GradientMethod(Method):
    """Base of the methods that decompose the mean gradient G over ``samples`` samples of the fine-tuning data.

    Settings:
        samples: how many.
    """

    cost: ClassVar[str] = "a gradient pass over the samples, a truncated SVD of each gradient"

    samples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, samples=self.samples)

    def wants(self, layer: Layer) -> Wants:
        """Return what to collect: the gradient."""
        return Wants(gradient=True)

    def decompose(self, layer: Layer, rank: int) -> tuple[TruncatedSVD | None, dict[str, float]]:
        """Return the ``rank`` leading triplets of G, or None where G is zero, and numbers for the report."""
        G = layer.require_gradient()
        if not bool(G.count_nonzero()):
            return None, {}
        svd = truncated_svd(G, rank)
        return svd, {"residual": svd.residual, "share": _share(G, svd.S)}


def no_gradient(layer: Layer) -> Factors:
    """Return the start of 'lora', with a note."""
    return as_lora(layer, "no gradient reached this layer in the samples; it starts as 'lora' does")


def downhill(U: Tensor, S: Tensor, V: Tensor, gamma: float, info: dict[str, float], repair: str = "") -> Factors:
    """Return B A = -U S V' / gamma, split evenly between B and A."""
    root = S.sqrt() / math.sqrt(gamma)
    return Factors((-root[:, None] * V.T).float(), (U * root).float(), info=info, repair=repair)


@register("lora-one")
@dataclass(frozen=True)
class LoRAOne(GradientMethod):
    """LoRA-One: with -G = U S V', B = U_r sqrt(S_r/S_1)/sqrt(gamma), A = sqrt(S_r/S_1) V_r'/sqrt(gamma); kept.

    Source: Zhang et al. 2025 (LoRA-One), Algorithm 1.

    Settings:
        samples: how many samples the gradient is averaged over. The method sets no number; ours is LoRA-DA's.
        gamma: the published scale is 128.
        scale: "published"; or "search": that multiple of it, the same for all layers, which lowers the loss of further
            samples most (:mod:`headstart.statistics.search`).
    """

    source: ClassVar[str] = "LoRA-One (Zhang et al. 2025), Algorithm 1"
    form: ClassVar[Form] = "kept"

    gamma: float = 128.0
    scale: Literal["published", "search"] = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, gamma=self.gamma)

    def factors(self, layer: Layer) -> Factors:
        """Split the leading triplets of -G evenly between B and A."""
        svd, info = self.decompose(layer, layer.r)
        if svd is None:
            return no_gradient(layer)
        return downhill(svd.U, svd.S / svd.S[0], svd.V, self.gamma, info)


def _share(G: Tensor, S: Tensor) -> float:
    """Return the share of ||G||_F^2 that the kept singular values hold."""
    return float(double(S).square().sum() / double(G).square().sum())
