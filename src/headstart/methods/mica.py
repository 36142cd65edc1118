"""MiCA: the weight's minor directions, in which only A trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from headstart.linalg.svd import TruncatedSVD
from headstart.methods.base import Factors, Form, Layer
from headstart.methods.registry import register
from headstart.methods.spectral import SingularTriplets


@register("mica")
@dataclass(frozen=True)
class MiCA(SingularTriplets):
    """MiCA: with the thin W = U S V', B = the last r columns of U, frozen, and A = 0; only A trains; kept.

    Training changes W within the span of these left singular vectors and nowhere else. Where d_out > d_in they are
    still vectors of the thin decomposition, not of W's left null space.

    Source: MiCA (arXiv 2604.01694); as PEFT's ``init_lora_weights="mica"``, in float64.
    """

    source: ClassVar[str] = "MiCA (arXiv 2604.01694)"
    cost: ClassVar[str] = "a full SVD of each weight"
    keep: ClassVar[bool] = True
    form: ClassVar[Form] = "kept"
    starts_A: ClassVar[bool] = False
    which: ClassVar[Literal["largest", "smallest"]] = "smallest"

    @property
    def freezes(self) -> tuple[str, ...]:
        """B."""
        return ("lora_B",)

    def start(self, layer: Layer, svd: TruncatedSVD) -> Factors:
        """Take the left singular vectors, which stay."""
        A = torch.zeros(layer.r, layer.d_in, dtype=torch.float32, device=svd.U.device)
        return Factors(A, svd.U, info={"residual": svd.residual}, frozen=self.freezes)
