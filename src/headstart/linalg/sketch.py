"""The leading singular triplets of a sum of outer products, from thin sketches of it alone.

One pass over the data sketches both sides and a small core with random matrices (Tropp, Yurtsever, Udell and Cevher,
"Streaming Low-Rank Matrix Approximation with an Application to Scientific Simulation", SISC 2019, after their
"Practical Sketching Algorithms for Low-Rank Matrix Approximation", SIMAX 2017). Each further pass is a half step of
subspace iteration (Halko, Martinsson and Tropp, "Finding Structure with Randomness", SIAM Review 2011, section 4.5).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from headstart.linalg.precision import double, full_precision, like

# What only the error estimates see: the square of one vector's norm is off by about 70 percent with so few.
TEST_COLUMNS = 4
# The first of several passes sums one side only, in the memory of both; more columns than this many widths gain little.
_WIDEST_START = 4
# A single pass's core, per column of the sketches: less would amplify what the sketches miss, more gains little.
_CORE_LEAST, _CORE_MOST = 3, 5


@dataclass(frozen=True)
class SketchedSVD:
    """k leading singular triplets of a (d_out, d_in) matrix G, in descending order, in float32.

    They are on the sketch's solving device.

    ``norm`` and what follows it are estimates, from `TEST_COLUMNS` random combinations of G's columns or rows that
    the triplets don't depend on. A G of zeros, or to which nothing was added, has ``S[0] == 0`` and ``norm == 0``;
    its vectors are orthonormal but arbitrary, ``residual`` and ``share`` 0 and the angles 1.

    Attributes:
        U: (d_out, k) orthonormal left vectors; in each, the entry of largest magnitude is positive.
        S: (k,) singular values. From two passes on, none is above G's own, but for rounding.
        V: (d_in, k) orthonormal right vectors.
        norm: the Frobenius norm of G, its square unbiased.
        residual: the root of the sum over the triplets of ``||G v - s u||^2 + ||G' u - s v||^2``, relative to
            ``S[0]``. Unbiased before the root. From two passes on, one of the terms is zero by construction.
        angle_left: the sine of the largest angle between U and G's own k leading left vectors, at most 1. Wedin's
            bound, with estimates for the residuals and the next value: 1 to 4 times the sine on the less exact of
            the two sides, up to 20 times on the other, and 1 where no gap is seen.
        angle_right: the same of V.
        share: ``sum(S**2) / norm**2``, at most 1.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    norm: float
    residual: float
    angle_left: float
    angle_right: float
    share: float


class GradientSketch:
    """At most ``(d_out + d_in) * width`` numbers that give the leading triplets of G = sum of g'x.

    `add` all data, then `finish`; with several passes, `advance` after each but the last and `add` the same data
    again, in any order and batches of any size. Sketches of one shape and seed share their random matrices, which
    are larger than the sums: give all layers of a model the same seed.

    Attributes:
        rank_limit: the largest k for `finish`, and the largest rank of a G that is recovered exactly.

    Args:
        d_out, d_in: the layer's output and input dimension.
        width: columns held for each side, in all; 2 k + 6 leaves about k + 10 for the vectors.
        passes: over the data. In one, only a G close to rank k is found well; slow decay needs 3 or 4.
        seed: of the random matrices; the same seed gives the same result, up to rounding.
        device, dtype: of the sums, the latter float32 or float64; what is added is converted.

    Raises:
        ValueError: where an argument is out of its range, or ``width`` too small for a single triplet.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        width: int,
        passes: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if min(d_out, d_in, passes) < 1 or dtype not in (torch.float32, torch.float64):
            raise ValueError(f"no sketch of shape ({d_out}, {d_in}) in {passes} passes and {dtype}")
        self.shape, self.passes, self._pass, self._scale = (d_out, d_in), passes, 1, 1.0
        # All that follows works on A (m, n), G or its transpose, so that the last pass sums A Q, and the first of
        # several sums on the shorter side, where the same memory holds the most columns.
        self._flip = passes > 1 and (d_out < d_in) == (passes % 2 == 0)
        m, n = (d_in, d_out) if self._flip else (d_out, d_in)
        if passes == 1:
            self.rank_limit, core = _one_pass_layout(m, n, width)
            columns = (self.rank_limit + TEST_COLUMNS // 2,) * 2
        else:
            core, memory = 0, width * (m + n) - TEST_COLUMNS * m
            self.rank_limit = min(memory // (m + n), m, n)
            start = min(memory // min(m, n), _WIDEST_START * width, m, n)
            columns = (start + TEST_COLUMNS, 0) if passes % 2 else (TEST_COLUMNS, start)
        if self.rank_limit < 1:
            raise ValueError(f"a width of {width} is too small for ({d_out}, {d_in}) in {passes} passes")
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._draws = (seed, "right", columns[0] + core, n), (seed, "left", columns[1] + core, m)
        # What multiplies the right side (c, n) and the left one (c, m), and the sums of it; one c of the two may be 0.
        # In rows: a processor is then faster at both products.
        self._factors = [_random_rows(*draw, self._like) for draw in self._draws]
        self._sums = [self._like.new_zeros(columns[0], m), self._like.new_zeros(columns[1], n)]
        self._core, self._test = self._like.new_zeros(core, core), self._like

    @property
    def bytes_held(self) -> int:
        """Bytes of what this sketch alone holds between calls, at most ``(d_out + d_in) * width`` numbers."""
        held = [*self._sums, self._core, self._test, *(self._factors if self._pass > 1 else [])]
        return sum(tensor.nbytes for tensor in held)

    @property
    def bytes_shared(self) -> int:
        """Bytes of the random matrices, once for all that share them; 0 after the first of several passes."""
        return sum(factor.nbytes for factor in self._factors) if self._pass == 1 else 0

    def tensors(self) -> list[Tensor]:
        """Return the sums of this pass, to be added up over processes in place before it ends.

        They have the same shapes in all. The basis that `advance` makes of them is the same on like hardware only.
        """
        return [tensor for tensor in (*self._sums, self._core) if tensor.numel()]

    @torch.no_grad()
    def add(self, x: Tensor, g: Tensor) -> None:
        """Add g'x to G.

        Args:
            x: (..., d_in), inputs of the layer, of any floating-point type.
            g: (..., d_out), gradients with respect to its outputs, for the same tokens.

        Raises:
            ValueError: where the shapes don't fit.
        """
        d_out, d_in = self.shape
        if x.shape[-1:] != (d_in,) or g.shape[-1:] != (d_out,) or x.shape[:-1] != g.shape[:-1]:
            raise ValueError(f"expected (..., {d_in}) and (..., {d_out}), got {tuple(x.shape)} and {tuple(g.shape)}")
        right, left = (tensor.reshape(-1, tensor.shape[-1]).to(self._like) for tensor in (x, g))
        right, left = (left, right) if self._flip else (right, left)
        with full_precision([self._like.device]):
            images = [factor @ side.mT for factor, side in zip(self._factors, (right, left), strict=True)]
            for sums, image, side in zip(self._sums, images, (left, right), strict=True):
                sums.addmm_(image[: len(sums)], side)
            of_right, of_left = (image[len(sums) :] for sums, image in zip(self._sums, images, strict=True))
            self._core.addmm_(of_left, of_right.mT)

    @torch.no_grad()
    def advance(self) -> None:
        """End a pass that isn't the last. For a moment, it takes a few copies of the pass's sums in float64.

        Raises:
            RuntimeError: in the last pass.
            ValueError: where the sums aren't finite.
        """
        if self._pass == self.passes:
            raise RuntimeError(f"pass {self._pass} is the last one")
        self._check_finite()
        summed = (self.passes - self._pass) % 2
        rows, d, other = self._sums[summed], self._sums[summed].shape[1], self._sums[1 - summed].shape[1]
        if self._pass == 1:
            # A copy, so that the sums of which it is a part can go.
            self._test = self._sums[0][-TEST_COLUMNS:].clone()
            rows = rows if summed else rows[:-TEST_COLUMNS]
        # Sorted by value: a wide start leaves only its leading part.
        basis = like(torch.linalg.svd(double(rows), full_matrices=False).Vh[: self.rank_limit], self._like).contiguous()
        # What was summed on the left (0) multiplies the left (1) now, and the other way round.
        self._factors[1 - summed], self._sums[1 - summed] = basis, self._like.new_zeros(len(basis), other)
        self._factors[summed], self._sums[summed] = self._like.new_empty(0, other), self._like.new_empty(0, d)
        self._pass += 1

    def scale(self, factor: float) -> None:
        """Multiply what `finish` takes for G by ``factor``; a ValueError where that isn't positive and finite."""
        if not 0 < factor < math.inf:
            raise ValueError(f"the factor must be positive and finite, got {factor}")
        self._scale *= factor

    @torch.no_grad()
    def finish(self, k: int) -> SketchedSVD:
        """Return the k leading triplets of G, without a change to the sketch.

        Raises:
            RuntimeError: before the last pass.
            ValueError: where ``k`` isn't from 1 to `rank_limit`, or the sums aren't finite.
        """
        if self._pass < self.passes:
            raise RuntimeError(f"pass {self._pass} of {self.passes} isn't the last one")
        if not 1 <= k <= self.rank_limit:
            raise ValueError(f"k must be from 1 to {self.rank_limit} for this sketch, got {k}")
        self._check_finite()
        found = self._from_one_pass() if self.passes == 1 else self._from_last_pass()
        residual, share, angles = 0.0, 0.0, (1.0, 1.0)
        if float(found.S[0]) > 0:
            residual = math.sqrt(float((found.left + found.right)[:k].sum())) / float(found.S[0])
            share = min(1.0, float(found.S[:k].square().sum()) / found.norm_squared)
            angles = found.angles(k, min(self.shape))
        U, V = found.U[:, :k], found.V[:, :k]
        U, V, angles = (V, U, angles[::-1]) if self._flip else (U, V, angles)
        sign = torch.where(U.gather(0, U.abs().argmax(dim=0, keepdim=True)) < 0, -1.0, 1.0).to(U)
        U, S, V = (each.float().contiguous() for each in (U * sign, found.S[:k] * self._scale, V * sign))
        return SketchedSVD(U, S, V, math.sqrt(found.norm_squared) * self._scale, residual, *angles, share)

    def _check_finite(self) -> None:
        if not all(tensor.isfinite().all() for tensor in self.tensors()):
            raise ValueError("the sum of the gradient isn't finite")

    def _from_last_pass(self) -> _Found:
        image, Q = double(self._sums[0]).mT, double(self._factors[0]).mT
        U, S, rotation = torch.linalg.svd(image, full_matrices=False)
        V = Q @ rotation.mT
        phi = double(_random_rows(*self._draws[0], self._like)[-TEST_COLUMNS:]).mT
        # A Q is exact, so A V = U S, and only A'U - V S = (A - A V V')'U is to be estimated.
        missed = double(self._test).mT - (U * S) @ (V.mT @ phi)
        right = (U.mT @ missed).square().mean(dim=1)
        norm_squared = float(S.square().sum() + missed.square().sum() / TEST_COLUMNS)
        return _Found(U, S, V, torch.zeros_like(right), right, norm_squared)

    def _from_one_pass(self) -> _Found:
        rank, end = self.rank_limit, len(self._sums[0])
        (Y, test_left), (Z, test_right) = ((double(s[:rank]).mT, double(s[rank:]).mT) for s in self._sums)
        omega, psi = (double(factor).mT for factor in self._factors)
        Q, P = torch.linalg.qr(Y).Q, torch.linalg.qr(Z).Q
        # A is about Q X P', and the core psi'A omega about (psi'Q) X (P'omega).
        X = torch.linalg.lstsq(psi[:, end:].mT @ Q, double(self._core)).solution
        X = torch.linalg.lstsq(omega[:, end:].mT @ P, X.mT).solution.mT
        left, S, right = torch.linalg.svd(X)
        U, V = Q @ left, P @ right.mT
        phi, chi = omega[:, rank:end], psi[:, rank:end]
        of_V, of_U = V.mT @ phi, U.mT @ chi
        # Exchanging what U S V' contributes to the tests for its exact value is unbiased, and varies less. Chance can
        # make the result negative, but not what it was before.
        tests = test_left.square().sum() + test_right.square().sum()
        own = (S[:, None] * of_V).square().sum() + (S[:, None] * of_U).square().sum()
        norm_squared = float(S.square().sum() + (tests - own) / TEST_COLUMNS)
        left = (V.mT @ test_right - S[:, None] * of_U).square().mean(dim=1)
        right = (U.mT @ test_left - S[:, None] * of_V).square().mean(dim=1)
        return _Found(U, S, V, left, right, norm_squared if norm_squared > 0 else float(tests) / TEST_COLUMNS)


class _Found(NamedTuple):
    """All triplets of A, squares of ``||A v - s u||`` (left) and ``||A'u - s v||`` (right), and ``||A||_F^2``."""

    U: Tensor
    S: Tensor
    V: Tensor
    left: Tensor
    right: Tensor
    norm_squared: float

    def angles(self, k: int, full: int) -> tuple[float, float]:
        """Return the sines for the k leading left and right vectors, see `SketchedSVD`; ``full`` is min(m, n)."""
        S, next_squared = self.S[:k], self.S.new_zeros(())
        if k < len(self.S):
            # ||A'u||^2, which is closer to the value that the triplet stands for than s^2 is.
            next_squared = self.S[k] ** 2 + torch.maximum(self.left[k], self.right[k])
        elif k < full:
            next_squared = (self.norm_squared - S.square().sum()).clamp_min(0)
        gap = S.square() - next_squared
        if float(gap[-1]) <= 0:
            return 1.0, 1.0
        # With U2, V2 for A's vectors after the k-th: s |U2'u| <= s2 |V2'v| + ||A v - s u||, and the same mirrored.
        s2, left, right = next_squared.sqrt(), self.left[:k].sqrt(), self.right[:k].sqrt()
        of_left, of_right = (((S * a + s2 * b) / gap).norm() for a, b in ((left, right), (right, left)))
        return min(1.0, float(of_left)), min(1.0, float(of_right))


def _one_pass_layout(m: int, n: int, width: int) -> tuple[int, int]:
    """Return columns of both sketches and of the core that fit into the memory along with the test columns."""
    for rank in range(min(width - TEST_COLUMNS // 2, m, n), 0, -1):
        core = min(math.isqrt((width - TEST_COLUMNS // 2 - rank) * (m + n)), _CORE_MOST * rank)
        if core >= _CORE_LEAST * rank:
            return rank, core
    return 0, 0


# Held as long as a sketch holds them. A race for one of them costs a second draw of the same numbers, no more.
_shared: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()


def _random_rows(seed: int, place: str, rows: int, d: int, like: Tensor) -> Tensor:
    """Return (rows, d) standard normal values, given by the arguments alone, in one tensor for all callers."""
    key = (seed, place, rows, d, like.device, like.dtype)
    drawn = _shared.get(key)
    if drawn is None:
        # A digest, because neighbouring seeds and places would otherwise give related streams.
        digest = int.from_bytes(hashlib.blake2b(repr(key[:4]).encode(), digest_size=7).digest(), "big")
        drawn = _shared[key] = torch.randn(
            rows, d, generator=torch.Generator("cpu").manual_seed(digest), dtype=torch.float32, device="cpu"
        ).to(like)
    return drawn
