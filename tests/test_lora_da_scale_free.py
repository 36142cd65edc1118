"""LoRA-DA without units: the preset against dense float64, and what may be scaled without changing the start."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import headstart as hs
from conftest import all_factors, tiny_llama, token_batch, wrap
from fisher import check, draw, layer, logspace, sampled
from headstart.methods import parse_method
from inputs import normal
from oracles import relative

NOISE = ["published", "tokens", "unbiased"]


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_settings_against_the_dense_fisher_matrix(data):
    d_out, d_in = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    r = data.draw(st.integers(1, d_in))
    full = data.draw(st.booleans())
    scales = {f"scale_{x}": 10.0 ** data.draw(st.integers(-8, 8)) for x in "GZY"}
    G, Z, Y = draw(d_out, d_in, data.draw(st.integers(0, 999)), full, **scales)
    variance, bias = data.draw(st.sampled_from([(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0), (100.0, 1.0)]))
    damping = data.draw(st.sampled_from([1e-2, 0.1, 1.0, 10.0]))
    noise = data.draw(st.sampled_from(["tokens", "unbiased"]))
    N, n, T = (data.draw(st.sampled_from(values)) for values in ([16, 7473], [4, 256], [1, 205]))
    expected = sampled(G, Z, Y, damping=damping, noise=noise, N=N, n=n, T=T, variance=variance, bias=bias)
    method = hs.LoRADA(
        preset="scale-free",
        damping=damping,
        noise=noise,
        variance=variance,
        bias=bias,
        fisher="full" if full else "diagonal",
        normalize=False,
        gamma=1.0,
    )
    start = method.factors(layer(G, Z, Y, r, population=N, tokens=n * T, samples=n))
    assert start.repair == ""
    check(start, expected, r, gamma=1.0)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(NOISE),
    st.sampled_from([0.1, 1.0]),
    st.booleans(),
    st.floats(-12, 12),
    st.floats(-12, 12),
    st.integers(0, 999),
)
def test_neither_the_units_of_the_loss_nor_of_the_inputs_matter(noise, damping, full, log_loss, log_inputs, seed):
    """A loss that is a sum over tokens or samples in place of a mean is one in another unit."""
    G, Z, Y = (part.double() for part in draw(6, 8, seed, full))
    loss, unit = 10.0**log_loss, 10.0**log_inputs
    method = hs.LoRADA(preset="scale-free", damping=damping, noise=noise, fisher="full" if full else "diagonal")
    options = dict(tokens=640, samples=64, population=7473)
    plain = method.factors(layer(G, Z, Y, 3, **options))
    scaled = method.factors(layer(G * loss * unit, Z * unit**2, Y * loss**2, 3, **options))
    assert scaled.repair == ""
    assert relative(scaled.B @ scaled.A, plain.B @ plain.A) < 1e-5
    for name in ("objective", "variance_share", "noise", "energy_inputs", "in_noise", "in_rounding", "rank_inputs"):
        assert scaled.info[name] == pytest.approx(plain.info[name], rel=1e-6), name


@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_an_absolute_damping_depends_on_units(damping):
    """So the test above can tell."""
    G, Z, Y = draw(6, 8, 0)
    method = hs.LoRADA(preset="published", damping=damping)
    plain = method.factors(layer(G, Z, Y, 3))
    scaled = method.factors(layer(G * 1e-4, Z, Y * 1e-8, 3))
    assert relative(scaled.B @ scaled.A, plain.B @ plain.A) > 1e-2


def test_the_damping_that_is_reported_is_relative_to_the_mean_diagonals():
    G, Z, Y = draw(6, 8, 0)
    start = hs.LoRADA(preset="scale-free", damping=0.25).factors(layer(G, Z, Y, 3))
    assert start.info["damping"] == pytest.approx(0.5 * float(Z.diagonal().mean()), rel=1e-6)
    assert start.info["damping_outputs"] == pytest.approx(0.5 * float(Y.mean()), rel=1e-6)
    # Nothing at all is raised, whatever the unit, and said in words that have none.
    bare = hs.LoRADA(preset="scale-free", damping=0).factors(layer(G, torch.ones(8, 8), Y, 3))
    assert "with 0 of mean diagonals" in bare.repair


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ("preset=published", "preset=published,damping=1e-6,noise=published,variance=0.03,gamma=1024"),
        ("preset=scale-free", "preset=scale-free,damping=0.1,noise=unbiased,variance=1,gamma=1024"),
        ("preset=scale-free,noise=published", "preset=scale-free,damping=0.1,noise=published,variance=0.03"),
        ("preset=published,noise=tokens", "preset=published,damping=1e-6,noise=tokens,variance=1"),
    ],
)
def test_what_presets_stand_for(short, whole):
    G, Z, Y = draw(6, 8, 0)
    given_layer = layer(G, Z, Y, 3, tokens=640, samples=64)
    one, other = (parse_method(f"lora-da:{text}").factors(given_layer) for text in (short, whole))
    assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B) and one.info == other.info


def started(base, data, method="lora-da:samples=8,preset=scale-free", **options):
    model = wrap(copy.deepcopy(base))
    report = hs.initialize_(model, method, data=data, **options)
    return {name: B.double() @ A.double() for name, (A, B) in all_factors(model).items()}, report


def summed(model, batch):
    """The loss as a sum over labels."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_normalisation_of_the_loss_does_not_matter_to_the_verb(factor):
    """Sum or mean over the tokens of samples of one length, and any constant."""
    base, data = tiny_llama(), [token_batch(seed=seed, padded=False) for seed in (1, 2)]
    data = [batch | {"labels": batch["input_ids"].clone()} for batch in data]
    plain, _ = started(base, data)
    for loss in (summed, lambda model, batch: factor * model(**batch).loss):
        scaled, _ = started(base, data, loss=loss)
        for name, product in plain.items():
            assert relative(scaled[name], product) < 1e-3, name


def test_batches_and_padding_do_not_matter_to_the_verb():
    base, data = tiny_llama(), [token_batch(seed=seed) for seed in (1, 2)]
    singly = [{key: value[row : row + 1] for key, value in batch.items()} for batch in data for row in range(4)]
    plain, report = started(base, data)
    alone, other = started(base, singly)
    for name, product in plain.items():
        assert relative(alone[name], product) < 1e-3, name
    for one, two in zip(report.layers, other.layers, strict=True):
        assert one.info["noise"] == pytest.approx(two.info["noise"], rel=1e-3)


def test_the_units_of_a_models_inputs_do_not_matter():
    """The same function, with what attention reads 4096 times as small: powers of two change no digit."""
    base, data = tiny_llama(), [token_batch(seed=seed) for seed in (1, 2)]
    scaled = copy.deepcopy(base)
    with torch.no_grad():
        for block in scaled.model.layers:
            block.input_layernorm.weight /= 4096
            for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                part.weight *= 4096
    method = "lora-da:samples=8,preset={}"
    one, other = (started(model, data, method.format("scale-free"))[0] for model in (base, scaled))
    for name, product in one.items():
        assert relative(other[name], product) < 1e-4, name
    one, other = (started(model, data, method.format("published"))[0] for model in (base, scaled))
    assert any(relative(other[name], product) > 1e-2 for name, product in one.items())


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_fewer_tokens_than_inputs_leave_nothing_to_rounding(seed):
    """Statistics in float32 and in float64 give one start, which an absolute damping much below Z's scale does not."""
    x = normal(92, 96, seed=seed) * logspace(-2, 0.5, 96)
    g = 1e-3 * normal(92, 40, seed=seed + 1) * logspace(-2, 0, 40)
    exact = g.T @ x / 4, x.T @ x / 92, g.square().mean(0)
    single = g.float().T @ x.float() / 4, x.float().T @ x.float() / 92, g.float().square().mean(0)
    apart = {}
    for preset in ("scale-free", "published"):
        method = hs.LoRADA(preset=preset, population=7473)
        starts = [method.factors(layer(*parts, 4, tokens=92, samples=4)) for parts in (exact, single)]
        products = [start.B.double() @ start.A.double() for start in starts]
        apart[preset] = relative(products[1], products[0])
    assert apart["scale-free"] < 1e-4 and apart["published"] > 20 * apart["scale-free"], (apart, seed)
