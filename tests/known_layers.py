"""Layers of which a method is told all that it asks for, and what makes a matrix one that was drawn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

import inputs
from headstart.methods import Moments
from headstart.methods.base import Kronecker, Layer, Training
from inputs import NAME

# A large layer, in which sampling errors are small: A has 16,384 entries, B 12,288.
D_OUT, D_IN, R = 768, 1024, 16
SHAPES = [(48, 30), (30, 48), (32, 32)]
ZERO_PRODUCT = ("lora", "init-a", "init-b", "gaussian", "orthogonal")
DRAWN = (*ZERO_PRODUCT, "init-ab", "init-ab-plus", "inilora-alpha", "inilora-beta")


def normal(*shape, seed=0, std=1.0):
    """In float32; std is the standard deviation."""
    return (std * inputs.normal(*shape, seed=seed)).float()


def layer(d_out=D_OUT, d_in=D_IN, r=R, *, s=1.0, **given):
    return Layer(**(dict(name=NAME, d_out=d_out, d_in=d_in, r=r, scaling=s) | given))


def of_weight(W, r, *, s=1.0, **given):
    given = dict(moments=Moments(0.0, float(W.double().std(correction=0)))) | given
    return layer(*W.shape, r, s=s, weight=W, **given)


def of_gradient(G, r, **given):
    return layer(*G.shape, r, gradient=G, **given)


def everything(d_out=24, d_in=20, r=4, s=1.5, seed=0, name=NAME):
    """A layer of which all is known that any method asks for."""
    W, G = normal(d_out, d_in, seed=11), normal(d_out, d_in, seed=12, std=1e-3)
    x, g = normal(4 * d_in, d_in, seed=13), normal(4 * d_in, d_out, seed=14, std=1e-2)
    Z, Y = x.T @ x / len(x), g.square().mean(0)
    kronecker = Kronecker(inputs=Z, outputs=Y, mean_input=x.mean(0), mean_output=g.mean(0), tokens=len(x))
    original = W + normal(d_out, d_in, seed=15, std=0.05)
    kept = normal(4 * d_in, d_in, seed=16)
    preserved = Kronecker(kept.T @ kept / len(kept), None, kept.mean(0), None, len(kept))
    known = dict(gradient=G, kronecker=kronecker, original=original, training=Training(1000, 1e-3))
    known |= {"preserved": preserved}
    return of_weight(W, r, s=s, seed=seed, name=name, **known)


def from_spectrum(d_out, d_in, S, seed=0):
    """A matrix with these singular values, in float64."""
    U, V = (torch.linalg.qr(inputs.normal(side, len(S), seed=seed + k)).Q for k, side in enumerate((d_out, d_in)))
    return U @ torch.diag(torch.as_tensor(S, dtype=torch.float64)) @ V.T


sizes = st.integers(1, 24)


@st.composite
def problems(draw, twice=False):
    d_out, d_in = draw(sizes.filter(lambda n: n > 1) if twice else sizes), draw(sizes)
    d_in = max(d_in, 2) if twice else d_in
    rank = draw(st.integers(1, min(d_out, d_in) // (2 if twice else 1)))
    scale = 10.0 ** draw(st.integers(-12, 6))
    rank_of_W = draw(st.integers(1, min(d_out, d_in)))
    seed = draw(st.integers(0, 10_000))
    W = scale * normal(d_out, rank_of_W, seed=seed) @ normal(rank_of_W, d_in, seed=seed + 1)
    return W, rank, 2.0 ** draw(st.integers(-6, 6))


def assert_drawn(matrix, std, shape="normal"):
    """Mean, deviation and fourth moment within five standard errors; for uniform draws the bounds as well."""
    x = matrix.double().flatten()
    n = len(x)
    kurtosis = {"normal": 3.0, "uniform": 1.8}[shape]
    assert abs(float(x.mean())) < 5 * std / math.sqrt(n)
    # Var(mean of x^2) = (kurtosis - 1) std^4 / n.
    assert float(x.square().mean()) / std**2 == pytest.approx(1, abs=5 * math.sqrt((kurtosis - 1) / n))
    # Var(mean of x^4) = (E x^8 - (E x^4)^2) / n: 105 - 9 for normal, 9 - 3.24 (in std^8) for uniform draws.
    spread = {"normal": 96.0, "uniform": 81 / 9 - 1.8**2}[shape]
    assert float(x.pow(4).mean()) / std**4 == pytest.approx(kurtosis, abs=5 * math.sqrt(spread / n))
    if shape == "uniform":
        bound = math.sqrt(3) * std
        assert float(x.abs().max()) <= bound * (1 + 1e-6)
        # Chance of no entry in the outer hundredth: 0.99^12288 = 2e-54.
        assert float(x.max()) > 0.98 * bound
        assert float(x.min()) < -0.98 * bound


def assert_uncorrelated(x, y):
    x, y = x.double().flatten(), y.double().flatten()
    n = min(len(x), len(y))
    assert abs(float(torch.corrcoef(torch.stack((x[:n], y[:n])))[0, 1])) < 5 / math.sqrt(n)
