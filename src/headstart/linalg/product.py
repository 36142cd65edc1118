"""The spectrum, norm and best truncation of a product B A, without forming the d_out by d_in matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from headstart.linalg.precision import double, like


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of B A: ``(U, S, V)`` with ``B @ A = U @ diag(S) @ V.T``, S in descending order.

    With the thin QRs ``B = Q_B R_B`` and ``A' = Q_A R_A``, it is the SVD of the small ``R_B R_A'``, turned by Q_B
    and Q_A.

    Args:
        B: (d_out, r), any floating-point type; r may exceed d_out and d_in.
        A: (r, d_in), of the same type.

    Returns:
        U (d_out, k), S (k,), V (d_in, k) with k = min(d_out, r, d_in), computed in float64, in the type of B and on its
        device.

    Raises:
        ValueError: where B and A don't fit together.
    """
    U, S, V = _svd(B, A)
    return like(U, B), like(S, B), like(V, B)


def product_norm(B: Tensor, A: Tensor) -> float:
    """Return the Frobenius norm of B A, as ``sqrt(<B'B, A A'>)`` in float64.

    Where B and A nearly cancel, it is good to about 1e-8 times ``||B|| ||A||``, no better.

    Args:
        B: (d_out, r), any floating-point type.
        A: (r, d_in), of the same type.

    Raises:
        ValueError: where B and A don't fit together.
    """
    B, A = _double(B, A)
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0.0).sqrt())


def truncate_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return ``(B', A', relative_error)``: the best approximation of B A by factors of rank ``rank``.

    The factors are balanced: ``B' = U sqrt(S)``, ``A' = sqrt(S) V'``. The error is the Frobenius norm of what
    the truncation discards over that of B A, both from the singular values; zero where B A is zero. Rounding the
    factors to the input type comes on top of it.

    Args:
        B: (d_out, r), any floating-point type; r may exceed d_out and d_in.
        A: (r, d_in), of the same type.
        rank: at least 1. Above min(d_out, r, d_in), the factors are filled up with zeros.

    Returns:
        B' (d_out, rank) and A' (rank, d_in), computed in float64, in the type and on the device of B; and the error.

    Raises:
        ValueError: where B and A don't fit together, or ``rank`` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    U, S, V = _svd(B, A)
    root = S[:rank].sqrt()
    left = B.new_zeros(B.shape[0], rank)
    right = A.new_zeros(rank, A.shape[1])
    left[:, : len(root)] = like(U[:, :rank] * root, B)
    right[: len(root)] = like((V[:, :rank] * root).mT, A)
    whole = float(S.norm())
    return left, right, float(S[rank:].norm()) / whole if whole > 0 else 0.0


def _svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, A = _double(B, A)
    left, left_small = torch.linalg.qr(B)
    right, right_small = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(left_small @ right_small.mT, full_matrices=False)
    return left @ U, S, right @ Vh.mT


def _double(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or 0 in (*B.shape, *A.shape):
        raise ValueError(f"B {tuple(B.shape)} and A {tuple(A.shape)} don't make a product")
    if not B.is_floating_point() or not A.is_floating_point():
        raise ValueError(f"expected floating-point factors, got {B.dtype} and {A.dtype}")
    return double(B), double(A)
