"""Starts from the mean gradient of the loss at the base model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from headstart.errors import LayerError
from headstart.linalg.svd import TruncatedSVD, truncated_svd
from headstart.methods.base import Factors, LayerInputs, Method, Needs, check_positive
from headstart.methods.registry import register
from headstart.methods.zero import LoRA


@dataclass(frozen=True)
class GradientMethod(Method):
    """Base of the methods that decompose the mean gradient G over ``samples`` samples of the fine-tuning data."""

    needs: ClassVar[Needs] = Needs.GRADIENT
    cost: ClassVar[str] = "a gradient pass over the samples, a truncated SVD of each gradient"

    samples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, samples=self.samples)


def _no_gradient(layer: LayerInputs) -> Factors:
    start = LoRA().factors(layer)
    note = "no gradient reached this layer in the samples; it starts as 'lora' does"
    return Factors(start.A, start.B, offset="keep", note=note)


def _decompose(G: Tensor, rank: int) -> TruncatedSVD | None:
    """Return the ``rank`` leading triplets of G, or None where G is zero."""
    return truncated_svd(G, rank) if bool(G.count_nonzero()) else None


@register("lora-ga")
@dataclass(frozen=True)
class LoRAGA(GradientMethod):
    """LoRA-GA: with G = U S V', B = c U[:, r:2r] and A = c V[:, :r]', c = d_out^(1/4) / sqrt(gamma); subtracted.

    Source: Wang et al. 2024 (LoRA-GA), section 3, "stable" scale. The rank must be at most min(d_out, d_in) / 2.

    Settings:
        samples: how many samples the gradient is averaged over. The method sets no number; ours is LoRA-DA's.
        gamma: the published scale is 16.
    """

    source: ClassVar[str] = "LoRA-GA (Wang et al. 2024), section 3"

    gamma: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, gamma=self.gamma)

    def factors(self, layer: LayerInputs) -> Factors:
        """Take the leading right and the following left singular vectors of G."""
        if 2 * layer.r > min(layer.d_out, layer.d_in):
            raise LayerError(
                f"layer {layer.name!r}: method 'lora-ga' takes 2 r = {2 * layer.r} singular vectors, more than its "
                f"smaller side ({min(layer.d_out, layer.d_in)}); choose a rank of at most "
                f"{min(layer.d_out, layer.d_in) // 2} or leave the layer out of target_modules."
            )
        svd = _decompose(layer.require_gradient(), 2 * layer.r)
        if svd is None:
            return _no_gradient(layer)
        c = layer.d_out**0.25 / math.sqrt(self.gamma)
        info = {"residual": svd.residual}
        return Factors(c * svd.V[:, : layer.r].T, c * svd.U[:, layer.r :], info=info)


@register("lora-one")
@dataclass(frozen=True)
class LoRAOne(GradientMethod):
    """LoRA-One: with -G = U S V', B = U_r sqrt(S_r/S_1)/sqrt(gamma), A = sqrt(S_r/S_1) V_r'/sqrt(gamma); kept.

    Source: Zhang et al. 2025 (LoRA-One), Algorithm 1.

    Settings:
        samples: how many samples the gradient is averaged over. The method sets no number; ours is LoRA-DA's.
        gamma: the published scale is 128.
    """

    source: ClassVar[str] = "LoRA-One (Zhang et al. 2025), Algorithm 1"

    gamma: float = 128.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, gamma=self.gamma)

    def factors(self, layer: LayerInputs) -> Factors:
        """Split the leading triplets of -G evenly between B and A."""
        svd = _decompose(-layer.require_gradient(), layer.r)
        if svd is None:
            return _no_gradient(layer)
        root = (svd.S / svd.S[0]).sqrt() / math.sqrt(self.gamma)
        info = {"residual": svd.residual, "share": _share(layer.require_gradient(), svd.S)}
        return Factors(root[:, None] * svd.V.T, svd.U * root, offset="keep", info=info)


def _share(G: Tensor, S: Tensor) -> float:
    """Return the share of ||G||_F^2 that the kept singular values hold."""
    return float(S.double().square().sum() / G.double().square().sum())
