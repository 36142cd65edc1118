"""Block Krylov spaces of W'W, of one matrix or of many in step.

Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition",
NeurIPS 2015; reorthogonalised, and grown until every wanted triplet's residual is small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Blocks are multiples of this: a block at least as wide as k can't miss a copy of a k-fold singular value, and
# wider ones need a larger space for the same accuracy.
_BLOCK = 8
_FIRST_CHECK = 12
# How small one direction of a new block may be, relative to the others, before its rounding errors matter.
_LITTLE = 1e-2


def block_for(k: int) -> int:
    """Return how many vectors a block has in which k triplets are looked for."""
    return _BLOCK * math.ceil(k / _BLOCK)


def leading_right_vectors(
    tall: Tensor, k: int, *, tol: float, max_iterations: int, seed: int
) -> tuple[Tensor, Tensor, int]:
    """Return each matrix's k leading right vectors as rows (..., k, n), which of them reached ``tol``, and the steps.

    Many matrices take their steps together, as long as the slowest of them needs; one that can't be settled in this
    precision keeps the others from nothing.

    Args:
        tall: (..., m, n), in float32 or float64.
        k: how many vectors.
        tol: the largest residual of W'W to accept, relative to the singular value.
        max_iterations: the most steps.
        seed: of the first block, the same for every matrix.
    """
    *batch, _, n = tall.shape
    block = block_for(k)
    # Beyond three quarters of the space the dense decomposition costs no more.
    most = min(max_iterations, 3 * n // 4 // block)
    # Vectors are rows: on a processor, a thin block times a matrix is then up to five times as fast.
    rows = torch.empty(*batch, most * block, n, dtype=tall.dtype, device=tall.device)
    # Symmetric; only its lower half is filled and read.
    projected = torch.zeros(*batch, most * block, most * block, dtype=tall.dtype, device=tall.device)
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(n, block, generator=generator, dtype=torch.float64, device="cpu")
    new = torch.linalg.qr(start.to(tall)).Q.mT.expand(*batch, block, n)
    due, last = min(_FIRST_CHECK, most), (0, 0.0)
    for step in range(1, most + 1):
        low, high = (step - 1) * block, step * block
        rows[..., low:high, :] = new
        basis = rows[..., :high, :]
        image = (new @ tall.mT) @ tall
        # Exactly, an image has parts along the last two blocks alone.
        near = max(0, low - block)
        coefficients = image @ rows[..., near:high, :].mT
        projected[..., low:high, near:high] = coefficients
        fresh = image - coefficients @ rows[..., near:high, :]
        # Of the others, rounding leaves parts that grow as the wanted vectors converge.
        fresh = fresh - (fresh @ basis.mT) @ basis
        Q, triangle = torch.linalg.qr(fresh.mT)
        smallest = triangle.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
        if bool((smallest < _LITTLE * triangle.abs().amax((-2, -1))).any()):
            # A direction of which almost nothing was left: normalised, its rounding errors are large.
            Q, again = torch.linalg.qr(Q - basis.mT @ (basis @ Q))
            triangle = again @ triangle
        new = Q.mT
        if step < due:
            continue
        values, vectors = torch.linalg.eigh(projected[..., :high, :high])
        values, vectors = values[..., -k:], vectors[..., -k:]
        # W'W y - theta y = new R (last block of y), and W'u - s v is that over s: relative to s, over theta.
        residuals = ((triangle @ vectors[..., -block:, :]).norm(dim=-2) / values).amax(-1)
        # The rounding of W'W alone hides the smallest wanted value of these.
        hidden = values[..., 0] * tol < values[..., -1] * torch.finfo(tall.dtype).eps
        reached = ~hidden & (residuals <= tol)
        pending = ~hidden & ~reached
        if step == most or not bool(pending.any()):
            return vectors.mT @ basis, reached, step
        logarithm = math.log(float(residuals[pending].max()))
        rate = (last[1] - logarithm) / (step - last[0]) if last[0] else 0.0
        ahead = math.ceil((logarithm - math.log(tol)) / rate) if rate > 0 else _FIRST_CHECK // 3
        # A guess from a plateau overshoots, so it never looks further than a third of the way come.
        due, last = min(most, step + max(1, min(ahead, step // 3))), (step, logarithm)
    raise AssertionError("max_iterations and n leave no step")
