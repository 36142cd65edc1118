import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fisher import logspace
from headstart.linalg.guidance import GuidanceSpace, guidance_space
from headstart.linalg.svd import truncated_svd

EPS = torch.finfo(torch.float64).eps


def orthonormal(n: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q


class Problem:
    """Z of the given eigenvalues, Delta of the given singular values, and the exact answer."""

    def __init__(self, z: Tensor, S: Tensor, m: int, variance: float, bias: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = len(z)
        Q = orthonormal(n, n, generator)
        self.Z, self.inverse = (Q * z) @ Q.mT, (Q / z) @ Q.mT
        k = min(len(S), m, n)
        self.delta = (orthonormal(m, k, generator) * S[:k]) @ orthonormal(n, k, generator).mT
        self.variance, self.bias = variance, bias
        self.omega = variance * self.inverse - bias * self.delta.mT @ self.delta
        self.norm = max(variance / float(z.min()), bias * float(S.max()) ** 2 if len(S) else 0.0)

    def solve(self, r: int, **options: Any) -> GuidanceSpace:
        return guidance_space(
            self.inverse, self.delta, r, variance=self.variance, bias=self.bias, factor=self.Z, **options
        )

    def check(self, found: GuidanceSpace, r: int, tol: float = 1e-6) -> None:
        """Compare with the dense decomposition, and check every promise of the result."""
        n = len(self.omega)
        assert found.vectors.shape == (n, r) and found.vectors.dtype == torch.float32
        assert found.values.shape == (r,) and found.values.dtype == torch.float64
        assert bool((found.values[1:] >= found.values[:-1]).all())
        assert found.objective == pytest.approx(float(found.values.sum()), rel=1e-12, abs=r * EPS * self.norm)
        gram = found.vectors.double().mT @ found.vectors.double()
        assert float((gram - torch.eye(r, dtype=torch.float64)).abs().max()) < 2e-6
        assert bool((found.vectors.gather(0, found.vectors.abs().argmax(dim=0, keepdim=True)) > 0).all())
        assert 0 <= found.error <= tol
        exact = torch.linalg.eigvalsh(self.omega)[:r]
        optimum = float(exact.sum())
        # What the dense decomposition itself may be off.
        rounding = (100 + 10 * r) * EPS * self.norm
        excess = found.objective - optimum
        assert -rounding <= excess <= tol * abs(optimum) + rounding
        assert excess <= 1.01 * found.error * max(abs(found.objective), 32 * EPS * self.norm / tol) + rounding
        assert float((found.values - exact).abs().max()) <= tol * abs(optimum) + rounding
        # Of the vectors themselves, rounded to float32 as they are.
        A = found.vectors.double()
        assert (
            abs(float((A * (self.omega @ A)).sum()) - optimum)
            <= tol * abs(optimum) + 1e-6 * float(exact.abs().sum()) + 1e-12 * n * self.norm
        )


def power(n: int, p: float) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -p


N = 300
FACTORS = {
    "wide": logspace(-6, 4, N),
    "mild": logspace(-1, 1, N),
    "damped": logspace(-9, 2, N) + 1e-6,
    "equal": torch.ones(N, dtype=torch.float64),
    "spiked": torch.cat([torch.ones(N - 3), torch.tensor([1e3, 1e4, 1e5])]).double(),
    "one weak": torch.cat([torch.tensor([1e-8]), torch.ones(N - 1)]).double(),
}
DELTAS = {
    "power": power(N, 0.5),
    "equal": torch.ones(N, dtype=torch.float64),
    "rank 3": torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64),
    "ninefold": torch.cat([2 * torch.ones(9), torch.linspace(1, 0, N - 9)]).double(),
    "flat": 1 + 1e-3 * torch.linspace(1, 0, N, dtype=torch.float64),
    "outlier": torch.cat([torch.tensor([1e3]), torch.rand(N - 1, generator=torch.Generator().manual_seed(5))]).double(),
    "zero": torch.zeros(5, dtype=torch.float64),
}


@pytest.mark.parametrize("ratio", [0.0, 1e-6, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("factor", FACTORS)
def test_hard_spectra(factor: str, delta: str, ratio: float) -> None:
    z, S = FACTORS[factor], DELTAS[delta]
    largest = float(S.max()) or 1.0
    problem = Problem(z, S, 350, ratio * largest**2 * float(z.min()), 1.0)
    problem.check(problem.solve(8), 8)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 320),
    m=st.integers(1, 320),
    share=st.floats(0, 1),
    decades=st.floats(0, 10),
    decay=st.floats(0, 3),
    rank=st.integers(1, 320),
    log_ratio=st.floats(-12, 12),
    log_scale=st.integers(-12, 12),
    seed=st.integers(0, 2**31),
)
def test_any_shape_weight_and_scale(
    n: int, m: int, share: float, decades: float, decay: float, rank: int, log_ratio: float, log_scale: int, seed: int
) -> None:
    r = 1 + int(share * (n - 1)) if seed % 2 else min(n, 1 + seed % 9)
    z = logspace(-6, decades - 6, n)
    scale = 10.0**log_scale
    variance = scale * 10.0**log_ratio * (1e-6 if seed % 3 else 1.0)
    problem = Problem(z, power(rank, decay), m, variance, scale, seed)
    problem.check(problem.solve(r, seed=seed), r)


@pytest.mark.parametrize("log_variance", range(-12, 13, 3))
def test_any_variance(log_variance: int) -> None:
    problem = Problem(FACTORS["wide"], DELTAS["power"], 200, 10.0**log_variance, 1.0)
    problem.check(problem.solve(8), 8)


@pytest.mark.parametrize("m", [100, 600])
@pytest.mark.parametrize("ratio", [0.0, 1e-3, 0.1, 1.0])
def test_float32_is_what_answers_for_a_layer(ratio: float, m: int) -> None:
    n = 400
    z = logspace(-8, 1, n) + 1e-6
    problem = Problem(z, power(n, 0.5), m, ratio * float(z.min()), 1.0)
    found = problem.solve(8)
    # So few steps can't have been spent on float32 in vain and on float64 again.
    assert not found.exact and 0 < found.iterations < 30
    problem.check(found, 8)


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-9, 1e-11])
def test_other_tolerances_without_the_dense_decomposition(tol: float) -> None:
    problem = Problem(FACTORS["damped"], DELTAS["power"], 350, 1e-8, 1.0)
    found = problem.solve(8, tol=tol)
    assert not found.exact
    problem.check(found, 8, tol)


@settings(max_examples=60, deadline=None)
@given(
    hidden=st.integers(1, 12),
    closeness=st.floats(1e-5, 0.5),
    seed=st.integers(0, 1000),
    r=st.sampled_from([1, 3, 8]),
)
def test_eigenvalues_close_to_others_are_not_taken_for_them(hidden: int, closeness: float, seed: int, r: int) -> None:
    # Only `hidden` values stand out from a crowd, by as little as the tolerance can tell.
    S = torch.cat([torch.full((hidden,), 1 + closeness), torch.linspace(1, 0.9, N - hidden)]).double()
    problem = Problem(FACTORS["mild"], S, N, 1e-7, 1.0, seed)
    problem.check(problem.solve(r, seed=seed + 1), r)


def test_an_objective_near_zero() -> None:
    z = torch.ones(N, dtype=torch.float64)
    S = torch.tensor([5.0, 4.0, 3.0], dtype=torch.float64).sqrt()
    problem = Problem(z, S, N, 1.0, 1.0)
    shift = float(torch.linalg.eigvalsh(problem.omega)[:8].sum()) / 8
    for gap in (1e-3, 1e-6, 0.0):
        # Z stays positive: Omega moves up by the identity until the objective is `gap`.
        variance = 1.0 - shift + gap
        moved = Problem(z, S, N, variance, 1.0)
        found = moved.solve(8)
        moved.check(found, 8)
        assert found.objective == pytest.approx(8 * gap, abs=1e-9)


@pytest.mark.parametrize("n", [60, 300])
def test_no_variance_gives_the_singular_vectors_of_delta(n: int) -> None:
    problem = Problem(logspace(-4, 2, n), power(n, 1.0), 310, 0.0, 0.3)
    found, expected = problem.solve(6, tol=1e-10), truncated_svd(problem.delta, 6)
    torch.testing.assert_close(found.vectors.abs(), expected.V.abs(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.values, -0.3 * expected.S.double() ** 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [60, 300])
@pytest.mark.parametrize("decades", [2, 10])
def test_no_bias_gives_the_leading_eigenvectors_of_the_factor(decades: int, n: int) -> None:
    problem = Problem(logspace(-6, decades - 6, n), power(5, 1.0), 20, 0.02, 0.0)
    found = problem.solve(6)
    problem.check(found, 6)
    assert found.exact == (n < 100)
    top = torch.linalg.eigh(problem.Z).eigenvectors[:, -6:]
    A = found.vectors.double()
    assert float((A @ A.mT - top @ top.mT).norm()) < 2e-2
    assert float((A * (problem.Z @ A)).sum()) == pytest.approx(float((top * (problem.Z @ top)).sum()), rel=1e-5)


@pytest.mark.parametrize("n", [30, 300])
def test_a_rank_below_r_is_completed(n: int) -> None:
    problem = Problem(logspace(-3, 1, n), DELTAS["rank 3"], 50, 0.0, 1.0)
    first, again = problem.solve(8), problem.solve(8)
    problem.check(first, 8)
    assert torch.equal(first.vectors, again.vectors)


@pytest.mark.parametrize("n", [10, 300])
@pytest.mark.parametrize("m", [0, 4])
def test_where_nothing_matters_any_space_is_right(n: int, m: int) -> None:
    eye = torch.eye(n)
    found = guidance_space(eye, torch.zeros(m, n), 4, variance=0.0, bias=1.0, factor=eye)
    assert found.objective == 0 and found.error == 0 and found.exact
    torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(4))


def test_coordinate_vectors_and_repeated_ones() -> None:
    # Images that are exactly zero, exactly in the basis and exactly on the axes.
    z = torch.ones(N, dtype=torch.float64)
    z[7] = 2.0
    delta = torch.zeros(5, N, dtype=torch.float64)
    delta[0, 3] = delta[1, 9] = 2.0
    Z = torch.diag(z)
    for variance in (0.0, 1e-3, 1.0):
        found = guidance_space(Z.inverse(), delta, 2, variance=variance, bias=1.0, factor=Z)
        assert found.objective == pytest.approx(2 * variance - 8, rel=1e-9)
        assert float(found.vectors[[3, 9]].square().sum()) == pytest.approx(2, rel=1e-5)


def hard() -> Problem:
    return Problem(FACTORS["damped"], DELTAS["power"], 250, 1e-6, 1.0)


def test_published_iterations_stop_above_the_optimum_and_say_so() -> None:
    problem = hard()
    best, published = problem.solve(8), problem.solve(8, iterations=10)
    assert published.iterations == 10 and not published.exact
    excess = (published.objective - best.objective) / abs(published.objective)
    assert 1e-4 < excess <= published.error
    more = problem.solve(8, iterations=60)
    assert best.objective * (1 + 1e-6) <= more.objective < published.objective
    torch.testing.assert_close(published.vectors.mT @ published.vectors, torch.eye(8))


@settings(max_examples=40, deadline=None)
@given(iterations=st.integers(1, 30), log_ratio=st.floats(-4, 4), decay=st.floats(0, 2), seed=st.integers(0, 1000))
def test_published_iterations_have_an_honest_error(iterations: int, log_ratio: float, decay: float, seed: int) -> None:
    problem = Problem(logspace(-3, 1, 120), power(120, decay), 100, 1e-3 * 10**log_ratio, 1.0, seed)
    found = problem.solve(5, iterations=iterations, seed=seed)
    optimum = float(torch.linalg.eigvalsh(problem.omega)[:5].sum())
    excess = found.objective - optimum
    rounding = 100 * EPS * problem.norm
    assert (
        -rounding <= excess <= 1.5 * found.error * max(abs(found.objective), 32 * EPS * problem.norm / 1e-6) + rounding
    )


def test_published_iterations_are_dense_on_a_short_side() -> None:
    problem = Problem(logspace(-3, 1, 20), power(20, 1.0), 30, 1e-3, 1.0)
    found = problem.solve(8, iterations=10)
    assert found.exact and found.iterations == 0
    problem.check(found, 8)


def test_no_steps_allowed_is_dense() -> None:
    for steps in (0, 1):
        found = hard().solve(8, max_iterations=steps)
        assert found.exact
        hard().check(found, 8)


@pytest.mark.parametrize("iterations", [None, 10])
def test_same_seed_same_bits_and_other_seed_same_space(iterations: int | None) -> None:
    problem = Problem(FACTORS["mild"], power(N, 1.0), 200, 1e-4, 1.0)
    torch.manual_seed(1)
    first = problem.solve(8, iterations=iterations)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again, other = problem.solve(8, iterations=iterations), problem.solve(8, iterations=iterations, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.vectors, again.vectors) and torch.equal(first.values, again.values)
    assert not torch.equal(first.vectors, other.vectors)
    if iterations is None:
        assert first.objective == pytest.approx(other.objective, rel=1e-6)


@pytest.mark.parametrize("log_scale", [-100, -30, 30, 100])
def test_entries_out_of_the_range_of_float32(log_scale: int) -> None:
    plain = Problem(FACTORS["mild"], DELTAS["power"], 200, 1e-2, 1.0)
    factor = 10.0**log_scale
    found = guidance_space(
        plain.inverse * factor,
        plain.delta * factor,
        8,
        variance=1e-2 / factor,
        bias=1 / factor / factor,
        factor=plain.Z / factor,
    )
    assert not found.exact
    plain.check(found, 8)


def test_single_precision_arguments() -> None:
    plain = Problem(FACTORS["mild"], DELTAS["power"], 200, 1e-2, 1.0)
    inverse, delta = plain.inverse.float(), plain.delta.float()
    found = guidance_space(inverse, delta, 8, variance=1e-2, bias=1.0, factor=plain.Z.float())
    plain.inverse, plain.delta = inverse.double(), delta.double()
    plain.omega = 1e-2 * plain.inverse - plain.delta.mT @ plain.delta
    plain.check(found, 8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["inverse", "delta", "factor"])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    matrices = {"inverse": torch.eye(4), "delta": torch.ones(3, 4), "factor": torch.eye(4)}
    matrices[name][1, 2] = bad
    with pytest.raises(ValueError, match=f"{name} holds a value that isn't finite"):
        guidance_space(matrices["inverse"], matrices["delta"], 2, variance=1.0, bias=1.0, factor=matrices["factor"])


def test_arguments_out_of_range_are_refused() -> None:
    eye, delta = torch.eye(5), torch.ones(3, 5)

    def call(r: int = 2, inverse: Tensor = eye, delta: Tensor = delta, factor: Tensor = eye, **options: Any) -> None:
        guidance_space(inverse, delta, r, factor=factor, **({"variance": 1.0, "bias": 1.0} | options))

    for r in (0, 6):
        with pytest.raises(ValueError, match="r must be from 1 to 5"):
            call(r)
    for name in ("variance", "bias"):
        for value in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="variance and bias"):
                call(**{name: value})
    with pytest.raises(ValueError, match="not both 0"):
        call(variance=0.0, bias=0.0)
    with pytest.raises(ValueError, match="tol"):
        call(tol=0.0)
    with pytest.raises(ValueError, match="max_iterations"):
        call(max_iterations=-1)
    with pytest.raises(ValueError, match="iterations at least 1"):
        call(iterations=0)
    for shapes in (
        {"inverse": eye[:4]},
        {"factor": torch.eye(4)},
        {"delta": delta.mT},
        {"delta": delta[0]},
        {"inverse": eye[:0, :0], "factor": eye[:0, :0], "delta": delta[:, :0]},
    ):
        with pytest.raises(ValueError, match="expected inverse and factor"):
            call(**shapes)
    with pytest.raises(ValueError, match="floating-point"):
        call(delta=delta.int())
    with pytest.raises(ValueError, match="overflows"):
        call(delta=delta.double() * 1e200)
