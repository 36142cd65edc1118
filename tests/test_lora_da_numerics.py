"""LoRA-DA where arithmetic is hard: the published ten steps, singular statistics, scales beyond a format."""

from __future__ import annotations

import math

import pytest
import torch

import headstart as hs
from fisher import ATTENTION, check, dense, draw, eye, layer, logspace, objective, of_spectrum, published
from inputs import normal
from oracles import relative


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
        method = published(iterations=iterations, variance=variance, bias=bias, damping=1e-3)
        start = method.factors(layer(G, Z, Y, r, population=N, seed=seed))
        A0 = 32 * start.A.double().T
        assert float((A0.T @ A0 - eye(r)).abs().max()) < 1e-5
        reached = start.info["objective"]
        # What is said of A0 is true of A0, and nothing is below the optimum.
        assert reached == pytest.approx(objective(omega, A0), rel=1e-5, abs=1e-9 * norm)
        assert reached >= optimum - 5e-6 * abs(optimum) - 1e-12 * norm
        excess[iterations], errors[iterations] = reached - optimum, start.info["objective_error"]
        assert excess[iterations] <= (errors[iterations] + 5e-6) * abs(reached) + 1e-12 * norm
        assert relative(start.B, delta @ A0 / 32) < 1e-5
        assert start.info["steps"] == (iterations or 0) and start.info["dense"] == (iterations is None)
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
    check(published(iterations=iterations).factors(layer(G, Z, Y, 3)), expected, 3)


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
    start = published(damping=damping, **options).factors(layer(G, Z, Y, 3))
    assert bool(torch.isfinite(start.A).all() and torch.isfinite(start.B).all())
    assert bool(start.B.any())
    assert all(math.isfinite(value) for value in start.info.values())
    used = start.info["damping"]
    assert used >= damping and (used > damping) == ("inputs" in start.repair)
    assert "output" not in start.repair and start.info["damping_outputs"] == damping
    if damping == 0:
        assert start.repair
    if start.repair:
        assert "\n" not in start.repair and "damping" in start.repair
    # With the damping that was used in the end, it is the method.
    Yi = torch.linalg.inv((Y.double() if full else Y.double().diag()) + damping * eye(6))
    values, vectors = torch.linalg.eigh(Z.double() + used * eye(N_IN))
    assert float(values[0]) > 0
    Zi = (vectors / values) @ vectors.T
    delta = -Yi @ G.double() @ Zi
    sigma = torch.linalg.matrix_norm(delta, 2)
    delta = delta / sigma
    A0 = 32 * start.A.double().T
    # The inverse is good to the condition number times float64's precision.
    assert relative(start.B, delta @ A0 / 32) < 1e-5
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
    start = published(damping=damping).factors(layer(normal(6, 16).float(), Z, Y, 3))
    assert start.repair == "" and start.info["damping"] == damping
    bare = published(damping=0).factors(layer(normal(6, 16).float(), Z, Y, 3))
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
    start = published(damping=damping, **options).factors(layer(G, Z, Y, 3))
    assert bool(torch.isfinite(start.A).all() and torch.isfinite(start.B).all())
    assert not start.B[:zeros].any() and bool(start.B.any())
    assert ("output gradients" in start.repair) == (damping == 0) == (start.info["damping_outputs"] > damping)
    if damping:
        check(start, dense(G, Z, Y, N=256, **options), 3)


def test_full_outputs_of_low_rank():
    G, Z, _ = draw(6, 8, seed=3)
    g = normal(2, 6, seed=4).float()
    for damping in (0, 1e-6):
        start = published(damping=damping, fisher="full").factors(layer(G, Z, g.T @ g / 2, 3))
        assert bool(torch.isfinite(start.A).all() and torch.isfinite(start.B).all() and start.B.any())
        if damping == 0:
            assert "output gradients" in start.repair
        assert ("output gradients" in start.repair) == (start.info["damping_outputs"] > damping)
    assert published(damping=1e-3, fisher="full").factors(layer(G, Z, g.T @ g / 2, 3)).repair == ""


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
    start = published(**options).factors(layer(G, Z, Y, 3))
    assert float(torch.linalg.matrix_norm(start.B.double(), 2)) == pytest.approx(1 / 32, rel=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_delta_beyond_the_range_of_float64_names_the_layer(normalize):
    G, Z, Y = draw(6, 8, seed=3)
    with pytest.raises(hs.LayerError, match=rf"{ATTENTION}.*damping"):
        published(damping=1e200, normalize=normalize).factors(layer(G, Z, Y, 3))


@pytest.mark.parametrize("scales", [(1e-12, 1e-6, 1e-12), (1e6, 1e6, 1e6), (1e-20, 1.0, 1e-30), (1.0, 1e-20, 1.0)])
def test_undamped_the_scales_of_the_statistics_do_not_matter(scales):
    G, Z, Y = draw(6, 8, seed=3)
    method = published(damping=0, variance=0)
    plain = method.factors(layer(G, Z, Y, 3))
    scaled = method.factors(layer(G * scales[0], Z * scales[1], Y * scales[2], 3))
    assert scaled.repair == ""
    assert relative(scaled.B @ scaled.A, plain.B @ plain.A) < 1e-5
