"""KeepLoRA against dense decompositions in float64: what it protects, before and while it trains."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from conftest import all_factors, logits, started, tiny_gpt2, tiny_llama, token_batch, wrap
from headstart.layers.weights import dense
from headstart.methods.keeplora import leading_inputs, with_inputs
from inputs import NAME, inputs_by_layer, inputs_of, moments, product, worst_angle
from known_layers import everything, from_spectrum, layer, normal
from oracles import best, exact_gradients, relative
from snapshots import targets_of

BOTH = [hs.KeepLoRA, hs.KeepLoRAPlus]
SHAPES = [(20, 14), (14, 20), (16, 16)]


def oracle(W, share):
    """P by its definition: singular vectors are added until there are enough."""
    _, S, Vh = torch.linalg.svd(W.double())
    k, energy = 0, S.square()
    while float(energy[:k].sum()) < share * float(energy.sum()):
        k += 1
    return Vh[:k].T


def weighted(d_out, d_in, seed=0):
    side = min(d_out, d_in)
    return from_spectrum(d_out, d_in, torch.logspace(0.5, -1, side), seed=seed).float()


def of(d_out=20, d_in=14, r=3, s=2.0, **given_facts):
    facts = dict(weight=weighted(d_out, d_in, seed=4), gradient=normal(d_out, d_in, seed=7, std=1e-3)) | given_facts
    return layer(d_out, d_in, r, s=s, **facts)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_the_fewest_leading_inputs_that_hold_the_share(d_out, d_in, share):
    W = weighted(d_out, d_in)
    P, expected = leading_inputs(W, share), oracle(W, share)
    assert P.shape == expected.shape
    assert torch.allclose(P.T @ P, torch.eye(P.shape[1], dtype=torch.float64), atol=1e-12)
    assert P.shape[1] == 0 or worst_angle(P, expected) < 1e-5


def test_a_weight_of_zeros_protects_nothing():
    assert leading_inputs(torch.zeros(5, 7), 0.9).shape == (7, 0)


def energy(x, basis):
    """The share of the tokens' squared norm that lies in the span of an orthonormal basis."""
    return float((x.double() @ basis).square().sum() / x.double().square().sum())


def extended(P, x, share):
    """P by its definition for tokens x: leading right singular vectors of what they have outside P, one at a time."""
    x = x.double()
    directions = torch.linalg.svd(x - x @ P @ P.T).Vh
    k = 0
    while energy(x, torch.cat((P, directions[:k].T), 1)) < share:
        k += 1
    return torch.cat((P, directions[:k].T), 1)


@pytest.mark.parametrize("of_weight", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("tokens", [5, 60])
def test_the_fewest_inputs_beside_the_weights_that_hold_the_share(of_weight, share, tokens):
    x, P = inputs_of(tokens, 14), oracle(weighted(20, 14), of_weight)
    found, expected = with_inputs(P, moments(x).inputs, share), extended(P, x, share)
    assert found.shape == expected.shape and torch.equal(found[:, : P.shape[1]], P)
    assert torch.allclose(found.T @ found, torch.eye(found.shape[1], dtype=torch.float64), atol=1e-10)
    assert found.shape[1] == 0 or worst_angle(found, expected) < 1e-3
    assert energy(x, found) >= share - 1e-6


@pytest.mark.parametrize("cls", BOTH)
def test_inputs_to_preserve_are_protected_too(cls):
    x, at = inputs_of(60, 14), of(preserved=moments(inputs_of(60, 14)))
    method = cls(weight_share=0.3, inputs_share=0.9)
    assert method.wants(at).preserved and not cls(weight_share=0.3).wants(at).preserved
    P = extended(oracle(at.weight, 0.3), x, 0.9)
    start = method.factors(at)
    assert start.info["protected"] == P.shape[1] > oracle(at.weight, 0.3).shape[1]
    assert float((start.A.double() @ P).abs().max()) < 1e-4
    unreached = method.factors(of())
    assert unreached.note == "no input to preserve reached it"
    assert torch.equal(unreached.A, cls(weight_share=0.3).factors(of()).A)


@pytest.mark.parametrize("name", ["keeplora", "keeplora-plus"])
def test_the_verb_reads_both_sets_of_data(name):
    batch, keep = token_batch(), token_batch(seed=3)
    model = wrap(tiny_llama())
    read = inputs_by_layer(model, [keep])
    hs.initialize_(model, f"{name}:samples=4,inputs_share=0.8", data=[batch], preserve=[keep])
    for each, target in targets_of(model).items():
        P = extended(oracle(target.weight(), 0.2), read[each], 0.8)
        A = all_factors(model)[each][0].double()
        assert float((A @ P).abs().max()) < 1e-3, each
        assert energy(read[each], A.T) < 0.2, each
    with pytest.raises(hs.DataError, match="preserve="):
        hs.initialize_(wrap(tiny_llama()), f"{name}:samples=4,inputs_share=0.8", data=[batch])


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.85])
def test_A_is_orthonormal_free_of_the_protected_and_frozen(d_out, d_in, share):
    at = of(d_out, d_in)
    P = oracle(at.weight, share)
    free = at.gradient.double() @ (torch.eye(d_in, dtype=torch.float64) - P @ P.T)
    for cls in BOTH:
        start = cls(weight_share=share).factors(at)
        A = start.A.double()
        assert torch.allclose(A @ A.T, torch.eye(3, dtype=torch.float64), atol=1e-6)
        assert P.shape[1] == 0 or float((A @ P).abs().max()) < 1e-6
        assert start.frozen == ("lora_A",) and start.note == ""
        assert worst_angle(A.T, torch.linalg.svd(free).Vh[:3].T) < 1e-5
        assert start.info["protected"] == P.shape[1]
        assert start.info["free_share"] == pytest.approx(
            float(free.square().sum() / at.gradient.square().sum()), rel=1e-5
        )


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.85])
def test_the_product_is_the_best_of_the_free_gradient(d_out, d_in, share):
    at = of(d_out, d_in)
    P = oracle(at.weight, share)
    free = at.gradient.double() @ (torch.eye(d_in, dtype=torch.float64) - P @ P.T)
    start = hs.KeepLoRA(weight_share=share).factors(at)
    assert relative(product(start, at.scaling), at.scaling * best(free, 3)) < 1e-5
    B = start.B.double()
    gram = B.T @ B
    assert torch.allclose(gram, torch.linalg.svdvals(free)[:3].square().diag(), atol=1e-5 * float(gram.max()))
    plus = hs.KeepLoRAPlus(weight_share=share).factors(at)
    assert torch.equal(plus.A, start.A) and not bool(plus.B.count_nonzero())


@pytest.mark.parametrize("cls", BOTH)
def test_with_nothing_protected_it_is_the_gradients_decomposition(cls):
    at = of(weight=None)
    method = cls(weight_share=0.0)
    assert str(method.wants(at)) == "gradient" and str(cls().wants(at)) == "weight + gradient"
    start = method.factors(at)
    one = hs.LoRAOne().factors(at)
    assert relative(start.A, torch.nn.functional.normalize(-one.A, dim=1)) < 1e-5


@settings(max_examples=80, deadline=None)
@given(
    d_out=st.integers(1, 16),
    d_in=st.integers(1, 16),
    rank_of_G=st.integers(0, 16),
    within=st.booleans(),
    share=st.floats(0, 0.99),
    scale=st.integers(-20, 6),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_whatever_the_gradient_nothing_protected_is_touched(d_out, d_in, rank_of_G, within, share, scale, seed, data):
    """Also where the gradient has fewer directions than the rank, or none that is free."""
    W = normal(d_out, d_in, seed=seed)
    r = data.draw(st.integers(1, min(d_out, d_in)))
    P = oracle(W, share)
    G = 10.0**scale * normal(d_out, rank_of_G, seed=seed + 1) @ normal(rank_of_G, d_in, seed=seed + 2)
    if within:
        G = (G.double() @ P @ P.T).float()
    at = layer(d_out, d_in, r, weight=W, gradient=G)
    method = hs.KeepLoRA(weight_share=share)
    if P.shape[1] + r > d_in:
        words = rf"{NAME}.*protects {P.shape[1]} of {d_in} input directions.*rank {r};"
        with pytest.raises(hs.LayerError, match=words):
            method.factors(at)
        assert method.checks_weight(replace(at, weight=None)) and share > 0
        with pytest.raises(hs.LayerError, match=words):
            method.check(at)
        return
    method.check(at)
    start = method.factors(at)
    A = start.A.double()
    assert torch.allclose(A @ A.T, torch.eye(r, dtype=torch.float64), atol=1e-6)
    assert P.shape[1] == 0 or float((A @ P).abs().max()) < 1e-5
    free = G.double() - G.double() @ P @ P.T
    expected = best(free, r) if min(free.shape) else free
    assert float((product(start) - expected).norm()) <= 1e-5 * float(G.double().norm())
    if within or rank_of_G < r:
        assert "A's other rows are drawn" in start.note


def test_what_is_drawn_is_the_layers_own():
    at = of(gradient=torch.zeros(20, 14))
    for cls in BOTH:
        start, again = cls().factors(at), cls().factors(at)
        assert torch.equal(start.A, again.A) and not bool(start.B.count_nonzero())
        assert "its gradient has 0 directions" in start.note
        other = cls().factors(of(gradient=torch.zeros(20, 14), name="another"))
        assert not torch.allclose(start.A, other.A, atol=0.1)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_out_of_range_is_refused(cls, share):
    for setting in ("weight_share", "inputs_share"):
        with pytest.raises(hs.MethodError, match=setting):
            cls(**{setting: share})


@pytest.mark.parametrize("cls", BOTH)
def test_a_weight_is_looked_at_early_only_where_it_matters(cls):
    narrow = of(20, 14, 3, weight=None)
    assert not cls().checks_weight(narrow) and not cls(weight_share=0.0).checks_weight(replace(narrow, r=14))
    assert cls(weight_share=0.8).checks_weight(narrow) and not cls(weight_share=0.8).checks_weight(of(5, 14))
    # 3 of 14 equal directions are all that a fifth of their sum takes, so that 11 are left.
    level = replace(narrow, weight=torch.eye(20, 14), r=11)
    assert not cls().checks_weight(level) and cls().checks_weight(replace(level, r=12))
    cls().check(level)
    with pytest.raises(hs.LayerError, match="protects 3 of 14 input directions, which leaves 11 for rank 12"):
        cls().check(replace(level, r=12))
    with pytest.raises(hs.LayerError, match="protects 0 of 14 input directions, which leaves 14 for rank 15"):
        cls(weight_share=0.0).check(replace(narrow, r=15))


@pytest.mark.parametrize("name", ["keeplora", "keeplora-plus"])
def test_too_many_protected_is_a_sentence_and_changes_nothing(name):
    model, batch = wrap(tiny_llama(), r=16, target_modules=["q_proj"]), token_batch()
    before = logits(model, batch)

    def unread():
        raise AssertionError("a sample was read")
        yield

    with pytest.raises(hs.LayerError, match=r"q_proj.*protects \d+ of 32 input directions.*lower weight_share"):
        hs.initialize_(model, f"{name}:samples=4,weight_share=0.98", data=unread())
    # What the inputs to preserve add, they say themselves.
    with pytest.raises(hs.LayerError, match=r"q_proj.*protects \d+ of 32 input directions.*lower weight_share"):
        keep = [token_batch(seed=3)]
        hs.initialize_(model, f"{name}:samples=4,inputs_share=0.999,weight_share=0.1", data=[batch], preserve=keep)
    assert torch.equal(logits(model, batch), before)
    assert all(target.module.lora_A["default"].weight.requires_grad for target in targets_of(model).values())


@pytest.mark.parametrize("name", ["keeplora", "keeplora-plus"])
@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_training_leaves_what_is_protected(tmp_path, name, form):
    batch = token_batch()
    model = wrap(tiny_llama())
    weights = {each: dense(target.module.get_base_layer()).double() for each, target in targets_of(model).items()}
    before = logits(model, batch)
    hs.initialize_(model, f"{name}:samples=4,weight_share=0.5", data=[batch], form=form)
    assert torch.allclose(logits(model, batch), before, atol=1e-5)
    started_A = {each: A.clone() for each, (A, _) in all_factors(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(logits(model, batch), before, atol=1e-3)
    anchored = name == "keeplora" and form == "anchored"
    for each, target in targets_of(model).items():
        A, B = (factor.detach().double() for factor in all_factors(model)[each])
        assert torch.equal(all_factors(model)[each][0], started_A[each])
        assert not target.module.lora_A["default"].weight.requires_grad
        assert target.module.lora_B["default"].weight.requires_grad
        P = oracle(weights[each], 0.5)
        if not anchored:
            W = dense(target.module.get_base_layer()).double() + target.scaling * B @ A
            assert float(((W - weights[each]) @ P).norm()) < 1e-5 * float(weights[each].norm()), each
        x = (P @ normal(P.shape[1], 6).double()).T.float()
        with torch.no_grad():
            output, plain = target.module(x), target.module.get_base_layer()(x)
            if form == "anchored":
                assert float((output - plain).norm()) < 1e-5 * float(plain.norm()), each
            x = torch.randn(6, target.d_in, generator=torch.Generator().manual_seed(0))
            assert float((target.module(x) - torch.nn.functional.linear(x, weights[each].float())).norm()) > 1e-3, each
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    loaded = hs.load_checkpoint(tiny_llama(), tmp_path / "checkpoint")
    assert torch.allclose(logits(loaded, batch), logits(model, batch), atol=1e-5)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_end_to_end_from_one_sample_at_a_time(make):
    batch = token_batch()
    targets = ["c_attn", "c_proj"] if make is tiny_gpt2 else "all-linear"
    model = started(make().double(), "keeplora-plus:samples=4,weight_share=0.3", data=[batch], target_modules=targets)
    found = targets_of(model)
    exact = exact_gradients(make().double(), [batch], list(found))
    for name, target in found.items():
        P = oracle(target.weight(), 0.3)
        free = exact[name] - exact[name] @ P @ P.T
        A = target.module.lora_A["default"].weight.detach().double()
        held = float((free @ A.T).square().sum())
        assert held == pytest.approx(float(torch.linalg.svdvals(free)[:4].square().sum()), rel=1e-5), name
        assert float((A @ P).abs().max()) < 1e-6, name


def test_needs_are_said():
    assert hs.KeepLoRA().wants(everything()).weight and hs.KeepLoRA().form == "anchored"
    assert hs.KeepLoRAPlus().form == "kept"
