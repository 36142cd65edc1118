"""Random starts against their distributions: deviations, shapes of the draw, what is zero and what is not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from headstart.methods import parse_method
from inputs import NAME, product
from known_layers import D_IN, D_OUT, DRAWN, ZERO_PRODUCT, R, assert_drawn, assert_uncorrelated, layer


def test_lora_is_kaiming_uniform_with_a_sqrt_5():
    start = hs.LoRA().factors(layer())
    assert not start.B.any()
    assert_drawn(start.A, math.sqrt(1 / (3 * D_IN)), "uniform")
    # The same as torch's own: gain sqrt(2 / (1 + 5)), bound gain sqrt(3 / fan-in).
    of_torch = torch.nn.init.kaiming_uniform_(torch.empty(R, D_IN), a=math.sqrt(5))
    assert float(of_torch.abs().max()) == pytest.approx(float(start.A.abs().max()), rel=0.01)


@pytest.mark.parametrize("shape", ["normal", "uniform"])
@pytest.mark.parametrize("beta", [0.25, 1.0, 16.0])
def test_init_a(beta, shape):
    start = hs.InitA(beta=beta, distribution=shape).factors(layer())
    assert not start.B.any()
    assert_drawn(start.A, beta / math.sqrt(D_IN), shape)


@pytest.mark.parametrize("shape", ["normal", "uniform"])
def test_init_b(shape):
    start = hs.InitB(distribution=shape).factors(layer())
    assert not start.A.any()
    assert_drawn(start.B, math.sqrt(1 / R), shape)


def test_gaussian_is_pefts():
    start = hs.Gaussian().factors(layer())
    assert not start.B.any()
    assert_drawn(start.A, 1 / R)


@pytest.mark.parametrize("shape", ["normal", "uniform"])
@pytest.mark.parametrize("beta", [0.25, 1.0, 8.0])
@pytest.mark.parametrize(
    ("scheme", "exponent_A", "exponent_B"), [("adam", -0.5, -0.5), ("sgd", -0.75, -0.25), ("lora+", -1.0, 0.0)]
)
@pytest.mark.parametrize("cls", [hs.InitAB, hs.InitABPlus])
def test_init_ab(cls, scheme, exponent_A, exponent_B, beta, shape):
    start = cls(beta=beta, scheme=scheme, distribution=shape).factors(layer())
    assert_drawn(start.A, beta * D_IN**exponent_A, shape)
    assert_drawn(start.B, beta * D_IN**exponent_B, shape)
    assert_uncorrelated(start.A, start.B)


@pytest.mark.parametrize("text", ["", ":beta=4,scheme=sgd", ":distribution=uniform"])
def test_init_ab_plus_is_the_same_draw(text):
    plain, plus = (parse_method(name + text).factors(layer(40, 30, 4)) for name in ("init-ab", "init-ab-plus"))
    assert torch.equal(plain.A, plus.A) and torch.equal(plain.B, plus.B)


def test_the_width_is_d_in_not_d_out():
    tall, wide = (hs.InitAB().factors(layer(d_out, d_in, 16)) for d_out, d_in in ((4096, 256), (256, 4096)))
    for start, width in ((tall, 256), (wide, 4096)):
        assert_drawn(start.A, 1 / math.sqrt(width))
        assert_drawn(start.B, 1 / math.sqrt(width))


@pytest.mark.parametrize("std", [None, 1e-4, 1.5])
def test_inilora_alpha(std):
    start = (hs.IniLoRAAlpha() if std is None else hs.IniLoRAAlpha(std=std)).factors(layer())
    assert_drawn(start.A, std or 0.5)
    assert_drawn(start.B, std or 0.5)
    assert_uncorrelated(start.A, start.B)


# Standard deviations of A (r, d_in) and B (d_out, r), and their form, from torch's documentation.
BETA = {
    "kaiming-normal": (math.sqrt(2 / D_IN), math.sqrt(2 / R), "normal"),
    "kaiming-uniform": (math.sqrt(2 / D_IN), math.sqrt(2 / R), "uniform"),
    "xavier-normal": (math.sqrt(2 / (D_IN + R)), math.sqrt(2 / (R + D_OUT)), "normal"),
    "xavier-uniform": (math.sqrt(2 / (D_IN + R)), math.sqrt(2 / (R + D_OUT)), "uniform"),
    "normal": (0.01, 0.01, "normal"),
    "uniform": (0.1 / math.sqrt(3), 0.1 / math.sqrt(3), "uniform"),
}


@pytest.mark.parametrize("distribution", BETA)
def test_inilora_beta(distribution):
    std_A, std_B, shape = BETA[distribution]
    start = hs.IniLoRABeta(distribution=distribution).factors(layer())
    assert_drawn(start.A, std_A, shape)
    assert_drawn(start.B, std_B, shape)
    assert_uncorrelated(start.A, start.B)


@pytest.mark.parametrize(("short", "full"), [("K-N", "kaiming-normal"), ("K-U", "kaiming-uniform")])
def test_inilora_beta_has_the_papers_names(short, full):
    assert hs.IniLoRABeta(distribution=short) == hs.IniLoRABeta(distribution=full)
    assert hs.IniLoRABeta() == hs.IniLoRABeta(distribution="K-N")


def test_inilora_beta_orthogonal():
    start = hs.IniLoRABeta(distribution="orthogonal").factors(layer())
    assert torch.allclose(start.A @ start.A.T, torch.eye(R), atol=1e-5)
    assert torch.allclose(start.B.T @ start.B, torch.eye(R), atol=1e-5)


def test_inilora_beta_sparse():
    start = hs.IniLoRABeta(distribution="sparse").factors(layer())
    for matrix in (start.A, start.B):
        # Half of each column is zero, and not the same half.
        zero = matrix == 0
        assert torch.equal(zero.sum(0), torch.full((matrix.shape[1],), matrix.shape[0] // 2))
        assert not torch.equal(zero[:, 0], zero[:, 1])
        assert_drawn(matrix[~zero], 0.01)


def test_inilora_beta_constant():
    start = hs.IniLoRABeta(distribution="constant").factors(layer())
    assert torch.equal(start.A, torch.full((R, D_IN), 0.001))
    assert torch.equal(start.B, torch.full((D_OUT, R), 0.001))


def test_orthogonal_has_no_product_but_both_factors():
    start = hs.Orthogonal().factors(layer())
    size = float(start.A.norm() * start.B.norm())
    assert float(product(start).norm()) < 1e-6 * size
    # ||A||^2 = ||X||^2 / 100 for X of d_in x r/2 standard normal entries: 2/n is the relative variance.
    for matrix, n in ((start.A, D_IN * R // 2), (start.B, D_OUT * R // 2)):
        assert float(matrix.double().square().sum()) * 100 / n == pytest.approx(1, abs=5 * math.sqrt(2 / n))
        assert int((torch.linalg.svdvals(matrix.double()) > 1e-3).sum()) == R // 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 10), st.integers(0, 1000))
def test_orthogonal_of_any_shape(d_out, d_in, half, seed):
    start = hs.Orthogonal().factors(layer(d_out, d_in, 2 * half, seed=seed))
    assert float(product(start).norm()) <= 1e-6 * float(start.A.norm() * start.B.norm())
    assert start.A.norm() > 0 and start.B.norm() > 0


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_orthogonal_needs_an_even_rank(rank):
    with pytest.raises(hs.LayerError, match=rf"{NAME}.*even rank.*{rank}"):
        hs.Orthogonal().check(layer(40, 30, rank))


@pytest.mark.parametrize("text", ZERO_PRODUCT)
def test_zero_products_leave_nothing_to_subtract(text):
    start = parse_method(text).factors(layer(40, 30, 4, s=3.0))
    assert parse_method(text).form == "kept"
    assert float(product(start).norm()) <= 1e-6 * max(1.0, float(start.A.norm() * start.B.norm()))


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize(("d_out", "d_in"), [(2, 9), (9, 2)])
def test_draws_of_the_smallest_layers(name, d_out, d_in):
    start = hs.get_method(name).factors(layer(d_out, d_in, 2))
    assert start.A.shape == (2, d_in) and start.B.shape == (d_out, 2)
    assert start.A.count_nonzero() or start.B.count_nonzero()


@pytest.mark.parametrize("d_out", [1, 2])
def test_sparse_leaves_something_to_train(d_out):
    """Half zero, not all: where both factors are zero, neither ever gets a gradient."""
    start = hs.IniLoRABeta(distribution="sparse").factors(layer(d_out, 8, 1))
    assert start.A.count_nonzero() or start.B.count_nonzero()
