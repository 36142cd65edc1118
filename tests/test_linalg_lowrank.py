import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer, active_count, get_ident

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.linalg.adam import Path
from headstart.linalg.lowrank import adam_lowrank, squared_error, svd_lowrank_factors
from headstart.linalg.svd import TruncatedSVD, eckart_young_tail, truncated_svd
from oracles import published_adam, relative


def problem(
    n: int, d_out: int, d_in: int, r: int, dtype: torch.dtype = torch.float32, std: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, d_out, d_in), (n, r, d_in), (n, d_out, r))
    W, A0, B0 = (std * torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return W, A0, B0


def optimum(W: Tensor, r: int) -> Tensor:
    return torch.stack([torch.linalg.svdvals(w.double())[r:].square().sum() for w in W])


# Weights of 0.02 have gradients near Adam's eps of 1e-8, where the mean in the loss makes a difference.
@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torch(dtype: torch.dtype, std: float) -> None:
    W, A0, B0 = problem(2, 48, 30, 4, dtype, std)
    fit = adam_lowrank(W, A0, B0, steps=200, lr=1e-3, decay=0.7, decay_every=60)
    for i in range(2):
        A, B = published_adam(W[i], A0[i], B0[i], steps=200, lr=1e-3, decay=0.7, decay_every=60)
        bound = 1e-4 if dtype == torch.float32 else 1e-9
        assert relative(fit.A[i], A) < bound and relative(fit.B[i], B) < bound
        assert float(fit.error[i]) == pytest.approx(float((W[i] - B @ A).double().square().sum()), rel=1e-4)
    assert fit.steps.tolist() == [200, 200]
    assert fit.A.dtype == fit.B.dtype == dtype and fit.error.dtype == torch.float64


def test_defaults_are_the_published_ones() -> None:
    W, A0, B0 = problem(1, 12, 10, 2, torch.float64)
    calls: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        adam_lowrank(W, A0, B0, progress=stop_at(calls, 100))
    assert calls == [(0, 20_000), (100, 20_000)]
    fit = adam_lowrank(W, A0, B0, steps=5_010)
    A, B = published_adam(W[0], A0[0], B0[0], steps=5_010, lr=5e-4, decay=0.9, decay_every=5_000)
    assert relative(fit.A[0], A) < 1e-6 and relative(fit.B[0], B) < 1e-6


def stop_at(calls: list[tuple[int, int]], step: int):
    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        if done >= step:
            raise KeyboardInterrupt

    return progress


def test_zero_steps_return_the_draw() -> None:
    W, A0, B0 = problem(3, 9, 7, 2)
    fit = adam_lowrank(W, A0, B0, steps=0)
    assert torch.equal(fit.A, A0) and torch.equal(fit.B, B0)
    assert fit.A.data_ptr() != A0.data_ptr() and fit.B.data_ptr() != B0.data_ptr()
    torch.testing.assert_close(fit.error, (W - B0 @ A0).double().square().sum((1, 2)), rtol=1e-5, atol=0)
    assert fit.steps.tolist() == [0, 0, 0]


def test_the_start_is_left_as_it_is() -> None:
    W, A0, B0 = problem(2, 9, 7, 2)
    before = (W.clone(), A0.clone(), B0.clone())
    adam_lowrank(W, A0, B0, steps=5)
    assert all(torch.equal(x, y) for x, y in zip((W, A0, B0), before, strict=True))


def test_descent_ends_at_the_eckart_young_bound() -> None:
    W, A0, B0 = problem(2, 16, 12, 3, torch.float64)
    fit = adam_lowrank(W, A0, B0, steps=6_000, lr=2e-3, decay=0.5, decay_every=1_000)
    bound = optimum(W, 3)
    assert bool((fit.error >= bound * (1 - 1e-12)).all())
    torch.testing.assert_close(fit.error, bound, rtol=1e-4, atol=0)


def test_a_matrix_stops_once_it_is_near_the_bound() -> None:
    W, A0, B0 = problem(4, 16, 12, 3, torch.float64)
    bound = optimum(W, 3)
    fit = adam_lowrank(W, A0, B0, steps=6_000, lr=2e-3, tolerance=0.01, optimum=bound, check_every=50)
    assert bool((fit.error <= 1.01 * bound).all())
    assert len(set(fit.steps.tolist())) > 1 and int(fit.steps.max()) < 6_000
    assert bool((fit.steps % 50 == 0).all())
    for i, steps in enumerate(fit.steps.tolist()):
        # Stopped is where the same descent without a tolerance is after so many steps, and no check earlier.
        one = slice(i, i + 1)
        full = adam_lowrank(W[one], A0[one], B0[one], steps=steps, lr=2e-3)
        assert torch.equal(fit.A[i], full.A[0]) and torch.equal(fit.B[i], full.B[0])
        earlier = adam_lowrank(W[one], A0[one], B0[one], steps=steps - 50, lr=2e-3)
        assert float(earlier.error[0]) > 1.01 * float(bound[i])


def test_a_start_at_the_bound_takes_no_step() -> None:
    W, _, _ = problem(1, 16, 12, 3, torch.float64)
    A, B = svd_lowrank_factors(truncated_svd(W[0], 3), "balanced")
    fit = adam_lowrank(W, A[None], B[None], steps=100, tolerance=1e-6, optimum=optimum(W, 3))
    assert fit.steps.tolist() == [0]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Sides that are no multiple of a vector register: there a matrix inside a stack is aligned unlike one alone.
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 9), st.integers(1, 3))
@example(20, 14, 3, 2)
@example(67, 129, 8, 2)
def test_a_matrix_alone_and_among_others_is_the_same_to_the_last_bit(d_out: int, d_in: int, r: int, count: int) -> None:
    W, A0, B0 = problem(4, d_out, d_in, r)
    with threads(count):
        together = adam_lowrank(W, A0, B0, steps=60, lr=1e-2)
        listed = adam_lowrank(list(W), A0, B0, steps=60, lr=1e-2)
        turned = adam_lowrank(W.flip(0), A0.flip(0), B0.flip(0), steps=60, lr=1e-2)
    for i in range(4):
        one = slice(i, i + 1)
        alone = adam_lowrank(W[one], A0[one], B0[one], steps=60, lr=1e-2)
        for fit, at in ((together, i), (listed, i), (turned, 3 - i)):
            assert torch.equal(fit.A[at], alone.A[0]) and torch.equal(fit.B[at], alone.B[0])
            assert fit.error[at] == alone.error[0] and fit.history[at] == alone.history[0]


def test_fewer_steps_are_the_beginning_of_more() -> None:
    W, A0, B0 = problem(1, 40, 30, 4)
    short = adam_lowrank(W, A0, B0, steps=100)
    # A descent of more steps, stopped where the short one ended.
    long = adam_lowrank(W, A0, B0, steps=20_000, tolerance=1e-6, optimum=short.error)
    assert long.steps.tolist() == [100]
    assert torch.equal(long.A, short.A) and torch.equal(long.B, short.B)


def test_history_is_the_way_there() -> None:
    W, A0, B0 = problem(2, 20, 14, 3)
    fit = adam_lowrank(W, A0, B0, steps=2_050, lr=1e-3, check_every=10)
    for i, history in enumerate(fit.history):
        assert [step for step, _ in history] == [*range(0, 2_050, 30), 2_050]
        for step, mean in (history[0], history[1], history[7], history[-1]):
            A, B = published_adam(W[i], A0[i], B0[i], steps=step, lr=1e-3, decay=0.9, decay_every=5_000)
            assert mean == pytest.approx(float((W[i] - B @ A).square().mean()), rel=1e-4)
        assert history[-1][1] == pytest.approx(float(fit.error[i]) / (20 * 14), rel=1e-12)
    assert [step for step, _ in adam_lowrank(W, A0, B0, steps=0).history[0]] == [0]
    assert len(adam_lowrank(W[:1], A0[:1], B0[:1], steps=500, check_every=1).history[0]) == 101
    bound = optimum(W, 3)
    early = adam_lowrank(W, A0, B0, steps=6_000, lr=1e-2, tolerance=0.02, optimum=bound, check_every=10)
    for history, taken, least in zip(early.history, early.steps.tolist(), bound.tolist(), strict=True):
        assert history[-1][0] == taken < 6_000
        assert history[-1][1] * 20 * 14 <= 1.02 * least < history[-2][1] * 20 * 14


def test_a_rate_that_vanishes_leaves_the_factors() -> None:
    W, A0, B0 = problem(1, 9, 7, 2)
    once = adam_lowrank(W, A0, B0, steps=1, decay=1e-30, decay_every=1)
    more = adam_lowrank(W, A0, B0, steps=40, decay=1e-30, decay_every=1)
    assert torch.equal(once.A, more.A) and not torch.equal(once.A, A0)


def test_progress_counts_to_the_end() -> None:
    W, A0, B0 = problem(1, 6, 5, 2)
    calls: list[tuple[int, int]] = []
    adam_lowrank(W, A0, B0, steps=25, check_every=10, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 25), (10, 25), (20, 25), (25, 25)]


def test_progress_of_several_is_their_mean_in_the_callers_thread() -> None:
    W, A0, B0 = problem(3, 6, 5, 2)
    calls: list[tuple[int, int, object]] = []
    with threads(2):
        adam_lowrank(
            W, A0, B0, steps=30, check_every=10, progress=lambda done, total: calls.append((done, total, get_ident()))
        )
    assert calls[0][:2] == (0, 30) and calls[-1][:2] == (30, 30)
    assert [done for done, *_ in calls] == sorted(done for done, *_ in calls)
    assert {ident for *_, ident in calls} == {get_ident()}


@pytest.mark.parametrize("count", [1, 2])
def test_an_interrupt_ends_every_descent(count: int) -> None:
    W, A0, B0 = problem(6, 30, 20, 4)
    calls: list[tuple[int, int]] = []
    before = active_count()
    with threads(count):
        with pytest.raises(KeyboardInterrupt):
            adam_lowrank(W, A0, B0, steps=10**9, progress=stop_at(calls, 100))
        assert torch.get_num_threads() == count
    assert active_count() == before


def test_control_c_ends_every_descent() -> None:
    W, A0, B0 = problem(2, 30, 20, 4)
    before = active_count()
    # A shell's background jobs are started with the signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer = Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        # Nothing is looked at, so that nothing but the signal can wake the waiting thread.
        with pytest.raises(KeyboardInterrupt):
            adam_lowrank(W, A0, B0, steps=10**9, check_every=10**9)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert active_count() == before


def test_what_fails_in_a_descent_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> Path:
        raise MemoryError("full")

    monkeypatch.setattr("headstart.linalg.lowrank.descend", fail)
    W, A0, B0 = problem(3, 6, 5, 2)
    with pytest.raises(MemoryError, match="full"):
        adam_lowrank(W, A0, B0, steps=5)


def test_gradients_are_neither_needed_nor_left() -> None:
    W, A0, B0 = problem(2, 9, 7, 2)
    expected = adam_lowrank(W, A0, B0, steps=5)
    fit = adam_lowrank(W.requires_grad_(), A0.requires_grad_(), B0.requires_grad_(), steps=5)
    assert torch.equal(fit.A, expected.A) and not fit.A.requires_grad and not fit.error.requires_grad


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(-6, 6))
def test_squared_error(d_out: int, d_in: int, r: int, log_scale: int) -> None:
    W, A, B = problem(2, d_out, d_in, r, torch.float64, 10.0**log_scale)
    expected = (W - B @ A).square().sum((1, 2))
    size = float(W.square().sum() + (B.square().sum() * A.square().sum()))
    torch.testing.assert_close(squared_error(W, A, B), expected, rtol=1e-10, atol=1e-14 * size)


def small_svd(dtype: torch.dtype = torch.float32) -> tuple[TruncatedSVD, Tensor, Tensor, Tensor]:
    W, A0, B0 = problem(1, 14, 10, 4, dtype)
    return truncated_svd(W[0], 4), W[0], A0[0], B0[0]


@pytest.mark.parametrize("gauge", ["balanced", "aligned", "flow", "random"])
def test_every_gauge_has_the_same_product(gauge: str) -> None:
    svd, W, A0, B0 = small_svd()
    generator = torch.Generator().manual_seed(1)
    A, B = svd_lowrank_factors(svd, gauge, A0=A0, B0=B0, generator=generator)  # type: ignore[arg-type]
    assert A.shape == (4, 10) and B.shape == (14, 4) and A.dtype == B.dtype == torch.float32
    torch.testing.assert_close(B @ A, (svd.U * svd.S) @ svd.V.mT)
    bound = eckart_young_tail(W, svd)
    assert float((W - B @ A).square().sum()) == pytest.approx(bound, rel=1e-5)
    # A rotation keeps the two Grams equal; flow keeps the difference that they have in the draw.
    delta = float(B0.square().sum() - A0.square().sum()) / 4 if gauge == "flow" else 0.0
    torch.testing.assert_close(B.mT @ B, A @ A.mT + delta * torch.eye(4), rtol=1e-5, atol=1e-5)


def test_balanced_factors() -> None:
    svd, *_ = small_svd()
    A, B = svd_lowrank_factors(svd, "balanced")
    torch.testing.assert_close(B, svd.U * svd.S.sqrt())
    torch.testing.assert_close(A, svd.S.sqrt()[:, None] * svd.V.mT)


def test_aligned_is_the_nearest_of_all_rotations() -> None:
    svd, _, A0, B0 = small_svd()
    A, B = (x.double() for x in svd_lowrank_factors(svd, "aligned", A0=A0, B0=B0))

    def distance(Q: Tensor) -> float:
        return float((B @ Q - B0).square().sum() + (Q.mT @ A - A0).square().sum())

    best = distance(torch.eye(4, dtype=torch.float64))
    generator = torch.Generator().manual_seed(2)
    balanced_A, balanced_B = svd_lowrank_factors(svd, "balanced")
    assert best < float((balanced_B - B0).square().sum() + (balanced_A - A0).square().sum())
    for _ in range(500):
        Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
        assert distance(Q) > best
    # Turning by t in any plane: no first-order change, and a second-order rise.
    for i in range(4):
        for j in range(i):
            K = torch.zeros(4, 4, dtype=torch.float64)
            K[i, j], K[j, i] = 1.0, -1.0
            t = 1e-3
            up, down = distance(torch.linalg.matrix_exp(t * K)), distance(torch.linalg.matrix_exp(-t * K))
            # The factors are rounded to float32: a slope of 1e-7 remains.
            assert abs(up - down) / (2 * t) < 1e-6
            assert up > best and down > best


def test_aligned_brings_a_turned_start_back() -> None:
    svd, *_ = small_svd()
    generator = torch.Generator().manual_seed(3)
    A0, B0 = svd_lowrank_factors(svd, "random", generator=generator)
    A, B = svd_lowrank_factors(svd, "aligned", A0=A0, B0=B0)
    torch.testing.assert_close(A, A0, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B, B0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("delta", [0.7, -0.4])
def test_flow_has_the_norms_that_gradient_descent_ends_in(delta: float) -> None:
    generator = torch.Generator().manual_seed(6)
    W = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    # A start whose B'B - AA' is delta I, which small steps of descent leave as it is.
    A = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64)).Q.mT * 0.2**0.5
    B = torch.linalg.qr(torch.randn(9, 3, generator=generator, dtype=torch.float64)).Q * 0.2**0.5
    A, B = (A, B * ((0.2 + delta) / 0.2) ** 0.5) if delta > 0 else (A * ((0.2 - delta) / 0.2) ** 0.5, B)
    A0, B0 = A, B
    for _ in range(30_000):
        residual = W - B @ A
        A, B = A + 1e-3 * B.mT @ residual, B + 1e-3 * residual @ A.mT
    svd = truncated_svd(W.float(), 3)
    found_A, found_B = (x.double() for x in svd_lowrank_factors(svd, "flow", A0=A0.float(), B0=B0.float()))
    torch.testing.assert_close(found_B @ found_A, B @ A, rtol=1e-4, atol=1e-4)
    for mine, theirs in ((found_A, A), (found_B, B)):
        torch.testing.assert_close(torch.linalg.svdvals(mine), torch.linalg.svdvals(theirs), rtol=2e-3, atol=2e-3)


def test_flow_of_a_matrix_of_lower_rank() -> None:
    W = torch.outer(torch.arange(1.0, 6.0), torch.ones(4))
    svd = truncated_svd(W, 2)
    for scale in (0.1, 10.0):
        A, B = svd_lowrank_factors(svd, "flow", A0=torch.full((2, 4), 0.3), B0=torch.full((5, 2), 0.3 * scale))
        assert bool(torch.isfinite(A).all() and torch.isfinite(B).all())
        torch.testing.assert_close(B @ A, W, rtol=1e-5, atol=1e-5)


def test_random_gauge_is_haar() -> None:
    svd, *_ = small_svd()
    generator = torch.Generator().manual_seed(4)
    inverse = svd.U.mT / svd.S.sqrt()[:, None]
    turns = torch.stack([inverse @ svd_lowrank_factors(svd, "random", generator=generator)[1] for _ in range(2_000)])
    torch.testing.assert_close(turns.mT @ turns, torch.eye(4).expand(2_000, 4, 4), rtol=0, atol=1e-5)
    # Of a uniform 4 by 4 rotation: entries have mean 0 and mean square 1/4, the trace mean 0 and mean square 1.
    # Six standard errors of 2,000 draws; the diagonal tells QR's sign convention from the uniform law.
    assert float(turns.mean(0).abs().max()) < 6 * 0.5 / 2_000**0.5
    assert float((turns.square().mean(0) - 0.25).abs().max()) < 6 * 0.25 / 2_000**0.5
    traces = turns.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(float(traces.square().mean()) - 1) < 6 * 1.5 / 2_000**0.5
    again = torch.Generator().manual_seed(4)
    first = svd_lowrank_factors(svd, "random", generator=again)[1]
    torch.testing.assert_close(inverse @ first, turns[0])


def test_gauges_refuse_what_they_cannot_use() -> None:
    svd, _, A0, B0 = small_svd()
    with pytest.raises(ValueError, match="aligned"):
        svd_lowrank_factors(svd, "aligned", A0=A0)
    with pytest.raises(ValueError, match="aligned"):
        svd_lowrank_factors(svd, "aligned", A0=A0[:2], B0=B0[:, :2])
    with pytest.raises(ValueError, match="gauge"):
        svd_lowrank_factors(svd, "diagonal")  # type: ignore[arg-type]


def test_fit_refuses_what_does_not_fit() -> None:
    W, A0, B0 = problem(2, 6, 5, 2)
    with pytest.raises(ValueError, match="don't fit"):
        adam_lowrank(W, A0[:, :1], B0)
    with pytest.raises(ValueError, match="float32 or float64"):
        adam_lowrank(W.half(), A0, B0)
    with pytest.raises(ValueError, match="one shape"):
        adam_lowrank([W[0], W[1, :5]], A0, B0)
    with pytest.raises(ValueError, match="none"):
        adam_lowrank([], A0[:0], B0[:0])
    with pytest.raises(ValueError, match="lr"):
        adam_lowrank(W, A0, B0, lr=0.0)
    with pytest.raises(ValueError, match="optimum"):
        adam_lowrank(W, A0, B0, tolerance=0.1)
    with pytest.raises(ValueError, match="steps"):
        adam_lowrank(W, A0, B0, steps=-1)
