"""The space of the r smallest eigenvalues of LoRA-DA's guidance matrix, Omega = c Z^-1 - b Delta'Delta.

Where the first term, the variance, isn't much larger than the second, the bias, Omega isn't formed: a block Krylov
space (block Lanczos with full reorthogonalisation, as in `headstart.linalg.svd`) grows in float32, then in float64
where float32 isn't accurate enough. With no bias it is the Krylov space of Z. One Rayleigh-Ritz step with Omega in
float64 gives the values and measures the error. The rest goes to a dense decomposition in float64.

Under a large variance the spectrum is too wide for that. Residuals preconditioned by ``(c Z^-1 + tau I)^-1``
(LOBPCG: Knyazev, SIAM J. Sci. Comput. 2001) and Krylov spaces of ``(Omega + sigma I)^-1`` converge there, but at
widths of 576 and 1536 no faster on a processor than the dense decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.linalg.precision import solving_device

TOLERANCE = 1e-6
MAX_ITERATIONS = 100

# A block at least as wide as r can't miss a copy of an r-fold eigenvalue; a multiple of this is faster.
_BLOCK = 8
# Pairs followed beyond the block: they tell how far the wanted eigenvalues are from the rest.
_SPARE = 4
# On a side shorter than this many blocks, the dense decomposition is as fast.
_DENSE_BLOCKS = 32
# The largest ratio of the variance term to the bias term at which a Krylov space of Omega pays.
_WIDE = 4.0
_FIRST_CHECK = 5
_POWER_STEPS = 4
# A gap is one between eigenvalues that are themselves estimates.
_SAFETY = 4.0
# How small one direction of a new block may be, relative to the others, before its rounding errors matter.
_LITTLE = 1e-2
# What float64 makes of a matrix of norm 1, and matrices that should agree, of each other.
_ROUNDING = 16 * torch.finfo(torch.float64).eps

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
            ``32 eps / tol`` times the norm of Omega's larger term, with the eps of float64, relative to this: what
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
    of Z. In place of Z^-1 any positive definite matrix will do. Where eigenvalues beyond the r smallest equal one of
    them, the space isn't unique; the seed settles it.

    Args:
        inverse: Z^-1 (n, n), symmetric positive definite, best in float64; what comes back is on its solving device.
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
    matrices = {"inverse": inverse, "factor": factor, "delta": delta}
    _check(matrices, r, variance, bias, tol, (max_iterations, 1 if iterations is None else iterations))
    n, device = inverse.shape[0], solving_device(inverse.device)
    inverse, delta, factor = (matrix.to(device) for matrix in (inverse, delta, factor))
    inverse, scaled = _scaled(inverse, variance, False)
    delta, bias = _scaled(delta, bias, True)
    block = min(n, _BLOCK * math.ceil(r / _BLOCK))
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(n, block, generator=generator, dtype=torch.float64, device="cpu").to(device).mT
    single = _Omega(inverse.float(), delta.float(), scaled, bias)
    spread, depth = single.norms(start[:_SPARE])
    unit = max(spread, depth)
    if not math.isfinite(unit):
        raise ValueError("variance * inverse - bias * delta' delta overflows")
    if unit == 0:
        # Every space is optimal.
        return _result(torch.linalg.qr(start.mT).Q.mT, start.new_zeros(block), r, 1.0, 0.0, 0, True)
    single = _Omega(single.inverse, single.delta, scaled / unit, bias / unit)
    omega = _Omega(inverse.double(), delta.double(), scaled / unit, bias / unit)
    if iterations is not None:
        rows = _published(single, start[:r], iterations) if n >= 3 * r else None
        if rows is not None:
            rows, values, residuals = omega.ritz(rows)
            # Their own residuals can't tell what they overlook: two steps on, more of that is in the space.
            _, better, remaining = omega.ritz(torch.cat([rows, residuals, omega.negative(residuals)]))
            excess = float((values - better[:r]).sum() + remaining[:r].norm(dim=1).sum() + residuals.norm(dim=1).sum())
            return _result(rows, values, r, unit, excess / _size(values, tol), iterations, False)
        max_iterations = 0
    steps, attempts = 0, list[tuple[_Operator, torch.dtype]]()
    if max_iterations > 0 and n >= _DENSE_BLOCKS * block:
        if depth == 0:
            covariance = factor.double() * (unit / variance)
            attempts = [(lambda rows: rows @ covariance, torch.float64)]
        elif spread <= _WIDE * depth:
            attempts = [(single.negative, torch.float32), (omega.negative, torch.float64)]
    for operator, dtype in attempts:
        basis, more = _krylov(operator, depth == 0, start.to(dtype), r, tol, max_iterations)
        steps += more
        if basis is None:
            break
        rows, values, residuals = omega.ritz(operator(basis) if depth == 0 else basis.double())
        size = _size(values[:r], tol)
        if depth == 0:
            excess = _inverse_excess(operator(rows), rows, values, r)
        else:
            excess = _excess(values, residuals, r, tol * size)
        error = (excess + _ROUNDING) / size
        if error <= tol:
            return _result(rows, values, r, unit, error, steps, False)
    values, vectors = torch.linalg.eigh(omega.formed())
    return _result(vectors.mT, values, r, unit, _ROUNDING / _size(values[:r], tol), steps, True)


@dataclass(frozen=True)
class _Omega:
    """Omega, applied to vectors as rows: on a processor, a thin block times a matrix is then much faster."""

    inverse: Tensor
    delta: Tensor
    variance: float
    bias: float

    def negative(self, rows: Tensor) -> Tensor:
        image = self.bias * ((rows @ self.delta.mT) @ self.delta) if self.bias else torch.zeros_like(rows)
        return image - self.variance * (rows @ self.inverse) if self.variance else image

    def formed(self) -> Tensor:
        return self.variance * self.inverse - self.bias * (self.delta.mT @ self.delta)

    def norms(self, start: Tensor) -> tuple[float, float]:
        """Return the norms of the two terms, from below, by a few steps of the power method."""
        norms = []
        for variance, bias in ((1.0, 0.0), (0.0, 1.0)):
            term, rows = _Omega(self.inverse, self.delta, variance, bias), start.to(self.inverse)
            for _ in range(_POWER_STEPS):
                rows = term.negative(torch.nn.functional.normalize(rows, dim=1))
            norms.append((variance * self.variance + bias * self.bias) * float(rows.norm(dim=1).max()))
        return norms[0], norms[1]

    def ritz(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Ritz vectors in the span of ``rows``, their values, ascending, and their residuals."""
        rows = torch.linalg.qr(rows.mT).Q.mT
        image = -self.negative(rows)
        values, rotation = torch.linalg.eigh(image @ rows.mT)
        rows, image = rotation.mT @ rows, rotation.mT @ image
        return rows, values, image - values[:, None] * rows


def _check(
    matrices: dict[str, Tensor], r: int, variance: float, bias: float, tol: float, steps: tuple[int, int]
) -> None:
    inverse, factor, delta = matrices["inverse"], matrices["factor"], matrices["delta"]
    n = inverse.shape[-1] if inverse.ndim else 0
    if n == 0 or inverse.shape != (n, n) or factor.shape != (n, n) or delta.ndim != 2 or delta.shape[1] != n:
        shapes = ", ".join(str(tuple(matrix.shape)) for matrix in matrices.values())
        raise ValueError(f"expected inverse and factor (n, n) and delta (m, n), got {shapes}")
    for name, matrix in matrices.items():
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
    if steps[0] < 0 or steps[1] < 1:
        raise ValueError(f"max_iterations must be at least 0 and iterations at least 1, got {steps[0]} and {steps[1]}")


def _scaled(matrix: Tensor, weight: float, squared: bool) -> tuple[Tensor, float]:
    """Return the matrix with entries that float32 can square, and the weight that makes up for it."""
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if largest == 0 or 2.0**-20 < largest < 2.0**20:
        return matrix, weight
    scale = 2.0 ** (math.frexp(largest)[1] - 1)
    # Not scale**2, which raises where the product is merely infinite.
    return matrix.double() / scale, weight * scale * (scale if squared else 1.0)


def _size(values: Tensor, tol: float) -> float:
    """Return what errors are relative to, for the r smallest eigenvalues of an Omega of norm 1."""
    return max(abs(float(values.sum())), 2 * _ROUNDING / tol)


def _inverse_excess(image: Tensor, rows: Tensor, values: Tensor, r: int) -> float:
    """Return by how much the r smallest ``values`` are too high, from the image of the rows under Omega's inverse."""
    reciprocals, rotation = torch.linalg.eigh(-image @ rows.mT)
    reciprocals, rotation = -reciprocals[:r], rotation[:, :r].mT
    if float(reciprocals[-1]) <= 0:
        return math.inf
    residuals = (rotation @ image - reciprocals[:, None] * (rotation @ rows)).norm(dim=1)
    return max(0.0, float((values[:r] - 1 / reciprocals).sum())) + float((residuals / reciprocals.square()).sum())


def _excess(values: Tensor, residuals: Tensor, r: int, enough: float) -> float:
    """Estimate by how much the r smallest Ritz values are above the r smallest eigenvalues, in sum.

    Any one by no more than its residual's norm, where no smaller eigenvalue was overlooked. Where float32 leaves
    that sum above ``enough``: given k Ritz pairs with residuals R and every other eigenvalue above nu, the j <= k
    smallest are at most ``||R||_F^2 / (nu - theta_j)`` too high in sum (Schur complement). The best j and k are
    taken, the first bound for the r - j others. nu is the next Ritz value less its own residual's norm.
    """
    squares = residuals.square().sum(dim=1)
    linear = squares.sqrt()
    gaps = (values - linear)[1:] - values[:r, None]
    beyond = linear[:r].sum() - linear[:r].cumsum(0)
    bounds = _SAFETY * squares.cumsum(0)[:-1] / gaps + beyond[:, None]
    valid = (gaps > 0) & torch.ones_like(gaps, dtype=torch.bool).triu()
    first, second = float(linear[:r].sum()), float(torch.where(valid, bounds, math.inf).min())
    return min(first, max(second, 0.5 * enough))


def _krylov(
    operator: _Operator, inverse: bool, start: Tensor, r: int, tol: float, max_iterations: int
) -> tuple[Tensor | None, int]:
    """Return leading Ritz vectors of -Omega, or Omega's inverse, as rows, None without convergence, and the steps."""
    block, n = start.shape
    # Beyond three quarters of the space the dense decomposition costs no more.
    most = min(max_iterations, 3 * n // 4 // block)
    rows = start.new_empty(most * block, n)
    # Symmetric; only its lower half is filled and read.
    projected = start.new_zeros(most * block, most * block)
    generator = torch.Generator("cpu").manual_seed(0)
    new = torch.linalg.qr(start.mT).Q.mT
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
        leading, vectors = values.flip(0)[:r].double(), vectors.flip(1)[:, : block + _SPARE]
        # F y - mu y = new R (last block of y)
        residuals = (triangle @ vectors[-block:, :r]).norm(dim=0).double()
        wanted, first = -leading, residuals
        if inverse:
            wanted = 1 / leading.clamp_min(rounding)
            first = residuals * wanted.square()
        # To first order. Where there is a gap it is of second order; but an eigenvalue that seems the next may have
        # others before it that a block of this width separates only later.
        error = float(first.sum()) / _size(wanted, tol)
        if error <= tol or float(residuals.max()) <= 16 * rounding:
            return vectors.mT @ basis, step
        logarithm = math.log(error)
        rate = (last[1] - logarithm) / (step - last[0]) if last[0] else 0.0
        ahead = math.ceil((logarithm - math.log(tol)) / rate) if rate > 0 else most
        if step >= most // 2 and step + ahead > 2 * most:
            return None, step
        # A guess from a plateau overshoots, so it never looks further than a third of the way come.
        due, last = min(most, step + max(1, min(ahead, step // 3))), (step, logarithm)
    return None, most


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
        noise = torch.randn(Q.shape, generator=generator, dtype=torch.float64, device="cpu").to(Q) / math.sqrt(len(Q))
        Q, triangle = torch.where(nothing, noise, Q), torch.where(nothing[:, None], 0.0, triangle)
        for _ in range(2):
            Q, again = torch.linalg.qr(Q - basis.mT @ (basis @ Q))
            triangle = again @ triangle
    return Q.mT, triangle


def _published(single: _Omega, start: Tensor, iterations: int) -> Tensor | None:
    """Return what LOBPCG leaves after ``iterations`` steps as rows (r, n), None where it breaks down."""
    formed, X = single.formed(), start.to(single.inverse).mT.contiguous()
    try:
        # A tolerance that float32 can't reach: the steps are what ends it.
        vectors = torch.lobpcg(formed, k=len(start), X=X, niter=iterations, tol=1e-30, largest=False)[1]
    except (RuntimeError, ValueError):
        return None
    return vectors.mT.double() if math.isfinite(float(vectors.abs().sum())) else None


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
