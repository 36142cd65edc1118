"""Starts in a subspace of the layer's outputs: Astra, and SC-LoRA, which turns away from outputs that are to stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import MethodError
from headstart.linalg.precision import double
from headstart.linalg.svd import truncated_svd
from headstart.methods.base import Factors, Kronecker, Layer, Wants
from headstart.methods.inputs import InputsMethod
from headstart.methods.registry import register
from headstart.methods.zero import as_lora

# Of a moment in float32, and what follows from it.
_ROUNDING = 1e-5
NO_INPUT = "no input reached this layer in the samples, or only zeros; it starts as 'lora' does"


@register("astra")
@dataclass(frozen=True)
class Astra(InputsMethod):
    """Astra: B = Q, A = Q' W / s, Q the r leading eigenvectors of C; s B A = Q Q' W is subtracted.

    C = W Z W' is the second moment of the layer's outputs (without a bias), Z the mean of x x' over tokens. Of all
    products of rank r, "ipm" has the one with the least mean of |W x - s B A x|^2.

    Source: Astra (arXiv 2602.19111) and its published code, which pads all samples to one length, counts padding, and
    divides each sample's outputs by their largest entry first.

    Settings:
        mode: "ipm": the r largest eigenvalues; "kpm": the r smallest. Where d_out is above d_in, those are zero, and so
            is A: the layer then starts as a plain one whose A is zero.
        samples: how many samples Z is a mean over.
        tokens: over those that the attention mask shows, or those that predict a label.
    """

    source: ClassVar[str] = "Astra (arXiv 2602.19111)"
    cost: ClassVar[str] = "a forward pass over the samples, an eigenproblem a layer"

    mode: Literal["ipm", "kpm"] = "ipm"

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight and the second moment of the inputs are needed."""
        return Wants(weight=True, inputs=True, tokens=self.tokens)

    def factors(self, layer: Layer) -> Factors:
        """Take the chosen eigenvectors of C."""
        W = double(layer.require_weight())
        C = _outputs_moment(W, layer.kronecker)
        if C is None:
            return as_lora(layer, NO_INPUT)
        values, Q = _leading(C, layer.r, definite=True) if self.mode == "ipm" else _smallest(C, layer.r)
        return _projector(layer, W, Q, {"share": float(values.sum() / C.trace())})


@register("sc-lora")
@dataclass(frozen=True)
class SCLoRA(InputsMethod):
    """SC-LoRA: B = Q, A = Q' W / s, Q the r leading eigenvectors of (1 - beta) C - beta C_keep; subtracted.

    C and C_keep are the second moments of the layer's outputs (without a bias) over the data to learn and over data
    whose ability is to stay (``preserve=``), both means over tokens, so that their ratio doesn't depend on how much of
    each was read. beta = 0 is Astra.

    Source: SC-LoRA (arXiv 2505.23724), through descriptions of its code, which sums outputs that are divided by each
    sample's largest entry.

    Settings:
        beta: 0.8 where knowledge of the world is to stay, 0.9 for safety.
        samples: how many samples of each.
        tokens: over those that the attention mask shows, or those that predict a label.
    """

    source: ClassVar[str] = "SC-LoRA (arXiv 2505.23724)"
    cost: ClassVar[str] = "a forward pass over two sets of samples, an eigenproblem a layer"

    beta: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise MethodError(f"method {self.name!r}: beta={self.beta!r} must lie from 0 to 1.")

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight and the second moments of the inputs over both sets of data are needed."""
        return Wants(weight=True, inputs=True, preserved=True, tokens=self.tokens)

    def factors(self, layer: Layer) -> Factors:
        """Take the leading eigenvectors of the difference."""
        W = double(layer.require_weight())
        C, C_keep = _outputs_moment(W, layer.kronecker), _outputs_moment(W, layer.preserved)
        if C is None or C_keep is None:
            return as_lora(layer, NO_INPUT)
        M = (1 - self.beta) * C - self.beta * C_keep
        _, Q = _leading(M, layer.r, definite=self.beta == 0)
        shares = {
            name: float((Q * (moment @ Q)).sum() / moment.trace()) for name, moment in (("share", C), ("kept", C_keep))
        }
        return _projector(layer, W, Q, shares)


def _outputs_moment(W: Tensor, moments: Kronecker | None) -> Tensor | None:
    """Return W Z W' in float64; None where there is no input, or none but zeros."""
    if moments is None or not bool(moments.inputs.count_nonzero()):
        return None
    C = W @ double(moments.inputs) @ W.mT
    # Products aren't symmetric to the last digit.
    return torch.lerp(C, C.mT, 0.5)


def _leading(M: Tensor, r: int, *, definite: bool) -> tuple[Tensor, Tensor]:
    """Return the r largest eigenvalues of a symmetric matrix, and their vectors (n, r).

    ``definite`` says that no eigenvalue is below zero.
    """
    # Where some are, all are raised above it, so that the largest singular values are those of the largest eigenvalues.
    shift = 0.0 if definite else float(truncated_svd(M, 1).S[0])
    raised = M + shift * torch.eye(len(M), dtype=M.dtype, device=M.device)
    V = double(truncated_svd(raised, r).V)
    Q = torch.linalg.qr(V).Q
    Q = Q * torch.where((Q * V).sum(dim=0) < 0, -1.0, 1.0)
    return (Q * (M @ Q)).sum(dim=0), Q


def _smallest(M: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the r smallest eigenvalues of a symmetric matrix and their vectors (n, r)."""
    values, vectors = torch.linalg.eigh(M)
    return values[:r], vectors[:, :r]


def _projector(layer: Layer, W: Tensor, Q: Tensor, info: dict[str, float]) -> Factors:
    """Return B = Q, A = Q' W / s."""
    image = Q.mT @ W
    # The least of a moment's eigenvalues are zero where there are more outputs than inputs.
    nowhere = int((image.norm(dim=1) < _ROUNDING * torch.linalg.matrix_norm(W)).sum())
    caution = f"{nowhere} of {layer.r} chosen directions hold nothing of the weight, so that A is zero there"
    A = image / layer.scaling
    return Factors(A.float(), Q.float(), info=info, caution=caution if nowhere else "")
