"""A start from the weight: its r longest rows."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from headstart import Factors, Layer, Method, Wants, register


@register("longest-rows")
@dataclass(frozen=True)
class LongestRows(Method):
    """A holds the r longest rows of W, and s B A is W there and zero elsewhere; subtracted.

    Source: an example.
    """

    source: ClassVar[str] = "an example"
    cost: ClassVar[str] = "the norms of the rows"
    arithmetic_version: ClassVar[int] = 1

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight is needed."""
        return Wants(weight=True)

    def factors(self, layer: Layer) -> Factors:
        """Choose rows."""
        W = layer.require_weight()
        rows = W.norm(dim=1).topk(layer.r).indices
        B = torch.zeros(layer.d_out, layer.r, dtype=W.dtype, device=W.device)
        B[rows, torch.arange(layer.r)] = 1 / layer.scaling
        return Factors(W[rows], B)
