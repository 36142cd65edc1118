"""GoRA: one step of descent, projected on random directions, and ranks where weight and gradient are large together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import MethodError
from headstart.linalg.precision import double
from headstart.methods.base import Factors, Form, Layer, Wants, check_positive
from headstart.methods.draws import empty
from headstart.methods.gradient import GradientMethod, no_gradient
from headstart.methods.registry import register


@register("gora")
@dataclass(frozen=True)
class GoRA(GradientMethod):
    """GoRA: A as in 'lora', B = -(step / s) sqrt(d_in / r) G A' (A A')^-1; kept.

    So s B A = -step sqrt(d_in / r) G P, P the projector on A's rows: of all B with this A the nearest to a step of
    gradient descent, lengthened until its root mean square norm over draws of A is that of the whole step.

    Ranks are shared out: a layer's share is its importance, the mean over entries of abs(W * G), over the sum of all
    layers' importances, and its rank what that share of the adapter's parameters pays for, rounded down, within bounds
    (so that the sum of parameters is not quite the adapter's own). A layer that no gradient reached keeps its rank.

    Source: GoRA (arXiv 2502.12171), and its published code, whose costs of a rank are d_in + d_out (the paper's are
    the root of that: ``rank_cost``). The sign is the paper's: the published code of 2026-03 adds the gradient, against
    its own measure of the error. There s is alpha / sqrt(rank), of the layer's own rank; here a layer keeps its s, and
    lora_alpha follows. The published search for ``step``, down from 1 by the loss of one batch, gives way to ``scale``.

    Settings:
        samples: how many samples the gradient is averaged over. The published code takes 32 training batches; ours is
            LoRA-DA's.
        step: the rate of the step of gradient descent, 0.05 in the published scripts.
        ranks: "chosen" as above, or "given": every layer keeps its rank, and the weight isn't read.
        rank_cost: of one rank of a layer, where ranks are chosen: "parameters", d_in + d_out, or "root", its square
            root, by which large layers get more ranks; the adapter then has as many parameters as that comes to.
        smallest, largest: of a chosen rank, relative to the layer's own; a half and 4 in the published scripts, 4 and
            32 for 8.
        scale: "published", of ``step``; or "search": that multiple of it, the same for all layers, which lowers the
            loss of further samples most (:mod:`headstart.statistics.search`).
    """

    source: ClassVar[str] = "GoRA (arXiv 2502.12171)"
    cost: ClassVar[str] = "a gradient pass over the samples"
    form: ClassVar[Form] = "kept"

    step: float = 0.05
    ranks: Literal["chosen", "given"] = "chosen"
    rank_cost: Literal["parameters", "root"] = "parameters"
    smallest: float = 0.5
    largest: float = 4.0
    scale: Literal["published", "search"] = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, step=self.step)
        if not 0 <= self.smallest <= 1:
            raise MethodError(f"method {self.name!r}: smallest={self.smallest!r} must be from 0 to 1.")
        if not 1 <= self.largest < math.inf:
            raise MethodError(f"method {self.name!r}: largest={self.largest!r} must be at least 1 and finite.")

    def wants(self, layer: Layer) -> Wants:
        """Return what to collect: the gradient, and for the importance the weight."""
        return replace(super().wants(layer), weight=self.shares_ranks)

    @property
    def shares_ranks(self) -> bool:
        """Whether layers may get other ranks than they have."""
        return self.ranks == "chosen"

    def factors(self, layer: Layer) -> Factors:
        """Draw A, and fit B to the step."""
        G = double(layer.require_gradient())
        if not bool(G.count_nonzero()):
            return no_gradient(layer)
        r = layer.r
        rows = max(r, min(math.floor(self.largest * r), layer.d_out, layer.d_in)) if self.shares_ranks else r
        bound = 1 / math.sqrt(layer.d_in)
        A = empty(rows, layer.d_in).uniform_(-bound, bound, generator=layer.generator()).to(G.device)
        Q, triangle = _orthonormal(A)
        # The step in the coordinates of A's rows: those of the first k rows are its first k columns, whatever k.
        image = -(self.step / layer.scaling) * math.sqrt(layer.d_in / r) * (G @ Q)
        B = _fitted(image[:, :r], triangle)
        shares = ((G @ Q).square().sum(0) / G.square().sum()).tolist()
        info = {"share": math.fsum(shares[:r])}
        if not self.shares_ranks:
            return Factors(A, B, info=info)
        info["importance"] = float((double(layer.require_weight()) * G).abs().mean())
        spare_B = image[:, r:].float()
        return Factors(A[:r].clone(), B, info=info, spare=A[r:].clone(), spare_B=spare_B, worth=tuple(shares))

    def settle(self, starts: Mapping[str, Factors], ranks: Mapping[str, int]) -> dict[str, Factors]:
        """Give the layers ranks by their importance."""
        sharing = [name for name in ranks if starts[name].spare is not None]
        costs = {name: self._cost(len(starts[name].B) + starts[name].A.shape[1]) for name in sharing}
        budget = sum(costs[name] * ranks[name] for name in sharing)
        total = math.fsum(starts[name].info["importance"] for name in sharing)
        settled = dict(starts)
        for name in sharing:
            rank = ranks[name]
            if total > 0:
                rank = int(round(budget * (starts[name].info["importance"] / total)) // costs[name])
            settled[name] = self._of_rank(starts[name], rank)
        return settled

    def _cost(self, parameters: int) -> float:
        """Return what one rank of a layer is reckoned to cost, of as many parameters."""
        return parameters if self.rank_cost == "parameters" else math.sqrt(parameters)

    def _of_rank(self, start: Factors, rank: int) -> Factors:
        assert start.spare is not None and start.spare_B is not None  # as factors gave them
        before, most = len(start.A), len(start.A) + len(start.spare)
        rank = min(max(rank, 1, math.floor(self.smallest * before)), most)
        if rank == before:
            return replace(start, spare=None, spare_B=None, worth=())
        A = torch.cat((start.A, start.spare))[:rank]
        _, triangle = _orthonormal(A)
        image = double(start.B) @ _orthonormal(start.A)[1].mT
        image = torch.cat((image, double(start.spare_B)), 1)[:, :rank] * math.sqrt(before / rank)
        info = {**start.info, "share": math.fsum(start.worth[:rank])}
        return replace(start, A=A, B=_fitted(image, triangle), info=info, spare=None, spare_B=None, worth=())


def _orthonormal(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q (d_in, k) and the upper triangle R (k, k) with A' = Q R, R's diagonal positive, in float64."""
    Q, R = torch.linalg.qr(double(A).mT)
    # Which sign a decomposition takes is its own affair, and on another device another.
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
    return Q * signs, signs[:, None] * R


def _fitted(image: Tensor, triangle: Tensor) -> Tensor:
    """Return B (d_out, k) with B A = image Q', for A' = Q R: image R'^-1."""
    k = image.shape[1]
    return torch.linalg.solve_triangular(triangle[:k, :k].mT, image, upper=False, left=False).float()
