import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.linalg.product import product_norm, product_svd, truncate_product

shapes = st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 12))


def factors(d_out: int, r: int, d_in: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    return B.to(dtype), torch.randn(r, d_in, generator=generator, dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31), log_scale=st.integers(-30, 30))
def test_svd_of_the_product(shape: tuple[int, int, int], seed: int, log_scale: int) -> None:
    B, A = factors(*shape, seed)
    B, A = B * 10.0**log_scale, A * 10.0 ** (log_scale // 2)
    dense = B @ A
    U, S, V = product_svd(B, A)
    k = min(shape)
    assert U.shape == (shape[0], k) and S.shape == (k,) and V.shape == (shape[2], k)
    exact = torch.linalg.svdvals(dense)
    size = float(B.norm() * A.norm())
    assert float((S - exact[:k]).abs().max()) < 1e-13 * size
    assert float(((U * S) @ V.mT - dense).norm()) < 1e-13 * size
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(U.mT @ U, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(V.mT @ V, eye, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_norm_of_the_product(shape: tuple[int, int, int], seed: int) -> None:
    B, A = factors(*shape, seed)
    dense = float((B @ A).norm())
    assert product_norm(B, A) == pytest.approx(dense, rel=1e-9, abs=1e-8 * float(B.norm() * A.norm()))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, rank=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_truncation_is_the_best_one(shape: tuple[int, int, int], rank: int, seed: int) -> None:
    B, A = factors(*shape, seed)
    left, right, error = truncate_product(B, A, rank)
    assert left.shape == (shape[0], rank) and right.shape == (rank, shape[2])
    S = torch.linalg.svdvals(B @ A)
    expected = float(S[rank:].norm() / S.norm())
    assert error == pytest.approx(expected, rel=1e-8, abs=1e-11)
    measured = float((left @ right - B @ A).norm() / (B @ A).norm())
    assert measured == pytest.approx(expected, rel=1e-8, abs=1e-11)
    # Balanced: both Grams are the same diagonal matrix.
    torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=1e-9, atol=1e-9)


def test_truncation_that_keeps_everything_loses_nothing() -> None:
    B, A = factors(30, 6, 20, seed=0, dtype=torch.float32)
    left, right, error = truncate_product(torch.cat([B, -B], 1), torch.cat([A, A / 2]), 6)
    assert error < 1e-7
    torch.testing.assert_close(left @ right, B @ A / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_come_in_the_type_of_the_factors(dtype: torch.dtype) -> None:
    B, A = factors(9, 4, 7, seed=1, dtype=dtype)
    assert {x.dtype for x in product_svd(B, A)} == {dtype}
    left, right, _ = truncate_product(B, A, 2)
    assert left.dtype == right.dtype == dtype
    # The factors are rounded once, at the end.
    U, S, V = product_svd(B.double(), A.double())
    torch.testing.assert_close(left, (U[:, :2] * S[:2].sqrt()).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(right, (V[:, :2] * S[:2].sqrt()).mT.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("which", ["B", "A"])
def test_zero_product(which: str) -> None:
    B, A = factors(8, 3, 5, seed=2)
    (B if which == "B" else A).zero_()
    assert product_norm(B, A) == 0
    left, right, error = truncate_product(B, A, 2)
    assert error == 0 and bool((left @ right == 0).all())
    assert bool((product_svd(B, A)[1] == 0).all())


def test_a_product_that_cancels_is_seen_by_the_svd() -> None:
    B, A = factors(8, 3, 5, seed=3)
    both, opposed = torch.cat([B, B], 1), torch.cat([A, -A])
    size = float(B.norm() * A.norm())
    assert float(product_svd(both, opposed)[1].max()) < 1e-14 * size
    assert product_norm(both, opposed) < 1e-7 * size


def test_factors_that_do_not_fit_are_refused() -> None:
    B, A = factors(8, 3, 5, seed=4)
    with pytest.raises(ValueError, match="product"):
        product_svd(B, A[:2])
    with pytest.raises(ValueError, match="product"):
        product_norm(B[:0], A)
    with pytest.raises(ValueError, match="floating-point"):
        product_norm(B.int(), A.int())
    with pytest.raises(ValueError, match="rank"):
        truncate_product(B, A, 0)
