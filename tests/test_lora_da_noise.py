"""LoRA-DA's variance term against samples of a known Fisher information, and what the report says of noise."""

from __future__ import annotations

import math

import pytest
import torch

import headstart as hs
from conftest import tiny_llama, token_batch, wrap
from fisher import draw, layer, logspace, objective, of_spectrum, sampled
from inputs import normal
from oracles import relative

# Samples of T tokens: n of them for the start, N to train on.
n, T, N = 4, 6, 50
M, D = 4, 5


def known(full, seed=0):
    """Y and Z, and a mean gradient of the size of its noise."""
    Z, Y = of_spectrum(logspace(-1, 1, D), seed + 1), of_spectrum(logspace(-2, 0, M), seed + 2)
    Y = Y if full else Y.diagonal().diag()
    root = torch.linalg.cholesky(Y), torch.linalg.cholesky(Z)
    mean = 1.5 * math.sqrt(T / n) * root[0] @ normal(M, D, seed=seed + 3) @ root[1].T
    return Z, Y, mean


def gradients(Z, Y, mean, repetitions, seed=9):
    """Mean gradients of n samples, whose tokens' own are g x' with independent g and x, but for the mean."""
    tokens = normal(repetitions, n * T, M + D, seed=seed)
    g = tokens[..., :M] @ torch.linalg.cholesky(Y).T
    x = tokens[..., M:] @ torch.linalg.cholesky(Z).T
    return mean + g.mT @ x / n


def measured(values):
    """Mean and standard error over the first axis."""
    return values.mean(0), values.std(0) / math.sqrt(len(values))


@pytest.mark.parametrize(("damping", "full"), [(0.0, True), (0.1, False), (1.0, True)])
def test_the_guidance_matrix_is_unbiased(damping, full):
    """Its truth is what the noiseless gradient gives, with the variance of training on N samples."""
    Z, Y, mean = known(full)
    options = dict(damping=damping, N=N, n=n, T=T)
    truth = sampled(mean, Z, Y, noise="tokens", **options).omega
    drawn = gradients(Z, Y, mean, 4000)
    means, errors = {}, {}
    for noise in ("tokens", "unbiased"):
        omegas = torch.stack([sampled(G, Z, Y, noise=noise, **options).omega for G in drawn])
        means[noise], errors[noise] = measured(omegas)
    assert bool(((means["unbiased"] - truth).abs() <= 4.5 * errors["unbiased"]).all())
    # What it mends is no small thing: without it the trace, and each of its terms, are too low.
    low = (truth - means["tokens"]).diagonal()
    assert bool((low > 5 * errors["tokens"].diagonal()).all())


@pytest.mark.parametrize(("preset", "full"), [("scale-free", True), ("published", False)])
def test_the_methods_own_trace_is_unbiased(preset, full):
    """Of all directions together the objective is the trace of Omega."""
    Z, Y, mean = known(full)
    given_Y = Y if full else Y.diagonal()
    options = dict(preset=preset, normalize=False, fisher="full" if full else "diagonal", population=N)
    variances = dict(tokens=n * T, samples=n)

    def trace(G, noise):
        method = hs.LoRADA(noise=noise, **options)
        return method.factors(layer(G, Z, given_Y, D, **variances)).info["objective"]

    truth = trace(mean, "tokens")
    drawn = gradients(Z, Y, mean, 400)
    values = {noise: torch.tensor([trace(G, noise) for G in drawn]) for noise in ("published", "tokens", "unbiased")}
    results = {noise: measured(of_noise) for noise, of_noise in values.items()}
    assert abs(results["unbiased"][0] - truth) <= 4 * results["unbiased"][1]
    for noise in ("published", "tokens"):
        assert truth - results[noise][0] > 8 * results[noise][1]


def test_the_variance_of_training_is_that_of_least_squares_on_sequences():
    """y = W x + e with a known covariance of e: the Fisher information of a sample is that of its T tokens."""
    Z, S, target = of_spectrum(logspace(-1, 1, D), 1), of_spectrum(logspace(-1, 0, M), 2), normal(M, D, seed=3)
    # Of a loss that is the mean over tokens of e' S^-1 e / 2, whose gradients are S^-1 e / T a token.
    Y = torch.linalg.inv(S) / T**2
    draws = normal(2000, N * T, M + D, seed=4)
    x = draws[..., M:] @ torch.linalg.cholesky(Z).T
    y = x @ target.T + draws[..., :M] @ torch.linalg.cholesky(S).T
    estimates = torch.linalg.solve(x.mT @ x, x.mT @ y).mT
    # In the published units a step of W is Delta = T^2 times as much: -Y^-1 G Z^-1 = T^2 S S^-1 (target - W) Z Z^-1.
    away = T**2 * (estimates - target)
    mean, error = measured(away.mT @ away)
    G = (-torch.linalg.inv(S) @ target @ Z).double()
    assert relative(sampled(G, Z, Y, damping=0.0, noise="tokens", N=N, n=n, T=T).delta, T**2 * target) < 1e-9
    # Finite samples of Gaussian inputs have a variance that is larger by a known factor.
    finite = N * T / (N * T - D - 1)
    variance = sampled(G, Z, Y, damping=0.0, noise="tokens", N=N, n=n, T=T, bias=0.0).omega
    assert bool(((mean - finite * variance).abs() <= 4.5 * error).all())
    # Not that of a token.
    assert float((mean - finite * variance / T).diagonal().min()) > 0.5 * float(mean.diagonal().min())


@pytest.mark.parametrize("size", [0.7, 2.0])
def test_a_signal_that_lies_elsewhere_than_the_noise_is_seen_better_without_bias(size):
    """By what directions are chosen for: the truth's own guidance, over many draws."""
    Z, Y, _ = known(False, seed=5)
    # Along the inputs of the most energy, where Delta has the least noise.
    leading = torch.linalg.eigh(Z).eigenvectors[:, -2:]
    mean = size * Y @ torch.linalg.qr(normal(M, 2, seed=7)).Q @ leading.T @ Z
    truth = sampled(mean, Z, Y, damping=0.1, noise="tokens", N=N, n=n, T=T).omega
    reached = {}
    for noise in ("published", "unbiased"):
        method = hs.LoRADA(preset="scale-free", noise=noise, gamma=1.0, population=N)
        starts = [
            method.factors(layer(G, Z, Y.diagonal(), 2, tokens=n * T, samples=n))
            for G in gradients(Z, Y, mean, 300, seed=6)
        ]
        reached[noise] = torch.tensor([objective(truth, start.A.double().T) for start in starts])
        assert float(reached[noise].min()) >= (1 + 1e-5) * float(torch.linalg.eigvalsh(truth)[:2].sum())
    gain, error = measured(reached["published"] - reached["unbiased"])
    assert gain > 3 * error


@pytest.mark.parametrize(("preset", "full"), [("scale-free", False), ("published", True)])
def test_the_share_of_noise_that_is_reported(preset, full):
    Z, Y, mean = known(full)
    given_Y = Y if full else Y.diagonal()
    method = hs.LoRADA(preset=preset, normalize=False, gamma=1.0, fisher="full" if full else "diagonal")

    def delta(G):
        start = method.factors(layer(G, Z, given_Y, D, tokens=n * T, samples=n))
        return start.B.double() @ start.A.double(), start.info["noise"]

    noiseless, _ = delta(mean)
    measured_noise, reported = [], []
    for G in gradients(Z, Y, mean, 400):
        product, share = delta(G)
        measured_noise.append(float((product - noiseless).square().sum()))
        reported.append(share * float(product.square().sum()))
    average, error = measured(torch.tensor(measured_noise))
    assert max(reported) == pytest.approx(min(reported), rel=1e-4)
    assert abs(average - reported[0]) <= 4 * error


def many(signal, seed, m=24, d=32, r=3):
    """A layer's statistics as they are measured, of a gradient with a signal of rank r that is so large."""
    x, g = normal(n * T * 20, d, seed=seed) * logspace(-1, 0, d), normal(n * T * 20, m, seed=seed + 1)
    U, V = (torch.linalg.qr(normal(size, r, seed=seed + 2)).Q for size in (m, d))
    g = g + signal * x @ V @ U.T
    return layer(
        (g.T @ x / n).float(), (x.T @ x / len(x)).float(), g.square().mean(0).float(), r, tokens=len(x), samples=n
    )


@pytest.mark.parametrize("preset", ["scale-free", "published"])
def test_a_start_from_noise_alone_says_so(preset):
    starts = [hs.LoRADA(preset=preset).factors(many(0.0, seed)) for seed in range(0, 120, 3)]
    assert [start.info["in_noise"] for start in starts].count(3) >= 39
    assert all("sampling noise" in start.caution for start in starts)
    assert 0.8 < sum(start.info["noise"] for start in starts) / len(starts) < 1.2


def test_a_start_from_a_signal_does_not():
    for seed in range(0, 30, 3):
        start = hs.LoRADA(preset="scale-free").factors(many(5.0, seed))
        assert start.info["in_noise"] == 0 and start.info["noise"] < 0.5 and start.caution == ""


def test_the_share_of_the_variance_in_what_was_chosen():
    G, Z, Y = draw(6, 8, seed=1)
    for noise in ("published", "tokens", "unbiased"):
        method = hs.LoRADA(noise=noise, normalize=False, gamma=1.0, population=N)
        start = method.factors(layer(G, Z, Y, 3, tokens=n * T, samples=n))
        moved = float(start.B.double().square().sum())
        variance = start.info["objective"] + moved
        assert start.info["variance_share"] == pytest.approx(variance / (variance + moved), abs=1e-6)
    assert hs.LoRADA(variance=0).factors(layer(G, Z, Y, 3)).info["variance_share"] == 0
    assert hs.LoRADA(bias=0).factors(layer(G, Z, Y, 3)).info["variance_share"] == 1


def test_no_bias_means_no_correction_of_it():
    G, Z, Y = draw(6, 8, seed=1)
    one, other = (
        hs.LoRADA(noise=noise, bias=0).factors(layer(G, Z, Y, 3, tokens=n * T, samples=n))
        for noise in ("tokens", "unbiased")
    )
    assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


def test_directions_without_inputs_are_noise():
    """As where G counts all tokens and Z some: Z^-1 is largest where no input is."""
    x = normal(5, 16, seed=4)
    G, _, Y = draw(6, 16, seed=8)
    start = hs.LoRADA(preset="published", variance=0).factors(layer(G, (x.T @ x / 5).float(), Y, 3))
    assert start.info["rank_inputs"] == 5 and start.info["energy_inputs"] < 1e-5
    assert start.info["in_rounding"] == 3 and "rounding errors" in start.caution
    assert "fewer directions" not in start.caution
    few = hs.LoRADA(preset="published", variance=0).factors(layer(G, (x.T @ x / 5).float(), Y, 6))
    assert few.info["rank_inputs"] == 5 and "fewer directions than the rank" in few.caution


def test_the_energy_of_the_inputs_along_what_was_chosen():
    G, Z, Y = draw(6, 8, seed=1)
    start = hs.LoRADA(gamma=1.0).factors(layer(G, Z, Y, 3))
    A0 = start.A.double().T
    expected = objective(Z.double(), A0) / float(Z.double().trace())
    assert start.info["energy_inputs"] == pytest.approx(expected, rel=1e-5)
    assert start.info["rank_inputs"] == 8 and start.info["in_rounding"] == 0
    assert hs.LoRADA().factors(layer(G, Z, Y, 8)).info["energy_inputs"] == pytest.approx(1, rel=1e-5)
    zero = hs.LoRADA().factors(layer(G, 0 * Z, Y, 3)).info
    assert zero["energy_inputs"] == 0 and zero["rank_inputs"] == 0 and zero["in_rounding"] == 3


def test_cautions_are_reported_and_no_reason_to_refuse():
    """A random model has nothing to learn but its samples' noise."""
    data = [token_batch(), token_batch(seed=1)]
    report = hs.initialize_(wrap(tiny_llama()), "lora-da:samples=8", data=data, strict=True)
    cautious = [layer.name for layer in report.layers if layer.caution]
    assert len(cautious) > 3 and report.warnings == []
    assert any(f"{cautious[0]}, " in sentence and " more: noise may" in sentence for sentence in report.cautions())
    assert "caution: " in str(report)
