"""LoRA-DA against dense float64 formulas on vectorised weights, its definition by brute force, and the verb."""

from __future__ import annotations

import copy
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import headstart as hs
from conftest import (
    ARCHITECTURES,
    all_factors,
    logits,
    perturb,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
    token_batch,
    wrap,
)
from headstart.errors import HeadstartWarning
from headstart.layers.anchored import anchors
from headstart.layers.find import lora_layers
from headstart.methods import parse_method
from headstart.methods.base import ANY_LAYER, Kronecker, Layer, Training
from inputs import normal
from oracles import relative

ATTENTION = "model.layers.0.self_attn.q_proj"
FEED_FORWARD = "model.layers.0.mlp.up_proj"


def of_spectrum(values, seed=0):
    Q = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    found = (Q * values) @ Q.T
    return (found + found.T) / 2


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


def layer(G, Z, Y, r, *, name=ATTENTION, s=1.0, seed=0, population=None):
    d_out, d_in = G.shape
    # The means are not LoRA-DA's business.
    kronecker = Kronecker(Z, Y, torch.full((d_in,), math.nan), torch.full((d_out,), math.nan), tokens=1)
    given_layer = dict(name=name, d_out=d_out, d_in=d_in, r=r, scaling=s, seed=seed, training=Training(population))
    return Layer(**given_layer, gradient=G, kronecker=kronecker)


def layer_named(name):
    return Layer(name=name, d_out=8, d_in=8, r=2, scaling=1.0)


def fisher_of(Z, Y, damping):
    """F of the weight's rows, one after the other, as a matrix: a row belongs to one output."""
    Z = Z.double() + damping * eye(len(Z))
    Y = (Y.double().diag() if Y.dim() == 1 else Y.double()) + damping * eye(len(Y))
    return torch.kron(Y, Z)


def dense(G, Z, Y, *, N, damping=1e-6, variance=0.03, bias=1.0, normalise=True):
    """Delta and Omega from the Fisher matrix of all weights: equations 18 to 21."""
    m, n = G.shape
    inverse = torch.linalg.inv(fisher_of(Z, Y, damping))
    delta = -(inverse @ G.double().reshape(-1)).reshape(m, n)
    # The covariance of an estimate from N samples is F^-1 / N; an output's own weights have the diagonal blocks.
    blocks = inverse.reshape(m, n, m, n)
    spread = sum(blocks[j, :, j, :] for j in range(m)) / N
    sigma = float(torch.linalg.matrix_norm(delta, 2))
    scale = 1 / sigma if normalise else 1.0
    omega = scale**2 * (variance * spread - bias * delta.T @ delta)
    norm = scale**2 * max(variance * float(torch.linalg.matrix_norm(spread, 2)), bias * sigma**2)
    return SimpleNamespace(delta=scale * delta, omega=omega, sigma=sigma, inverse=inverse, norm=norm)


def objective(omega, A0):
    return float((A0 * (omega @ A0)).sum())


def projector(A0):
    return A0 @ torch.linalg.pinv(A0)


def check(found, expected, r, *, gamma=1024.0, tol=1e-6, loose=1e-6):
    """A and B are those of the dense answer, up to a rotation where eigenvalues are equal."""
    omega, delta = expected.omega, expected.delta
    n = len(omega)
    A0 = math.sqrt(gamma) * found.A.double().T
    assert float((A0.T @ A0 - eye(r)).abs().max()) < 5e-6
    values, vectors = torch.linalg.eigh(omega)
    optimum = float(values[:r].sum())
    rounding = loose * float(values[:r].abs().sum()) + (1e-11 * n + loose**2) * expected.norm
    assert abs(objective(omega, A0) - optimum) <= tol * abs(optimum) + rounding
    assert relative(found.B, delta @ A0 / math.sqrt(gamma)) < 2e-6 + 4 * loose
    assert relative(found.B.double() @ found.A.double(), delta @ A0 @ A0.T / gamma) < 2e-6 + 4 * loose
    assert found.core is None and found.note == ""
    assert found.A.dtype == found.B.dtype == torch.float32
    if r < n:
        gap = float(values[r] - values[r - 1])
        # An excess e over the optimum leaves the space at most sqrt(e / gap) away.
        angle = math.sqrt((tol * abs(optimum) + rounding) / gap) if gap > 0 else 1.0
        if angle < 0.01:
            away = float((projector(A0) - vectors[:, :r] @ vectors[:, :r].T).norm())
            assert away <= 2 * angle + 1e-5
    if found.info and "objective" in found.info:
        assert found.info["objective"] == pytest.approx(optimum, rel=tol + 1e-5, abs=rounding)
        assert found.info["sigma"] == pytest.approx(expected.sigma, rel=1e-5)
        assert 0 <= found.info["objective_error"] <= tol


# The formulas.


def test_the_vectorisation_is_the_one_of_a_single_token():
    """With one token x and its g the gradient is g x', and F the outer product of that with itself."""
    x, g = normal(4, seed=1), normal(3, seed=2)
    vector = torch.outer(g, x).reshape(-1)
    F = fisher_of(torch.outer(x, x), torch.outer(g, g), 0.0)
    assert torch.allclose(F, torch.outer(vector, vector))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("d_out", "d_in", "r"), [(3, 5, 2), (5, 3, 2), (4, 4, 1), (4, 4, 4), (1, 6, 3), (6, 1, 1)])
def test_the_formulas_of_METHODS_are_those_of_the_dense_fisher_matrix(d_out, d_in, r, full):
    G, Z, Y = draw(d_out, d_in, seed=r, full=full)
    expected = dense(G, Z, Y, N=50, normalise=False)
    Zd, Yd = Z.double() + 1e-6 * eye(d_in), (Y.double() if full else Y.double().diag()) + 1e-6 * eye(d_out)
    assert relative(-Yd.inverse() @ G.double() @ Zd.inverse(), expected.delta) < 1e-11
    omega = 0.03 * Yd.inverse().trace() / 50 * Zd.inverse() - expected.delta.T @ expected.delta
    assert relative(omega, expected.omega) < 1e-11
    # And of what they mean: the variance of what B A0' can move, and what of Delta it can't reach.
    A0 = torch.linalg.qr(normal(d_in, r, seed=9)).Q
    P = A0 @ A0.T
    variance = 0.03 / 50 * torch.kron(eye(d_out), P).mul(expected.inverse).sum()
    missed = (expected.delta - expected.delta @ P).square().sum() - expected.delta.square().sum()
    assert objective(expected.omega, A0) == pytest.approx(float(variance + missed), rel=1e-9)
    found = hs.LoRADA(fisher="full" if full else "diagonal", normalise=False).factors(layer(G, Z, Y, r, population=50))
    check(found, expected, r)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_settings(data):
    d_out, d_in = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    r = data.draw(st.integers(1, d_in))
    full = data.draw(st.booleans())
    scales = {f"scale_{x}": 10.0 ** data.draw(st.integers(-4, 4)) for x in "GZY"}
    G, Z, Y = draw(d_out, d_in, data.draw(st.integers(0, 999)), full, **scales)
    weights = data.draw(st.sampled_from([(0.03, 1.0), (1.0, 1.0), (100.0, 0.1), (0.0, 1.0), (0.0, 3.0), (0.03, 0.0)]))
    damping = data.draw(st.sampled_from([0, 1e-6, 1e-3, 1.0]))
    N = data.draw(st.sampled_from([1, 16, 256, 10**6]))
    normalise = data.draw(st.booleans())
    gamma = data.draw(st.sampled_from([1, 1024.0, 3e5]))
    options = dict(damping=damping, variance=weights[0], bias=weights[1], normalise=normalise)
    expected = dense(G, Z, Y, N=N, **options)
    # Beyond this no two ways of computing agree.
    assume(expected.norm > 0)
    method = hs.LoRADA(fisher="full" if full else "diagonal", gamma=gamma, population=N, **options)
    found = method.factors(layer(G, Z, Y, r))
    assert found.repair == "" and found.info["damping"] == found.info["damping_outputs"] == damping
    check(found, expected, r, gamma=gamma)
    # The adapter's scaling s plays no part.
    again = method.factors(layer(G, Z, Y, r, s=7.0))
    assert torch.equal(again.A, found.A) and torch.equal(again.B, found.B)


@pytest.mark.parametrize("options", [{}, dict(variance=0.0), dict(bias=0.0), dict(variance=3e-7), dict(tol=1e-3)])
@pytest.mark.parametrize(("d_out", "r"), [(20, 4), (400, 8), (300, 16)])
def test_layers_too_wide_for_the_dense_decomposition(d_out, r, options):
    """The formulas of METHODS, shown above to be those of the dense Fisher matrix."""
    n, N = 300, 1000
    G = (normal(d_out, n, seed=1) @ of_spectrum(logspace(-3, 0, n), seed=2)).float()
    Z, Y = of_spectrum(logspace(-3, 2, n), seed=3).float(), logspace(-6, -4, d_out).float()
    found = hs.LoRADA(**options).factors(layer(G, Z, Y, r, population=N))
    assert found.repair == ""
    Zi = torch.linalg.inv(Z.double() + 1e-6 * eye(n))
    Zi = (Zi + Zi.T) / 2
    Yi = 1 / (Y.double() + 1e-6)
    delta = -Yi[:, None] * G.double() @ Zi
    sigma = float(torch.linalg.matrix_norm(delta, 2))
    parts = options.get("variance", 0.03) * Yi.sum() / N * Zi / sigma**2, delta.T @ delta / sigma**2
    omega = parts[0] - options.get("bias", 1.0) * parts[1]
    norm = max(float(torch.linalg.matrix_norm(part, 2)) for part in parts)
    expected = SimpleNamespace(delta=delta / sigma, omega=omega, sigma=sigma, norm=norm)
    check(found, expected, r, tol=options.get("tol", 1e-6))


def test_published_settings_are_the_defaults():
    method = hs.LoRADA()
    assert (method.samples, method.damping, method.gamma) == (256, 1e-6, 1024)
    assert (method.variance, method.bias, method.normalise, method.fisher) == (0.03, 1, True, "diagonal")
    assert (method.population, method.iterations, method.layers, method.tokens) == (None, None, "all", "attention")
    assert str(method.wants(ANY_LAYER)) == "gradient + Fisher factors"


def test_normalising_changes_B_alone():
    G, Z, Y = draw(6, 9, seed=3)
    one, other = (hs.LoRADA(normalise=flag).factors(layer(G, Z, Y, 3)) for flag in (True, False))
    assert torch.equal(one.A, other.A)
    assert relative(one.B * one.info["sigma"], other.B) < 1e-6
    # Of what is normalised, the largest part that a direction can hold is 1.
    assert float(torch.linalg.matrix_norm(one.B.double(), 2)) <= (1 + 1e-6) / 32


def test_layers_that_share_their_input_are_solved_as_if_alone():
    (G, Z, Y), (H, X, V) = draw(5, 7, seed=1), draw(4, 7, seed=2)
    given_layers = [layer(G, Z, Y, 2), layer(H, Z, V, 3), layer(H, X, V, 3), layer(G, Z, Y, 3), layer(G, X, Y, 1)]
    method = hs.LoRADA()
    for one, together in zip(given_layers, method.factors_batch(given_layers), strict=True):
        alone = method.factors(one)
        assert torch.equal(alone.A, together.A) and torch.equal(alone.B, together.B)
        assert alone.info == together.info


def test_the_size_of_the_training_set_by_precedence():
    G, Z, Y = draw(5, 7, seed=4)

    def A_of(method, population):
        return method.factors(layer(G, Z, Y, 2, population=population)).info["objective"]

    assert A_of(hs.LoRADA(population=9), 5000) == A_of(hs.LoRADA(), 9)
    assert A_of(hs.LoRADA(samples=9), None) == A_of(hs.LoRADA(), 9)
    assert A_of(hs.LoRADA(samples=9), 5000) == A_of(hs.LoRADA(), 5000)
    assert A_of(hs.LoRADA(), 9) > A_of(hs.LoRADA(), 5000)


# The definition, by brute force.


def minimum(cost, n, r, restarts=12):
    """The smallest cost over orthonormal (n, r), from many starts."""
    least = math.inf
    for seed in range(restarts):
        X = normal(n, r, seed=seed).requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [X], lr=1.0, max_iter=100, tolerance_grad=1e-10, tolerance_change=1e-13, line_search_fn="strong_wolfe"
        )

        def closure(X=X, optimizer=optimizer):
            optimizer.zero_grad()
            value = cost(torch.linalg.qr(X).Q)
            value.backward()
            return value

        optimizer.step(closure)
        least = min(least, float(cost(torch.linalg.qr(X.detach()).Q)))
    return least


@pytest.mark.parametrize("N", [3, 40, 100_000])
@pytest.mark.parametrize(("n", "r"), [(3, 1), (3, 2), (4, 2), (5, 1), (5, 2)])
def test_one_output_by_brute_force(n, r, N):
    """Theorem 4.1: variance of the estimate inside the subspace, and the distance of its target from it."""
    G, Z, Y = draw(1, n, seed=10 * n + r)
    F = fisher_of(Z, Y, 1e-6)
    delta = -torch.linalg.solve(F, G.double()[0])
    covariance = torch.linalg.inv(F) / N

    def cost(A0):
        return (A0 * (covariance @ A0)).sum() + (delta - A0 @ (A0.T @ delta)).square().sum()

    found = hs.LoRADA(variance=1.0, normalise=False, gamma=1.0).factors(layer(G, Z, Y, r, population=N))
    A0 = found.A.double().T
    least = minimum(cost, n, r)
    assert float(cost(A0)) == pytest.approx(least, rel=1e-6, abs=1e-9 * float(delta.square().sum()))
    constant = float(delta.square().sum())
    assert found.info["objective"] == pytest.approx(float(cost(A0)) - constant, rel=1e-5, abs=1e-6 * constant)
    # B A is Delta's projection on the subspace (equation 17).
    assert relative((found.B @ found.A)[0], A0 @ (A0.T @ delta)) < 1e-5
    # Neither part alone does better.
    for options in (dict(variance=0.0), dict(bias=0.0)):
        other = hs.LoRADA(gamma=1.0, **options).factors(layer(G, Z, Y, r)).A.double().T
        assert float(cost(other)) >= least - 1e-6 * constant


def test_one_output_and_one_direction_on_a_fine_grid():
    G, Z, Y = draw(1, 3, seed=5)
    F = fisher_of(Z, Y, 1e-6)
    delta, N = -torch.linalg.solve(F, G.double()[0]), 10
    covariance = torch.linalg.inv(F) / N
    theta, phi = (torch.arange(0, math.pi, 0.003, dtype=torch.float64) for _ in range(2))
    theta, phi = torch.meshgrid(theta, phi, indexing="ij")
    a = torch.stack((theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()), dim=-1).reshape(-1, 3)

    def costs(rows):
        return (rows @ covariance * rows).sum(1) + delta.square().sum() - (rows @ delta).square()

    grid = costs(a)
    found = hs.LoRADA(variance=1.0, gamma=1.0).factors(layer(G, Z, Y, 1, population=N))
    mine = float(costs(found.A.double()))
    spread = float(grid.max() - grid.min())
    assert mine <= float(grid.min()) + 1e-7 * spread
    assert mine >= float(grid.min()) - 1e-5 * spread


@pytest.mark.parametrize(("m", "n", "r"), [(2, 4, 2), (3, 3, 1)])
def test_several_outputs_by_brute_force(m, n, r):
    """Theorem 4.2, with correlated outputs: the trace over all weights of what the projection leaves of F^-1."""
    G, Z, Y = draw(m, n, seed=m, full=True)
    F = fisher_of(Z, Y, 1e-6)
    delta = -torch.linalg.solve(F, G.double().reshape(-1)).reshape(m, n)
    covariance = torch.linalg.inv(F) / 20

    def cost(A0):
        P = A0 @ A0.T
        return (torch.kron(eye(m), P) * covariance).sum() + (delta - delta @ P).square().sum()

    method = hs.LoRADA(variance=1.0, normalise=False, gamma=1.0, fisher="full")
    found = method.factors(layer(G, Z, Y, r, population=20))
    assert float(cost(found.A.double().T)) == pytest.approx(minimum(cost, n, r, 12), rel=1e-6)


# Without Fisher information: Remark 4.3.


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(12, 20, 4), (20, 12, 4), (7, 7, 7), (1, 9, 1), (30, 300, 5)])
def test_no_fisher_information_and_no_variance(d_out, d_in, r):
    G = normal(d_out, d_in, seed=3).float()
    method = hs.LoRADA(variance=0, fisher="none")
    bare = Layer(name=ATTENTION, d_out=d_out, d_in=d_in, r=r, scaling=1.0, gradient=G)
    found = method.factors(bare)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    best = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
    A0 = 32 * found.A.double().T
    assert float((A0.T @ A0 - eye(r)).abs().max()) < 5e-6
    assert float((projector(A0) - Vh[:r].T @ Vh[:r]).norm()) < 2e-3
    assert float((G.double() @ A0).square().sum()) == pytest.approx(float(S[:r].square().sum()), rel=1e-6)
    assert relative(found.B.double() @ found.A.double(), -best / float(S[0]) / 1024) < 1e-5
    assert relative(found.B, -G.double() @ A0 / float(S[0]) / 32) < 1e-5
    assert found.note == found.repair == ""
    plain = hs.LoRADA(variance=0, fisher="none", normalise=False, gamma=16).factors(bare)
    assert relative(plain.B.double() @ plain.A.double(), -best / 16) < 1e-5
    # The same as Fisher information that says nothing.
    said = hs.LoRADA(variance=0, damping=0).factors(layer(G, torch.eye(d_in), torch.ones(d_out), r))
    assert relative(said.B.double() @ said.A.double(), found.B.double() @ found.A.double()) < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_no_fisher_information_at_any_scale(scale):
    G = normal(9, 8, seed=1).float()
    method = hs.LoRADA(variance=0, fisher="none")
    given_layers = [Layer(name=ATTENTION, d_out=9, d_in=8, r=2, scaling=1.0, gradient=each) for each in (G, G * scale)]
    plain, scaled = (method.factors(each) for each in given_layers)
    assert relative(scaled.B @ scaled.A, plain.B @ plain.A) < 1e-5


@pytest.mark.parametrize("budget", [None, "20KB"])
def test_the_gradients_subspace_without_fisher_information(budget):
    base, data = tiny_llama(), [token_batch()]
    truth = statistics(base, data, [name for name, _ in linear(base) if name != "lm_head"])
    model = wrap(tiny_llama())
    method = hs.LoRADA(samples=4, variance=0, fisher="none")
    report = hs.initialize_(model, method, data=data, memory_budget=budget)
    assert report.warnings == []
    found = all_factors(model)
    assert found.keys() == truth.keys()
    for name, (A, B) in found.items():
        G, A = truth[name].G, 32 * A.double()
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        assert float((G @ A.T).square().sum()) == pytest.approx(float(S[:4].square().sum()), rel=1e-5)
        assert relative(32 * B.double() @ A, -(U[:, :4] * S[:4] / S[0]) @ Vh[:4]) < 1e-4


def test_fewer_directions_than_the_rank_without_fisher_information():
    """A gradient of rank one: the rest of A0 is any orthonormal completion, and its columns of B are zero."""
    G = torch.outer(normal(6, seed=1), normal(8, seed=2)).float()
    found = hs.LoRADA(variance=0, fisher="none").factors(
        Layer(name=ATTENTION, d_out=6, d_in=8, r=3, scaling=1.0, gradient=G)
    )
    A0 = 32 * found.A.double().T
    assert float((A0.T @ A0 - eye(3)).abs().max()) < 5e-6
    assert relative(found.B @ found.A * 1024, -G.double() / float(torch.linalg.matrix_norm(G.double(), 2))) < 1e-5


# Ablations.


@pytest.mark.parametrize("n", [10, 300])
def test_without_bias_the_leading_eigenvectors_of_the_inputs(n):
    values = logspace(-2, 2, n)
    values[-3:] *= 2
    Z = of_spectrum(values).float()
    G, _, Y = draw(6, n, seed=1)
    found = hs.LoRADA(bias=0).factors(layer(G, Z, Y, 3))
    leading = torch.linalg.eigh(Z.double()).eigenvectors[:, -3:]
    assert float((projector(found.A.double().T) - leading @ leading.T).norm()) < 5e-3
    assert objective(Z.double(), 32 * found.A.double().T) == pytest.approx(float(values[-3:].sum()), rel=1e-5)


def test_without_variance_the_leading_right_singular_vectors_of_delta():
    G, Z, Y = draw(12, 15, seed=1)
    found = hs.LoRADA(variance=0).factors(layer(G, Z, Y, 3, population=7))
    delta = -G.double() / (Y.double() + 1e-6)[:, None] @ torch.linalg.inv(Z.double() + 1e-6 * eye(15))
    U, S, Vh = torch.linalg.svd(delta)
    assert float((projector(found.A.double().T) - Vh[:3].T @ Vh[:3]).norm()) < 1e-4
    best = U[:, :3] @ torch.diag(S[:3]) @ Vh[:3]
    assert relative(found.B @ found.A, best / float(S[0]) / 1024) < 1e-5


def test_an_endless_training_set_leaves_no_variance():
    G, Z, Y = draw(12, 15, seed=2)
    none = hs.LoRADA(variance=0).factors(layer(G, Z, Y, 3))
    expected = projector(none.A.double().T)
    found = [hs.LoRADA(variance=1).factors(layer(G, Z, Y, 3, population=N)) for N in (1, 10**3, 10**6, 10**12)]
    distances = [float((projector(each.A.double().T) - expected).norm()) for each in found]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1e-3 and distances[-1] < 1e-5


@pytest.mark.parametrize("factor", [2, 100])
def test_the_weight_of_the_variance_and_the_training_set_trade_off(factor):
    G, Z, Y = draw(6, 8, seed=2)
    one = hs.LoRADA(variance=0.03 * factor).factors(layer(G, Z, Y, 3, population=10 * factor))
    other = hs.LoRADA(variance=0.03).factors(layer(G, Z, Y, 3, population=10))
    assert relative(one.B @ one.A, other.B @ other.A) < 1e-5


def test_weights_count_by_their_ratio():
    G, Z, Y = draw(6, 8, seed=2)
    one, other = (hs.LoRADA(variance=c, bias=b).factors(layer(G, Z, Y, 3)) for c, b in ((0.3, 1), (3, 10)))
    assert relative(one.B @ one.A, other.B @ other.A) < 1e-5
    assert other.info["objective"] == pytest.approx(10 * one.info["objective"], rel=1e-9)


# Which layers.


def linear(model):
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]


# By the part of the name that says it: written by hand from the architectures' papers.
PARTS = {
    "llama": (tiny_llama, (".self_attn.",), (".mlp.",)),
    "gpt2": (tiny_gpt2, (".attn.",), (".mlp.",)),
    "t5": (tiny_t5, (".SelfAttention.", ".EncDecAttention."), (".DenseReluDense.",)),
    "bert": (tiny_bert, (".attention.self.", ".attention.output."), (".intermediate.", ".0.output.", ".1.output.")),
    "vit": (tiny_vit, (".attention.",), (".mlp.",)),
    "mixtral": (lambda: tiny_mixtral(num_hidden_layers=2), (".self_attn.",), ()),
}


@pytest.mark.parametrize("architecture", PARTS)
def test_real_names_are_sorted_into_attention_and_the_rest(architecture):
    make, attention, feed_forward = PARTS[architecture]
    seen = 0
    for name, _ in linear(make()):
        kinds = [any(part in name for part in parts) for parts in (attention, feed_forward)]
        if not any(kinds):
            # Heads and poolers are no attention either.
            assert name.rpartition(".")[2] in ("lm_head", "classifier", "dense"), name
        assert not all(kinds)
        seen += kinds[0]
        assert (hs.LoRADA(layers="attention").wants(layer_named(name)).data) == kinds[0], name
        assert (hs.LoRADA(layers="feed-forward").wants(layer_named(name)).data) == (not kinds[0]), name
        assert hs.LoRADA().wants(layer_named(name)).data
    assert seen >= 4


MORE_NAMES = {
    "transformer.h.0.self_attention.query_key_value": True,
    "model.decoder.layers.0.self_attn.out_proj": True,
    "model.decoder.layers.0.encoder_attn.k_proj": True,
    "model.decoder.layers.0.fc1": False,
    "transformer.blocks.0.attn.Wqkv": True,
    "transformer.blocks.0.ffn.up_proj": False,
    "model.layers.0.block_sparse_moe.experts.3.w1": False,
    "model.layers.0.block_sparse_moe.gate": False,
    "model.layers.3.mlp.experts.7.down_proj": False,
    "model.layers.0.mlp.gate_up_proj": False,
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": True,
    "distilbert.transformer.layer.0.attention.q_lin": True,
    "distilbert.transformer.layer.0.ffn.lin1": False,
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output": False,
    "q_proj": True,
    "up_proj": False,
}
LOOK_ALIKES = {
    "roberta_head.classifier.out_proj": False,
    "rwkv.blocks.0.feed_forward.key": False,
    "rwkv.blocks.0.feed_forward.value": False,
    "backbone.layers.0.mixer.out_proj": False,
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": False,
}


@pytest.mark.parametrize(("name", "attention"), [*MORE_NAMES.items(), *LOOK_ALIKES.items()])
def test_names_of_other_architectures(name, attention):
    assert (hs.LoRADA(layers="attention").wants(layer_named(name)).data) == attention


@pytest.mark.parametrize("options", [{}, dict(fisher="none", variance=0)])
@pytest.mark.parametrize(("layers", "left_out"), [("attention", FEED_FORWARD), ("feed-forward", ATTENTION)])
def test_layers_left_out_start_as_lora_does(layers, left_out, options):
    bare = Layer(name=left_out, d_out=6, d_in=8, r=2, scaling=1.0, seed=3)
    found, plain = hs.LoRADA(layers=layers, **options).factors(bare), hs.LoRA().factors(bare)
    assert torch.equal(found.A, plain.A) and torch.equal(found.B, plain.B)
    assert found.note == found.repair == ""


@pytest.mark.parametrize("layers", ["attention", "feed-forward"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_verb_with_layers_left_out(architecture, layers):
    make, batch_of, targets = ARCHITECTURES[architecture]
    parts = PARTS[architecture][1]
    models = {}
    methods = {"lora": "lora", "all": hs.LoRADA(samples=4), "some": hs.LoRADA(samples=4, layers=layers)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadstartWarning)
        for name, method in methods.items():
            models[name] = wrap(make(), target_modules=targets)
            data = None if name == "lora" else [batch_of()]
            report = hs.initialize_(models[name], method, data=data, seed=5)
    found = {name: all_factors(model) for name, model in models.items()}
    assert all(each.note == "" for each in report.layers)
    count = 0
    for name, (A, B) in found["some"].items():
        chosen = any(part in name for part in parts) == (layers == "attention")
        other = found["all" if chosen else "lora"][name]
        assert relative(A, other[0]) < 1e-3 if chosen else torch.equal(A, other[0]), name
        assert B.any() == chosen
        count += chosen
    assert 0 < count < len(found["some"])


# The published ten steps.


def hard(seed, n=160):
    """Z of condition 1e6, and G for a Delta whose singular values fall slowly, as those of real layers do."""
    Z, Y = of_spectrum(logspace(-3, 3, n), seed=seed).float(), logspace(-7, -4, n).float()
    U, V = (torch.linalg.qr(normal(n, n, seed=seed + place)).Q for place in (1, 2))
    delta = (U * torch.arange(1, n + 1, dtype=torch.float64) ** -0.3) @ V.T
    return (-(Y.double() + 1e-3)[:, None] * delta @ (Z.double() + 1e-3 * eye(n))).float(), Z, Y


@pytest.mark.parametrize(("ratio", "bias"), [(0.0, 1.0), (0.1, 1.0), (10.0, 1.0), (1e3, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_ten_steps_are_worse_than_the_optimum_and_say_so(seed, ratio, bias):
    """``ratio`` is that of the variance term's norm to the bias term's."""
    r, N = 4, 1000
    G, Z, Y = hard(seed)
    n = len(Z)
    Zi = torch.linalg.inv(Z.double() + 1e-3 * eye(n))
    Yi = 1 / (Y.double() + 1e-3)
    delta = -Yi[:, None] * G.double() @ Zi
    sigma = float(torch.linalg.matrix_norm(delta, 2))
    variance = ratio * sigma**2 * N / float(Yi.sum() * torch.linalg.matrix_norm(Zi, 2))
    delta = delta / sigma
    omega = variance * Yi.sum() / N * Zi / sigma**2 - bias * delta.T @ delta
    omega = (omega + omega.T) / 2
    norm = max(ratio, bias)
    optimum = float(torch.linalg.eigvalsh(omega)[:r].sum())
    excess, errors = {}, {}
    for iterations in (None, 10, 40):
        method = hs.LoRADA(iterations=iterations, variance=variance, bias=bias, damping=1e-3)
        found = method.factors(layer(G, Z, Y, r, population=N, seed=seed))
        A0 = 32 * found.A.double().T
        assert float((A0.T @ A0 - eye(r)).abs().max()) < 1e-5
        reached = found.info["objective"]
        # What is said of A0 is true of A0, and nothing is below the optimum.
        assert reached == pytest.approx(objective(omega, A0), rel=1e-5, abs=1e-9 * norm)
        assert reached >= optimum - 5e-6 * abs(optimum) - 1e-12 * norm
        excess[iterations], errors[iterations] = reached - optimum, found.info["objective_error"]
        assert excess[iterations] <= (errors[iterations] + 5e-6) * abs(reached) + 1e-12 * norm
        assert relative(found.B, delta @ A0 / 32) < 1e-5
        assert found.info["steps"] == (iterations or 0) and found.info["dense"] == (iterations is None)
    assert errors[None] <= 1e-6 < errors[10]
    # Where the variance is small ten steps come close; where it rules they don't.
    assert excess[10] > excess[None]
    assert (excess[10] > 0.05 * abs(optimum)) == (ratio >= 10 * bias)
    assert ratio >= 10 * bias or excess[10] < 1e-5 * abs(optimum)
    assert excess[40] < excess[10]


@pytest.mark.parametrize("iterations", [1, 10])
def test_steps_on_narrow_layers_are_dense(iterations):
    G, Z, Y = draw(5, 8, seed=3)
    expected = dense(G, Z, Y, N=256)
    check(hs.LoRADA(iterations=iterations).factors(layer(G, Z, Y, 3)), expected, 3)


# Statistics that arithmetic does not like.


def low_rank(n, tokens, scale=1.0):
    x = normal(tokens, n, seed=4).float()
    return scale * (x.T @ x / tokens)


def noisy(n):
    values = logspace(-3, 2, n)
    values[0] = -1e-4
    return of_spectrum(values).float()


N_IN = 16
HARD_INPUTS = {
    "rank": low_rank(N_IN, 3),
    "large rank": low_rank(N_IN, 3, 1e6),
    "small rank": low_rank(N_IN, 3, 1e-8),
    "condition": of_spectrum(logspace(-8, 4, N_IN)).float(),
    "noise": noisy(N_IN),
    "zero": torch.zeros(N_IN, N_IN),
    "one input": torch.diag(torch.eye(N_IN)[0]),
}


@pytest.mark.parametrize("options", [{}, dict(variance=0), dict(bias=0), dict(fisher="full"), dict(iterations=3)])
@pytest.mark.parametrize("damping", [0, 1e-6, 1e-2])
@pytest.mark.parametrize("inputs", HARD_INPUTS)
def test_inputs_that_cannot_be_inverted_as_they_are(inputs, damping, options):
    Z = HARD_INPUTS[inputs]
    full = options.get("fisher") == "full"
    G, _, Y = draw(6, N_IN, seed=8, full=full)
    found = hs.LoRADA(damping=damping, **options).factors(layer(G, Z, Y, 3))
    assert bool(torch.isfinite(found.A).all() and torch.isfinite(found.B).all())
    assert bool(found.B.any())
    assert all(math.isfinite(value) for value in found.info.values())
    used = found.info["damping"]
    assert used >= damping and (used > damping) == ("inputs" in found.repair)
    assert "output" not in found.repair and found.info["damping_outputs"] == damping
    if damping == 0:
        assert found.repair
    if found.repair:
        assert "\n" not in found.repair and "damping" in found.repair
    # With the damping that was used in the end, it is the method.
    Yi = torch.linalg.inv((Y.double() if full else Y.double().diag()) + damping * eye(6))
    values, vectors = torch.linalg.eigh(Z.double() + used * eye(N_IN))
    assert float(values[0]) > 0
    Zi = (vectors / values) @ vectors.T
    delta = -Yi @ G.double() @ Zi
    sigma = torch.linalg.matrix_norm(delta, 2)
    delta = delta / sigma
    A0 = 32 * found.A.double().T
    # The inverse is good to the condition number times float64's precision.
    assert relative(found.B, delta @ A0 / 32) < 1e-5
    parts = options.get("variance", 0.03) * Yi.trace() / 256 * Zi / sigma**2, options.get("bias", 1) * delta.T @ delta
    omega = parts[0] - parts[1]
    norm = max(float(torch.linalg.matrix_norm(part, 2)) for part in parts)
    optimum = float(torch.linalg.eigvalsh(omega)[:3].sum())
    if "iterations" not in options:
        assert abs(objective(omega, A0) - optimum) <= 5e-6 * abs(optimum) + 1e-9 * norm


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
def test_what_can_be_inverted_is_not_repaired(damping):
    """Representable exactly: powers of two on a diagonal, well within the precision."""
    Z, Y = torch.diag(2.0 ** torch.arange(-4.0, 12.0)), 2.0 ** torch.arange(-3.0, 3.0)
    found = hs.LoRADA(damping=damping).factors(layer(normal(6, 16).float(), Z, Y, 3))
    assert found.repair == "" and found.info["damping"] == damping
    bare = hs.LoRADA(damping=0).factors(layer(normal(6, 16).float(), Z, Y, 3))
    assert bare.repair == "" and bare.info["damping"] == 0
    expected = dense(normal(6, 16).float(), Z, Y, N=256, damping=0.0)
    check(bare, expected, 3)


@pytest.mark.parametrize("options", [{}, dict(variance=0), dict(bias=0)])
@pytest.mark.parametrize("damping", [0, 1e-6])
@pytest.mark.parametrize("zeros", [1, 5])
def test_outputs_that_no_gradient_reached(zeros, damping, options):
    """Where g is always zero, so is the gradient's row."""
    G, Z, Y = draw(6, 8, seed=3)
    Y[:zeros], G[:zeros] = 0, 0
    found = hs.LoRADA(damping=damping, **options).factors(layer(G, Z, Y, 3))
    assert bool(torch.isfinite(found.A).all() and torch.isfinite(found.B).all())
    assert not found.B[:zeros].any() and bool(found.B.any())
    assert ("output gradients" in found.repair) == (damping == 0) == (found.info["damping_outputs"] > damping)
    if damping:
        check(found, dense(G, Z, Y, N=256, **options), 3)


def test_full_outputs_of_low_rank():
    G, Z, _ = draw(6, 8, seed=3)
    g = normal(2, 6, seed=4).float()
    for damping in (0, 1e-6):
        found = hs.LoRADA(damping=damping, fisher="full").factors(layer(G, Z, g.T @ g / 2, 3))
        assert bool(torch.isfinite(found.A).all() and torch.isfinite(found.B).all() and found.B.any())
        if damping == 0:
            assert "output gradients" in found.repair
        assert ("output gradients" in found.repair) == (found.info["damping_outputs"] > damping)
    assert hs.LoRADA(damping=1e-3, fisher="full").factors(layer(G, Z, g.T @ g / 2, 3)).repair == ""


@pytest.mark.parametrize("case", ["outputs zero, no damping", "large gradient", "small gradient"])
def test_delta_beyond_the_range_of_float32(case):
    """Normalised by its largest singular value, Delta's scale must not matter."""
    G, Z, Y = draw(6, 8, seed=3)
    options = dict(damping=0, variance=0)
    if case == "outputs zero, no damping":
        # As with tokens='labels', where G counts all tokens and Y some.
        Y = torch.zeros(6)
    elif case == "large gradient":
        G, Y = G * 1e30, Y * 1e-20
    else:
        G, Z, Y = G * 1e-30, Z * 1e8, Y * 1e8
    found = hs.LoRADA(**options).factors(layer(G, Z, Y, 3))
    assert float(torch.linalg.matrix_norm(found.B.double(), 2)) == pytest.approx(1 / 32, rel=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_delta_beyond_the_range_of_float64_names_the_layer(normalise):
    G, Z, Y = draw(6, 8, seed=3)
    with pytest.raises(hs.LayerError, match=rf"{ATTENTION}.*damping"):
        hs.LoRADA(damping=1e200, normalise=normalise).factors(layer(G, Z, Y, 3))


@pytest.mark.parametrize("scales", [(1e-12, 1e-6, 1e-12), (1e6, 1e6, 1e6), (1e-20, 1.0, 1e-30), (1.0, 1e-20, 1.0)])
def test_undamped_the_scales_of_the_statistics_do_not_matter(scales):
    G, Z, Y = draw(6, 8, seed=3)
    method = hs.LoRADA(damping=0, variance=0)
    plain = method.factors(layer(G, Z, Y, 3))
    scaled = method.factors(layer(G * scales[0], Z * scales[1], Y * scales[2], 3))
    assert scaled.repair == ""
    assert relative(scaled.B @ scaled.A, plain.B @ plain.A) < 1e-5


@pytest.mark.parametrize("options", [{}, dict(fisher="full"), dict(fisher="none", variance=0)])
def test_no_gradient_starts_as_lora_does_and_says_so(options):
    _, Z, Y = draw(6, 8, full=options.get("fisher") == "full")
    given_layer = layer(torch.zeros(6, 8), Z, Y, 2)
    found, plain = hs.LoRADA(**options).factors(given_layer), hs.LoRA().factors(given_layer)
    assert torch.equal(found.A, plain.A) and torch.equal(found.B, plain.B)
    assert "no gradient" in found.note and "lora" in found.note


def test_missing_statistics_name_the_layer():
    bare = Layer(name=ATTENTION, d_out=6, d_in=8, r=2, scaling=1.0)
    with pytest.raises(hs.LayerError, match=rf"{ATTENTION}.*gradient"):
        hs.LoRADA().factors(bare)
    bare = Layer(name=ATTENTION, d_out=6, d_in=8, r=2, scaling=1.0, gradient=torch.ones(6, 8))
    with pytest.raises(hs.LayerError, match=rf"{ATTENTION}.*moments of its inputs"):
        hs.LoRADA().factors(bare)


# Settings.

OUT_OF_RANGE = [
    *(("gamma", value) for value in (0, -1.0, math.nan, math.inf)),
    *((name, value) for name in ("damping", "variance", "bias") for value in (-1e-9, math.nan, math.inf)),
    *((name, value) for name in ("samples", "population", "iterations", "tol") for value in (0, -4)),
    ("fisher", "k-fac"),
    ("tokens", "all"),
    ("layers", "mlp"),
    ("samples", 2.5),
    ("population", 2.5),
    ("iterations", 2.5),
    ("iterations", "ten"),
    ("normalise", 1),
    ("damping", None),
    ("tol", None),
]


@pytest.mark.parametrize(("setting", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_names_the_setting(setting, value):
    with pytest.raises(hs.MethodError, match=rf"'lora-da'.*{setting}"):
        hs.get_method("lora-da", **{setting: value})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(variance=0, bias=0), "variance and bias"),
        (dict(fisher="none"), "variance=0"),
        (dict(fisher="none", variance=0, bias=0), "variance and bias"),
    ],
)
def test_settings_that_contradict_each_other(options, match):
    with pytest.raises(hs.MethodError, match=match):
        hs.LoRADA(**options)


@pytest.mark.parametrize(
    "method",
    [
        hs.LoRADA(),
        hs.LoRADA(samples=16, damping=0, population=7473, fisher="full", tokens="labels", normalise=False),
        hs.LoRADA(variance=0.0, gamma=1, tol=1e-3, iterations=10, layers="feed-forward"),
        hs.LoRADA(bias=0, layers="attention"),
        # None and "none" look the same as text.
        hs.LoRADA(variance=0, fisher="none"),
    ],
)
def test_round_trip_through_text(method):
    assert parse_method(str(method)) == method
    assert parse_method("lora-da:" + ",".join(f"{k}={v}" for k, v in method.settings().items())) == method
    assert hs.get_method("lora-da", **method.settings()) == method


def test_what_is_collected():
    assert hs.LoRADA().wants(layer_named(ATTENTION)).outputs == "diagonal"
    assert hs.LoRADA(fisher="full", tokens="labels").wants(layer_named(ATTENTION)).outputs == "full"
    assert hs.LoRADA(tokens="labels").wants(layer_named(ATTENTION)).tokens == "labels"
    assert hs.LoRADA(fisher="none", variance=0).wants(layer_named(ATTENTION)).outputs is None
    assert hs.LoRADA(fisher="none", variance=0).wants(layer_named(ATTENTION)).gradient


# The verb.


def reads_decoder(name):
    """Whether a layer of T5 reads the decoder's tokens."""
    return name.startswith("decoder.") and not name.endswith(("EncDecAttention.k", "EncDecAttention.v"))


def statistics(base, batches, names, tokens="attention"):
    """G, Z and Y in float64 from autograd, one sample at a time without its padding: the definitions.

    What labels are -100 for is padding to a decoder, which has no mask of its own here.
    """
    model = copy.deepcopy(base).double().eval()
    two_sided = bool(getattr(model.config, "is_encoder_decoder", False))
    sums = {name: SimpleNamespace(G=0.0, Z=0.0, Y=0.0, rows=0) for name in names}
    kept = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            kept[name] = (args[0].detach(), output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    samples = 0
    for batch in batches:
        for row in range(len(batch["labels"])):
            one = {
                k: v[row : row + 1].double() if v.is_floating_point() else v[row : row + 1] for k, v in batch.items()
            }
            if "attention_mask" in one:
                mask = one["attention_mask"][0].bool()
                one = {k: v[:, mask] if v.dim() == 2 and v.shape[1] == len(mask) else v for k, v in one.items()}
            model.zero_grad()
            model(**one).loss.backward()
            samples += 1
            for name in names:
                x, output = kept[name]
                x, g = x.reshape(-1, x.shape[-1]), output.grad.reshape(-1, output.shape[-1])
                found = sums[name]
                found.G = found.G + g.T @ x
                if tokens == "labels" or (two_sided and reads_decoder(name)):
                    learned = one["labels"][0] != -100
                    if not two_sided:  # a causal model predicts the label of the next position
                        learned = torch.cat([learned[1:], torch.zeros_like(learned[:1])])
                    x, g = x[learned], g[learned]
                found.Z, found.Y, found.rows = found.Z + x.T @ x, found.Y + g.T @ g, found.rows + len(x)
    for handle in handles:
        handle.remove()
    return {
        name: SimpleNamespace(G=f.G / samples, Z=f.Z / f.rows, Y=f.Y / f.rows, samples=samples)
        for name, f in sums.items()
    }


def whole(G, Z, Y, *, N, damping, variance=0.03, normalise=True):
    """As `dense`, for layers of which the Fisher matrix is too large: by METHODS' formulas, tested above."""
    Zi = torch.linalg.inv(Z + damping * eye(len(Z)))
    Yi = torch.linalg.inv((Y.diag() if Y.dim() == 1 else Y) + damping * eye(len(Y)))
    delta = -Yi @ G @ Zi
    sigma = float(torch.linalg.matrix_norm(delta, 2))
    parts = variance * Yi.trace() / N * Zi / sigma**2, delta.T @ delta / sigma**2
    norm = max(float(torch.linalg.matrix_norm(part, 2)) for part in parts)
    omega = parts[0] - parts[1]
    return SimpleNamespace(delta=delta / sigma, omega=(omega + omega.T) / 2, sigma=sigma, norm=norm)


@pytest.mark.parametrize("options", [{}, dict(fisher="full"), dict(variance=30.0)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_verb_against_autograd(architecture, options):
    """Damped enough that the statistics' float32 does not show."""
    make, batch_of, targets = ARCHITECTURES[architecture]
    base = make()
    batches = [batch_of(seed=1), batch_of(seed=2)]
    model = wrap(copy.deepcopy(base), target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadstartWarning)
        report = hs.initialize_(model, hs.LoRADA(samples=8, damping=1e-2, **options), data=batches)
    found = all_factors(model)
    truth = statistics(base, batches, list(found))
    for each in report.layers:
        A, B = found[each.name]
        t = truth[each.name]
        Y = t.Y if options.get("fisher") == "full" else t.Y.diagonal()
        expected = whole(t.G, t.Z, Y, N=8, damping=1e-2, variance=options.get("variance", 0.03))
        assert each.repair == "" and each.note == ""
        made = SimpleNamespace(A=A, B=B, info=each.info, core=None, note="")
        check(made, expected, 4, loose=3e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tokens_with_a_label(architecture):
    make, batch_of, targets = ARCHITECTURES[architecture]
    base, batches = make(), [batch_of(seed=1)]
    model = wrap(copy.deepcopy(base), target_modules=targets)
    hs.initialize_(model, hs.LoRADA(samples=4, damping=1e-2, tokens="labels"), data=batches)
    found = all_factors(model)
    truth = statistics(base, batches, list(found), tokens="labels")
    for name, (A, B) in found.items():
        t = truth[name]
        expected = whole(t.G, t.Z, t.Y.diagonal(), N=4, damping=1e-2)
        check(SimpleNamespace(A=A, B=B, info={}, core=None, note=""), expected, 4, loose=3e-5)


INFO = {"objective", "objective_error", "steps", "dense", "condition", "damping", "damping_outputs", "sigma"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_verb_with_published_settings(architecture):
    make, batch_of, targets = ARCHITECTURES[architecture]
    model = wrap(make(), target_modules=targets)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadstartWarning)
        report = hs.initialize_(model, "lora-da:samples=4", data=[batch_of()])
    assert report.method == "lora-da:samples=4"
    assert report.samples == 4
    assert [each.name for each in report.layers] == [target.name for target in lora_layers(model, "default")]
    for each in report.layers:
        assert set(each.info) == INFO
        assert all(isinstance(v, int | float) and math.isfinite(v) for v in each.info.values())
        assert each.info["objective_error"] <= 1e-6
        # The rows of A are orthonormal over 32.
        assert each.norm_A == pytest.approx(2 / 32, rel=1e-5)
        assert 0 < each.norm_B <= (1 + 1e-5) * 2 / 32
        assert each.info["damping_outputs"] == 1e-6
        assert (each.repair != "") == (each.info["damping"] > 1e-6)
    repaired = [each.name for each in report.layers if each.repair]
    assert all(any(name in sentence for sentence in report.repairs()) for name in repaired)
    assert bool(repaired) == bool(report.repairs()) == ("repaired: " in str(report))
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["info"].keys() == INFO
    # The start is W + s B A: W untouched, nothing subtracted.
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name]), name
    assert all(anchors(target.module, target.adapter) is None for target in lora_layers(model, "default"))


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_the_start_is_beside_the_base_model(form):
    base, batch = tiny_llama(), token_batch()
    model = wrap(copy.deepcopy(base), lora_alpha=16, use_rslora=True)
    hs.initialize_(model, "lora-da:samples=4,gamma=16", data=[batch], form=form)
    moved = copy.deepcopy(base)
    s = 16 / math.sqrt(4)
    with torch.no_grad():
        for name, (A, B) in all_factors(model).items():
            moved.get_submodule(name).weight.add_(s * B @ A)
    assert torch.allclose(logits(model, batch), logits(moved, batch), atol=1e-5)
    assert float((logits(model, batch) - logits(base, batch)).norm()) > 1e-2


def test_the_start_is_downhill():
    """Delta is a preconditioned descent direction: tr(G' Delta) < 0, and of its projection as well."""
    base, batch = tiny_llama(), token_batch(padded=False)
    truth = statistics(base, [batch], [n for n, _ in linear(base) if n != "lm_head"])
    for options in ({}, dict(bias=0), dict(fisher="none", variance=0)):
        model = wrap(copy.deepcopy(base))
        hs.initialize_(model, hs.LoRADA(samples=4, damping=1e-2, **options), data=[batch])
        found = all_factors(model)
        assert sum(float((truth[name].G * (B.double() @ A.double())).sum()) for name, (A, B) in found.items()) < 0


@pytest.mark.parametrize("options", ["", ",fisher=full", ",iterations=5"])
def test_the_same_seed_gives_the_same_factors(options):
    method = "lora-da:samples=4" + options
    found = []
    for _ in range(2):
        model = wrap(tiny_llama())
        hs.initialize_(model, method, data=[token_batch()], seed=3)
        found.append(all_factors(model))
    for name, (A, B) in found[0].items():
        assert torch.equal(A, found[1][name][0]) and torch.equal(B, found[1][name][1])
    # The optimum has no seed.
    model = wrap(tiny_llama())
    hs.initialize_(model, method, data=[token_batch()], seed=4)
    if "iterations" not in method:
        for name, (A, B) in all_factors(model).items():
            assert relative(B @ A, found[0][name][1] @ found[0][name][0]) < 1e-4


def test_the_population_of_the_verb():
    def started(method, **given):
        model = wrap(tiny_llama(), target_modules=["q_proj", "down_proj"])
        report = hs.initialize_(model, method, **(dict(data=[token_batch(), token_batch(seed=1)]) | given))
        return [each.info["objective"] for each in report.layers]

    four = dict(samples=4)
    # The length of the data, not what was read of them.
    assert started(hs.LoRADA(**four)) == started(hs.LoRADA(**four, population=8))
    batches = [token_batch(), token_batch(seed=1)]
    known = hs.TrainingData(batches, training=hs.Training(population=1000))
    assert started(hs.LoRADA(**four), data=known) == started(hs.LoRADA(**four, population=1000))
    # The setting goes before what the data tell.
    assert started(hs.LoRADA(**four, population=8), data=known) == started(hs.LoRADA(**four))
    # What has no length: the samples.
    assert started(hs.LoRADA(**four), data=iter([token_batch()])) == started(hs.LoRADA(**four, population=4))
    assert started(hs.LoRADA(**four)) != started(hs.LoRADA(**four), data=known)


class Heads(nn.Module):
    """A layer that is used, one whose output counts for nothing, and one that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type="heads")
        self.used, self.muted, self.unused = (nn.Linear(8, 6) for _ in range(3))

    def forward(self, x, labels):
        scores = self.used(x) + 0 * self.muted(x)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def heads(*targets):
    torch.manual_seed(1)
    return get_peft_model(Heads(), LoraConfig(r=2, lora_alpha=4, target_modules=list(targets)))


HEADS_BATCH = {"x": normal(24, 8).float(), "labels": torch.arange(24) % 6}


@pytest.mark.parametrize("method", [hs.LoRADA(samples=24), hs.LoRADA(samples=24, fisher="none", variance=0)])
def test_layers_without_gradient_fall_back_with_a_warning(method):
    plain, model = heads("used", "muted", "unused"), heads("used", "muted", "unused")
    hs.initialize_(plain, "lora")
    with pytest.warns(HeadstartWarning, match="no gradient"):
        report = hs.initialize_(model, method, data=[HEADS_BATCH])
    assert len(report.warnings) == 1
    assert "muted" in report.warnings[0] and "unused" in report.warnings[0]
    mine, theirs = all_factors(model), all_factors(plain)
    for name in ("muted", "unused"):
        assert torch.equal(mine[name][0], theirs[name][0]) and not mine[name][1].any()
    assert mine["used"][1].any()
    assert {each.name: each.note != "" for each in report.layers} == {"used": False, "muted": True, "unused": True}


@pytest.mark.parametrize("name", ["muted", "unused"])
def test_strict_refuses_a_layer_without_gradient(name):
    model = heads("used", name)
    before = all_factors(model)
    with pytest.raises(hs.LayerError, match=rf"{name}.*no gradient"):
        hs.initialize_(model, hs.LoRADA(samples=24), data=[HEADS_BATCH], strict=True)
    for each, (A, B) in all_factors(model).items():
        assert torch.equal(A, before[each][0]) and torch.equal(B, before[each][1])
    assert hs.initialize_(heads("used"), hs.LoRADA(samples=24), data=[HEADS_BATCH], strict=True).warnings == []


def test_repairs_are_reported_once_for_many_layers():
    """Four samples of one token see four of eight directions; without damping that can't be inverted."""
    model = heads("used")
    batch = {"x": HEADS_BATCH["x"][:4], "labels": HEADS_BATCH["labels"][:4]}
    report = hs.initialize_(model, hs.LoRADA(samples=4, damping=0), data=[batch], strict=True)
    assert len(report.repairs()) == 1
    assert report.repairs()[0].startswith("used: damping of inputs to ")
    assert report.warnings == []
    assert "repaired: used" in str(report)
    assert report.layers[0].info["damping"] > 0
    enough = hs.initialize_(heads("used"), hs.LoRADA(samples=24, damping=1e-6), data=[HEADS_BATCH])
    assert enough.repairs() == [] and enough.layers[0].info["damping"] == 1e-6


def test_data_are_needed():
    with pytest.raises(hs.DataError, match="lora-da"):
        hs.initialize_(wrap(tiny_llama()), "lora-da")
    with pytest.warns(HeadstartWarning, match="4 samples, 256 were asked for"):
        hs.initialize_(wrap(tiny_llama(), target_modules=["q_proj"]), "lora-da", data=[token_batch()])


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_saved_and_read_by_plain_peft(tmp_path, form):
    base, batch = tiny_llama(), token_batch()
    model = wrap(copy.deepcopy(base))
    hs.initialize_(model, "lora-da:samples=4,gamma=16", data=[batch], form=form)
    perturb(model)
    expected = logits(model, batch)
    assert hs.save_lora(model, tmp_path / "adapter") == 0.0
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    # Rank as it was: nothing had to be subtracted.
    assert again.peft_config["default"].r == 4
    assert torch.allclose(logits(again, batch), expected, atol=1e-6)
    again = again.merge_and_unload()
    assert torch.allclose(logits(again, batch), expected, atol=1e-5)


def test_half_precision_models_and_other_ranks():
    model = wrap(tiny_llama(), rank_pattern={"down_proj": 7}).to(torch.bfloat16)
    report = hs.initialize_(model, "lora-da:samples=4", data=[token_batch()])
    for each in report.layers:
        A, B = all_factors(model)[each.name]
        assert bool(torch.isfinite(A).all() and torch.isfinite(B).all())
        assert each.r == (7 if "down_proj" in each.name else 4)
