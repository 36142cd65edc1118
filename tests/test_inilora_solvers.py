"""IniLoRA's closed form in each gauge, and its Adam, against dense float64 formulas and torch's own optimizer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from headstart.methods import Moments
from headstart.methods.base import Factors
from inputs import product
from known_layers import (
    D_IN,
    D_OUT,
    SHAPES,
    R,
    assert_drawn,
    assert_uncorrelated,
    normal,
    of_weight,
    problems,
)
from oracles import best, published_adam, relative, tail


def the_draw(given_layer):
    start = hs.IniLoRA(solver="adam", steps=0).factors(given_layer)
    return start.A, start.B


def dense_error(W, start, s=1.0):
    return float((W.double() / s - product(start)).square().sum())


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("gauge", ["aligned", "random", "balanced"])
@pytest.mark.parametrize(
    ("d_out", "d_in", "r"), [*((*shape, 5) for shape in SHAPES), (192, 576, 8), (16, 16, 1), (20, 12, 12)]
)
def test_inilora_closed_form_is_the_best_product(d_out, d_in, r, gauge, s):
    weights = [normal(d_out, d_in, std=0.05, seed=seed) for seed in range(2)]
    given_layers = [of_weight(W, r, s=s, name=f"layer{place}") for place, W in enumerate(weights)]
    starts = hs.IniLoRA(solver="svd", gauge=gauge).factors_batch(given_layers)
    for W, start in zip(weights, starts, strict=True):
        assert relative(s * product(start), best(W, r)) < 1e-5
        # At full rank nothing is left but rounding.
        rounding = 1e-12 * float((W.double() / s).square().sum())
        assert start.info["bound"] == pytest.approx(tail(W, r) / s**2, rel=1e-5, abs=rounding)
        error = dense_error(W, start, s)
        assert start.info["error"] == pytest.approx(error, rel=1e-9)
        assert error == pytest.approx(tail(W, r) / s**2, rel=1e-6, abs=rounding)
        assert start.info["steps"] == 0 and start.history == []
        # All three gauges are rotations: the same norms, B'B and AA' with the same eigenvalues.
        S = torch.linalg.svdvals(W.double())[:r].flip(0) / s
        for gram in (start.B.double().T @ start.B.double(), start.A.double() @ start.A.double().T):
            assert torch.allclose(torch.linalg.eigvalsh(gram), S, rtol=1e-5)


def test_inilora_balanced_is_pissa():
    W = normal(40, 25)
    start = hs.IniLoRA(solver="svd", gauge="balanced").factors(of_weight(W, 6, s=1.5))
    pissa = hs.PiSSA().factors(of_weight(W, 6, s=1.5))
    for i in range(6):
        sign = torch.sign(start.A[i] @ pissa.A[i])
        assert torch.allclose(start.A[i], sign * pissa.A[i], atol=1e-5)
        assert torch.allclose(start.B[:, i], sign * pissa.B[:, i], atol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_inilora_aligned_is_the_rotation_nearest_to_the_draw(d_out, d_in):
    W = normal(d_out, d_in, std=0.3)
    given_layer = of_weight(W, 5)
    A0, B0 = the_draw(given_layer)
    starts = {g: hs.IniLoRA(solver="svd", gauge=g).factors(given_layer) for g in ("aligned", "random", "balanced")}

    def distance(A, B):
        return float((A.double() - A0.double()).square().sum() + (B.double() - B0.double()).square().sum())

    aligned = starts["aligned"]
    least = distance(aligned.A, aligned.B)
    assert least < distance(starts["random"].A, starts["random"].B)
    assert least < distance(starts["balanced"].A, starts["balanced"].B)
    for seed in range(50):
        Q = torch.linalg.qr(normal(5, 5, seed=seed)).Q
        assert least < distance(Q.T @ aligned.A, aligned.B @ Q)
    # Procrustes: at the optimum B'B0 + A A0' is symmetric and positive semidefinite.
    M = aligned.B.double().T @ B0.double() + aligned.A.double() @ A0.double().T
    assert torch.allclose(M, M.T, atol=1e-5 * float(M.norm()))
    assert float(torch.linalg.eigvalsh((M + M.T) / 2).min()) > -1e-5 * float(M.norm())


def test_inilora_random_gauge_is_no_other_gauge():
    W = normal(40, 25)
    by_gauge = {
        g: hs.IniLoRA(solver="svd", gauge=g).factors(of_weight(W, 6)).A for g in ("aligned", "random", "balanced")
    }
    for one, other in (("random", "balanced"), ("random", "aligned"), ("aligned", "balanced")):
        assert relative(by_gauge[one], by_gauge[other]) > 0.1


@pytest.mark.parametrize("s", [1.0, 4.0])
def test_inilora_without_steps_is_the_draw(s):
    W = normal(D_OUT, D_IN, std=0.02)
    start = hs.IniLoRA(solver="adam", steps=0).factors(of_weight(W, R, s=s, moments=Moments(mean=0.3, std=0.037)))
    # The published code uses mean 0 and the averaged sigma.
    assert_drawn(start.A, 0.037)
    assert_drawn(start.B, 0.037)
    assert_uncorrelated(start.A, start.B)
    assert start.info["steps"] == 0
    assert start.info["error"] == pytest.approx(dense_error(W, start, s), rel=1e-9)
    own = hs.IniLoRA(solver="adam", steps=0, std=0.5).factors(
        of_weight(W, R, s=s, moments=Moments(mean=0.3, std=0.037))
    )
    assert_drawn(own.A, 0.5)


@pytest.mark.parametrize("s", [1.0, 2.0])
@pytest.mark.parametrize("std", [0.05, 1.0])
@pytest.mark.parametrize(("d_out", "d_in", "r"), [(40, 24, 4), (24, 40, 4), (33, 47, 5), (64, 64, 16), (192, 576, 8)])
def test_inilora_adam_is_the_published_loop(d_out, d_in, r, std, s):
    weights = [normal(d_out, d_in, std=std, seed=seed) for seed in range(2)]
    given_layers = [of_weight(W, r, s=s, name=f"layer{place}") for place, W in enumerate(weights)]
    loop = dict(steps=150, lr=2e-3, decay=0.7, decay_every=40)
    starts = hs.IniLoRA(**loop).factors_batch(given_layers)
    for W, given_layer, start in zip(weights, given_layers, starts, strict=True):
        A0, B0 = the_draw(given_layer)
        A, B = published_adam(W.double() / s, A0.double(), B0.double(), **loop)
        # 150 steps in float32: rounding of 1e-7 a step, grown by Adam's division by small roots.
        assert relative(start.A, A) < 2e-5
        assert relative(start.B, B) < 2e-5
        # The steps have gone somewhere.
        assert relative(A, A0) > 0.01 and relative(B, B0) > 0.01
        assert start.info["steps"] == 150
        assert start.info["error"] == pytest.approx(dense_error(W, start, s), rel=1e-6)
        assert start.info["bound"] == pytest.approx(tail(W, r) / s**2, rel=1e-5)
        assert start.info["bound"] <= start.info["error"] < dense_error(W, Factors(A0, B0), s)


def test_inilora_defaults_are_the_published_ones_but_for_the_solver():
    method = hs.IniLoRA()
    assert (method.solver, method.steps, method.lr, method.decay, method.decay_every) == (
        "svd",
        20_000,
        5e-4,
        0.9,
        5_000,
    )
    assert method.tolerance is None


def test_inilora_default_rate_and_schedule_are_used():
    """One step of Adam moves every entry by the rate (bias correction cancels), up to eps."""
    W = normal(30, 20)
    given_layer = of_weight(W, 3)
    A0, _ = the_draw(given_layer)
    one = hs.IniLoRA(solver="adam", steps=1).factors(given_layer)
    assert torch.allclose((one.A - A0).abs(), torch.full_like(A0, 5e-4), rtol=1e-2)


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(["svd", "adam"]), st.sampled_from(["aligned", "random", "balanced"]))
def test_inilora_reports_the_dense_error(problem, solver, gauge):
    W, r, s = problem
    start = hs.IniLoRA(solver=solver, gauge=gauge, steps=5).factors(of_weight(W, r, s=s))
    total = float((W.double() / s).square().sum())
    assert start.info["error"] == pytest.approx(dense_error(W, start, s), rel=1e-6, abs=1e-13 * total + 1e-300)
    # The bound is a difference of sums of float32 values: good to 1e-7 of the total, as the package says.
    assert start.info["bound"] == pytest.approx(tail(W, r) / s**2, abs=3e-7 * total)
    assert start.info["error"] >= start.info["bound"] - 3e-7 * total
