"""LoRAM: fixed sine waves, as large as the weight is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headstart.errors import LayerError
from headstart.linalg.norms import squared_norm
from headstart.methods.base import Factors, Layer, Method, Wants
from headstart.methods.registry import register
from headstart.methods.zero import as_lora
from headstart.progress import Show, silent


@register("loram")
@dataclass(frozen=True)
class LoRAM(Method):
    """LoRAM: B = beta P_out, A = beta P_in', P_k the first r columns of the sine matrix of order k; subtracted.

    Its entries, i and j from 1, are sqrt(2 / (k + 1)) sin(i j pi / (k + 1)), so that P_k' P_k = I. With
    q = log r / log min(d_out, d_in), s beta^2 = ||W||_F sqrt(q / r), so ||s B A||_F = sqrt(q) ||W||_F, which is more
    than half of W at rank 16 and width 4096; all r singular values of s B A are equal. Subtracted from weights in
    bfloat16 (form "residual"), so large a product costs a rounding of W. Nothing is drawn. A weight of zeros starts as
    ``lora`` does.

    Source: LoRAM (arXiv 2507.06558), by an account of it. How the scaling enters was not found: beta is divided by
    sqrt(s), which is the published start at s = 1.
    """

    source: ClassVar[str] = "LoRAM (arXiv 2507.06558)"
    cost: ClassVar[str] = "a norm of each weight"

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight is needed."""
        return Wants(weight=True)

    def check(self, layer: Layer) -> None:
        """Refuse a rank of 1, whose logarithm is zero."""
        super().check(layer)
        if layer.r == 1:
            raise LayerError(
                f"layer {layer.name!r}: method {self.name!r} scales its start by log r, so at rank 1 both factors "
                "would be zero and never train; choose a rank of at least 2."
            )

    def factors(self, layer: Layer) -> Factors:
        """Scale the sines."""
        return self.factors_batch([layer])[0]

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Scale the sines for several layers of one shape and rank, which share them."""
        first = layers[0]
        A, B = _sines(first.d_in, first.r).T, _sines(first.d_out, first.r)
        share = math.log(first.r) / math.log(min(first.d_out, first.d_in))
        return [self._scaled(layer, A, B, share) for layer in layers]

    def _scaled(self, layer: Layer, A: Tensor, B: Tensor, share: float) -> Factors:
        energy = squared_norm(layer.require_weight())
        if energy == 0:
            return as_lora(layer, "its weight is zero; it starts as 'lora' does")
        beta = (share * energy / layer.r) ** 0.25 / math.sqrt(layer.scaling)
        return Factors((beta * A).float(), (beta * B).float(), info={"norm_share": math.sqrt(share)})


def _sines(order: int, columns: int) -> Tensor:
    """Return the first columns (order, columns) of the orthogonal sine matrix, in float64 on the CPU."""
    places = torch.arange(1, order + 1, dtype=torch.long, device="cpu")
    # Whole turns are taken out while the numbers are whole.
    halves = torch.outer(places, places[:columns]) % (2 * (order + 1))
    return math.sqrt(2 / (order + 1)) * torch.sin(halves.double() * (math.pi / (order + 1)))
