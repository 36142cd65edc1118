"""RLPO and RLMO: orthonormal directions of the weight in A, and nothing in B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from headstart.linalg.svd import TruncatedSVD
from headstart.methods.base import Factors, Form, Layer
from headstart.methods.registry import register
from headstart.methods.spectral import SingularTriplets


@dataclass(frozen=True)
class _RightVectors(SingularTriplets):
    form: ClassVar[Form] = "kept"

    def start(self, layer: Layer, svd: TruncatedSVD) -> Factors:
        """Take the right singular vectors, and leave B zero."""
        B = torch.zeros(layer.d_out, layer.r, dtype=torch.float32, device=svd.V.device)
        return Factors(svd.V.T, B, info={"residual": svd.residual})


@register("rlpo")
@dataclass(frozen=True)
class RLPO(_RightVectors):
    """RLPO: with W = U S V', A = V_r', the r leading right singular vectors, and B = 0; both train.

    A spans what PiSSA's does, without the singular values: under reinforcement learning it is these, by its authors'
    account, and not the directions, that make the effective step too long.

    Source: arXiv 2606.31813 and its published code, which decomposes in float32. Its runs took plain LoRA's own rate.
    """

    source: ClassVar[str] = "geometry-preserving orthonormal initialisation (arXiv 2606.31813)"
    cost: ClassVar[str] = "a truncated SVD of each weight"
    which: ClassVar[Literal["largest", "smallest"]] = "largest"


@register("rlmo")
@dataclass(frozen=True)
class RLMO(_RightVectors):
    """RLMO: with the thin W = U S V', A = the last r columns of V, transposed, and B = 0; both train.

    A spans what MiLoRA's does. Where d_in > d_out these are still vectors of the thin decomposition, not of W's null
    space.

    Source: arXiv 2606.31813 and its published code, which decomposes in float32. Its runs took plain LoRA's own rate.
    """

    source: ClassVar[str] = "geometry-preserving orthonormal initialisation (arXiv 2606.31813)"
    cost: ClassVar[str] = "a full SVD of each weight"
    keep: ClassVar[bool] = True
    which: ClassVar[Literal["largest", "smallest"]] = "smallest"
