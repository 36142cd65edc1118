"""Starts in a subspace of the layer's outputs: Astra, and SC-LoRA, which turns away from outputs that are to stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
# The largest rank that Astra's code gives, or twice the layer's own where that is more.
_LARGEST_RANK = 256
NO_INPUT = "no input reached this layer in the samples, or only zeros; it starts as 'lora' does"


@register("astra")
@dataclass(frozen=True)
class Astra(InputsMethod):
    """Astra: B = Q, A = Q' W / s, Q the r leading eigenvectors of C; s B A = Q Q' W is subtracted.

    C = W Z W' is the second moment of the layer's outputs (without a bias), Z the mean of x x' over tokens. Of all
    products of rank r, "ipm" has the one with the least mean of |W x - s B A x|^2.

    Source: Astra (arXiv 2602.19111) and its published code, which pads all samples to one length, counts padding, and
    divides each sample's outputs by their largest entry first.

    Ranks can be shared out (an option of the published code, off there): a layer's score is log(1 + e), e the effective
    rank of its outputs, exp of the entropy of C's eigenvalues over their sum. Its rank is its score's share of the sum
    of all ranks, rounded, from 1 to 256 or twice its own rank, whichever is more; and then one more or one less, in
    descending order of score, over and over, until the sum is what it was. Here no rank is above the layer's smaller
    side, and eigenvalues that rounding has left below zero count as zero, where the code raises all to 1e-8, in its own
    units. A layer that no input reached keeps its rank.

    Settings:
        mode: "ipm": the r largest eigenvalues; "kpm": the r smallest. Where d_out is above d_in, those are zero, and so
            is A: the layer then starts as a plain one whose A is zero.
        samples: how many samples Z is a mean over.
        tokens: over those that the attention mask shows, or those that predict a label.
        ranks: "given", every layer keeps its rank, or "chosen" as above, for which every layer holds the directions of
            the largest rank that it may get until those of all are known. ``allocate_ranks_`` always chooses.
    """

    source: ClassVar[str] = "Astra (arXiv 2602.19111)"
    cost: ClassVar[str] = "a forward pass over the samples, an eigenproblem a layer"

    mode: Literal["ipm", "kpm"] = "ipm"
    ranks: Literal["given", "chosen"] = "given"

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight and the second moment of the inputs are needed."""
        return Wants(weight=True, inputs=True, tokens=self.tokens)

    def factors(self, layer: Layer) -> Factors:
        """Take the chosen eigenvectors of C."""
        W = double(layer.require_weight())
        C = _outputs_moment(W, layer.kronecker)
        if C is None:
            return as_lora(layer, NO_INPUT)
        most = _largest_rank(layer.r, layer.d_out, layer.d_in) if self.shares_ranks else layer.r
        values, Q = _leading(C, most, definite=True) if self.mode == "ipm" else _smallest(C, most)
        shares = values / _nonzero(C.trace())
        start = _projector(layer, W, Q[:, : layer.r], {"share": float(shares[: layer.r].sum())})
        if not self.shares_ranks:
            return start
        more = Q[:, layer.r :]
        info = {**start.info, "effective_rank": effective_rank(C)}
        spare = _image(layer, W, more)
        return replace(start, info=info, spare=spare, spare_B=more.float(), worth=tuple(shares.tolist()))

    @property
    def shares_ranks(self) -> bool:
        """Whether layers may get other ranks than they have."""
        return self.ranks == "chosen"

    def settle(self, starts: Mapping[str, Factors], ranks: Mapping[str, int]) -> dict[str, Factors]:
        """Give the layers ranks by the effective ranks of their outputs."""
        sharing = [name for name in ranks if starts[name].spare is not None]
        settled = dict(starts)
        scores = {name: math.log1p(starts[name].info["effective_rank"]) for name in sharing}
        most = {name: _largest_rank(ranks[name], len(starts[name].B), starts[name].A.shape[1]) for name in sharing}
        for name, rank in shared_out(scores, most, sum(ranks[name] for name in sharing)).items():
            start = starts[name]
            assert start.spare is not None and start.spare_B is not None  # as factors gave them
            A, B = torch.cat((start.A, start.spare))[:rank], torch.cat((start.B, start.spare_B), 1)[:, :rank]
            info = {**start.info, "share": math.fsum(start.worth[:rank])}
            # Not parts of what was held for the largest rank.
            kept = replace(start, A=A.clone(), B=B.clone(), info=info, caution=_nowhere(A))
            settled[name] = replace(kept, spare=None, spare_B=None, worth=())
        return settled


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
            name: float((Q * (moment @ Q)).sum() / _nonzero(moment.trace()))
            for name, moment in (("share", C), ("kept", C_keep))
        }
        return _projector(layer, W, Q, shares)


def effective_rank(C: Tensor) -> float:
    """Return exp of the entropy of a symmetric matrix's eigenvalues over their sum, those below zero as zero."""
    values = torch.linalg.eigvalsh(C).clamp_min(0)
    return math.exp(float(torch.special.entr(values / _nonzero(values.sum())).sum()))


def shared_out(scores: Mapping[str, float], most: Mapping[str, int], budget: int) -> dict[str, int]:
    """Share a sum of ranks out by scores, each from 1 to its largest.

    Args:
        scores: above 0, by layer.
        most: the largest rank, by layer.
        budget: the sum, within that of the least and that of the largest ranks.
    """
    total = math.fsum(scores.values())
    ranks = {name: min(max(round(score / total * budget), 1), most[name]) for name, score in scores.items()}
    order = sorted(scores, key=lambda name: -scores[name])
    while missing := budget - sum(ranks.values()):
        step = 1 if missing > 0 else -1
        able = [name for name in order if 1 <= ranks[name] + step <= most[name]]
        for name in able[: abs(missing)]:
            ranks[name] += step
    return ranks


def _nonzero(total: Tensor) -> Tensor:
    """Return a sum of what is not below zero to divide by: of zeros, whose shares are zero, 1."""
    return torch.where(total > 0, total, 1.0)


def _largest_rank(r: int, d_out: int, d_in: int) -> int:
    return max(r, min(max(2 * r, _LARGEST_RANK), d_out, d_in))


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
    A = _image(layer, W, Q)
    return Factors(A, Q.float(), info=info, caution=_nowhere(A))


def _image(layer: Layer, W: Tensor, Q: Tensor) -> Tensor:
    """Return Q' W / s, zero where only rounding errors are."""
    image = Q.mT @ W
    nowhere = image.norm(dim=1) < _ROUNDING * torch.linalg.matrix_norm(W)
    return (image.masked_fill(nowhere[:, None], 0.0) / layer.scaling).float()


def _nowhere(A: Tensor) -> str:
    # The least of a moment's eigenvalues are zero where there are more outputs than inputs.
    nowhere = int((A == 0).all(dim=1).sum())
    caution = f"{nowhere} of {len(A)} chosen directions hold nothing of the weight, so that A is zero there"
    return caution if nowhere else ""
