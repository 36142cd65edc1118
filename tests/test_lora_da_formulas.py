"""LoRA-DA's formulas against the dense Fisher matrix of all weights, and its definition by brute force."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fisher import check, dense, draw, eye, fisher_of, layer, logspace, objective, of_spectrum, published
from inputs import normal
from oracles import relative


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
    expected = dense(G, Z, Y, N=50, normalize=False)
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
    start = published(fisher="full" if full else "diagonal", normalize=False).factors(layer(G, Z, Y, r, population=50))
    check(start, expected, r)


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
    normalize = data.draw(st.booleans())
    gamma = data.draw(st.sampled_from([1, 1024.0, 3e5]))
    options = dict(damping=damping, variance=weights[0], bias=weights[1], normalize=normalize)
    expected = dense(G, Z, Y, N=N, **options)
    # Beyond this no two ways of computing agree.
    assume(expected.norm > 0)
    method = published(fisher="full" if full else "diagonal", gamma=gamma, population=N, **options)
    start = method.factors(layer(G, Z, Y, r))
    assert start.repair == "" and start.info["damping"] == start.info["damping_outputs"] == damping
    check(start, expected, r, gamma=gamma)
    # The adapter's scaling s plays no part.
    again = method.factors(layer(G, Z, Y, r, s=7.0))
    assert torch.equal(again.A, start.A) and torch.equal(again.B, start.B)


@pytest.mark.parametrize("options", [{}, dict(variance=0.0), dict(bias=0.0), dict(variance=3e-7), dict(tol=1e-3)])
@pytest.mark.parametrize(("d_out", "r"), [(20, 4), (400, 8), (300, 16)])
def test_layers_too_wide_for_the_dense_decomposition(d_out, r, options):
    """The formulas of METHODS, shown above to be those of the dense Fisher matrix."""
    n, N = 300, 1000
    G = (normal(d_out, n, seed=1) @ of_spectrum(logspace(-3, 0, n), seed=2)).float()
    Z, Y = of_spectrum(logspace(-3, 2, n), seed=3).float(), logspace(-6, -4, d_out).float()
    start = published(**options).factors(layer(G, Z, Y, r, population=N))
    assert start.repair == ""
    Zi = torch.linalg.inv(Z.double() + 1e-6 * eye(n))
    Zi = (Zi + Zi.T) / 2
    Yi = 1 / (Y.double() + 1e-6)
    delta = -Yi[:, None] * G.double() @ Zi
    sigma = float(torch.linalg.matrix_norm(delta, 2))
    parts = options.get("variance", 0.03) * Yi.sum() / N * Zi / sigma**2, delta.T @ delta / sigma**2
    omega = parts[0] - options.get("bias", 1.0) * parts[1]
    norm = max(float(torch.linalg.matrix_norm(part, 2)) for part in parts)
    expected = SimpleNamespace(delta=delta / sigma, omega=omega, sigma=sigma, norm=norm)
    check(start, expected, r, tol=options.get("tol", 1e-6))


def test_normalising_changes_B_alone():
    G, Z, Y = draw(6, 9, seed=3)
    one, other = (published(normalize=flag).factors(layer(G, Z, Y, 3)) for flag in (True, False))
    assert torch.equal(one.A, other.A)
    assert relative(one.B * one.info["sigma"], other.B) < 1e-6
    # Of what is normalised, the largest part that a direction can hold is 1.
    assert float(torch.linalg.matrix_norm(one.B.double(), 2)) <= (1 + 1e-6) / 32


def test_layers_that_share_their_input_are_solved_as_if_alone():
    (G, Z, Y), (H, X, V) = draw(5, 7, seed=1), draw(4, 7, seed=2)
    given_layers = [layer(G, Z, Y, 2), layer(H, Z, V, 3), layer(H, X, V, 3), layer(G, Z, Y, 3), layer(G, X, Y, 1)]
    method = published()
    for one, together in zip(given_layers, method.factors_batch(given_layers), strict=True):
        alone = method.factors(one)
        assert torch.equal(alone.A, together.A) and torch.equal(alone.B, together.B)
        assert alone.info == together.info


def test_the_size_of_the_training_set_by_precedence():
    G, Z, Y = draw(5, 7, seed=4)

    def A_of(method, population):
        return method.factors(layer(G, Z, Y, 2, population=population)).info["objective"]

    assert A_of(published(population=9), 5000) == A_of(published(), 9)
    assert A_of(published(samples=9), None) == A_of(published(), 9)
    assert A_of(published(samples=9), 5000) == A_of(published(), 5000)
    assert A_of(published(), 9) > A_of(published(), 5000)


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


@pytest.mark.parametrize(
    ("n", "r", "N"), [(3, 1, 40), (3, 2, 40), (4, 2, 3), (4, 2, 40), (4, 2, 100_000), (5, 1, 40), (5, 2, 40)]
)
def test_one_output_by_brute_force(n, r, N):
    """Theorem 4.1: variance of the estimate inside the subspace, and the distance of its target from it."""
    G, Z, Y = draw(1, n, seed=10 * n + r)
    F = fisher_of(Z, Y, 1e-6)
    delta = -torch.linalg.solve(F, G.double()[0])
    covariance = torch.linalg.inv(F) / N

    def cost(A0):
        return (A0 * (covariance @ A0)).sum() + (delta - A0 @ (A0.T @ delta)).square().sum()

    start = published(variance=1.0, normalize=False, gamma=1.0).factors(layer(G, Z, Y, r, population=N))
    A0 = start.A.double().T
    least = minimum(cost, n, r)
    assert float(cost(A0)) == pytest.approx(least, rel=1e-6, abs=1e-9 * float(delta.square().sum()))
    constant = float(delta.square().sum())
    assert start.info["objective"] == pytest.approx(float(cost(A0)) - constant, rel=1e-5, abs=1e-6 * constant)
    # B A is Delta's projection on the subspace (equation 17).
    assert relative((start.B @ start.A)[0], A0 @ (A0.T @ delta)) < 1e-5
    # Neither part alone does better.
    for options in (dict(variance=0.0), dict(bias=0.0)):
        other = published(gamma=1.0, **options).factors(layer(G, Z, Y, r)).A.double().T
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
    start = published(variance=1.0, gamma=1.0).factors(layer(G, Z, Y, 1, population=N))
    reached = float(costs(start.A.double()))
    spread = float(grid.max() - grid.min())
    assert reached <= float(grid.min()) + 1e-7 * spread
    assert reached >= float(grid.min()) - 1e-5 * spread


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

    method = published(variance=1.0, normalize=False, gamma=1.0, fisher="full")
    start = method.factors(layer(G, Z, Y, r, population=20))
    assert float(cost(start.A.double().T)) == pytest.approx(minimum(cost, n, r, 12), rel=1e-6)
