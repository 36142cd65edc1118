"""Ranks that Astra shares out by the effective ranks of layers' outputs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

import headstart as hs
from conftest import logits, tiny_llama, token_batch, wrap
from headstart.layers.find import lora_layers
from headstart.methods.sc_lora import effective_rank, shared_out
from inputs import inputs_by_layer, inputs_of, layer_of, normal, product
from oracles import relative
from snapshots import targets_of
from test_processes import batches, together

CHOSEN = hs.Astra(ranks="chosen")


def published(scores, budget, r):
    """As the published code has it, in a plain loop; its largest rank is never reached here."""
    total = sum(scores)
    ranks = [min(max(round(score / total * budget), 1), max(2 * r, 256)) for score in scores]
    order = itertools.cycle(sorted(range(len(scores)), key=lambda place: scores[place], reverse=True))
    while sum(ranks) != budget:
        place, step = next(order), 1 if sum(ranks) < budget else -1
        ranks[place] += step if ranks[place] + step >= 1 else 0
    return ranks


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.69, 9.0), min_size=1, max_size=12), st.integers(1, 9))
def test_ranks_are_those_of_the_published_loop(scores, r):
    names = [f"layer {place}" for place in range(len(scores))]
    budget = r * len(scores)
    ranks = shared_out(dict(zip(names, scores, strict=True)), dict.fromkeys(names, 256), budget)
    assert list(ranks.values()) == published(scores, budget, r)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.tuples(st.floats(0.69, 9.0), st.integers(1, 12)), min_size=1, max_size=8))
def test_the_budget_is_kept_within_every_bound(data, layers):
    scores = {str(place): score for place, (score, _) in enumerate(layers)}
    most = {str(place): size for place, (_, size) in enumerate(layers)}
    budget = data.draw(st.integers(len(layers), sum(most.values())))
    ranks = shared_out(scores, most, budget)
    assert sum(ranks.values()) == budget
    assert all(1 <= rank <= most[name] for name, rank in ranks.items())


def test_the_effective_rank():
    for n in (1, 3, 8):
        C = torch.zeros(8, 8, dtype=torch.float64)
        C[:n, :n] = 5.0 * torch.eye(n)
        assert effective_rank(C) == pytest.approx(n)
    values = torch.tensor([4.0, 2.0, 1.0, -1e-9], dtype=torch.float64)
    Q = torch.linalg.qr(normal(4, 4, seed=1)).Q
    shares = [4 / 7, 2 / 7, 1 / 7]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    for scale in (1.0, 1e-12, 1e12):
        assert effective_rank(scale * (Q * values) @ Q.T) == pytest.approx(expected, rel=1e-6)


def of(decades, seed, r=4, d_out=20, d_in=14):
    """A layer whose outputs have fewer directions the more decades its inputs' deviations span."""
    return layer_of(inputs_of(200, d_in, decades=decades, offset=0.0, seed=seed), normal(d_out, d_in, seed=seed), r)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_a_settled_start_is_that_of_its_rank(mode):
    layers = {f"l{place}": of(decades, place) for place, decades in enumerate((0.0, 0.5, 1.0, 3.0))}
    method = hs.Astra(mode=mode, ranks="chosen")
    starts = {name: method.factors(layer) for name, layer in layers.items()}
    settled = method.settle(starts, {name: layer.r for name, layer in layers.items()})
    ranks = [len(start.A) for start in settled.values()]
    assert sum(ranks) == 16 and max(ranks) > 4 > ranks[-1] == min(ranks)
    assert len({start.info["effective_rank"] for start in settled.values()}) == 4
    for name, start in settled.items():
        layer = layers[name]
        own = hs.Astra(mode=mode).factors(layer.__class__(**(layer.__dict__ | {"r": len(start.A)})))
        assert start.spare is None and start.spare_B is None and start.worth == ()
        assert start.caution == own.caution and (mode == "kpm") == bool(own.caution)
        assert start.info["share"] == pytest.approx(own.info["share"], rel=1e-4, abs=1e-9)
        if mode == "ipm":  # null directions may be any
            assert relative(product(start), product(own)) < 1e-4


def test_given_ranks_stay():
    start = hs.Astra().factors(of(1.0, 0))
    assert start.spare is None and start.worth == () and not hs.Astra().shares_ranks
    assert hs.Astra().settle({"a": start}, {"a": 4})["a"] is start


def test_a_layer_without_input_keeps_its_rank():
    lone = layer_of(torch.zeros(3, 14), normal(20, 14), 4)
    starts = {"unreached": CHOSEN.factors(lone), "a": CHOSEN.factors(of(0.0, 1)), "b": CHOSEN.factors(of(3.0, 2))}
    settled = CHOSEN.settle(starts, dict.fromkeys(starts, 4))
    assert settled["unreached"] is starts["unreached"]
    assert len(settled["a"].A) + len(settled["b"].A) == 8


def expected_ranks(model, data):
    """By the definition, from the layers' own outputs in float64."""
    read, scores = inputs_by_layer(model, data), {}
    targets = targets_of(model)
    for name, target in targets.items():
        outputs = read[name].double() @ target.weight().double().T
        values = torch.linalg.svdvals(outputs).square()
        shares = values / values.sum()
        scores[name] = math.log(1 + math.exp(-float((shares * shares.clamp_min(1e-300).log()).sum())))
    return dict(zip(scores, published(list(scores.values()), 4 * len(scores), 4), strict=True))


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_a_model_starts_at_these_ranks(form, tmp_path):
    data = [token_batch(seed=seed) for seed in range(2)]
    model = wrap(tiny_llama())
    expected, base = expected_ranks(model, data), logits(model, data[0])
    report = hs.initialize_(model, "astra:samples=8,ranks=chosen", data=data, form=form)
    assert {line.name: line.r for line in report.layers} == expected and len(set(expected.values())) > 1
    assert sum(expected.values()) == 4 * len(expected)
    torch.testing.assert_close(logits(model, data[0]), base, rtol=1e-4, atol=1e-5)
    allocated = wrap(tiny_llama())
    # By name alone, too: its ranks are given ones by default.
    assert hs.allocate_ranks_(allocated, "astra:samples=8", data=data) == expected
    assert {layer.name: layer.r for layer in lora_layers(allocated, "default")} == expected
    hs.initialize_(allocated, "pissa")
    before = logits(allocated, data[0])
    hs.save_lora(allocated, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain, data[0]), before, rtol=1e-4, atol=1e-4)


def ranks_in_one_of_two(rank):
    return hs.allocate_ranks_(wrap(tiny_llama()), "astra:samples=10", data=batches(), progress=False)


def test_two_processes_share_out_as_one_does(tmp_path):
    expected = ranks_in_one_of_two(0)
    assert together(tmp_path, ranks_in_one_of_two) == [expected, expected]
