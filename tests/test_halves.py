"""Two halves of the samples: their gradients from one pass, and the noise in LoRA-DA's Delta that they show."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import headstart as hs
from conftest import ARCHITECTURES, all_factors, tiny_experts, tiny_llama, token_batch, wrap
from fisher import dense, draw, layer, logspace, of_spectrum
from headstart.linalg.halves import agreement
from headstart.methods.base import Half, Wants
from headstart.statistics.batches import Samples
from headstart.statistics.halves import by_half, divided, half_of
from headstart.statistics.prepare import prepare
from inputs import normal
from oracles import exact_factors, exact_gradients, relative
from passes import BATCHES, Tokens, lora, named, pair_batch, reordered, singles, whole_batch, wider
from test_processes import batches, together


def collect(model, data, samples=None, *, halves=True, outputs="diagonal", **given):
    """The statistics of the only pass."""
    wanted = dict.fromkeys(named(model), Wants(gradient=True, halves=halves, outputs=outputs))
    samples = samples or sum(len(batch["labels"]) for batch in data)
    (statistics,) = prepare(model, named(model), wanted, data, samples, **given).passes()
    return statistics


def assert_halves(found, base, ordered, *, loss=None):
    """Compare with a backward pass a sample in float64; ``ordered`` are the samples, one a batch, as they come."""
    names = list(found.gradients)
    exact = exact_gradients(base, ordered, names, loss=loss)
    first = exact_gradients(base, ordered[::2], names, loss=loss)
    assert found.halves.keys() == found.gradients.keys() and names
    for name in names:
        assert found.halves[name].share == pytest.approx(len(ordered[::2]) / len(ordered))
        assert relative(found.halves[name].gradient, first[name]) < 2e-5, name
        assert relative(found.gradients[name], exact[name]) < 2e-5, name
    # Not what any division would give.
    other = exact_gradients(base, ordered[1::2], names, loss=loss)
    assert all(relative(first[name], other[name]) > 0.1 for name in names)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "bert", "vit"])
def test_every_second_sample_has_its_mean_gradient(architecture):
    make, _, targets = ARCHITECTURES[architecture]
    base, batch = make(), pair_batch() if architecture == "t5" else BATCHES[architecture](4)
    found = collect(wrap(copy.deepcopy(base), target_modules=targets), [batch])
    assert_halves(found, base, singles(batch))


@pytest.mark.parametrize("samples", [6, 7])
def test_batches_padding_and_offload_do_not_matter(samples):
    base, batch = tiny_llama(), token_batch(7, 16)
    batch = reordered(batch, list(range(samples)))
    parts = [reordered(batch, rows) for rows in ([0], [1, 2, 3], list(range(4, samples)))]
    ways = {
        "one batch": dict(data=[batch]),
        "batches of one": dict(data=singles(batch)),
        "wider": dict(data=[wider(batch, 9)]),
        "split": dict(data=parts),
        "offloaded": dict(data=[batch], offload="cpu"),
    }
    for given in ways.values():
        found = collect(wrap(copy.deepcopy(base)), samples=samples, **given)
        assert_halves(found, base, singles(batch))


def test_samples_put_together_by_length_keep_their_halves():
    """What is read first is not what comes first."""
    base, batch = tiny_llama(), token_batch(8, 20, padded=False)
    for row, length in enumerate((20, 4, 18, 3, 5, 19, 6, 17)):
        for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            batch[key][row, length:] = fill
    parts = [reordered(batch, rows) for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    assert_halves(collect(wrap(copy.deepcopy(base)), parts), base, singles(batch))


def test_experts_that_see_some_tokens_each():
    base, batch = tiny_experts(), token_batch(6, 16, seed=2)
    assert_some(collect(wrap(copy.deepcopy(base)), [batch]), base, singles(batch))


def assert_some(found, base, ordered):
    """As assert_halves, where a half may leave a layer without any gradient."""
    names = list(found.gradients)
    exact, first = exact_gradients(base, ordered, names), exact_gradients(base, ordered[::2], names)
    for name in names:
        error = float((found.halves[name].gradient.double() - first[name]).norm())
        assert error <= 2e-5 * float(exact[name].norm() + first[name].norm()), name


def test_a_loss_that_is_read_one_sample_at_a_time():
    base = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), reduction="sum")
    batch = whole_batch(5, 6)
    found = collect(lora(base, ["body.0"]), [batch])
    assert any("one at a time" in note for note in found.notes)
    assert_halves(found, base, singles(batch))


class Pairs(Tokens):
    """Whose loss compares each two samples of a batch."""

    def forward(self, input_ids, labels=None, attention_mask=None):
        losses = self.head(self.body(self.embed(input_ids))).square().mean((1, 2)).view(-1, 2)
        return {"loss": functional.softplus(losses[:, 0] - losses[:, 1]).mean()}


def test_batches_that_are_read_as_wholes_are_halves_of_their_own():
    base, batch = Pairs(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), whole_batch(8, 6)
    pairs = [reordered(batch, [place, place + 1]) for place in range(0, 8, 2)]
    found = collect(lora(base, ["body.0"]), pairs, loss=lambda model, given: model(**given)["loss"])
    assert any("read as wholes" in note for note in found.notes)
    weight = base.body[0].weight
    gradients = [torch.autograd.grad(base(**pair)["loss"], weight)[0] for pair in pairs]
    half = found.halves["body.0"]
    assert half.share == 0.5
    assert relative(half.gradient, (gradients[0] + gradients[2]) / 2) < 2e-5
    assert relative(found.gradients["body.0"], sum(gradients) / 4) < 2e-5


def test_one_sample_has_no_halves():
    batch = reordered(token_batch(), [0])
    assert collect(wrap(tiny_llama()), [batch]).halves == {}
    report = hs.initialize_(wrap(tiny_llama()), "lora-da:samples=1,halves=true", data=[batch])
    assert not any("noise_halves" in line.info for line in report.layers)


def test_nothing_is_summed_for_who_does_not_ask():
    batch = token_batch()
    assert collect(wrap(tiny_llama()), [batch], halves=False).halves == {}
    assert not hs.LoRADA().wants(layer(*draw(6, 8), 2)).halves


@pytest.mark.parametrize("outputs", ["diagonal", None])
def test_the_second_sum_is_planned(outputs):
    def planned(halves):
        model = wrap(tiny_llama())
        wanted = dict.fromkeys(named(model), Wants(gradient=True, halves=halves, outputs=outputs))
        collector = prepare(model, named(model), wanted, [token_batch()], 4)
        (statistics,) = collector.passes()
        return collector.plan.bytes, statistics

    (less, _), (more, found) = planned(False), planned(True)
    assert more - less == sum(4 * half.gradient.numel() for half in found.halves.values()) > 0


@pytest.mark.parametrize("budget", ["60KiB", None])
def test_several_passes_find_the_same(budget):
    base, batch = tiny_llama(), token_batch(6, 16)
    model = wrap(copy.deepcopy(base))
    wanted = dict.fromkeys(named(model), Wants(gradient=True, halves=True))
    collector = prepare(model, named(model), wanted, [batch], 6, memory_budget=budget)
    assert (len(collector.plan.passes) > 1) == (budget is not None)
    for found in collector.passes():
        assert_halves(found, base, singles(batch))


def in_one_of_two(rank):
    report = hs.initialize_(wrap(tiny_llama()), "lora-da:samples=10,halves=true", data=batches(), progress=False)
    return {line.name: (line.info["noise_halves"], line.info["cosine_halves"]) for line in report.layers}


def test_two_processes_have_the_halves_of_one(tmp_path):
    expected = in_one_of_two(0)
    for found in together(tmp_path, in_one_of_two):
        assert found.keys() == expected.keys()
        for name, numbers in expected.items():
            assert found[name] == pytest.approx(numbers, abs=2e-3), name


# Batches.


def samples_at(*places):
    return Samples({"x": torch.tensor(places)}, places)


@pytest.mark.parametrize("places", [(3, 4, 5, 6, 9), (0, 1), (8, 2, 7)])
def test_a_batch_in_halves(places):
    parts = by_half(samples_at(*places))
    assert [half_of(part) for part in parts] == [0, 1]
    for half, part in enumerate(parts):
        assert part.indices == tuple(place for place in places if place % 2 == half)
        assert part.batch["x"].tolist() == list(part.indices)
    assert by_half(samples_at(2, 4))[0].indices == (2, 4) and len(by_half(samples_at(2, 4))) == 1


def test_a_batch_in_parts():
    parts = divided(samples_at(*range(7)), 3)
    assert [part.indices for part in parts] == [(0, 1), (2, 3), (4, 5, 6)]
    assert [part.batch["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5, 6]]


# What they say of noise.


@pytest.mark.parametrize("fisher", ["diagonal", "full", "none"])
@pytest.mark.parametrize("preset", ["published", "scale-free"])
def test_delta_of_either_half_against_a_dense_oracle(fisher, preset):
    """Of a tiny model, from one backward pass a sample in float64."""
    base, batch = tiny_llama(), token_batch(5, 14, seed=3, padded=False)
    options = dict(variance=0.0) if fisher == "none" else {}
    method = hs.LoRADA(samples=5, preset=preset, fisher=fisher, halves=True, **options)
    report = hs.initialize_(wrap(copy.deepcopy(base)), method, data=[batch])
    names = [line.name for line in report.layers]
    exact = exact_factors(base, singles(batch), names)
    first, second = (exact_gradients(base, singles(batch)[half::2], names) for half in (0, 1))
    compared = 0
    for line in report.layers:
        if line.info.get("condition", 1.0) > 1e4:  # float32 sums against float64 ones
            continue
        compared += 1
        deltas = []
        for G in (first[line.name], second[line.name], exact[line.name].gradient):
            if fisher == "none":
                deltas.append(-G)
                continue
            Z, Y = exact[line.name].Z, exact[line.name].Y
            Y = Y.diagonal().diag() if fisher == "diagonal" else Y
            of_Z, of_Y = line.info["damping"], line.info["damping_outputs"]
            Zd, Yd = Z + of_Z * torch.eye(len(Z)).double(), Y + of_Y * torch.eye(len(Y)).double()
            deltas.append(-torch.linalg.solve(Yd, torch.linalg.solve(Zd, G, left=False)))
        D1, D2, D = deltas
        inner = float((D1 * D2).sum())
        assert line.info["cosine_halves"] == pytest.approx(inner / float(D1.norm() * D2.norm()), abs=2e-3), line.name
        noise = min(max(1 - inner / float(D.square().sum()), 0.0), 1.0)
        assert line.info["noise_halves"] == pytest.approx(noise, abs=2e-3), line.name
        assert ("by two halves" in line.caution) == (line.info["noise_halves"] > 0.5)
    assert compared >= len(names) // 2


@pytest.mark.parametrize("method", ["lora-da:samples=8", "lora-da:samples=8,fisher=none,variance=0"])
def test_the_start_is_the_same_without(method):
    data = [token_batch(), token_batch(seed=1)]
    model, plain = wrap(tiny_llama()), wrap(tiny_llama())
    hs.initialize_(model, f"{method},halves=true", data=data)
    hs.initialize_(plain, method, data=data)
    for name, (A, B) in all_factors(plain).items():
        product = B.double() @ A.double()
        own_A, own_B = all_factors(model)[name]
        assert float((own_B.double() @ own_A.double() - product).norm()) < 2e-2 * float(product.norm()), name


# Of a layer of M outputs and D inputs, n samples of T tokens each.
M, D, n, T = 20, 30, 8, 5


def measured(Z, Y, mean, repetitions, share, seed=9):
    """Of samples whose tokens' own gradients are g x' with independent g and x but for the mean: G, and of a half."""
    roots = torch.linalg.cholesky(Y), torch.linalg.cholesky(Z)
    for repetition in range(repetitions):
        tokens = normal(n, T, M + D, seed=seed + repetition)
        g, x = tokens[..., :M] @ roots[0].T, tokens[..., M:] @ roots[1].T
        of_samples = mean + g.mT @ x
        first = of_samples[: round(share * n)].mean(0)
        yield of_samples.mean(0).float(), Half(first.float(), share)


@pytest.mark.parametrize("signal", [0.0, 0.8, 2.0])
@pytest.mark.parametrize("share", [0.5, 0.375])
@pytest.mark.parametrize("preset", ["published", "scale-free"])
def test_the_share_of_noise_is_near_the_truth(signal, share, preset):
    """The truth is what each Delta is away from the noiseless one, which a simulation knows."""
    Z, Y = of_spectrum(logspace(-0.5, 0.5, D), 1), torch.diag(logspace(-1, 0, M))
    mean = signal * torch.linalg.cholesky(Y) @ normal(M, D, seed=3) @ torch.linalg.cholesky(Z).T
    method = hs.LoRADA(preset=preset, normalize=False, gamma=1.0, halves=True)

    def started(G, half=None):
        given = layer(G, Z.float(), Y.diagonal().float(), D, tokens=n * T, samples=n)
        start = method.factors(replace(given, half=half))
        return start.B.double() @ start.A.double(), start

    noiseless = started(mean.float())[0] if signal else torch.zeros(M, D).double()
    truths, shares, cautioned = [], [], 0
    for G, half in measured(Z, Y, mean, 60, share):
        delta, start = started(G, half)
        truths.append(float((delta - noiseless).square().sum() / delta.square().sum()))
        shares.append(start.info["noise_halves"])
        cautioned += "by two halves" in start.caution
    truth, reported = torch.tensor(truths), torch.tensor(shares)
    # Above 1 is cut off, which where all is noise happens to every second one.
    assert abs(float((reported - truth).mean())) < (0.05 if signal else 0.1)
    assert float((reported - truth).abs().mean()) < 0.12
    assert cautioned == int((reported > 0.5).sum())
    low, high = {0.0: (1.0, 1.0), 0.8: (0.4, 0.6), 2.0: (0.05, 0.2)}[signal]
    assert low <= float(truth.mean()) <= high


def test_agreement_does_not_depend_on_scale():
    whole, first = normal(6, 9, seed=1), normal(6, 9, seed=2)
    second = (whole - 0.25 * first) / 0.75
    inner = float((first * second).sum())
    expected = inner / float(first.norm() * second.norm()), min(max(1 - inner / float(whole.square().sum()), 0), 1)
    for scale in (1.0, 1e-200, 1e200):
        assert agreement(scale * whole, scale * first, 0.25) == pytest.approx(expected, rel=1e-12)
    same = agreement(whole, whole, 0.5)
    assert same.cosine == pytest.approx(1) and same.noise == pytest.approx(0, abs=1e-15)
    assert agreement(whole, torch.zeros(6, 9), 0.5) == (0.0, 1.0)
    opposed = agreement(whole, whole + 40 * normal(6, 9, seed=4), 0.5)
    assert opposed.noise == 1.0 and opposed.cosine < -0.9


def test_delta_out_of_the_range_of_squares_is_no_obstacle():
    G, Z, Y = draw(6, 8, seed=1, scale_Z=1e-15, scale_Y=1e-15)
    first = (G + 0.1 * normal(6, 8, seed=5)).float()
    given = replace(layer(G, Z, Y, 3, samples=4), half=Half(first, 0.5))
    info = hs.LoRADA(damping=0.0, halves=True).factors(given).info
    Delta = [dense(g, Z, Y, N=4, damping=0.0, normalize=False).delta for g in (first, 2 * G - first)]
    cosine = float((Delta[0] * Delta[1]).sum() / Delta[0].norm() / Delta[1].norm())
    assert info["cosine_halves"] == pytest.approx(cosine, abs=1e-4) and math.isfinite(info["noise_halves"])
