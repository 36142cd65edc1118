"""The space of the r smallest eigenvalues of LoRA-DA's guidance matrix, Omega = c Z^-1 - b Delta'Delta.

Where the variance term, the first, isn't much larger than the bias term, a block Krylov space of Omega (as in
`headstart.linalg.svd`), in float32 and without forming Omega, has the space after a few products. Else the wide
spectrum makes that hopeless, and the Krylov space is that of ``(Omega + sigma I)^-1``, in float64: the spectral
transformation of Ericsson and Ruhe (Math. Comp. 1980). One Rayleigh-Ritz step with Omega in float64 gives the
values and measures the error. What doesn't converge goes to a dense decomposition in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

TOLERANCE = 1e-6
MAX_ITERATIONS = 100

# A block at least as wide as r can't miss a copy of an r-fold eigenvalue; a multiple of this is faster.
_BLOCK = 8
# Pairs followed beyond the block: they tell how far the wanted eigenvalues are from the rest.
_SPARE = 4
# On a side shorter than this many blocks, the dense decomposition is as fast.
_DENSE_BLOCKS = 32
# And on a side shorter than this, as fast as Krylov spaces of an inverse.
_SHIFT_BLOCKS = 96
# The largest ratio of the variance term to the bias term at which Omega itself is tried, and the steps of it that
# cost as much as a factorisation.
_WIDE, _PLAIN_STEPS = 4.0, 32
_ROUGH_STEPS = 6
_FIRST_CHECK = 5
_POWER_STEPS = 4
# An estimate of the error rests on eigenvalues that are themselves estimates.
_SAFETY = 4.0
# How small one direction of a new block may be, relative to the others, before its rounding errors matter.
_LITTLE = 1e-2
_EPS = torch.finfo(torch.float64).eps

_Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GuidanceSpace:
    """The space of the r smallest eigenvalues of Omega (n, n).

    Attributes:
        vectors: (n, r) orthonormal, float32, by ascending eigenvalue; in each, the entry of largest magnitude is
            positive.
        values: (r,) eigenvalues, ascending, float64, in the unit of Omega.
        objective: their sum, ``tr(A0' Omega A0)`` with A0 the vectors before their rounding to float32.
        error: estimated upper bound of objective - optimum, relative to ``|objective|``. Where that is below
            ``eps / tol`` times the norm of Omega's larger term, with the eps of float64, relative to this: what
            float64 can tell of such a small difference of large terms.
        iterations: block steps taken (of `torch.lobpcg` where their number was given); zero where Omega went to a
            dense decomposition at once.
        exact: whether they come from a dense decomposition in float64.
    """

    vectors: Tensor
    values: Tensor
    objective: float
    error: float
    iterations: int
    exact: bool


@torch.no_grad()
def guidance_space(
    inverse: Tensor,
    delta: Tensor,
    r: int,
    *,
    variance: float,
    bias: float,
    factor: Tensor,
    tol: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    iterations: int | None = None,
    seed: int = 0,
) -> GuidanceSpace:
    """Return the orthonormal A0 that minimises ``tr(A0' (variance Z^-1 - bias Delta'Delta) A0)``.

    With no variance these are the leading right singular vectors of Delta, with no bias the leading eigenvectors
    of Z. Where eigenvalues beyond the r smallest equal one of them, the space isn't unique; the seed settles it.

    Args:
        inverse: Z^-1 (n, n), symmetric positive definite, best in float64, on a device that has float64.
        delta: Delta (m, n), any floating-point type.
        r: how many, from 1 to n.
        variance: c, at least 0.
        bias: b, at least 0.
        factor: Z (n, n) itself, damped as in ``inverse``; read only where there is no bias term.
        tol: the largest error to accept (see `GuidanceSpace`).
        max_iterations: the most block steps, of either kind, before the dense decomposition takes over.
        iterations: do as LoRA-DA's published code does: this many steps (there 10) of ``torch.lobpcg`` on Omega
            in float32 from a random start, whatever error they leave. Dense where ``n < 3 r`` or they break down.
        seed: of the random first block; the same seed gives the same space.

    Raises:
        ValueError: where shapes disagree, a value isn't finite, Omega overflows, an argument is out of its range
            or variance and bias are both zero.
    """
    _check(inverse, delta, r, variance, bias, factor, tol, max_iterations, iterations)
    n = inverse.shape[0]
    inverse, scaled = _scaled(inverse, variance, 1)
    delta, bias = _scaled(delta, bias, 2)
    block = min(n, _BLOCK * math.ceil(r / _BLOCK))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, block, generator=generator, dtype=torch.float64).to(inverse.device).mT
    single = _Omega(inverse.float(), delta.float(), scaled, bias)
    spread, depth = single.norms(start[:_SPARE])
    unit = max(spread, depth)
    if not math.isfinite(unit):
        raise ValueError("variance * inverse - bias * delta' delta overflows")
    if unit == 0:
        # Every space is optimal.
        return _result(_orthonormal(start), start.new_zeros(block), r, 1.0, 0.0, 0, True)
    single = _Omega(single.inverse, single.delta, scaled / unit, bias / unit)
    omega = _Omega(inverse.double(), delta.double(), scaled / unit, bias / unit)
    if iterations is not None:
        rows = _published(single, start[:r], iterations) if n >= 3 * r else None
        if rows is not None:
            rows, values, residuals = omega.ritz(rows)
            # Nothing is known of the eigenvalues beyond these, so no gap can make the bound smaller.
            error = float(residuals.norm(dim=1).sum()) / _size(values, tol)
            return _result(rows, values, r, unit, error, iterations, False)
        max_iterations = 0
    steps, formed = 0, None
    rows, lowest = start, -depth / unit
    for kind, most in _attempts(spread, depth, n // block) if max_iterations > 0 else ():
        operator: _Operator = single.negative
        shift = None
        if kind == "factor":
            operator, shift = partial(_multiplied, factor.double() * (unit / variance)), 0.0
        elif kind == "shifted":
            formed = omega.formed() if formed is None else formed
            operator, shift = _shifted_inverse(formed, -lowest)
        first = rows[:block].float() if shift is None else rows[:block]
        found, more = _krylov(operator, shift, first, r, tol, min(most, max_iterations))
        steps += more
        rows, values, residuals = omega.ritz(found.double())
        error = _error(values, residuals, rows, r, tol, operator, shift)
        if error <= tol:
            return _result(rows, values, r, unit, error, steps, False)
        lowest = float(values[0] - 0.1 * (values[-1] - values[0]).clamp_max(1.0)) if len(values) > r else lowest
    values, vectors = torch.linalg.eigh(omega.formed() if formed is None else formed)
    return _result(vectors.mT, values, r, unit, _EPS / _size(values[:r], tol), steps, True)


def _attempts(spread: float, depth: float, blocks: int) -> list[tuple[str, int]]:
    """Return operators to try and the most steps of each, for the norms of the two terms and the side in blocks."""
    if blocks < _DENSE_BLOCKS:
        return []
    if depth == 0:
        return [("factor", MAX_ITERATIONS)]
    plain = [("plain", _PLAIN_STEPS)] if spread <= _WIDE * depth else []
    if blocks < _SHIFT_BLOCKS:
        return plain
    # The first shift, from a bound of the smallest eigenvalue, only serves to find a closer one.
    return [*(plain or [("shifted", _ROUGH_STEPS)]), ("shifted", MAX_ITERATIONS)]


@dataclass(frozen=True)
class _Omega:
    """Omega, applied to vectors as rows: on a processor, a thin block times a matrix is then much faster."""

    inverse: Tensor
    delta: Tensor
    variance: float
    bias: float

    def negative(self, rows: Tensor) -> Tensor:
        return self.bias_term(rows) - self.variance_term(rows)

    def variance_term(self, rows: Tensor) -> Tensor:
        return self.variance * (rows @ self.inverse) if self.variance else torch.zeros_like(rows)

    def bias_term(self, rows: Tensor) -> Tensor:
        return self.bias * ((rows @ self.delta.mT) @ self.delta) if self.bias else torch.zeros_like(rows)

    def formed(self) -> Tensor:
        return self.variance * self.inverse - self.bias * (self.delta.mT @ self.delta)

    def norms(self, start: Tensor) -> tuple[float, float]:
        """Return the norms of the two terms, from below, by a few steps of the power method."""
        norms = []
        for weight, term in (
            (self.variance, _Omega(self.inverse, self.delta, 1.0, 0.0).variance_term),
            (self.bias, _Omega(self.inverse, self.delta, 0.0, 1.0).bias_term),
        ):
            rows, norm = start.float(), 0.0
            for _ in range(_POWER_STEPS if weight else 0):
                rows = term(torch.nn.functional.normalize(rows, dim=1))
                norm = float(rows.norm(dim=1).max())
            norms.append(weight * norm)
        return norms[0], norms[1]

    def ritz(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Ritz vectors in the span of ``rows``, their values, ascending, and their residuals."""
        rows = _orthonormal(rows)
        image = -self.negative(rows)
        values, rotation = torch.linalg.eigh(image @ rows.mT)
        rows, image = rotation.mT @ rows, rotation.mT @ image
        return rows, values, image - values[:, None] * rows


def _check(
    inverse: Tensor,
    delta: Tensor,
    r: int,
    variance: float,
    bias: float,
    factor: Tensor,
    tol: float,
    max_iterations: int,
    iterations: int | None,
) -> None:
    n = inverse.shape[-1] if inverse.ndim else 0
    if n == 0 or inverse.shape != (n, n) or factor.shape != (n, n) or delta.ndim != 2 or delta.shape[1] != n:
        shapes = ", ".join(str(tuple(matrix.shape)) for matrix in (inverse, factor, delta))
        raise ValueError(f"expected inverse and factor (n, n) and delta (m, n), got {shapes}")
    for name, matrix in (("inverse", inverse), ("factor", factor), ("delta", delta)):
        if not matrix.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point type, got {matrix.dtype}")
        # NaN where there is one.
        if matrix.numel() and not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(matrix)):
            raise ValueError(f"{name} holds a value that isn't finite")
    if not 1 <= r <= n:
        raise ValueError(f"r must be from 1 to {n}, got {r}")
    if not (0 <= variance < math.inf and 0 <= bias < math.inf and variance + bias > 0):
        raise ValueError(f"variance and bias must be at least 0, finite and not both 0, got {variance} and {bias}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if max_iterations < 0:
        raise ValueError(f"max_iterations can't be negative, got {max_iterations}")
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


def _scaled(matrix: Tensor, weight: float, power: int) -> tuple[Tensor, float]:
    """Return the matrix with entries that float32 can square, and the weight that makes up for it."""
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if largest == 0 or 2.0**-20 < largest < 2.0**20:
        return matrix, weight
    scale = 2.0 ** (math.frexp(largest)[1] - 1)
    for _ in range(power):
        weight *= scale
    return matrix.double() / scale, weight


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT).Q.mT


def _size(values: Tensor, tol: float) -> float:
    """Return what errors are relative to, for the r smallest eigenvalues of an Omega of norm 1."""
    return max(abs(float(values.sum())), _EPS / tol)


def _error(
    values: Tensor, residuals: Tensor, rows: Tensor, r: int, tol: float, operator: _Operator, shift: float | None
) -> float:
    """Return the error of Ritz pairs of Omega: with a shift, judged by its inverse, which sees the gaps better."""
    if shift is None:
        excess = _excess(values, residuals.square().sum(dim=1), r)
    else:
        image = operator(rows)
        inverses, rotation = torch.linalg.eigh(image @ rows.mT)
        inverses, rotation = inverses.flip(0), rotation.flip(1).mT
        if float(inverses[r - 1]) <= 0:
            return math.inf
        squares = (rotation @ image - inverses[:, None] * (rotation @ rows)).square().sum(dim=1)
        excess = max(0.0, float((values - (1 / inverses - shift))[:r].sum()))
        excess += _excess(-inverses, squares, r, inverses[:r] ** -2)
    return (_SAFETY * excess + _EPS) / _size(values[:r], tol)


def _excess(values: Tensor, squares: Tensor, r: int, slopes: Tensor | None = None) -> float:
    """Estimate by how much the r smallest Ritz values are above the r smallest eigenvalues, in sum.

    Given k Ritz pairs with residuals R and every other eigenvalue above nu, the j <= k smallest are at most
    ``||R||_F^2 / (nu - theta_j)`` too high in sum (Schur complement), and any one at most by its residual's norm.
    The best j and k are taken, so no gap is needed right after r. nu is the next Ritz value less its own error.

    Args:
        values: (k,) Ritz values, ascending.
        squares: (k,) squared norms of their residuals.
        r: how many are wanted.
        slopes: (r,) what a unit of each value counts, ascending; 1 by default.
    """
    slopes = torch.ones_like(values[:r]) if slopes is None else slopes
    linear = squares.sqrt()
    gaps = (values - linear)[1:] - values[:r, None]
    quadratic = slopes[:, None] * squares.cumsum(0)[:-1] / gaps
    linear = linear[:r] * slopes
    beyond = linear.sum() - linear.cumsum(0)
    valid = (gaps > 0) & torch.ones_like(gaps, dtype=torch.bool).triu()
    bounds = torch.where(valid, quadratic + beyond[:, None], math.inf)
    return min(float(linear.sum()), float(bounds.min()))


def _krylov(
    operator: _Operator, shift: float | None, start: Tensor, r: int, tol: float, max_iterations: int
) -> tuple[Tensor, int]:
    """Return leading Ritz vectors as rows (k, n), k > r, converged unless that seems too far away, and the steps.

    Args:
        operator: -Omega, or (Omega + sigma)^-1, applied to rows.
        shift: None for the former, sigma for the latter.
        start: (block, n) first block; its precision is that of all.
        r: how many have to converge.
        tol: the error to reach, but for the rounding of ``operator``, which doesn't show here.
        max_iterations: the most steps.
    """
    block, n = start.shape
    # Beyond three quarters of the space the dense decomposition costs no more.
    most = min(max_iterations, 3 * n // 4 // block)
    rows = start.new_empty(most * block, n)
    # Symmetric; only its lower half is filled and read.
    projected = start.new_zeros(most * block, most * block)
    generator = torch.Generator().manual_seed(0)
    new = _orthonormal(start)
    largest, due, last = 0.0, min(_FIRST_CHECK, most), (0, 0.0)
    for step in range(1, most + 1):
        low, high = (step - 1) * block, step * block
        rows[low:high] = new
        basis = rows[:high]
        image = operator(new)
        largest = max(largest, float(image.norm(dim=1).max()))
        rounding = torch.finfo(start.dtype).eps * largest
        coefficients = image @ basis.mT
        projected[low:high, :high] = coefficients
        new, triangle = _fresh(image - coefficients @ basis, basis, rounding, generator)
        if step < due:
            continue
        values, vectors = torch.linalg.eigh(projected[:high, :high])
        values, vectors = values.flip(0)[: block + _SPARE].double(), vectors.flip(1)[:, : block + _SPARE]
        # F y - mu y = new R (last block of y)
        squares = (triangle @ vectors[-block:]).double().square().sum(dim=0)
        slopes, wanted = None, -values[:r]
        if shift is not None:
            # mu = 1 / (theta + sigma)
            clamped = values[:r].clamp_min(rounding)
            slopes, wanted = clamped**-2, 1 / clamped - shift
        error = 2 * _SAFETY * _excess(-values, squares, r, slopes) / _size(wanted, tol)
        if error <= tol or float(squares[:r].max()) <= (4 * rounding) ** 2:
            break
        logarithm = math.log(error)
        rate = (last[1] - logarithm) / (step - last[0]) if last[0] else 0.0
        ahead = math.ceil((logarithm - math.log(tol)) / rate) if rate > 0 else most
        if step >= most // 2 and step + ahead > 2 * most:
            break
        # A guess from a plateau overshoots, so it never looks further than a third of the way come.
        due, last = min(most, step + max(1, min(ahead, step // 3))), (step, logarithm)
    return vectors.mT @ basis, step


def _fresh(block: Tensor, basis: Tensor, zero: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return new orthonormal rows that span ``block`` beyond ``basis``, and R with ``block = R' new``.

    Directions of a norm below ``zero`` are replaced by random ones: all that is left of them is rounding.
    """
    # Once more: what rounding leaves of the basis grows as the wanted vectors converge.
    block = block - (block @ basis.mT) @ basis
    Q, triangle = torch.linalg.qr(block.mT)
    sizes = triangle.diagonal().abs()
    if float(sizes.min()) < max(_LITTLE * float(sizes.max()), zero):
        # A direction of which almost nothing was left: normalised, its rounding errors are large.
        nothing = sizes <= zero
        noise = torch.randn(Q.shape, generator=generator, dtype=torch.float64).to(Q) / math.sqrt(len(Q))
        Q, triangle = torch.where(nothing, noise, Q), torch.where(nothing[:, None], 0.0, triangle)
        for _ in range(2):
            Q, again = torch.linalg.qr(Q - basis.mT @ (basis @ Q))
            triangle = again @ triangle
    return Q.mT, triangle


def _shifted_inverse(formed: Tensor, shift: float) -> tuple[_Operator, float]:
    """Return (Omega + sigma)^-1 on rows, and sigma: ``shift``, or where Omega + shift isn't positive, more."""
    step = max(0.1 * abs(shift), len(formed) * _EPS)
    while True:
        shifted = formed.clone()
        shifted.diagonal().add_(shift)
        cholesky, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return partial(_solve, cholesky), shift
        shift, step = shift + step, 4 * step


def _multiplied(matrix: Tensor, rows: Tensor) -> Tensor:
    return rows @ matrix


def _solve(cholesky: Tensor, rows: Tensor) -> Tensor:
    return torch.cholesky_solve(rows.mT, cholesky).mT


def _published(single: _Omega, start: Tensor, iterations: int) -> Tensor | None:
    """Return what LOBPCG leaves after ``iterations`` steps as rows (r, n), None where it breaks down."""
    try:
        # A tolerance that float32 can't reach: the steps are what ends it.
        found = torch.lobpcg(
            single.formed(), k=len(start), X=start.float().mT.contiguous(), niter=iterations, tol=1e-30, largest=False
        )[1]
    except (RuntimeError, ValueError):
        return None
    return found.mT.double() if math.isfinite(float(found.abs().sum())) else None


def _result(rows: Tensor, values: Tensor, r: int, unit: float, error: float, steps: int, exact: bool) -> GuidanceSpace:
    vectors, values = rows[:r].mT, values[:r] * unit
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return GuidanceSpace(
        vectors=(vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors)).float().contiguous(),
        values=values,
        objective=float(values.sum()),
        error=error,
        iterations=steps,
        exact=exact,
    )
