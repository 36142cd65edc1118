"""Squared Frobenius norms in float64, a few rows at a time: a large matrix is never held in float64 whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headstart.linalg.precision import double

_ENTRIES = 2**20


def in_double(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a matrix (d_out, d_in) in float64, with their places; copies, so that each is aligned alike."""
    step = max(1, _ENTRIES // max(1, matrix.shape[-1]))
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        part = double(matrix[rows])
        yield rows, part.clone() if part.dtype == matrix.dtype else part


def squared_norm(matrix: Tensor) -> float:
    """Return the sum of the squared entries of a matrix."""
    return float(sum(float(torch.dot(part.flatten(), part.flatten())) for _, part in in_double(matrix)))
