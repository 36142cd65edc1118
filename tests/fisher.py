"""LoRA-DA in dense float64: the Fisher matrix of all weights, what follows from it, and layers that have one."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import headstart as hs
from headstart.methods.base import Kronecker, Layer, Training
from inputs import normal
from oracles import relative

# Whichever preset is the default.
published = partial(hs.LoRADA, preset="published")

ATTENTION = "model.layers.0.self_attn.q_proj"
FEED_FORWARD = "model.layers.0.mlp.up_proj"


def of_spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues, in float64."""
    Q = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    matrix = (Q * values) @ Q.T
    return (matrix + matrix.T) / 2


def logspace(low, high, n):
    return torch.logspace(low, high, n, dtype=torch.float64)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def draw(d_out, d_in, seed=0, full=False, scale_G=1.0, scale_Z=1.0, scale_Y=1.0):
    """G, Z and Y in float32, of tokens many enough that Z and Y are well-conditioned."""
    x, g = normal(5 * d_in + 5, d_in, seed=seed), normal(5 * d_out + 5, d_out, seed=seed + 1)
    x = x * (0.3 + torch.rand(d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    g = g * (0.3 + torch.rand(d_out, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    Z, Y = scale_Z * (x.T @ x) / len(x), scale_Y * (g.T @ g) / len(g)
    Y = Y if full else Y.diagonal()
    return (scale_G * normal(d_out, d_in, seed=seed + 2)).float(), Z.float(), Y.float()


def layer(G, Z, Y, r, *, name=ATTENTION, s=1.0, seed=0, population=None, tokens=1, samples=None):
    d_out, d_in = G.shape
    # The means are not LoRA-DA's business.
    kronecker = Kronecker(Z, Y, torch.full((d_in,), math.nan), torch.full((d_out,), math.nan), tokens=tokens)
    given_layer = dict(name=name, d_out=d_out, d_in=d_in, r=r, scaling=s, seed=seed, training=Training(population))
    return Layer(**given_layer, gradient=G, kronecker=kronecker, samples=samples)


def layer_named(name):
    return Layer(name=name, d_out=8, d_in=8, r=2, scaling=1.0)


def linear(model):
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]


def fisher_of(Z, Y, damping):
    """F of the weight's rows, one after the other, as a matrix: a row belongs to one output."""
    Z = Z.double() + damping * eye(len(Z))
    Y = (Y.double().diag() if Y.dim() == 1 else Y.double()) + damping * eye(len(Y))
    return torch.kron(Y, Z)


def dense(G, Z, Y, *, N, damping=1e-6, variance=0.03, bias=1.0, normalize=True):
    """Delta and Omega from the Fisher matrix of all weights: equations 18 to 21."""
    m, n = G.shape
    inverse = torch.linalg.inv(fisher_of(Z, Y, damping))
    delta = -(inverse @ G.double().reshape(-1)).reshape(m, n)
    # The covariance of an estimate from N samples is F^-1 / N; an output's own weights have the diagonal blocks.
    blocks = inverse.reshape(m, n, m, n)
    spread = sum(blocks[j, :, j, :] for j in range(m)) / N
    sigma = float(torch.linalg.matrix_norm(delta, 2))
    scale = 1 / sigma if normalize else 1.0
    omega = scale**2 * (variance * spread - bias * delta.T @ delta)
    norm = scale**2 * max(variance * float(torch.linalg.matrix_norm(spread, 2)), bias * sigma**2)
    return SimpleNamespace(delta=scale * delta, omega=omega, sigma=sigma, inverse=inverse, norm=norm)


def sampled(G, Z, Y, *, damping, noise, N, n, T, variance=1.0, bias=1.0):
    """Delta and Omega from the Fisher matrix of all weights where it is damped relative to its own mean diagonals.

    ``noise`` is what LoRADA has under that name, but "published"; n samples of T tokens each gave G. Not normalised.
    """
    m, d = G.shape
    Z, Y = Z.double(), Y.double().diag() if Y.dim() == 1 else Y.double()
    root = math.sqrt(damping)
    Zi = torch.linalg.inv(Z + root * Z.trace() / d * eye(d))
    Yi = torch.linalg.inv(Y + root * Y.trace() / m * eye(m))
    inverse, fisher = torch.kron(Yi.contiguous(), Zi.contiguous()), torch.kron(Y.contiguous(), Z.contiguous())
    delta = -(inverse @ G.double().reshape(-1)).reshape(m, d)

    def summed(matrix):
        """Over outputs, the diagonal blocks of a matrix of all weights."""
        blocks = matrix.reshape(m, d, m, d)
        return sum(blocks[j, :, j, :] for j in range(m))

    spread = variance * T / N * summed(torch.kron((Yi @ Y @ Yi).contiguous(), Zi.contiguous()))
    if noise == "unbiased":
        # The covariance of all of Delta's entries, from n sums of T independent products g x' each.
        spread = spread + bias * variance * T / n * summed(inverse @ fisher @ inverse)
    sigma = float(torch.linalg.matrix_norm(delta, 2))
    omega = spread - bias * delta.T @ delta
    norm = max(float(torch.linalg.matrix_norm(spread, 2)), bias * sigma**2)
    return SimpleNamespace(delta=delta, omega=(omega + omega.T) / 2, sigma=sigma, norm=norm)


def objective(omega, A0):
    return float((A0 * (omega @ A0)).sum())


def projector(A0):
    return A0 @ torch.linalg.pinv(A0)


def check(start, expected, r, *, gamma=1024.0, tol=1e-6, loose=1e-6):
    """A and B are those of the dense answer, up to a rotation where eigenvalues are equal."""
    omega, delta = expected.omega, expected.delta
    n = len(omega)
    A0 = math.sqrt(gamma) * start.A.double().T
    assert float((A0.T @ A0 - eye(r)).abs().max()) < 5e-6
    values, vectors = torch.linalg.eigh(omega)
    optimum = float(values[:r].sum())
    rounding = loose * float(values[:r].abs().sum()) + (1e-11 * n + loose**2) * expected.norm
    assert abs(objective(omega, A0) - optimum) <= tol * abs(optimum) + rounding
    assert relative(start.B, delta @ A0 / math.sqrt(gamma)) < 2e-6 + 4 * loose
    assert relative(start.B.double() @ start.A.double(), delta @ A0 @ A0.T / gamma) < 2e-6 + 4 * loose
    assert start.core is None and start.note == ""
    assert start.A.dtype == start.B.dtype == torch.float32
    if r < n:
        gap = float(values[r] - values[r - 1])
        # An excess e over the optimum leaves the space at most sqrt(e / gap) away.
        angle = math.sqrt((tol * abs(optimum) + rounding) / gap) if gap > 0 else 1.0
        if angle < 0.01:
            away = float((projector(A0) - vectors[:, :r] @ vectors[:, :r].T).norm())
            assert away <= 2 * angle + 1e-5
    assert start.info["objective"] == pytest.approx(optimum, rel=tol + 1e-5, abs=rounding)
    assert start.info["sigma"] == pytest.approx(expected.sigma, rel=1e-5)
    assert 0 <= start.info["objective_error"] <= tol
