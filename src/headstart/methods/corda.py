"""CorDA: the weight decomposed as the inputs of the data see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import MethodError
from headstart.linalg.precision import double
from headstart.linalg.svd import truncated_svd
from headstart.methods.alive import rounding
from headstart.methods.base import Factors, Layer, Method, Wants, check_positive
from headstart.methods.registry import register
from headstart.methods.zero import as_lora


@register("corda")
@dataclass(frozen=True)
class CorDA(Method):
    """CorDA: with W Zf = U S V', B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r' Zf^-1; s B A is subtracted.

    Zf = Z + damping mean(diag Z) I, Z the mean of x x' over tokens. As S V' Zf^-1 = U' W, nothing is inverted:
    A = U_r' W / sqrt(s S_r), and s B A = U_r U_r' W. Of all products of rank r, "ipm" has the one with the least
    ||(W - s B A) Zf||_F.

    With W Zf^p decomposed instead, exponents p of 0, 1/2 and 1 are one family: PiSSA's product (MiLoRA's in "kpm"),
    Astra's, which has the least mean of |(W - s B A) x|^2, and CorDA's.

    Source: CorDA (Yang et al. 2024), section 3, and its published code. That inverts Zf in float32 and doubles the
    damping until the inverse passes a test; in float64, without an inverse, the first damping always does.

    Settings:
        mode: "ipm", instruction-previewed: the r largest triplets, from data of the task to learn; or "kpm",
            knowledge-preserved: the r smallest, from data of the knowledge to keep. In "kpm" A can be large where W Zf
            is small; the report has its largest entry.
        samples: how many samples Z is a mean over.
        damping: relative to the mean of Z's diagonal.
        exponent: p, from 0 to 2.
        tokens: Z is a mean over the tokens that the attention mask shows, or over those that predict a label. The
            published code divides each sample's inputs by their largest entry first, and takes padding along.
    """

    source: ClassVar[str] = "CorDA (Yang et al. 2024), section 3"
    cost: ClassVar[str] = "a forward pass over the samples, an SVD a layer"

    mode: Literal["ipm", "kpm"] = "ipm"
    samples: int = 256
    damping: float = 0.01
    exponent: float = 1.0
    tokens: Literal["attention", "labels"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, samples=self.samples, damping=self.damping)
        if not 0 <= self.exponent <= 2:
            raise MethodError(f"method {self.name!r}: exponent={self.exponent!r} must lie from 0 to 2.")

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight and the second moment of the inputs are needed."""
        return Wants(weight=True, inputs=True, tokens=self.tokens)

    def factors(self, layer: Layer) -> Factors:
        """Decompose W Zf, and split the triplets evenly."""
        mean_square = 0.0 if layer.kronecker is None else float(double(layer.kronecker.inputs.diagonal()).mean())
        if layer.kronecker is None or not mean_square > 0:
            note = "no input reached this layer in the samples, or only zeros; it starts as 'lora' does"
            return as_lora(layer, note)
        Z, W = double(layer.kronecker.inputs), double(layer.require_weight())
        # Products in float32 aren't symmetric to the last digit.
        Zf = torch.lerp(Z, Z.mT, 0.5)
        damping = self.damping * mean_square
        Zf.diagonal().add_(damping)
        product = W @ _power(Zf, self.exponent)
        U, S = self._left_triplets(product, layer.r)
        whole = float(product.norm())
        # A triplet that isn't there is zero in both factors, as its product is: its root would enlarge rounding errors.
        S = torch.where(rounding(layer) * whole < S, S, 0.0)
        inverse_root = torch.where(S > 0, (S * layer.scaling).rsqrt(), 0.0)
        A = inverse_root[:, None] * (U.mT @ W)
        B = U * (S / layer.scaling).sqrt()
        share = float(S.norm() / whole) ** 2 if whole > 0 else 0.0
        info = {"largest_A": float(A.abs().max()), "damping": damping, "share": share}
        return Factors(A.float(), B.float(), info=info)

    def _left_triplets(self, matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """Return left singular vectors (d_out, r) and singular values (r,) of the chosen end, in float64."""
        if self.mode == "ipm":
            svd = truncated_svd(matrix, r)
            return double(svd.U), double(svd.S)
        # What is divided by the root of a small singular value must not have been rounded to float32.
        U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, -r:], S[-r:]


def _power(Zf: Tensor, exponent: float) -> Tensor:
    """Return a power of a positive definite matrix, in float64."""
    if exponent == 1:
        return Zf
    if exponent == 0:
        return torch.eye(len(Zf), dtype=Zf.dtype, device=Zf.device)
    values, vectors = torch.linalg.eigh(Zf)
    return (vectors * values.clamp_min(0.0) ** exponent) @ vectors.mT
