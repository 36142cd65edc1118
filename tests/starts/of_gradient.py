"""A start from the gradient: its r longest rows, taken downhill."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from headstart import Factors, Form, Layer, Method, Wants, register


@register("steepest-rows")
@dataclass(frozen=True)
class SteepestRows(Method):
    """A holds the r longest rows of G, normalised, and B their places, negative and scaled by ``size``; kept.

    Source: an example.
    """

    source: ClassVar[str] = "an example"
    form: ClassVar[Form] = "kept"

    samples: int = 8
    size: float = 0.01

    def wants(self, layer: Layer) -> Wants:
        """Return that the gradient is needed."""
        return Wants(gradient=True)

    def factors(self, layer: Layer) -> Factors:
        """Choose rows."""
        G = layer.require_gradient()
        rows = G.norm(dim=1).topk(layer.r).indices
        B = torch.zeros(layer.d_out, layer.r, device=G.device)
        B[rows, torch.arange(layer.r)] = -self.size
        return Factors(torch.nn.functional.normalize(G[rows], dim=1), B)
