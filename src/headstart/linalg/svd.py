"""The k largest or smallest singular triplets of a matrix, with the error that they carry.

The largest come from a randomised block Krylov space of W'W (Musco and Musco, "Randomized Block Krylov
Methods for Stronger and Faster Approximate Singular Value Decomposition", NeurIPS 2015), reorthogonalised and
grown until every wanted triplet's residual is small. Eigenvectors of the dense W'W answer for small matrices and for
the smallest triplets, as long as their residual is small as well. What neither can settle goes to a dense decomposition
of W in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.linalg.norms import squared_norm
from headstart.linalg.precision import double, one_thread_each, solving_device

Which = Literal["largest", "smallest"]

TOLERANCE = 1e-5
MAX_ITERATIONS = 64

# Blocks are multiples of this: a block at least as wide as k can't miss a copy of a k-fold singular value, and
# wider ones need a larger space for the same accuracy.
_BLOCK = 8
# Weights of language models need 8 to 28 blocks at rank 8; on a side shorter than this many of them, the dense
# decomposition is as fast.
_DENSE_BLOCKS = 32
_FIRST_CHECK = 12
# How small one direction of a new block may be, relative to the others, before its rounding errors matter.
_LITTLE = 1e-2


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
    if not 2.0**-20 < largest_entry < 2.0**20:
        # By a power of two, so that squares neither overflow nor vanish and no entry is rounded.
        scale = 2.0 ** math.frexp(largest_entry)[1]
        matrix = matrix.double() / scale
    # No singular value is above sqrt(d_out * d_in) times the largest entry.
    bound = largest_entry / scale * math.sqrt(matrix.numel())
    zero = max(torch.finfo(torch.float64).eps * max(matrix.shape) * bound, sys.float_info.min)
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.mT if wide else matrix
    iterations, exact, triplets = 0, False, None
    for work, right, steps in _candidates(tall, k, which, 0.9 * tol, max_iterations, seed):
        iterations, exact = iterations + steps, steps == 0
        triplets = None if right is None else _rayleigh_ritz(work, right, zero)
        if triplets is not None and triplets.residual <= tol:
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
    so that its triplets are the same bit for bit whatever comes with it and however many threads there are.

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

    if any(matrix.device.type != "cpu" for matrix in matrices):
        return [decompose(matrix) for matrix in matrices]
    return one_thread_each(decompose, matrices)


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
    residual: float


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
    block = _BLOCK * math.ceil(k / _BLOCK)
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    if which == "largest":
        dtypes = tuple(dict.fromkeys((tall.dtype, torch.float64)))
        if max_iterations > 0 and small_side >= _DENSE_BLOCKS * block:
            for dtype in dtypes:
                work = tall.to(dtype)
                yield work, *_krylov(work, k, block, tol, max_iterations, seed)
            dtypes = dtypes[-1:]
        elif small_side < _DENSE_BLOCKS // 2 * block:
            # So large a share reaches far down the spectrum, where the rounding of a Gram matrix in float32 hides it.
            dtypes = dtypes[-1:]
    for dtype in dtypes:
        work = tall.to(dtype)
        # In ascending order of the eigenvalues.
        vectors = torch.linalg.eigh(work.mT @ work).eigenvectors
        yield work, (vectors[:, -k:] if which == "largest" else vectors[:, :k]).mT, 0


def _krylov(tall: Tensor, k: int, block: int, tol: float, max_iterations: int, seed: int) -> tuple[Tensor | None, int]:
    """Return the k leading right vectors as rows (k, n), None where ``tol`` wasn't reached, and the steps."""
    n = tall.shape[1]
    # Beyond three quarters of the space the dense decomposition costs no more.
    most = min(max_iterations, 3 * n // 4 // block)
    # Vectors are rows: on a processor, a thin block times a matrix is then up to five times as fast.
    rows = torch.empty(most * block, n, dtype=tall.dtype, device=tall.device)
    # Symmetric; only its lower half is filled and read.
    projected = torch.zeros(most * block, most * block, dtype=tall.dtype, device=tall.device)
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(n, block, generator=generator, dtype=torch.float64, device="cpu")
    new = torch.linalg.qr(start.to(tall)).Q.mT
    due, last = min(_FIRST_CHECK, most), (0, 0.0)
    for step in range(1, most + 1):
        low, high = (step - 1) * block, step * block
        rows[low:high] = new
        basis = rows[:high]
        image = (new @ tall.mT) @ tall
        # Exactly, an image has parts along the last two blocks alone.
        near = max(0, low - block)
        coefficients = image @ rows[near:high].mT
        projected[low:high, near:high] = coefficients
        fresh = image - coefficients @ rows[near:high]
        # Of the others, rounding leaves parts that grow as the wanted vectors converge.
        fresh = fresh - (fresh @ basis.mT) @ basis
        Q, triangle = torch.linalg.qr(fresh.mT)
        if float(triangle.diagonal().abs().min()) < _LITTLE * float(triangle.abs().max()):
            # A direction of which almost nothing was left: normalised, its rounding errors are large.
            Q, again = torch.linalg.qr(Q - basis.mT @ (basis @ Q))
            triangle = again @ triangle
        new = Q.mT
        if step < due:
            continue
        values, vectors = torch.linalg.eigh(projected[:high, :high])
        values, vectors = values[-k:], vectors[:, -k:]
        if float(values[0]) * tol < float(values[-1]) * torch.finfo(tall.dtype).eps:
            return None, step  # the rounding of W'W alone hides the smallest wanted value
        # W'W y - theta y = new R (last block of y), and W'u - s v is that over s: relative to s, over theta.
        residual = float(((triangle @ vectors[-block:]).norm(dim=0) / values).max())
        if residual <= tol:
            return vectors.mT @ basis, step
        logarithm = math.log(residual)
        rate = (last[1] - logarithm) / (step - last[0]) if last[0] else 0.0
        ahead = math.ceil((logarithm - math.log(tol)) / rate) if rate > 0 else _FIRST_CHECK // 3
        # A guess from a plateau overshoots, so it never looks further than a third of the way come.
        due, last = min(most, step + max(1, min(ahead, step // 3))), (step, logarithm)
    return None, most


def _rayleigh_ritz(work: Tensor, right: Tensor, zero: float) -> _Triplets:
    """Return the best triplets with right vectors in the span of the rows of ``right`` (k, n), in float64."""
    V = torch.linalg.qr(right.double().mT).Q
    image = (V.mT.to(work) @ work.mT).double().mT
    U, S, rotation = torch.linalg.svd(image, full_matrices=False)
    return _measured(work, U, S, V @ rotation.mT, image @ rotation.mT, zero)


def _measured(work: Tensor, U: Tensor, S: Tensor, V: Tensor, image: Tensor, zero: float) -> _Triplets:
    """Return the triplets with their residual; ``image`` is W V."""
    right = (image - U * S).norm(dim=0)
    left = ((U.mT.to(work) @ work).double() - S[:, None] * V.mT).norm(dim=1)
    relative_to = torch.where(zero < S, S, S[0].clamp_min(zero))
    return _Triplets(U, S, V, float((torch.maximum(right, left) / relative_to).max()))


def _dense(work: Tensor, k: int, which: Which, zero: float) -> _Triplets:
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
        residual=triplets.residual,
        iterations=iterations,
        exact=exact,
    )
