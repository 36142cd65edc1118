"""Starts from the singular value decomposition or the QR decomposition of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from headstart.linalg.svd import TruncatedSVD, truncated_svd_batch
from headstart.methods.base import Factors, Layer, Method, Wants
from headstart.methods.registry import register
from headstart.methods.zero import as_lora
from headstart.progress import Show, silent


@dataclass(frozen=True)
class SingularTriplets(Method):
    """Base of the methods that start from r singular triplets of the weight, at one end of its spectrum."""

    which: ClassVar[Literal["largest", "smallest"]]

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight is needed."""
        return Wants(weight=True)

    def factors(self, layer: Layer) -> Factors:
        """Decompose the weight of one layer."""
        return self.factors_batch([layer])[0]

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Decompose the weights of several layers of one shape and rank together."""
        weights = [layer.require_weight() for layer in layers]
        svds = truncated_svd_batch(weights, layers[0].r, which=self.which)
        return [self.start(layer, svd) for layer, svd in zip(layers, svds, strict=True)]

    def start(self, layer: Layer, svd: TruncatedSVD) -> Factors:
        """Return a layer's start from its triplets: by default, split evenly between B and A."""
        return split_evenly(layer, svd)


def split_evenly(layer: Layer, svd: TruncatedSVD, **info: float) -> Factors:
    """Return B = U_r sqrt(S_r / s) and A = sqrt(S_r / s) V_r', so that s B A = U_r S_r V_r'; ``info`` is reported.

    Where all values are zero, so would both factors be, and never train: such a layer starts as 'lora' does.
    """
    if not float(svd.S[0]) > 0:
        return as_lora(layer, "the matrix to split is zero; it starts as 'lora' does")
    root = (svd.S / layer.scaling).sqrt()
    return Factors(root[:, None] * svd.V.T, svd.U * root, info={"residual": svd.residual, **info})


@register("pissa")
@dataclass(frozen=True)
class PiSSA(SingularTriplets):
    """PiSSA: with W = U S V', B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r', so s B A = U_r S_r V_r'; subtracted.

    Source: Meng et al. 2024 (PiSSA), section 3.
    """

    source: ClassVar[str] = "PiSSA (Meng et al. 2024), section 3"
    cost: ClassVar[str] = "a truncated SVD of each weight"
    rate: ClassVar[float | None] = 1 / 10
    which: ClassVar[Literal["largest", "smallest"]] = "largest"


@register("milora")
@dataclass(frozen=True)
class MiLoRA(SingularTriplets):
    """MiLoRA: PiSSA's split of the r smallest singular triplets; subtracted.

    Source: Wang et al. 2024 (MiLoRA), section 3.
    """

    source: ClassVar[str] = "MiLoRA (Wang et al. 2024), section 3"
    cost: ClassVar[str] = "a full SVD of each weight"
    keep: ClassVar[bool] = True
    rate: ClassVar[float | None] = 1 / 3.2
    which: ClassVar[Literal["largest", "smallest"]] = "smallest"


@register("olora")
@dataclass(frozen=True)
class OLoRA(Method):
    """OLoRA: with W = Q R, B = Q[:, :r] and A = R[:r]; s B A is subtracted.

    Only r Householder reflections are needed: the first r columns of Q are those of the QR decomposition of the
    first r columns of W, and R[:r] = Q[:, :r]' W.

    Source: Büyükakyüz 2024 (OLoRA), section 3.
    """

    source: ClassVar[str] = "OLoRA (Büyükakyüz 2024), section 3"
    cost: ClassVar[str] = "a thin QR of each weight"
    rate: ClassVar[float | None] = 1 / 18

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight is needed."""
        return Wants(weight=True)

    def factors(self, layer: Layer) -> Factors:
        """Decompose the first r columns."""
        W = layer.require_weight()
        Q, _ = torch.linalg.qr(W[:, : layer.r])
        return Factors(Q.T @ W, Q)
