"""Of one step of a low-rank layer, what "Beyond Zero Initialization" (equation 2, definitions 3 and 4) speaks of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.linalg.product import product_norm, product_svd

# Singular values below this share of the largest one span no direction of their own in float32.
_NOTHING = 1e-6

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Quantities:
    """Of one layer at one step t. Sizes are root mean squares over entries and tokens; the factor s is in all but z_a.

    Attributes:
        z_a: of Z_A = A z before the step.
        z_b: of Z_B = s B A z before the step.
        delta1: of s B dZ_A: what training A alone adds to the output.
        delta2: of s dB Z_A: what training B alone adds.
        delta3: of s dB dZ_A; the change of Z_B is the sum of the three.
        norm_a, norm_b: Frobenius norms of A and B after the step.
        update: Frobenius norm of s (B A - B0 A0).
        effective_rank: of B A - B0 A0: the exponential of the entropy of its singular values (Roy and Vetterli, 2007);
            0 where nothing has moved.
        start_overlap: of A's row space with that of A0, the mean squared cosine of their principal angles: 1 where they
            are one, about r / d_in by chance; None where one of them is zero.
        start_angle: the largest of these angles, in degrees.
        gradient_overlap, gradient_angle: the same with the r leading right singular vectors of the gradient for the
            layer's weight, from the step's tokens; None where there is none.
    """

    z_a: float
    z_b: float
    delta1: float
    delta2: float
    delta3: float
    norm_a: float
    norm_b: float
    update: float
    effective_rank: float
    start_overlap: float | None = None
    start_angle: float | None = None
    gradient_overlap: float | None = None
    gradient_angle: float | None = None


def quantities(
    inputs: Tensor,
    start: Pair,
    before: Pair,
    after: Pair,
    scaling: float,
    output_gradients: Tensor | None = None,
) -> Quantities:
    """Return the quantities of a step.

    Args:
        inputs: z (tokens, d_in).
        start: (A0, B0), of shapes (r, d_in) and (d_out, r).
        before, after: (A, B) before and after the step.
        scaling: s.
        output_gradients: (tokens, d_out) of the loss for the layer's output, by which, with the inputs, the gradient
            for its weight is the sum over tokens; None leaves the gradient's space out.
    """
    (A0, B0), (A, B), (new_A, new_B) = ((part.float() for part in pair) for pair in (start, before, after))
    z = inputs.float()
    step_A, step_B = new_A - A, new_B - B
    low, low_step = z @ A.mT, z @ step_A.mT
    both = torch.cat([new_B, -B0], dim=1), torch.cat([new_A, A0])
    moved = product_svd(*both)[1]
    start_overlap, start_angle = _between(_row_space(new_A), _row_space(A0))
    gradient_overlap, gradient_angle = None, None
    if output_gradients is not None:
        leading = _leading_space(output_gradients.float(), z, len(A))
        gradient_overlap, gradient_angle = _between(_row_space(new_A), leading)
    return Quantities(
        z_a=_size(low),
        z_b=scaling * _size(low @ B.mT),
        delta1=scaling * _size(low_step @ B.mT),
        delta2=scaling * _size(low @ step_B.mT),
        delta3=scaling * _size(low_step @ step_B.mT),
        norm_a=float(new_A.norm()),
        norm_b=float(new_B.norm()),
        update=scaling * product_norm(*both),
        effective_rank=_effective_rank(moved),
        start_overlap=start_overlap,
        start_angle=start_angle,
        gradient_overlap=gradient_overlap,
        gradient_angle=gradient_angle,
    )


def _size(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _effective_rank(values: Tensor) -> float:
    total = float(values.sum())
    if not total > 0:
        return 0.0
    shares = values / total
    return math.exp(float(torch.special.entr(shares).sum()))


def _row_space(A: Tensor) -> Tensor | None:
    """Return orthonormal rows that span the rows of A; None where they are zero."""
    _, values, vectors = torch.linalg.svd(A.double(), full_matrices=False)
    kept = values > _NOTHING * values[0]
    return vectors[kept] if bool(kept.any()) else None


def _leading_space(output_gradients: Tensor, z: Tensor, rank: int) -> Tensor | None:
    """Return the leading right singular vectors, as rows, of the sum over tokens of (output gradient) (input)'."""
    _, values, vectors = product_svd(output_gradients.mT, z)
    kept = values[:rank] > _NOTHING * values[0]
    return vectors[:, :rank][:, kept].mT.double() if bool(kept.any()) else None


def _between(space: Tensor | None, other: Tensor | None) -> tuple[float | None, float | None]:
    """Return the mean squared cosine, and the largest principal angle in degrees, between two spaces."""
    if space is None or other is None:
        return None, None
    cosines = torch.linalg.svdvals(space @ other.mT).clamp(max=1.0)
    return float(cosines.square().mean()), math.degrees(math.acos(float(cosines[-1])))
