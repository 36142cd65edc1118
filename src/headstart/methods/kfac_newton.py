"""A Newton-like step of low rank: the gradient, whitened by powers of the Fisher information's Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import LayerError, MethodError
from headstart.linalg.damped import damped_inverse, factored_damping
from headstart.linalg.precision import double
from headstart.linalg.product import product_svd
from headstart.linalg.svd import right_signs, truncated_svd
from headstart.methods.base import Factors, Form, Layer, Wants, check_positive
from headstart.methods.gradient import GradientMethod, downhill, no_gradient
from headstart.methods.registry import register
from headstart.progress import Show, silent

_NOISE = torch.finfo(torch.float32).eps


@register("kfac-newton")
@dataclass(frozen=True)
class KFACNewton(GradientMethod):
    """Ours: B A = D / (sigma_1(D) gamma) with D = -Y^-p (rank-r part of Y^-p G Z^-p) Z^-p; kept.

    Z and Y are the damped means of x x' and g g' over tokens, G is the mean gradient. p = 0 is LoRA-One. p = 1/2 gives
    the best step of rank r in K-FAC's model of the loss: of all D of rank r, the least <G, D> + tr(D' Y D Z) / 2. At
    full rank that is Newton's step in this model, -Y^-1 G Z^-1. Its neighbour LoRA-DA truncates that step in another
    metric.

    Damping adds sqrt(damping) times its own mean diagonal to each of Z and Y, Martens and Grosse's factored split of
    ``damping`` times the mean diagonal of Y (x) Z. So neither the loss's normalisation nor the inputs' units change the
    directions; they change the size of D alone, which ``normalize`` takes out.

    Source: this package. "In the spirit of" CG-LoRA (arXiv 2603.29824) and ULoRA (2607.26247), of which no more than
    summaries were known here: neither's formula is claimed. Damping: Martens and Grosse 2015 (K-FAC), section 6.3.

    Settings:
        samples: how many samples G, Y and Z are means over.
        p: from 0, the gradient's own directions, to 1.
        damping: without a unit, at least 0. From 0 it is raised where a factor can't be inverted (the report says
            where).
        fisher: Y whole, or its diagonal alone, which needs less memory.
        tokens: Y and Z are means over the tokens that the attention mask shows, or over those with a label.
        normalize: divide D by its largest singular value; without, B A = D / gamma, and layers keep their relative
            sizes.
        gamma: as in lora-one: s B A has the largest singular value s / gamma.
        scale: "gamma" as above; or "search": that multiple of it, the same for all layers, which lowers the loss of
            further samples most (:mod:`headstart.statistics.search`).
    """

    source: ClassVar[str] = "headstart's own, on K-FAC (Martens and Grosse 2015)"
    cost: ClassVar[str] = "a gradient pass over the samples, two inverses and a truncated SVD a layer"
    form: ClassVar[Form] = "kept"

    p: float = 0.5
    damping: float = 0.1
    fisher: Literal["full", "diagonal"] = "full"
    tokens: Literal["attention", "labels"] = "attention"
    normalize: bool = True
    gamma: float = 128.0
    scale: Literal["gamma", "search"] = "gamma"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, gamma=self.gamma)
        if not 0 <= self.p <= 1:
            raise MethodError(f"method {self.name!r}: p={self.p!r} must be from 0 to 1.")
        if not 0 <= self.damping < math.inf:
            raise MethodError(f"method {self.name!r}: damping={self.damping!r} must be at least 0 and finite.")

    def wants(self, layer: Layer) -> Wants:
        """Return what to collect: for p = 0 the gradient alone."""
        if self.p == 0:
            return super().wants(layer)
        return Wants(gradient=True, outputs=self.fisher, tokens=self.tokens)

    def factors(self, layer: Layer) -> Factors:
        """Solve one layer."""
        return self.factors_batch([layer])[0]

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Solve layers, inverting a Z that several of them share once."""
        shared: dict[int, _Root] = {}
        return [self._one(layer, shared) for layer in layers]

    def _one(self, layer: Layer, shared: dict[int, _Root]) -> Factors:
        if self.p == 0:
            svd, info = self.decompose(layer, layer.r)
            if svd is None:
                return no_gradient(layer)
            sigma = float(svd.S[0])
            info["sigma"] = sigma
            return self._split(layer, svd.U, svd.S, svd.V, info, "")
        G = double(layer.require_gradient())
        if not bool(G.count_nonzero()):
            return no_gradient(layer)
        kronecker = layer.require_kronecker()
        assert kronecker.outputs is not None  # as wanted
        on_inputs, on_outputs = factored_damping(kronecker.inputs, kronecker.outputs, self.damping)
        right = shared.get(id(kronecker.inputs))
        if right is None:
            # Only one input's root is held at a time.
            shared.clear()
            right = shared[id(kronecker.inputs)] = self._root(kronecker.inputs, on_inputs)
        left = self._root(kronecker.outputs, on_outputs)
        # With any L L' = Y^-2p and R R' = Z^-2p, D is -L (rank-r part of L' G R) R': rotations of L and R cancel.
        whitened = left.transposed(right.transposed(G.mT).mT)
        svd = truncated_svd(whitened, layer.r)
        U, S, V = product_svd(left.times(double(svd.U)) * double(svd.S), right.times(double(svd.V)).mT)
        signs = right_signs(V)
        info = {
            "residual": svd.residual,
            "share": float(double(svd.S).square().sum() / whitened.square().sum()),
            "condition": right.condition,
            "damping": right.damping,
            "damping_outputs": left.damping,
            "sigma": float(S[0]),
        }
        raised = [
            f"of {side} to {root.damping:.0e}"
            for side, root in (("inputs", right), ("output gradients", left))
            if root.raised
        ]
        repair = f"damping {' and '.join(raised)}: with less, rounding errors would rule" if raised else ""
        return self._split(layer, U * signs, S, V * signs, info, repair)

    def _split(self, layer: Layer, U: Tensor, S: Tensor, V: Tensor, info: dict[str, float], repair: str) -> Factors:
        limit = math.inf if self.normalize else torch.finfo(torch.float32).max
        if not 0 < info["sigma"] < limit:
            raise LayerError(
                f"layer {layer.name!r}: the step has norm {info['sigma']}, out of the range of numbers; raise damping."
            )
        return downhill(U, S / S[0] if self.normalize else S, V, self.gamma, info, repair)

    def _root(self, moment: Tensor, damping: float) -> _Root:
        """Return R with R R' = (M + damping)^-2p for a second moment M, or its diagonal."""
        if moment.dim() == 1:
            return self._root_of_diagonal(double(moment).clamp_min(0), damping)
        solved = damped_inverse(moment, damping)
        inverse = solved.inverse
        if self.p == 0.5:
            matrix = torch.linalg.cholesky(inverse)
        elif self.p == 1:
            matrix = inverse
        else:
            values, vectors = torch.linalg.eigh(inverse)
            matrix = vectors * values.clamp_min(0) ** self.p
        return _Root(matrix, solved.condition, solved.damping, solved.raised)

    def _root_of_diagonal(self, diagonal: Tensor, damping: float) -> _Root:
        used = damping
        if damping + float(diagonal.min()) <= 0:
            # A sum of squares is good to its last digits, however small; one that was rounded to zero is not.
            used = max(_NOISE * float(diagonal.mean()), torch.finfo(torch.float32).tiny)
        damped = diagonal + used
        return _Root(damped**-self.p, float(damped.max() / damped.min()), used, used > damping)


@dataclass(frozen=True)
class _Root:
    """Half of a negative power of a damped second moment: R (n, n), or its diagonal (n,), and the damping used."""

    matrix: Tensor
    condition: float
    damping: float
    raised: bool

    def times(self, other: Tensor) -> Tensor:
        """Return R M."""
        return self.matrix[:, None] * other if self.matrix.dim() == 1 else self.matrix @ other

    def transposed(self, other: Tensor) -> Tensor:
        """Return R' M."""
        return self.matrix[:, None] * other if self.matrix.dim() == 1 else self.matrix.mT @ other
