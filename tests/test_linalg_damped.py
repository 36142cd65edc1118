"""The damped inverse against dense float64: what it returns, and when it may raise the damping."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fisher import logspace, of_spectrum
from headstart.linalg.damped import DampedInverse, damped_inverse, factored_damping, numerical_rank
from inputs import normal

EPS32 = float(torch.finfo(torch.float32).eps)
EPS = float(torch.finfo(torch.float64).eps)


def eigenvalues(matrix: Tensor) -> np.ndarray:
    return np.linalg.eigvalsh(matrix.double().numpy())


def conditions(matrix: Tensor) -> tuple[float, float]:
    """The condition number, and that after scaling the diagonal to ones; infinite where not positive definite."""
    found = []
    root = matrix.double().diagonal().clamp_min(0).sqrt()
    for each in (matrix.double(), matrix.double() / root / root[:, None] if float(root.min()) > 0 else None):
        values = eigenvalues(each) if each is not None else np.array([-1.0, 1.0])
        found.append(values[-1] / values[0] if values[0] > 0 else math.inf)
    return found[0], found[1]


def plus(matrix: Tensor, damping: float) -> Tensor:
    return matrix.double() + damping * torch.eye(len(matrix), dtype=torch.float64)


def check(found: DampedInverse, matrix: Tensor, damping: float) -> None:
    """Every promise of the result that holds for any input."""
    n = len(matrix)
    assert found.matrix.shape == found.inverse.shape == (n, n)
    assert found.matrix.dtype == found.inverse.dtype == torch.float64
    assert bool(torch.isfinite(found.inverse).all())
    assert found.raised == (found.damping > damping) and found.damping >= damping
    assert torch.equal(found.matrix, plus(matrix, found.damping))
    assert float((found.inverse - found.inverse.T).abs().max()) <= 4 * EPS * float(found.inverse.abs().max())
    condition, scaled = conditions(found.matrix)
    # Positive definite, and not resting on the rounding errors of float32, but for the estimate's slack.
    assert scaled < 4 / EPS32
    # Backward errors of Cholesky's decomposition, which no scaling of the diagonal changes.
    root = found.matrix.diagonal().sqrt()
    expected = torch.from_numpy(np.linalg.inv((found.matrix / root / root[:, None]).numpy()))
    mine = found.inverse * root * root[:, None]
    assert float((mine - expected).norm() / expected.norm()) <= 50 * n * EPS * scaled
    assert scaled / 4 <= found.scaled_condition <= scaled * (1 + 1e-6 + 50 * n * EPS * scaled)
    if 1e-8 < float(found.matrix.abs().max()) < 1e8:
        assert condition / 4 <= found.condition <= condition * (1 + 1e-6 + 50 * n * EPS * condition)


def check_raised_no_further_than_needed(found: DampedInverse, matrix: Tensor, damping: float) -> None:
    """One step less of damping rests on float32's rounding errors: estimates are from below, so the truth is above."""
    assert found.raised
    first = max(EPS32 * float(matrix.double().diagonal().clamp_min(0).mean()), 1e-30, 10 * damping)
    before = found.damping / 10 if found.damping > 1.001 * first else damping
    smaller = plus(matrix, before)
    _, scaled = conditions(smaller)
    values = eigenvalues(smaller)
    # Cholesky's decomposition may fail just above zero.
    assert scaled >= (1 - 1e-6) / EPS32 or values[0] <= 10 * len(matrix) * EPS * max(values[-1], 1e-300)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 24),
    st.floats(0, 5),
    st.integers(-5, 5),
    st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
    st.booleans(),
    st.integers(0, 2**16),
)
@example(1, 0.0, 0, 0.0, True, 0)
def test_well_conditioned_matrices_keep_their_damping(n, decades, log_scale, damping, single, seed):
    matrix = of_spectrum(logspace(-decades, 0, n) * 10.0**log_scale, seed)
    matrix = matrix.float() if single else matrix
    assume(conditions(matrix)[1] < 0.1 / EPS32)
    before = matrix.clone()
    found = damped_inverse(matrix, damping)
    assert not found.raised and found.damping == damping
    assert torch.equal(matrix, before)
    check(found, matrix, damping)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(2, 24),
    st.floats(0, 16),
    st.integers(-4, 4),
    st.sampled_from([0.0, 1e-12, 1e-6, 1e-2]),
    st.integers(0, 2**16),
)
def test_any_spectrum_is_inverted_with_no_more_damping_than_needed(n, decades, log_scale, damping, seed):
    """float32 entries of a matrix of any condition: what is below their rounding may be negative."""
    matrix = of_spectrum(logspace(-decades, 0, n) * 10.0**log_scale, seed).float()
    matrix = (matrix + matrix.T) / 2
    found = damped_inverse(matrix, damping)
    check(found, matrix, damping)
    if found.raised:
        check_raised_no_further_than_needed(found, matrix, damping)


@settings(max_examples=120, deadline=None)
@given(st.integers(2, 30), st.data(), st.integers(-6, 6), st.sampled_from([0.0, 1e-6]), st.integers(0, 2**16))
def test_fewer_tokens_than_inputs(n, data, log_scale, damping, seed):
    tokens = data.draw(st.integers(1, n - 1))
    x = (10.0 ** (log_scale / 2) * normal(tokens, n, seed=seed)).float()
    matrix = x.T @ x / tokens
    # Products of matrices aren't symmetric to the last bit.
    matrix = matrix.tril() + matrix.tril(-1).T
    found = damped_inverse(matrix, damping)
    check(found, matrix, damping)
    if damping == 0:
        # Zero eigenvalues are rounding errors: some of either sign, all of them noise.
        assert found.raised
    if found.raised:
        check_raised_no_further_than_needed(found, matrix, damping)
    # Of the size of rounding errors, not of the matrix.
    assert found.damping <= max(damping, 1e4 * EPS32 * float(matrix.diagonal().mean()))


@pytest.mark.parametrize("n", [40, 200, 400])
@pytest.mark.parametrize("decades", [1, 4, 6])
def test_condition_estimates_of_larger_matrices(n, decades):
    matrix = of_spectrum(logspace(-decades, 0, n))
    check(damped_inverse(matrix, 0.0), matrix, 0.0)


def test_the_smallest_eigenvalue_alone_is_seen():
    """One small eigenvalue of many: the estimate must not miss it."""
    values = torch.ones(100, dtype=torch.float64)
    values[0] = 1e-5
    found = damped_inverse(of_spectrum(values), 0.0)
    assert 0.25e5 <= found.condition <= 1e5 * (1 + 1e-6)
    values[0] = 1e-9
    found = damped_inverse(of_spectrum(values), 0.0)
    assert found.raised
    # The rounding error of the mean variance, which is enough: no tenfold raise.
    assert found.damping == pytest.approx(0.99 * EPS32, rel=1e-6)
    assert 0.25 < found.condition * found.damping <= 1 + 1e-6


@pytest.mark.parametrize("damping", [0.0, 1e-6, 1.0])
def test_a_product_that_is_not_symmetric_to_the_last_digit(damping):
    """Both halves count the same, and what is returned is symmetric."""
    matrix = of_spectrum(logspace(-3, 0, 12)).float()
    matrix[0, 1:] *= 1 + 4 * EPS32
    before = matrix.clone()
    found = damped_inverse(matrix, damping)
    assert torch.equal(found.matrix, found.matrix.T) and torch.equal(matrix, before)
    middle = (matrix.double() + matrix.double().T) / 2
    check(found, middle, damping)
    other = damped_inverse(matrix.T.contiguous(), damping)
    assert torch.equal(found.matrix, other.matrix) and torch.equal(found.inverse, other.inverse)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_an_eigenvalue_below_zero_by_rounding(damping):
    values = logspace(-3, 2, 16)
    values[0] = -1e-5
    matrix = of_spectrum(values).float()
    found = damped_inverse(matrix, damping)
    assert found.raised and found.damping > 1e-5
    check(found, matrix, damping)
    check_raised_no_further_than_needed(found, matrix, damping)
    # Enough damping is not changed.
    enough = damped_inverse(matrix, 1e-3)
    assert not enough.raised and enough.damping == 1e-3


@pytest.mark.parametrize("n", [1, 5])
def test_zero(n):
    zero = torch.zeros(n, n)
    found = damped_inverse(zero, 1e-6)
    assert not found.raised and torch.allclose(found.inverse, 1e6 * torch.eye(n, dtype=torch.float64))
    assert found.condition == pytest.approx(1)
    bare = damped_inverse(zero, 0.0)
    assert bare.raised and bare.damping > 0
    assert torch.allclose(bare.inverse * bare.damping, torch.eye(n, dtype=torch.float64))
    assert bare.scaled_condition == pytest.approx(1)


def test_scales_of_the_diagonal_are_no_reason_to_raise():
    """Rounding errors of a float32 covariance are relative to its variances: small variances are known as well."""
    variances = logspace(-12, 12, 9)
    for correlation in (torch.eye(9, dtype=torch.float64), of_spectrum(logspace(-2, 0, 9)) + torch.eye(9)):
        root = variances.sqrt() / correlation.diagonal().sqrt()
        matrix = (correlation * root * root[:, None]).float()
        found = damped_inverse(matrix, 0.0)
        assert not found.raised
        check(found, matrix, 0.0)
        assert found.condition > 1e20


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e-14, 1e-3, 1e3, 1e14, 1e20])
def test_scale_does_not_matter(scale):
    matrix = of_spectrum(logspace(-3, 0, 10)) * scale
    found = damped_inverse(matrix, 0.0)
    assert not found.raised
    plain = damped_inverse(of_spectrum(logspace(-3, 0, 10)), 0.0)
    assert torch.allclose(found.inverse * scale, plain.inverse, rtol=1e-10, atol=1e-12 * 1e3)
    assert found.scaled_condition == pytest.approx(plain.scaled_condition, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-14, 1e25, 1e-6, 1e6, 1e14])
def test_scale_does_not_matter_to_the_condition(scale):
    matrix = of_spectrum(logspace(-3, 0, 10)) * scale
    assert 250 <= damped_inverse(matrix, 0.0).condition <= 1000 * (1 + 1e-6)


def test_a_float64_argument_is_not_written_to():
    matrix = of_spectrum(logspace(-3, 0, 6))
    before = matrix.clone()
    found = damped_inverse(matrix, 0.5)
    assert torch.equal(matrix, before)
    assert found.matrix.data_ptr() != matrix.data_ptr()
    bare = damped_inverse(matrix, 0.0)
    assert bare.matrix.data_ptr() != matrix.data_ptr()


def test_the_same_twice_and_torchs_generator_left_alone():
    matrix = of_spectrum(logspace(-3, 0, 30))
    state = torch.random.get_rng_state()
    one, two = damped_inverse(matrix, 1e-6), damped_inverse(matrix, 1e-6)
    assert torch.equal(one.inverse, two.inverse)
    assert (one.condition, one.scaled_condition) == (two.condition, two.scaled_condition)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_ends_for_matrices_that_are_no_covariance():
    """With enough damping anything symmetric is positive definite."""
    for matrix in (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), -torch.eye(3), of_spectrum(torch.tensor([-5.0, 1.0, 2.0]))):
        found = damped_inverse(matrix, 0.0)
        assert found.raised
        check(found, matrix, 0.0)


@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e300])
def test_no_damping_that_float64_can_hold_is_enough(damping):
    swap = torch.tensor([[0.0, 1e308], [1e308, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no damping.*1\.0e\+308"):
        damped_inverse(swap, damping)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(3),
        torch.zeros(3, 2),
        torch.zeros(0, 0),
        torch.zeros(2, 2, 2),
        torch.full((2, 2), math.nan),
        torch.tensor([[math.inf, 0.0], [0.0, 1.0]]),
        torch.tensor([[1.0, math.nan], [0.0, 1.0]]),
    ],
)
def test_what_is_no_finite_square_matrix_is_refused(matrix):
    with pytest.raises(ValueError, match=r"square|finite"):
        damped_inverse(matrix, 1e-6)


@pytest.mark.parametrize("damping", [-1e-6, math.nan, math.inf])
def test_a_damping_out_of_range_is_refused(damping):
    with pytest.raises(ValueError, match="damping"):
        damped_inverse(torch.eye(2), damping)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    st.floats(-25, 25),
    st.floats(-25, 25),
    st.integers(0, 2**16),
)
def test_the_factored_split_of_a_damping_without_a_unit(n, m, diagonal, damping, log_inputs, log_outputs, seed):
    """Martens and Grosse: pi sqrt(l) on one factor and sqrt(l) / pi on the other, l relative to the product's mean."""
    Z = of_spectrum(logspace(-3, 0, n), seed) * 10.0**log_inputs
    Y = of_spectrum(logspace(-3, 0, m), seed + 1) * 10.0**log_outputs
    on_inputs, on_outputs = factored_damping(Z, Y.diagonal() if diagonal else Y, damping)
    product = torch.kron(Y, Z).diagonal().mean()
    assert on_inputs * on_outputs == pytest.approx(float(damping * product), rel=1e-10)
    pi = (Z.diagonal().mean() / Y.diagonal().mean()).sqrt()
    assert on_inputs / on_outputs == pytest.approx(float(pi.square()), rel=1e-10)
    scaled = factored_damping(Z * 10.0**-log_inputs, Y * 10.0**-log_outputs, damping)
    assert scaled == pytest.approx((on_inputs * 10.0**-log_inputs, on_outputs * 10.0**-log_outputs), rel=1e-10)


def test_the_factored_split_where_a_factor_is_zero_or_negative_by_rounding():
    assert factored_damping(torch.zeros(3, 3), torch.ones(2), 0.25) == (0.0, 0.5)
    assert factored_damping(torch.tensor([1.0, -1e-9]), torch.ones(2), 4.0) == (1.0, 2.0)
    assert factored_damping(torch.eye(2), torch.ones(2), 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("damping", [-1e-6, math.nan, math.inf])
def test_a_factored_damping_out_of_range_is_refused(damping):
    with pytest.raises(ValueError, match="damping"):
        factored_damping(torch.eye(2), torch.ones(2), damping)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("n", [1, 7, 60])
def test_what_noise_of_the_matrix_itself_leaves(n, damping):
    matrix = of_spectrum(logspace(-3, 0, n), n)
    solved = damped_inverse(matrix, damping)
    inverse = torch.linalg.inv(plus(matrix, damping))
    expected = inverse @ matrix @ inverse
    assert torch.allclose(solved.spread(), expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()))
    assert solved.spread_trace() == pytest.approx(float(expected.trace()), rel=1e-8)
    norm = float(torch.linalg.matrix_norm(expected, 2))
    assert 0.5 * norm <= solved.spread_norm() <= norm * (1 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.data(), st.floats(-20, 20), st.booleans(), st.integers(0, 2**16))
def test_the_numerical_rank_is_the_number_of_tokens_where_these_are_few(n, data, log_scale, single, seed):
    tokens = data.draw(st.integers(0, 2 * n))
    silent = data.draw(st.integers(0, n - 1))
    x = 10.0 ** (log_scale / 2) * normal(tokens, n, seed=seed)
    x = x.float() if single else x
    x[:, :silent] = 0
    values = eigenvalues((x.double().T @ x.double())[silent:, silent:])
    # Neighbours of what rounding hides could be counted either way.
    assume(tokens == 0 or values[-min(tokens, n - silent)] > 1e-2 * values[-1])
    assert numerical_rank(x.T @ x / max(1, tokens)) == min(tokens, n - silent)


@pytest.mark.parametrize("n", [5, 80])
@pytest.mark.parametrize("floor", [-4, -9])
def test_the_numerical_rank_counts_eigenvalues_beyond_rounding(n, floor):
    """With ones on the diagonal, so that nothing is to be scaled: a circulant matrix."""
    wave = logspace(floor, 0, n // 2 + 1)
    values = torch.cat([wave, wave[1 : (n + 1) // 2].flip(0)])
    row = torch.fft.ifft(values / values.mean()).real
    matrix = torch.stack([row.roll(k) for k in range(n)])
    expected = int((eigenvalues(matrix) > n * EPS32).sum())
    assert numerical_rank(matrix) == expected and (expected == n) == (floor == -4)
    scale = 10.0 ** torch.linspace(-12, 12, n, dtype=torch.float64)
    assert numerical_rank(matrix * scale * scale[:, None]) == expected
