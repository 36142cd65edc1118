"""Starts from the gradient: LoRA-GA and LoRA-One against its dense decomposition in float64, and where it is zero."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from inputs import NAME, product
from known_layers import SHAPES, everything, layer, normal, of_gradient, problems
from oracles import best, relative


@pytest.mark.parametrize("gamma", [16.0, 64.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_lora_ga(d_out, d_in, gamma):
    G = normal(d_out, d_in, std=1e-4)
    r = 4
    start = hs.LoRAGA(gamma=gamma).factors(of_gradient(G, r, s=2.0))
    U, _, Vh = torch.linalg.svd(G.double())
    c = d_out**0.25 / math.sqrt(gamma)
    for i in range(r):
        # A singular vector's sign is free.
        right, left = Vh[i] * c, U[:, r + i] * c
        assert min(relative(start.A[i], right), relative(start.A[i], -right)) < 1e-5
        assert min(relative(start.B[:, i], left), relative(start.B[:, i], -left)) < 1e-5


def test_gradient_defaults_are_the_published_ones():
    assert hs.LoRAGA().gamma == 16
    assert hs.LoRAOne().gamma == 128


@settings(max_examples=60, deadline=None)
@given(problems(twice=True))
def test_lora_ga_whatever_the_gradient(problem):
    """In terms that need no gap in the spectrum; a gradient of low rank still gives orthonormal factors."""
    G, r, s = problem
    start = hs.LoRAGA().factors(of_gradient(G, r, s=s))
    S = torch.linalg.svdvals(G.double())
    c2 = math.sqrt(G.shape[0]) / 16
    A, B = start.A.double(), start.B.double()
    identity = torch.eye(r, dtype=torch.float64)
    assert torch.allclose(A @ A.T, c2 * identity, atol=5e-6 * c2)
    assert torch.allclose(B.T @ B, c2 * identity, atol=5e-6 * c2)
    total = float(S.square().sum())
    assert float((G.double() @ A.T).square().sum()) == pytest.approx(c2 * float(S[:r].square().sum()), rel=1e-5)
    second = float(S[r : 2 * r].square().sum())
    assert float((B.T @ G.double()).square().sum()) == pytest.approx(c2 * second, abs=1e-5 * c2 * total)


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(12, 40, 7), (40, 12, 7), (9, 9, 5), (1, 30, 1), (30, 1, 1)])
def test_lora_ga_needs_twice_the_rank(d_out, d_in, r):
    with pytest.raises(hs.LayerError, match=rf"{NAME}.*2 r = {2 * r}.*at most {min(d_out, d_in) // 2}"):
        hs.LoRAGA().check(layer(d_out, d_in, r))


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(12, 40, 6), (40, 12, 6), (2, 30, 1)])
def test_lora_ga_takes_half_the_side(d_out, d_in, r):
    start = hs.LoRAGA().factors(of_gradient(normal(d_out, d_in), r))
    assert torch.linalg.matrix_rank(product(start)) == r


@pytest.mark.parametrize("s", [1.0, 2.0])
@pytest.mark.parametrize("gamma", [1.0, 128.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_lora_one(d_out, d_in, gamma, s):
    G = normal(d_out, d_in, std=1e-4)
    start = hs.LoRAOne(gamma=gamma).factors(of_gradient(G, 5, s=s))
    S = torch.linalg.svdvals(G.double())
    assert relative(product(start), -best(G, 5) / (float(S[0]) * gamma)) < 1e-5
    root = (S[:5] / S[0] / gamma).diag()
    for gram in (start.B.double().T @ start.B.double(), start.A.double() @ start.A.double().T):
        assert torch.allclose(gram, root, atol=1e-6 * float(root.max()))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([1.0, 16.0, 128.0]))
def test_lora_one_whatever_the_gradient(problem, gamma):
    """A matrix with these singular values and this inner product with -G has its singular vectors (von Neumann)."""
    G, r, s = problem
    start = hs.LoRAOne(gamma=gamma).factors(of_gradient(G, r, s=s))
    S = torch.linalg.svdvals(G.double())
    expected = S[:r] / S[0] / gamma
    assert torch.allclose(torch.linalg.svdvals(product(start))[:r], expected, rtol=0, atol=2e-6 / gamma)
    inner = float(-(product(start) * G.double()).sum())
    assert inner == pytest.approx(float((expected * S[:r]).sum()), rel=1e-5)
    assert relative(start.A.norm(), start.B.norm()) < 1e-5


@pytest.mark.parametrize("cls", [hs.LoRAGA, hs.LoRAOne])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_gradients_scale_does_not_matter(cls, scale):
    G = normal(20, 16)
    plain, scaled = cls().factors(of_gradient(G, 3)), cls().factors(of_gradient(G * scale, 3))
    # Scaling by a power of ten rounds each entry.
    assert relative(scaled.A.abs(), plain.A.abs()) < 1e-5
    assert relative(scaled.B.abs(), plain.B.abs()) < 1e-5


@pytest.mark.parametrize(
    "method", ["lora-ga", "lora-one", "lora-da", "lora-da:fisher=full", "lora-da:fisher=none,variance=0"]
)
def test_no_gradient_starts_as_lora_does_and_says_so(method):
    given_layer = dataclasses.replace(everything(), gradient=torch.zeros(24, 20))
    if method.endswith("full"):
        full = dataclasses.replace(given_layer.kronecker, outputs=given_layer.kronecker.outputs.diag())
        given_layer = dataclasses.replace(given_layer, kronecker=full)
    start, plain = hs.methods.parse_method(method).factors(given_layer), hs.LoRA().factors(given_layer)
    assert torch.equal(start.A, plain.A) and torch.equal(start.B, plain.B)
    assert "no gradient" in start.note and "lora" in start.note


def test_lora_one_of_one_output():
    G = normal(1, 12)
    start = hs.LoRAOne().factors(of_gradient(G, 1))
    assert relative(product(start), -G.double() / float(G.double().norm()) / 128) < 1e-6
