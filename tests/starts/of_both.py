"""A start from weight and gradient: the weight's image where the gradient is steepest."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from headstart import Factors, Layer, Method, Wants, register


@register("steepest-image")
@dataclass(frozen=True)
class SteepestImage(Method):
    """A holds the r leading right singular vectors of G, and s B A is W projected onto them; subtracted.

    Source: an example.
    """

    source: ClassVar[str] = "an example"

    samples: int = 8

    def wants(self, layer: Layer) -> Wants:
        """Return that both are needed."""
        return Wants(weight=True, gradient=True)

    def factors(self, layer: Layer) -> Factors:
        """Project the weight."""
        A = torch.linalg.svd(layer.require_gradient(), full_matrices=False).Vh[: layer.r]
        return Factors(A, layer.require_weight() @ A.T / layer.scaling)
