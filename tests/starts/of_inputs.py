"""A start from activations: the directions in which a layer's inputs are largest."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from headstart import Factors, Form, Layer, Method, Wants, register


@register("input-directions")
@dataclass(frozen=True)
class InputDirections(Method):
    """A holds the r leading eigenvectors of the inputs' second moments, B = 0.

    Source: an example.
    """

    source: ClassVar[str] = "an example"
    form: ClassVar[Form] = "kept"

    samples: int = 8

    def wants(self, layer: Layer) -> Wants:
        """Return that the inputs are needed."""
        return Wants(inputs=True)

    def factors(self, layer: Layer) -> Factors:
        """Take the leading eigenvectors."""
        Z = layer.require_kronecker().inputs
        A = torch.linalg.eigh(Z).eigenvectors.flip(1)[:, : layer.r].T
        return Factors(A.contiguous(), torch.zeros(layer.d_out, layer.r, device=Z.device))
