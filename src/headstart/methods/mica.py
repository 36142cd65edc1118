"""MiCA: the weight's minor directions, in which only A trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from headstart.linalg.svd import truncated_svd_batch
from headstart.methods.base import Factors, Form, Layer, Method, Wants
from headstart.methods.registry import register
from headstart.progress import Show, silent


@register("mica")
@dataclass(frozen=True)
class MiCA(Method):
    """MiCA: with the thin W = U S V', B = the last r columns of U, frozen, and A = 0; only A trains; kept.

    Training changes W within the span of these left singular vectors and nowhere else. Where d_out > d_in they are
    still vectors of the thin decomposition, not of W's left null space.

    Source: MiCA (arXiv 2604.01694); as PEFT's ``init_lora_weights="mica"``, in float64.
    """

    source: ClassVar[str] = "MiCA (arXiv 2604.01694)"
    cost: ClassVar[str] = "a full SVD of each weight"
    form: ClassVar[Form] = "kept"
    starts_A: ClassVar[bool] = False

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight is needed."""
        return Wants(weight=True)

    def factors(self, layer: Layer) -> Factors:
        """Take the minor left singular vectors."""
        return self.factors_batch([layer])[0]

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Decompose the weights of several layers of one shape and rank together."""
        weights = [layer.require_weight() for layer in layers]
        results = truncated_svd_batch(weights, layers[0].r, which="smallest")
        starts = []
        for layer, svd in zip(layers, results, strict=True):
            A = torch.zeros(layer.r, layer.d_in, dtype=torch.float32, device=svd.U.device)
            starts.append(Factors(A, svd.U, info={"residual": svd.residual}, frozen=("lora_B",)))
        return starts
