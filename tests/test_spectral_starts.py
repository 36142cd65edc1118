"""PiSSA, MiLoRA and OLoRA against dense decompositions in float64, and weights at their limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from headstart.methods import Moments, parse_method
from inputs import product
from known_layers import SHAPES, from_spectrum, normal, of_weight, problems, sizes
from oracles import best, relative, tail


@pytest.mark.parametrize("s", [1.0, 0.25, 4.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_pissa(d_out, d_in, s):
    W = normal(d_out, d_in, std=0.02)
    start = hs.PiSSA().factors(of_weight(W, 5, s=s))
    assert relative(s * product(start), best(W, 5)) < 1e-5
    root = (torch.linalg.svdvals(W.double())[:5] / s).diag()
    assert torch.allclose(start.B.double().T @ start.B.double(), root, atol=1e-6 * float(root.max()))
    assert torch.allclose(start.A.double() @ start.A.double().T, root, atol=1e-6 * float(root.max()))


@pytest.mark.parametrize("s", [1.0, 2.0])
@pytest.mark.parametrize(("d_out", "d_in"), [(400, 300), (300, 400)])
def test_pissa_of_a_weight_too_large_for_a_dense_decomposition(d_out, d_in, s):
    """Values fall by 0.8, so the iteration's residual of 1e-5 moves a singular vector by at most 1e-5 / 0.2."""
    W = from_spectrum(d_out, d_in, [0.8**i for i in range(60)]).float()
    start = hs.PiSSA().factors(of_weight(W, 8, s=s))
    assert relative(s * product(start), best(W, 8)) < 5e-5


@pytest.mark.parametrize("s", [1.0, 0.25, 4.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_milora(d_out, d_in, s):
    W = normal(d_out, d_in, std=0.02)
    start = hs.MiLoRA().factors(of_weight(W, 5, s=s))
    rest = W.double() - best(W, min(d_out, d_in) - 5)
    # Rounding of the vectors to float32 acts on the smallest values only: 1e-5 of them.
    assert relative(s * product(start), rest) < 1e-5
    gram_B, gram_A = start.B.double().T @ start.B.double(), start.A.double() @ start.A.double().T
    assert torch.allclose(gram_A, gram_B, atol=1e-6 * float(gram_A.max()))


@pytest.mark.parametrize("s", [1.0, 3.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_olora(d_out, d_in, s):
    W = normal(d_out, d_in, std=0.02)
    start = hs.OLoRA().factors(of_weight(W, 5, s=s))
    Q, triangle = torch.linalg.qr(W.double())
    # s plays no part: B and A are Q and R themselves.
    assert relative(product(start), Q[:, :5] @ triangle[:5]) < 1e-5
    assert torch.allclose(start.B.double().T @ start.B.double(), torch.eye(5, dtype=torch.float64), atol=1e-6)
    signs = (Q[:, :5] * start.B.double()).sum(0)
    assert torch.allclose(signs.abs(), torch.ones(5, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(start.A.double(), signs.sign()[:, None] * triangle[:5], atol=1e-5 * float(W.norm()))
    assert torch.allclose(start.A[:, :5].tril(-1), torch.zeros(5, 5), atol=1e-6 * float(W.norm()))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_pissa_is_optimal_and_balanced_whatever_the_weight(problem):
    """Without gaps in the spectrum the factors are not unique: their norms and the error are."""
    W, r, s = problem
    start = hs.PiSSA().factors(of_weight(W, r, s=s))
    S = torch.linalg.svdvals(W.double())
    total = float(S.square().sum())
    error = float((W.double() - s * product(start)).square().sum())
    assert error == pytest.approx(tail(W, r), abs=1e-6 * total)
    expected = (S[:r] / s).diag()
    for gram in (start.B.double().T @ start.B.double(), start.A.double() @ start.A.double().T):
        assert torch.allclose(gram, expected, rtol=0, atol=2e-6 * float(expected.max()))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_milora_takes_out_the_smallest_whatever_the_weight(problem):
    W, r, s = problem
    start = hs.MiLoRA().factors(of_weight(W, r, s=s))
    S = torch.linalg.svdvals(W.double())
    left = torch.linalg.svdvals(W.double() - s * product(start))
    expected = torch.cat((S[: len(S) - r], torch.zeros(r, dtype=torch.float64)))
    assert torch.allclose(left, expected, rtol=0, atol=1e-5 * float(S[0]))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.data())
def test_olora_whatever_the_shape(d_out, d_in, data):
    r = data.draw(st.integers(1, min(d_out, d_in)))
    W = normal(d_out, d_in, seed=data.draw(st.integers(0, 10_000)))
    start = hs.OLoRA().factors(of_weight(W, r, s=2.0))
    Q, triangle = torch.linalg.qr(W.double())
    # Q's span is that of r columns, which rounding moves in proportion to their condition number.
    condition = float(torch.linalg.cond(W[:, :r].double()))
    assert relative(product(start), Q[:, :r] @ triangle[:r]) < 1e-6 * condition
    assert torch.allclose(start.B.T @ start.B, torch.eye(r), atol=5e-6)


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "inilora:solver=svd"])
@pytest.mark.parametrize(("d_out", "d_in"), [(6, 9), (9, 6), (1, 7), (7, 1), (1, 1)])
def test_full_rank_is_the_whole_weight(name, d_out, d_in):
    W = normal(d_out, d_in)
    s = 1.0 if name == "olora" else 2.5
    start = parse_method(name).factors(of_weight(W, min(d_out, d_in), s=s))
    assert relative(s * product(start), W) < 1e-5


@pytest.mark.parametrize("name", ["pissa", "inilora:solver=svd"])
def test_a_weight_of_lower_rank_is_fitted_whole(name):
    W = (normal(20, 3) @ normal(3, 30, seed=1)).double()
    start = parse_method(name).factors(of_weight(W.float(), 6, s=2.0))
    assert relative(2.0 * product(start), W) < 1e-5


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "inilora:solver=svd", "inilora:solver=adam,steps=3"])
def test_a_zero_weight_gives_finite_factors(name):
    start = parse_method(name).factors(of_weight(torch.zeros(12, 9), 3, moments=Moments(0.0, 0.1)))
    assert bool(torch.isfinite(start.A).all() and torch.isfinite(start.B).all())


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "inilora:solver=svd", "inilora:solver=adam,steps=30"])
def test_a_transposed_view_is_as_good_as_a_matrix(name):
    """GPT-2 stores its weights the other way round, and they come as views."""
    W = normal(20, 30)
    method = parse_method(name)
    plain, view = method.factors(of_weight(W, 4)), method.factors(of_weight(W.T.contiguous().T, 4))
    assert relative(product(view), product(plain)) < 1e-5
