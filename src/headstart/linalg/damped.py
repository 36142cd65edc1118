"""The inverse of a damped covariance, with a damping that is raised until the inverse means something.

The damping itself may be one that has no unit, divided between the two factors of a Kronecker product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.linalg.precision import double

# The sums that covariances come from are float32: what is smaller than their rounding, relative to the variances of
# the two entries, is noise, and its inverse would drown everything else.
_NOISE = torch.finfo(torch.float32).eps
_RAISE = 10.0
_POWER_STEPS = 8
_PROBES = 4


@dataclass(frozen=True)
class DampedInverse:
    """The inverse of M + damping I.

    Attributes:
        matrix: (n, n), M + damping I in float64.
        inverse: (n, n), its inverse, symmetric, in float64.
        damping: what was added in the end.
        raised: whether that is more than was asked for.
        condition: estimate, from below, of the condition number of the damped matrix.
        scaled_condition: the same after scaling its diagonal to ones, which is what rounding in M sees.
    """

    matrix: Tensor
    inverse: Tensor
    damping: float
    raised: bool
    condition: float
    scaled_condition: float

    def spread(self) -> Tensor:
        """Return (M + damping I)^-1 M (M + damping I)^-1 (n, n): the covariance that noise of covariance M has left.

        That is the inverse where nothing was added, and vanishes where damping rules.
        """
        return torch.addmm(self.inverse, self.inverse, self.inverse, alpha=-self.damping)

    def spread_trace(self) -> float:
        """Return the trace of :meth:`spread`, without forming it."""
        trace = float(self.inverse.diagonal().sum()) - self.damping * float(self.inverse.square().sum())
        return max(0.0, trace)

    def spread_norm(self) -> float:
        """Estimate the norm of :meth:`spread`, from below, without forming it."""

        def apply(rows: Tensor) -> Tensor:
            image = rows @ self.inverse
            return image - self.damping * (image @ self.inverse)

        return _norm(apply, self.inverse)


@torch.no_grad()
def factored_damping(input_moment: Tensor, output_moment: Tensor, damping: float) -> tuple[float, float]:
    """Return what to add to the diagonals of Z and Y so that Y (x) Z is damped relative to its own mean diagonal.

    Martens and Grosse's factored split (K-FAC, section 6.3, with the trace norm) of
    ``damping * mean(diag Z) * mean(diag Y)``: sqrt(damping) times each factor's mean diagonal. Whatever the units of
    the loss or of the inputs, the damped factors are the same but for these units.

    Args:
        input_moment: Z (n, n), or its diagonal (n,).
        output_moment: Y (m, m), or its diagonal (m,).
        damping: lambda, without a unit, at least 0.

    Returns:
        Those of Z and Y, in their units; 0 where a factor is 0.

    Raises:
        ValueError: damping is negative or not finite.
    """
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be at least 0 and finite, got {damping}")
    root = math.sqrt(damping)
    on_inputs, on_outputs = (
        # What rounding leaves of a variance may be negative.
        root * float(double(moment.diagonal() if moment.ndim == 2 else moment).clamp_min(0).mean())
        for moment in (input_moment, output_moment)
    )
    return on_inputs, on_outputs


@torch.no_grad()
def damped_inverse(matrix: Tensor, damping: float) -> DampedInverse:
    """Invert M + damping I by Cholesky's decomposition in float64.

    Where that fails, or where the inverse would rest on rounding errors of M's float32 entries (the condition number
    after scaling the diagonal to ones is beyond 1 / eps), the damping is raised tenfold until it holds; from zero it
    begins at the rounding error of the mean variance.

    Args:
        matrix: M (n, n), symmetric and positive semidefinite but for the rounding errors of sums in float32, finite.
        damping: at least 0.

    Raises:
        ValueError: M isn't square or finite, its entries are near the end of float64's range, or damping is negative.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
        raise ValueError(f"expected a square matrix, got {tuple(matrix.shape)}")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be at least 0 and finite, got {damping}")
    if not math.isfinite(float(matrix.abs().max())):
        raise ValueError("the matrix holds a value that isn't finite")
    # The largest entry of a covariance is on its diagonal.
    mean = float(double(matrix.diagonal()).clamp_min(0).mean())
    used = damping
    while True:
        attempt = _try(matrix, used)
        if attempt is not None and attempt.scaled_condition * _NOISE < 1:
            return DampedInverse(
                attempt.matrix, attempt.inverse, used, used > damping, attempt.condition, attempt.scaled_condition
            )
        used = max(_RAISE * used, _NOISE * mean, 1e-30)
        if not math.isfinite(used):
            raise ValueError(f"no damping makes a matrix with entries up to {float(matrix.abs().max()):.1e} invertible")


@torch.no_grad()
def numerical_rank(matrix: Tensor) -> int:
    """Return how many eigenvalues of a covariance stand out from the rounding errors of sums in float32.

    Those of the matrix with its diagonal scaled to ones, which is what rounding is relative to, beyond n eps. Counted
    by Sylvester's law of inertia, in a third of the time of a Cholesky decomposition and an inverse.

    Args:
        matrix: M (n, n), symmetric and positive semidefinite but for the rounding errors of sums in float32, finite.
    """
    whole = double(matrix)
    root = whole.diagonal().clamp_min(0).sqrt()
    seen = root > 0
    if not bool(seen.any()):
        return 0
    whole, root = whole[seen][:, seen], root[seen]
    scaled = torch.lerp(whole, whole.mT, 0.5) / root / root[:, None]
    scaled.diagonal().sub_(len(matrix) * _NOISE)
    factor, pivots = torch.linalg.ldl_factor(scaled)
    # Bunch and Kaufman: negative pivots are those of blocks of two, which have one eigenvalue of either sign.
    return int((pivots < 0).sum()) // 2 + int(((pivots > 0) & (factor.diagonal() > 0)).sum())


def _try(matrix: Tensor, damping: float) -> DampedInverse | None:
    # Products in float32 aren't symmetric to the last digit.
    whole = double(matrix)
    damped = torch.lerp(whole, whole.mT, 0.5)
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(factor)
    if not math.isfinite(float(inverse.abs().max())):
        return None
    root = damped.diagonal().sqrt()
    ones = torch.ones_like(root)
    return DampedInverse(
        matrix=damped,
        inverse=inverse,
        damping=damping,
        raised=False,
        condition=_scaled_norm(damped, ones) * _scaled_norm(inverse, ones),
        scaled_condition=_scaled_norm(damped, 1 / root) * _scaled_norm(inverse, root),
    )


def _scaled_norm(matrix: Tensor, scale: Tensor) -> float:
    """Return the norm of D M D for a diagonal D, from below."""
    return _norm(lambda rows: ((rows * scale) @ matrix) * scale, matrix)


def _norm(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Return the norm of a symmetric matrix, applied to rows, from below, by a few steps of the power method."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(_PROBES, len(like), generator=generator, dtype=torch.float64, device="cpu").to(like)
    norm = 0.0
    for _ in range(_POWER_STEPS):
        rows = apply(rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
        norm = float(rows.norm(dim=1).max())
    return norm
