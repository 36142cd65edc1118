"""The k largest or smallest singular triplets of a matrix, with the error that they carry.

The largest come from a randomised block Krylov space of W'W (:mod:`headstart.linalg.krylov`). Eigenvectors of the
dense W'W answer for small matrices and for the smallest triplets, as long as their residual is small as well. What
neither can settle goes to a dense decomposition of W in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.linalg.krylov import block_for, leading_right_vectors
from headstart.linalg.norms import squared_norm
from headstart.linalg.precision import double, one_thread_each, solving_device

Which = Literal["largest", "smallest"]

TOLERANCE = 1e-5
MAX_ITERATIONS = 64

# Weights of language models need 8 to 28 blocks at rank 8; on a side shorter than this many of them, the dense
# decomposition is as fast.
_DENSE_BLOCKS = 32
# Largest entries for which squares neither overflow nor vanish.
_ORDINARY = (2.0**-20, 2.0**20)


@dataclass(frozen=True)
class TruncatedSVD:
    """k singular triplets of a (d_out, d_in) matrix W, in descending order of value, in float32.

    Attributes:
        U: (d_out, k) orthonormal left vectors.
        S: (k,) singular values.
        V: (d_in, k) orthonormal right vectors, so that W is approximated by ``U @ diag(S) @ V.T``; in each, the entry
            of largest magnitude is positive (:func:`right_signs`), so that starts which pair vectors of different
            triplets are the same everywhere.
        residual: the largest, over the triplets, of ``||W v - s u||`` and ``||W' u - s v||``, each relative to
            its own s: W has a singular value within this relative distance of s. Measured before the rounding
            to float32. For an s that is zero to working precision, below ``eps * max(d_out, d_in) *
            sqrt(d_out * d_in) * max|W|`` with the eps of float64, relative to the largest s.
        iterations: block Krylov steps taken; zero where the matrix went to a dense decomposition at once.
        exact: whether the triplets come from a dense decomposition.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: float
    iterations: int
    exact: bool


def truncated_svd(
    matrix: Tensor,
    k: int,
    *,
    which: Which = "largest",
    tol: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    seed: int = 0,
) -> TruncatedSVD:
    """Return k singular triplets of ``matrix``.

    The largest are found in float32, then in float64 where float32 can't reach ``tol`` (a wide spectrum), then
    by a dense decomposition (a small matrix, a large share of the spectrum, or no convergence). The smallest take a
    dense decomposition in float64 at once. A dense decomposition is W'W's where that reaches ``tol``, which takes less
    than half the time, else W's own. Matrices in float64 skip float32.

    Args:
        matrix: (d_out, d_in), any floating-point type, on any device; the triplets come back on its solving device.
        k: how many triplets, from 1 to min(d_out, d_in).
        which: "largest" or "smallest"; both are returned in descending order.
        tol: the largest residual to accept, relative to the singular value (see `TruncatedSVD`).
        max_iterations: the most block steps before the dense decomposition takes over.
        seed: of the random first block; the same seed gives the same triplets.

    Raises:
        ValueError: where ``matrix`` isn't a finite floating-point matrix or an argument is out of its range.
    """
    _check(matrix, k, which, tol, max_iterations)
    matrix = matrix.detach().to(solving_device(matrix.device))
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    # NaN where there is one. An infinity norm says the same, but many times slower on a processor.
    largest_entry = max(abs(float(extreme)) for extreme in torch.aminmax(matrix))
    if not math.isfinite(largest_entry):
        raise ValueError("the matrix holds a value that isn't finite")
    scale = 1.0
    if not _ORDINARY[0] < largest_entry < _ORDINARY[1]:
        # By a power of two, so that squares neither overflow nor vanish and no entry is rounded.
        scale = 2.0 ** math.frexp(largest_entry)[1]
        matrix = matrix.double() / scale
    zero = _zero(torch.tensor(largest_entry / scale, dtype=torch.float64, device=matrix.device), matrix)
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.mT if wide else matrix
    iterations, exact, triplets = 0, False, None
    for work, right, steps in _candidates(tall, k, which, 0.9 * tol, max_iterations, seed):
        iterations, exact = iterations + steps, steps == 0
        triplets = None if right is None else _rayleigh_ritz(work, right, zero)
        if triplets is not None and float(triplets.residual) <= tol:
            break
        triplets = None
    if triplets is None:
        exact, triplets = True, _dense(tall.double(), k, which, zero)
    if wide:
        triplets = _Triplets(triplets.V, triplets.S, triplets.U, triplets.residual)
    return _result(triplets, scale, iterations, exact)


def truncated_svd_batch(
    matrices: Tensor | Sequence[Tensor],
    k: int,
    *,
    which: Which = "largest",
    tol: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    seed: int = 0,
) -> list[TruncatedSVD]:
    """Return `truncated_svd` of each of ``matrices``, the same up to rounding.

    On a processor, as many matrices run at once as torch has threads, each on one thread: products with thin
    blocks and decompositions of small matrices gain little from several. A single matrix takes one thread too,
    so that its triplets are the same bit for bit whatever comes with it and however many threads there are. On an
    accelerator matrices of one shape take their steps together (:func:`in_step`).

    Args:
        matrices: (n, d_out, d_in), or a sequence of matrices, which need no copy then.
        k: as in `truncated_svd`, like all that follow.
        which: "largest" or "smallest".
        tol: the largest residual to accept.
        max_iterations: the most block steps.
        seed: of the first block, the same for every matrix.

    Raises:
        ValueError: where ``matrices`` isn't a stack of matrices, and as `truncated_svd` does.
    """
    if isinstance(matrices, Tensor) and matrices.ndim != 3:
        raise ValueError(f"expected a stack of matrices (n, d_out, d_in), got shape {tuple(matrices.shape)}")
    matrices = list(matrices)

    def decompose(matrix: Tensor) -> TruncatedSVD:
        return truncated_svd(matrix, k, which=which, tol=tol, max_iterations=max_iterations, seed=seed)

    if all(matrix.device.type == "cpu" for matrix in matrices):
        return one_thread_each(decompose, matrices)
    settled = {}
    if which == "largest" and all(solving_device(matrix.device).type != "cpu" for matrix in matrices):
        settled = in_step(matrices, k, tol=tol, max_iterations=max_iterations, seed=seed)
    return [settled[place] if place in settled else decompose(matrix) for place, matrix in enumerate(matrices)]


def in_step(
    matrices: Sequence[Tensor], k: int, *, tol: float, max_iterations: int, seed: int
) -> dict[int, TruncatedSVD]:
    """Return the largest triplets of those matrices that one Krylov space each, grown in step in float32, settles.

    An accelerator is as fast with many small products at once as with one. What is left out, such as a matrix of
    another shape than the first, with a very wide spectrum, or in float64, is for `truncated_svd`.

    Args:
        matrices: each (d_out, d_in), on one device.
        k, tol, max_iterations, seed: as in `truncated_svd`.

    Returns:
        The triplets by place.
    """
    alike = [
        place
        for place, matrix in enumerate(matrices)
        if matrix.shape == matrices[0].shape and matrix.device == matrices[0].device and matrix.dtype != torch.float64
    ]
    if len(alike) < 2 or max_iterations < 1 or min(matrices[0].shape) < _DENSE_BLOCKS * block_for(k):
        return {}
    stack = torch.stack([matrices[place].detach().float() for place in alike])
    largest = stack.abs().amax((1, 2))
    ordinary = (largest > _ORDINARY[0]) & (largest < _ORDINARY[1])
    if not bool(ordinary.all()):
        alike = [place for place, kept in zip(alike, ordinary.tolist(), strict=True) if kept]
        stack, largest = stack[ordinary], largest[ordinary]
        if not alike:
            return {}
    zero = _zero(largest.double(), matrices[0])
    wide = stack.shape[1] < stack.shape[2]
    tall = stack.mT if wide else stack
    right, reached, steps = leading_right_vectors(tall, k, tol=0.9 * tol, max_iterations=max_iterations, seed=seed)
    triplets = _rayleigh_ritz(tall, right, zero)
    reached &= triplets.residual <= tol
    U, V = (triplets.V, triplets.U) if wide else (triplets.U, triplets.V)
    return {
        place: _result(_Triplets(U[i], triplets.S[i], V[i], triplets.residual[i]), 1.0, steps, False)
        for i, (place, good) in enumerate(zip(alike, reached.tolist(), strict=True))
        if good
    }


def eckart_young_tail(matrix: Tensor, svd: TruncatedSVD) -> float:
    """Return the smallest squared Frobenius error of an approximation of W by a matrix of rank k.

    That is ``||W||_F^2 - sum(S^2)`` (Eckart and Young, 1936), summed in float64 and never below zero. The
    singular values are float32, so it is good to about 1e-7 times ``||W||_F^2``, no better.

    Args:
        matrix: W (d_out, d_in).
        svd: its k largest triplets.
    """
    return max(0.0, squared_norm(matrix) - float(double(svd.S).square().sum()))


def right_signs(V: Tensor) -> Tensor:
    """Return the signs (1, k) with which the entry of largest magnitude in each column of V (n, k) is positive."""
    largest = V.gather(0, V.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(V)


@dataclass(frozen=True)
class _Triplets:
    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor


def _zero(largest_entry: Tensor, matrix: Tensor) -> Tensor:
    """Return what counts as a singular value of zero, for matrices of one shape by their largest entries."""
    # No singular value is above sqrt(d_out * d_in) times the largest entry.
    bound = largest_entry * math.sqrt(matrix.numel())
    return (torch.finfo(torch.float64).eps * max(matrix.shape) * bound).clamp_min(sys.float_info.min)


def _check(matrix: Tensor, k: int, which: str, tol: float, max_iterations: int) -> None:
    if matrix.ndim != 2 or matrix.numel() == 0 or not matrix.is_floating_point():
        raise ValueError(f"expected a floating-point matrix with entries, got {tuple(matrix.shape)} of {matrix.dtype}")
    if not 1 <= k <= min(matrix.shape):
        raise ValueError(f"k must be from 1 to {min(matrix.shape)} for shape {tuple(matrix.shape)}, got {k}")
    if which not in ("largest", "smallest"):
        raise ValueError(f'which must be "largest" or "smallest", got {which!r}')
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if max_iterations < 0:
        raise ValueError(f"max_iterations can't be negative, got {max_iterations}")


def _candidates(
    tall: Tensor, k: int, which: Which, tol: float, max_iterations: int, seed: int
) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Yield tries, the cheapest first: the matrix in working precision, right vectors as rows (k, n), steps.

    Steps are zero for the eigenvectors of the dense Gram matrix. The vectors are None where a try was given up.
    """
    small_side = tall.shape[1]
    block = block_for(k)
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    if which == "largest":
        dtypes = tuple(dict.fromkeys((tall.dtype, torch.float64)))
        if max_iterations > 0 and small_side >= _DENSE_BLOCKS * block:
            for dtype in dtypes:
                work = tall.to(dtype)
                right, reached, steps = leading_right_vectors(
                    work, k, tol=tol, max_iterations=max_iterations, seed=seed
                )
                yield work, right if bool(reached) else None, steps
            dtypes = dtypes[-1:]
        elif small_side < _DENSE_BLOCKS // 2 * block:
            # So large a share reaches far down the spectrum, where the rounding of a Gram matrix in float32 hides it.
            dtypes = dtypes[-1:]
    for dtype in dtypes:
        work = tall.to(dtype)
        # In ascending order of the eigenvalues.
        vectors = torch.linalg.eigh(work.mT @ work).eigenvectors
        yield work, (vectors[:, -k:] if which == "largest" else vectors[:, :k]).mT, 0


def _rayleigh_ritz(work: Tensor, right: Tensor, zero: Tensor) -> _Triplets:
    """Return the best triplets with right vectors in the span of the rows of ``right`` (..., k, n), in float64."""
    V = torch.linalg.qr(right.double().mT).Q
    image = (V.mT.to(work) @ work.mT).double().mT
    U, S, rotation = torch.linalg.svd(image, full_matrices=False)
    return _measured(work, U, S, V @ rotation.mT, image @ rotation.mT, zero)


def _measured(work: Tensor, U: Tensor, S: Tensor, V: Tensor, image: Tensor, zero: Tensor) -> _Triplets:
    """Return the triplets with their residual; ``image`` is W V."""
    right = (image - U * S[..., None, :]).norm(dim=-2)
    left = ((U.mT.to(work) @ work).double() - S[..., :, None] * V.mT).norm(dim=-1)
    zero = zero[..., None]
    relative_to = torch.where(zero < S, S, torch.maximum(S[..., :1], zero))
    return _Triplets(U, S, V, (torch.maximum(right, left) / relative_to).amax(-1))


def _dense(work: Tensor, k: int, which: Which, zero: Tensor) -> _Triplets:
    U, S, Vh = torch.linalg.svd(work, full_matrices=False)
    kept = slice(0, k) if which == "largest" else slice(len(S) - k, None)
    U, S, V = U[:, kept], S[kept], Vh[kept].mT
    return _measured(work, U, S, V, work @ V, zero)


def _result(triplets: _Triplets, scale: float, iterations: int, exact: bool) -> TruncatedSVD:
    sign = right_signs(triplets.V)
    return TruncatedSVD(
        U=(triplets.U * sign).float().contiguous(),
        S=(triplets.S * scale).float().contiguous(),
        V=(triplets.V * sign).float().contiguous(),
        residual=float(triplets.residual),
        iterations=iterations,
        exact=exact,
    )
