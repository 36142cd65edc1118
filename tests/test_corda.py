"""CorDA: the weight's triplets as the inputs see it, against the formula with its inverse, and against PEFT."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraConfig
from peft.tuners.lora.corda import preprocess_corda

import headstart as hs
from conftest import factors_of, logits, tiny_llama, token_batch, wrap
from headstart.errors import MethodError
from headstart.layers.find import lora_layers
from inputs import inputs_of, layer_of, layers_of, normal, product, weights
from oracles import relative

MODES = ("ipm", "kpm")


def damped(Z, damping=0.01):
    Z = Z.double()
    return Z + damping * Z.diagonal().mean() * torch.eye(len(Z), dtype=torch.float64)


def chosen(W, Zf, r, mode):
    """The chosen triplets of W Zf, as a product."""
    U, S, Vh = torch.linalg.svd(W.double() @ Zf, full_matrices=False)
    kept = slice(0, r) if mode == "ipm" else slice(len(S) - r, None)
    return U[:, kept] @ torch.diag(S[kept]) @ Vh[kept], S[kept]


def case(d_out=18, d_in=14, r=4, s=1.5, *, seed=0, **given):
    W, x = normal(d_out, d_in, seed=seed), inputs_of(200, d_in, seed=seed + 5, **given)
    return layer_of(x, W, r, s=s)


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(2, 20),
    d_in=st.integers(2, 20),
    s=st.floats(0.1, 20),
    decades=st.floats(0, 4),
    offset=st.floats(0, 10),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_product_is_the_formulas_whatever_the_inputs(d_out, d_in, s, decades, offset, mode, seed, data):
    r = data.draw(st.integers(1, min(d_out, d_in)))
    layer = case(d_out, d_in, r, s, seed=seed, decades=decades, offset=offset)
    start = hs.CorDA(mode=mode).factors(layer)
    Zf = damped(layer.kronecker.inputs)
    part, S = chosen(layer.weight, Zf, r, mode)
    M = product(start, s)
    # The last triplets are known as well as float32 factors hold them; what is inverted amplifies it.
    scale = float(torch.linalg.matrix_norm(layer.weight.double() @ Zf, 2))
    assert float((M @ Zf - part).norm()) < 2e-5 * scale
    inverse = torch.linalg.solve(Zf, part.T).T
    assert relative(M, inverse) < 1e-3 or float((M - inverse).norm()) < 2e-5 * float(layer.weight.norm())
    # Balanced: the triplets' roots on either side.
    gram = start.B.double().T @ start.B.double()
    assert torch.allclose(gram, torch.diag(S / s), rtol=1e-4, atol=1e-5 * float(S.max()) / s)
    assert start.info["largest_A"] == pytest.approx(float(start.A.abs().max()), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_A_carries_the_other_root(mode):
    layer = case()
    start = hs.CorDA(mode=mode).factors(layer)
    rows = start.A.double() @ damped(layer.kronecker.inputs)
    _, S = chosen(layer.weight, damped(layer.kronecker.inputs), layer.r, mode)
    assert torch.allclose(rows @ rows.T, torch.diag(S / layer.scaling), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)])
def test_the_full_rank_gives_the_weight(mode, shape):
    layer = case(*shape, r=min(shape), s=2.0)
    assert relative(product(hs.CorDA(mode=mode).factors(layer), 2.0), layer.weight) < 1e-5


def test_no_product_of_its_rank_is_nearer_to_the_weight_as_inputs_see_it():
    layer = case(r=3)
    Zf, W = damped(layer.kronecker.inputs), layer.weight.double()
    M = product(hs.CorDA().factors(layer), layer.scaling)
    error = float(((W - M) @ Zf).norm())
    tail = float(torch.linalg.svdvals(W @ Zf)[3:].norm())
    assert error == pytest.approx(tail, rel=1e-6)
    pissa = hs.PiSSA().factors(layer)
    assert error < float(((W - product(pissa, layer.scaling)) @ Zf).norm())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [1e-8, 3.0, 1e8])
def test_the_size_of_the_inputs_does_not_matter(mode, factor):
    layer = case()
    scaled = replace(layer, kronecker=replace(layer.kronecker, inputs=factor * layer.kronecker.inputs))
    one, other = (product(hs.CorDA(mode=mode).factors(each)) for each in (layer, scaled))
    assert relative(one, other) < 1e-4


@pytest.mark.parametrize(("mode", "name"), [("ipm", "pissa"), ("kpm", "milora")])
def test_round_inputs_give_the_starts_from_the_weight_alone(mode, name):
    layer = case()
    layer = replace(layer, kronecker=replace(layer.kronecker, inputs=2.5 * torch.eye(layer.d_in)))
    one, other = hs.CorDA(mode=mode).factors(layer), hs.get_method(name).factors(layer)
    assert relative(product(one), product(other)) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_inputs_and_weights_without_full_rank_are_no_trouble(mode):
    """Directions that no input has, and weights of low rank: float32's inverse would have nothing to stand on."""
    W = normal(12, 3, seed=1) @ normal(3, 10, seed=2)
    x = normal(50, 2, seed=3) @ normal(2, 10, seed=4)
    layer = layer_of(1e4 * x, W, 4, s=0.5)
    start = hs.CorDA(mode=mode, damping=1e-6).factors(layer)
    Zf = damped(layer.kronecker.inputs, 1e-6)
    part, _ = chosen(layer.weight, Zf, 4, mode)
    assert bool(torch.isfinite(start.A).all() and torch.isfinite(start.B).all())
    gain = float(torch.linalg.matrix_norm(layer.weight.double() @ Zf, 2))
    assert float((product(start, 0.5) @ Zf - part).norm()) < 1e-4 * gain


@pytest.mark.parametrize("nothing", ["no tokens", "zeros"])
def test_a_layer_that_saw_nothing_starts_as_lora_does(nothing):
    layer = case()
    zero = replace(layer.kronecker, inputs=torch.zeros(layer.d_in, layer.d_in))
    layer = replace(layer, kronecker=None if nothing == "no tokens" else zero)
    start = hs.CorDA().factors(layer)
    assert "starts as 'lora' does" in start.note
    assert torch.equal(start.A, hs.LoRA().factors(layer).A) and not bool(start.B.count_nonzero())


@pytest.mark.parametrize("changes", [dict(damping=0.0), dict(damping=-1.0), dict(samples=0), dict(mode="both")])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(MethodError):
        hs.CorDA(**changes)


def pefts_corda(base, method, run):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config.target_modules = set(targets)
    preprocess_corda(base, config, run_model=lambda: run(base))
    return get_peft_model(base, config)


@pytest.mark.parametrize("mode", MODES)
def test_one_samples_product_is_pefts_own(mode):
    """Of one sample without padding PEFT's covariance is Z but for a factor, which changes nothing."""
    batch = token_batch(1, 64, padded=False)
    theirs = pefts_corda(tiny_llama(max_position_embeddings=64), mode, lambda model: model(**batch))
    layers = layers_of(wrap(tiny_llama()), [batch])
    for target in lora_layers(theirs, "default"):
        ours = product(hs.CorDA(mode=mode).factors(layers[target.name]), target.scaling)
        pefts = target.module.get_delta_weight("default")
        assert relative(ours, pefts) < 2e-2, target.name


def test_several_samples_weigh_by_their_tokens_where_pefts_weigh_by_their_largest_entry():
    """PEFT divides each sample's inputs by their signed maximum: a sample with a large one counts for less."""
    batches = [token_batch(1, 64, seed=seed, padded=False) for seed in (1, 2)]
    theirs = pefts_corda(tiny_llama(), "ipm", lambda model: [model(**batch) for batch in batches])
    layers = layers_of(wrap(tiny_llama()), batches)
    apart = 0.0
    for target in lora_layers(theirs, "default"):
        layer = layers[target.name]
        ours = product(hs.CorDA().factors(layer), target.scaling)
        part, _ = chosen(layer.weight, damped(layer.kronecker.inputs), layer.r, "ipm")
        assert relative(ours @ damped(layer.kronecker.inputs), part) < 1e-5
        apart = max(apart, relative(ours, target.module.get_delta_weight("default")))
    assert apart > 1e-3


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_starts_from_its_own_inputs_and_does_not_move(form, mode):
    model, batches = wrap(tiny_llama()), [token_batch(seed=1), token_batch(seed=2)]
    base, W = logits(model, batches[0]), weights(model)
    layers = layers_of(model, batches)
    report = hs.initialize_(model, hs.CorDA(mode=mode, samples=8), data=batches, form=form)
    assert torch.allclose(logits(model, batches[0]), base, atol=1e-4)
    for target in lora_layers(model, "default"):
        A, B = (factor.double() for factor in factors_of(target.module))
        expected = product(hs.CorDA(mode=mode).factors(layers[target.name]))
        assert relative(B @ A, expected) < 1e-3, target.name
        if form == "residual":
            frozen = target.module.get_base_layer().weight
            assert torch.allclose(frozen, (W[target.name] - target.scaling * (B @ A)).float(), atol=1e-5)
    assert all(layer.info["largest_A"] > 0 for layer in report.layers)
    assert not report.warnings


def test_labels_are_not_needed():
    batches = [{k: v for k, v in token_batch(seed=1).items() if k != "labels"}]
    model = wrap(tiny_llama())
    report = hs.initialize_(model, hs.CorDA(samples=4), data=batches)
    assert report.samples == 4 and not math.isclose(report.layers[0].norm_B, 0)
