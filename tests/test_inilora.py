"""IniLoRA as a method: what it may share a batch with, its stops, where its path ends, its history, its studies."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

import headstart as hs
from cached import decoded, encoded
from conftest import tiny_llama, wrap
from headstart.methods.base import Factors, Layer, Moments
from headstart.methods.registry import parse_method
from oracles import relative, tail

SOLVERS = ["inilora:solver=adam,steps=120", "inilora:solver=adam,steps=400,lr=0.005,tolerance=0.05"]
SOLVERS += [f"inilora:solver=svd,gauge={gauge}" for gauge in ("aligned", "random", "balanced")]


def weight(d_out: int, d_in: int, seed: int, std: float = 0.05) -> Tensor:
    """A random weight with a few strong directions, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(d_out, d_in, generator=generator)
    left, right = torch.randn(d_out, 6, generator=generator), torch.randn(6, d_in, generator=generator)
    return std * (noise + left @ right / 2)


def layers(count: int, d_out: int = 50, d_in: int = 30, r: int = 4, s: float = 1.0, std: float = 0.05) -> list[Layer]:
    return [
        Layer(f"layer{i}", d_out, d_in, r, s, weight=weight(d_out, d_in, i, std), moments=Moments(0.0, 1.4 * std))
        for i in range(count)
    ]


def bound(layer: Layer) -> float:
    return tail(layer.require_weight().double() / layer.scaling, layer.r)


def error(layer: Layer, found: Factors) -> float:
    W = layer.require_weight().double() / layer.scaling
    return float((W - found.B.double() @ found.A.double()).square().sum())


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_layer_is_the_same_to_the_last_bit_whatever_comes_with_it(method: str, count: int) -> None:
    given = layers(5, 61, 29, 3, s=1.5)
    parsed = parse_method(method)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        together = parsed.factors_batch(given)
        pair = parsed.factors_batch(given[3:1:-1])
        alone = [parsed.factors(layer) for layer in given]
    finally:
        torch.set_num_threads(before)
    for one, other in [*zip(alone, together, strict=True), (alone[3], pair[0]), (alone[2], pair[1])]:
        assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B)
        assert one.info == other.info and one.history == other.history


@pytest.mark.parametrize("tolerance", [0.1, 1e-3])
def test_a_stop_is_within_the_tolerance(tolerance: float) -> None:
    given = layers(3, s=2.0)
    method = hs.IniLoRA(solver="adam", lr=5e-3, tolerance=tolerance)
    for layer, found in zip(given, method.factors_batch(given), strict=True):
        assert error(layer, found) <= (1 + tolerance) * bound(layer) * (1 + 1e-6)
        taken = int(found.info["steps"])
        assert 0 < taken < 20_000 and taken % 100 == 0
        # A look earlier it wasn't.
        earlier = hs.IniLoRA(solver="adam", lr=5e-3, steps=taken - 100).factors(layer)
        assert error(layer, earlier) > (1 + tolerance) * bound(layer)
        full = hs.IniLoRA(solver="adam", lr=5e-3, steps=taken).factors(layer)
        assert torch.equal(found.A, full.A) and torch.equal(found.B, full.B)


def test_the_path_ends_where_the_closed_form_is() -> None:
    given = layers(2, 24, 18, 3)
    # A rate that falls faster than the paper's: Adam's last digits don't settle before it does.
    path = hs.IniLoRA(solver="adam", steps=8_000, lr=5e-3, decay=0.5, decay_every=800).factors_batch(given)
    closed = hs.IniLoRA(solver="svd").factors_batch(given)
    for layer, one, other in zip(given, path, closed, strict=True):
        assert one.info["steps"] == 8_000
        assert error(layer, one) == pytest.approx(bound(layer), rel=1e-5)
        assert relative(one.B @ one.A, other.B @ other.A) < 1e-3
        # The same product by other factors.
        assert relative(one.A, other.A) > 1e-2


def test_the_papers_checkpoints_lie_on_one_path() -> None:
    """Figure 2: the approximation after 100 … 20,000 steps."""
    layer = layers(1)[0]
    longest = hs.IniLoRA(solver="adam", steps=2_000).factors(layer)
    history = dict(tuple(point) for point in longest.history)
    errors = []
    for steps in (0, 100, 500, 1_000, 2_000):
        found = parse_method(f"inilora:solver=adam,steps={steps}").factors(layer)
        errors.append(error(layer, found))
        assert history[steps] == pytest.approx(errors[-1] / (50 * 30), rel=1e-5)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("std", [1e-4, 0.01, 0.5, 1.5])
def test_the_papers_deviations(std: float) -> None:
    """Figure 3, with no step and with some."""
    given = layers(1, 400, 300, 8)[0]
    start = parse_method(f"inilora:solver=adam,steps=0,std={std}").factors(given)
    assert float(start.A.std()) == pytest.approx(std, rel=0.1) and float(start.B.std()) == pytest.approx(std, rel=0.1)
    alpha = parse_method(f"inilora-alpha:std={std}").factors(given)
    assert torch.equal(start.A, alpha.A) and torch.equal(start.B, alpha.B)
    moved = parse_method(f"inilora:solver=adam,steps=50,std={std}").factors(given)
    assert moved.info["error"] < start.info["error"]


def test_history_reaches_the_report_and_the_cache() -> None:
    model = wrap(tiny_llama(), r=4, target_modules=["q_proj", "v_proj"])
    report = hs.initialize_(model, "inilora:solver=adam,steps=250")
    for layer in report.layers:
        assert [step for step, _ in layer.history] == [0, 100, 200, 250]
        means = [mean for _, mean in layer.history]
        assert means == sorted(means, reverse=True)
        assert means[-1] * layer.d_out * layer.d_in == pytest.approx(layer.info["error"], rel=1e-12)
    written = json.loads(json.dumps(report.to_dict()))
    assert [layer["history"] for layer in written["layers"]] == [
        [list(point) for point in layer.history] for layer in report.layers
    ]
    assert all(layer.history == [] for layer in hs.initialize_(wrap(tiny_llama(), r=4), "pissa").layers)
    found = hs.IniLoRA(solver="adam", steps=150).factors(layers(1)[0])
    kept = decoded("key", encoded("key", found))
    assert [tuple(point) for point in kept.history] == found.history


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    model = wrap(tiny_llama(), r=4, target_modules=["q_proj", "v_proj"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def show(step: str, done: int, total: int) -> None:
        if step.startswith("Adam") and done >= 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hs.initialize_(model, "inilora", progress=show)
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_own_deviation_needs_no_moments() -> None:
    layer = dataclasses.replace(layers(1)[0], moments=None)
    with pytest.raises(hs.LayerError, match="layer0"):
        hs.IniLoRA(solver="adam", steps=1).factors(layer)
    assert hs.IniLoRA(solver="adam", steps=1, std=0.1).factors(layer).info["steps"] == 1
