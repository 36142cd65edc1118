"""How much of a measured mean is noise: what two halves of its samples agree on."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from headstart.linalg.precision import double


class Agreement(NamedTuple):
    """Of two halves of what a matrix is a mean over.

    Attributes:
        cosine: between the two halves' means; 0 where one of them is zero.
        noise: the share of the matrix's squared norm that is noise, within 0 and 1: one less the halves' inner product
            over that squared norm. As their noise is independent, the inner product is in the mean the squared norm of
            what both are measurements of.
    """

    cosine: float
    noise: float


def agreement(whole: Tensor, first: Tensor, share: float) -> Agreement:
    """Compare two halves of a mean.

    Args:
        whole: the mean of all samples, of any shape; not zero.
        first: that of the first half, of the same shape.
        share: how many of all samples the first half has, above 0 and below 1.
    """
    # Squares have to stay in the range of numbers.
    size = float(whole.abs().max())
    whole, first = double(whole) / size, double(first) / size
    second = (whole - share * first) / (1 - share)
    inner = float((first * second).sum())
    norms = math.sqrt(float(first.square().sum()) * float(second.square().sum()))
    noise = 1 - inner / float(whole.square().sum())
    return Agreement(inner / norms if norms else 0.0, min(max(noise, 0.0), 1.0))
