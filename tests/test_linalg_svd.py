import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.linalg.svd import TruncatedSVD, eckart_young_tail, in_step, truncated_svd, truncated_svd_batch
from known_layers import from_spectrum


def check(W: Tensor, svd: TruncatedSVD, k: int) -> None:
    """Compare with the exact singular values of W as given, and check every promise of the result."""
    exact = torch.linalg.svdvals(W.double())
    d_out, d_in = W.shape
    assert svd.U.shape == (d_out, k) and svd.S.shape == (k,) and svd.V.shape == (d_in, k)
    assert svd.U.dtype == svd.S.dtype == svd.V.dtype == torch.float32
    assert bool((svd.S[1:] <= svd.S[:-1]).all()) and bool((svd.S >= 0).all())
    # A zero singular value has no relative error: float64 gives it to about 1e-15 of the largest.
    floor = 1e-13 * float(exact[0])
    assert bool(((svd.S.double() - exact[:k]).abs() <= 1e-5 * exact[:k] + floor).all())
    eye = torch.eye(k, dtype=torch.float64)
    for vectors in (svd.U.double(), svd.V.double()):
        assert float((vectors.mT @ vectors - eye).abs().max()) < 2e-6
    best = svd.V.gather(0, svd.V.abs().argmax(dim=0, keepdim=True))
    assert bool((best > 0).all())
    assert svd.residual <= 1e-5
    # The optimum, whatever the gaps: the product's own error is within 1e-5 of Eckart and Young's.
    error = float((W.double() - product(svd)).square().sum())
    whole = float(exact.square().sum())
    assert error <= float(exact[k:].square().sum()) * (1 + 1e-5) + 1e-12 * whole


def product(svd: TruncatedSVD) -> Tensor:
    return (svd.U.double() * svd.S.double()) @ svd.V.double().mT


SPECTRA = {
    "flat": 1 + 1e-3 * torch.linspace(1, 0, 300, dtype=torch.float64),
    "equal": torch.ones(300, dtype=torch.float64),
    "tenfold": torch.cat([torch.ones(10, dtype=torch.float64), 0.5 * torch.linspace(1, 0, 290, dtype=torch.float64)]),
    "clusters": torch.tensor([3.0] * 3 + [2.0] * 3 + [1.999999] * 4 + [1.0] * 290, dtype=torch.float64),
    "steep": torch.logspace(0, -12, 300, dtype=torch.float64),
    "outlier": torch.cat([torch.tensor([1e4]).double(), torch.linspace(1, 0, 299, dtype=torch.float64)]),
    "power": 1 / torch.arange(1, 301, dtype=torch.float64) ** 0.5,
    "rank 3": torch.tensor([5.0, 4.0, 3.0], dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
@pytest.mark.parametrize("name", SPECTRA)
def test_values_of_hard_spectra(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = from_spectrum(*shape, SPECTRA[name].sort(descending=True).values).to(dtype)
    check(W, truncated_svd(W, 8), 8)


@settings(max_examples=40, deadline=None)
@given(
    d_out=st.integers(1, 260),
    d_in=st.integers(1, 260),
    share=st.floats(0, 1),
    decay=st.floats(0, 3),
    log_scale=st.integers(-25, 25),
    seed=st.integers(0, 2**31),
)
def test_values_of_any_shape_scale_and_decay(
    d_out: int, d_in: int, share: float, decay: float, log_scale: int, seed: int
) -> None:
    n = min(d_out, d_in)
    k = 1 + int(share * (n - 1)) if seed % 2 else min(n, 1 + seed % 9)
    spectrum = torch.arange(1, n + 1, dtype=torch.float64) ** -decay
    # In float64: rounding such small or large entries to float32 would change the matrix, not the method.
    W = from_spectrum(d_out, d_in, spectrum, seed) * 10.0**log_scale
    check(W, truncated_svd(W, k, seed=seed), k)


def test_the_krylov_space_is_what_answers_for_a_weight() -> None:
    S = torch.cat([torch.linspace(2, 1.2, 12, dtype=torch.float64), torch.rand(288, dtype=torch.float64)])
    W = from_spectrum(300, 500, S.sort(descending=True).values).float()
    svd = truncated_svd(W, 8)
    # So few steps can't have been spent on float32 in vain and on float64 again.
    assert not svd.exact and 0 < svd.iterations < 24
    check(W, svd, 8)


@pytest.mark.parametrize("gap", [0.3, 0.1, 0.03])
def test_product_is_the_optimal_one_where_there_is_a_gap(gap: float) -> None:
    S = torch.linspace(1, 0.8, 8, dtype=torch.float64)
    S = torch.cat([S, torch.linspace(0.8 * (1 - gap), 0, 292, dtype=torch.float64)])
    W = from_spectrum(300, 400, S).float()
    svd = truncated_svd(W, 8)
    assert not svd.exact
    U, exact, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    optimal = (U[:, :8] * exact[:8]) @ Vh[:8]
    assert float((product(svd) - optimal).norm() / optimal.norm()) < 1e-4


@pytest.mark.parametrize("k", [1, 8, 30, 300])
def test_large_shares_of_the_spectrum(k: int) -> None:
    W = torch.randn(300, 310, generator=torch.Generator().manual_seed(1))
    svd = truncated_svd(W, k)
    check(W, svd, k)
    assert svd.exact or k < 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_as_it_is(dtype: torch.dtype) -> None:
    W = torch.randn(150, 170, generator=torch.Generator().manual_seed(2)).to(dtype)
    check(W, truncated_svd(W, 4), 4)


@pytest.mark.parametrize("shape", [(5, 7), (300, 400)])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_zero_matrix(shape: tuple[int, int], which: str) -> None:
    svd = truncated_svd(torch.zeros(shape), 3, which=which)  # type: ignore[arg-type]
    assert bool((svd.S == 0).all()) and svd.residual == 0
    for vectors in (svd.U, svd.V):
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(3))


def test_one_entry_matrix_and_its_sign() -> None:
    svd = truncated_svd(torch.tensor([[-2.0]]), 1)
    assert (float(svd.U), float(svd.S), float(svd.V)) == (-1.0, 2.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("condition", [3, 1e3, 1e6, 1e9])
def test_what_the_gram_matrix_hides_is_found_in_the_matrix(condition: float, which: str, dtype: torch.dtype) -> None:
    S = torch.logspace(0, -math.log10(condition), 200, dtype=torch.float64)
    W = from_spectrum(220, 200, S).to(dtype)
    exact = torch.linalg.svdvals(W.double())
    expected = exact[:8] if which == "largest" else exact[-8:]
    svd = truncated_svd(W, 8, which=which)  # type: ignore[arg-type]
    assert svd.residual <= 1e-5 and svd.exact
    torch.testing.assert_close(svd.S.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_smallest_triplets(shape: tuple[int, int]) -> None:
    S = torch.logspace(0, -6, 40, dtype=torch.float64)
    W = from_spectrum(*shape, S)
    svd = truncated_svd(W, 5, which="smallest")
    assert svd.exact
    torch.testing.assert_close(svd.S.double(), S[-5:], rtol=1e-5, atol=0)
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)
    expected = (U[:, -5:] * values[-5:]) @ Vh[-5:]
    assert float((product(svd) - expected).norm() / expected.norm()) < 1e-5


def test_no_steps_allowed_falls_back_to_the_dense_decomposition() -> None:
    W = torch.randn(300, 280, generator=torch.Generator().manual_seed(3))
    for steps in (0, 1):
        svd = truncated_svd(W, 8, max_iterations=steps)
        assert svd.exact
        check(W, svd, 8)


def test_a_tolerance_beyond_float32_is_met_in_float64() -> None:
    S = torch.cat([torch.linspace(2, 1.2, 12, dtype=torch.float64), torch.rand(288, dtype=torch.float64)])
    svd = truncated_svd(from_spectrum(300, 400, S.sort(descending=True).values).float(), 8, tol=1e-9)
    assert svd.residual <= 1e-9 and not svd.exact


def test_residual_is_the_measured_one() -> None:
    W = from_spectrum(300, 350, torch.linspace(2, 1, 300, dtype=torch.float64)).float()
    svd = truncated_svd(W, 8, tol=0.1)
    U, S, V = svd.U.double(), svd.S.double(), svd.V.double()
    right = (W.double() @ V - U * S).norm(dim=0) / S
    left = (W.double().mT @ U - V * S).norm(dim=0) / S
    measured = float(torch.maximum(right, left).max())
    # The result is rounded to float32, which the residual doesn't count.
    assert measured == pytest.approx(svd.residual, rel=1e-2, abs=1e-6)
    assert 1e-4 < svd.residual <= 0.1 and not svd.exact


def test_same_seed_same_bits_and_other_seed_same_values() -> None:
    W = from_spectrum(300, 350, SPECTRA["power"]).float()
    first, again, other = truncated_svd(W, 8), truncated_svd(W, 8), truncated_svd(W, 8, seed=1)
    assert torch.equal(first.U, again.U) and torch.equal(first.S, again.S) and torch.equal(first.V, again.V)
    assert not torch.equal(first.U, other.U)
    torch.testing.assert_close(first.S, other.S, rtol=1e-5, atol=0)
    # The sign convention makes the vectors comparable, too.
    torch.testing.assert_close(first.U, other.U, rtol=0, atol=1e-4)


def test_batch_is_each_alone_and_leaves_the_threads_alone() -> None:
    W = torch.stack([from_spectrum(300, 260, SPECTRA["power"][:260], seed).float() for seed in range(3)])
    before = torch.get_num_threads()
    together = truncated_svd_batch(W, 4)
    assert torch.get_num_threads() == before
    for matrix, svd in zip(W, together, strict=True):
        alone = truncated_svd(matrix, 4)
        torch.testing.assert_close(svd.S, alone.S, rtol=1e-6, atol=0)
        # Rounding depends on the number of threads; the vectors carry it over the gaps.
        torch.testing.assert_close(product(svd), product(alone), rtol=0, atol=1e-4)
    assert truncated_svd_batch(W[:0], 4) == []


@pytest.mark.parametrize("shape", [(300, 260), (260, 300)])
def test_in_step_is_each_alone(shape: tuple[int, int]) -> None:
    spectra = [SPECTRA["power"][:260], torch.linspace(1, 0.5, 260, dtype=torch.float64), SPECTRA["power"][:260] * 1e3]
    matrices = [from_spectrum(*shape, spectrum, seed).float() for seed, spectrum in enumerate(spectra)]
    settled = in_step(matrices, 4, tol=1e-5, max_iterations=64, seed=0)
    assert list(settled) == [0, 1, 2]
    for place, svd in settled.items():
        check(matrices[place], svd, 4)
        alone = truncated_svd(matrices[place], 4)
        torch.testing.assert_close(svd.S, alone.S, rtol=1e-6, atol=0)
        if place != 1:  # whose singular values lie too close for their vectors to be told apart
            torch.testing.assert_close(product(svd), product(alone), rtol=0, atol=1e-4 * float(alone.S[0]))


def test_in_step_leaves_what_it_can_not_settle_and_settles_the_others() -> None:
    good = from_spectrum(300, 260, SPECTRA["power"][:260]).float()
    hidden = from_spectrum(300, 260, 10.0 ** -torch.arange(260, dtype=torch.float64).clamp_max(12)).float()
    broken = good.clone()
    broken[3, 4] = math.nan
    matrices = [good, hidden, torch.zeros(300, 260), good * 1e20, good.double(), good[:, :200], broken, -3 * good]
    settled = in_step(matrices, 8, tol=1e-5, max_iterations=64, seed=0)
    assert list(settled) == [0, 7]
    for place, svd in settled.items():
        check(matrices[place], svd, 8)
    assert in_step(matrices[:1], 8, tol=1e-5, max_iterations=64, seed=0) == {}
    assert in_step([good[:40, :40]] * 2, 8, tol=1e-5, max_iterations=64, seed=0) == {}


def test_eckart_young_tail() -> None:
    W = from_spectrum(60, 50, torch.linspace(1, 0, 50, dtype=torch.float64))
    expected = float(torch.linspace(1, 0, 50, dtype=torch.float64)[6:].square().sum())
    assert eckart_young_tail(W, truncated_svd(W, 6)) == pytest.approx(expected, rel=1e-6)
    whole = from_spectrum(60, 50, torch.ones(4, dtype=torch.float64))
    assert 0 <= eckart_young_tail(whole, truncated_svd(whole, 6)) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    W = torch.ones(4, 4)
    W[1, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        truncated_svd(W, 2)


def test_arguments_out_of_range_are_refused() -> None:
    W = torch.ones(4, 5)
    for k in (0, 5):
        with pytest.raises(ValueError, match="k must be from 1 to 4"):
            truncated_svd(W, k)
    with pytest.raises(ValueError, match="which"):
        truncated_svd(W, 1, which="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tol"):
        truncated_svd(W, 1, tol=0.0)
    with pytest.raises(ValueError, match="max_iterations"):
        truncated_svd(W, 1, max_iterations=-1)
    with pytest.raises(ValueError, match="floating-point"):
        truncated_svd(W.int(), 1)
    with pytest.raises(ValueError, match="floating-point"):
        truncated_svd(W[:0], 1)
    with pytest.raises(ValueError, match="stack"):
        truncated_svd_batch(W, 1)
