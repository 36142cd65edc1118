"""The factors that initialize_ gives: by PEFT's ranks and scalings, by seed and name, by real batches' gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig

import headstart as hs
from conftest import WRAPPERS, all_factors, factors_of, logits, started, tiny_gpt2, tiny_llama, wrap
from headstart.statistics.batches import take
from oracles import best, exact_gradients, relative
from snapshots import ALL, RANDOM, SUBTRACTING, data_for, dense_weight, same, targets_of


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_ranks_alphas_and_rslora_are_pefts(architecture, rslora):
    if architecture == "llama":
        kinds, base = ["q_proj", "v_proj", "down_proj"], tiny_llama()
        ranks, alphas = {"v_proj": 2, "layers.1.mlp.down_proj": 7}, {"v_proj": 3, "q_proj": 20}
        own = {"q_proj": (4, 20), "v_proj": (2, 3), "down_proj": (4, 9)}
        special = {"model.layers.1.mlp.down_proj": (7, 9)}
    else:
        kinds, base = ["c_attn", "c_fc"], tiny_gpt2()
        ranks, alphas = {"c_fc": 6}, {"c_attn": 5}
        own, special = {"c_attn": (4, 5), "c_fc": (6, 9)}, {}
    model = wrap(base, lora_alpha=9, target_modules=kinds, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    weights = {name: dense_weight(target) for name, target in targets_of(model).items()}
    report = hs.initialize_(model, "pissa")
    assert report.layers
    for layer in report.layers:
        r, alpha = special.get(layer.name, own[layer.name.rpartition(".")[2]])
        s = alpha / math.sqrt(r) if rslora else alpha / r
        A, B = (factor.double() for factor in factors_of(targets_of(model)[layer.name].module))
        W = weights[layer.name]
        assert layer.r == r and A.shape == (r, W.shape[1]) and B.shape == (W.shape[0], r)
        assert relative(s * B @ A, best(W, r)) < 1e-5
        assert layer.norm_product == pytest.approx(float(torch.linalg.svdvals(W)[:r].norm()), rel=1e-5)


@WRAPPERS
def test_models_without_pefts_wrapper_work_too(wrapped, batch):
    model = wrapped(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    expected = logits(model, batch)
    report = hs.initialize_(model, "pissa")
    assert report.layers[0].name == "model.layers.0.self_attn.q_proj"
    assert torch.equal(logits(model, batch), expected)


def test_moments_are_averaged_over_layers_of_one_kind():
    base = tiny_llama()
    with torch.no_grad():
        for i, block in enumerate(base.model.layers):
            block.self_attn.q_proj.weight.mul_(1 + 3 * i)
            block.mlp.down_proj.weight.mul_(50)
    model = wrap(base, r=16, target_modules=["q_proj", "down_proj"])
    weights = {name: dense_weight(target) for name, target in targets_of(model).items()}
    hs.initialize_(model, "inilora:solver=adam,steps=0")
    for kind in ("q_proj", "down_proj"):
        names = [name for name in weights if name.endswith(kind)]
        sigma = sum(float(weights[name].std(correction=0)) for name in names) / len(names)
        for name in names:
            drawn = torch.cat([factor.flatten() for factor in all_factors(model)[name]]).double()
            # 1,000 entries and more; five standard errors of the mean square, relative: 5 sqrt(2/n).
            assert float(drawn.square().mean()) / sigma**2 == pytest.approx(1, abs=5 * math.sqrt(2 / len(drawn)))


LORA_DA = ["lora-da:samples=4", "lora-da:samples=4,fisher=full", "lora-da:samples=4,iterations=5"]


@pytest.mark.parametrize("method", [*ALL, *LORA_DA])
def test_the_same_seed_gives_the_same_factors(method):
    one = started(tiny_llama(), method, seed=4, data=data_for(method))
    torch.manual_seed(999)
    two = started(tiny_llama(), hs.methods.parse_method(method), seed=4, data=data_for(method))
    assert same(all_factors(one), all_factors(two))


@pytest.mark.parametrize("method", [*RANDOM, "inilora:solver=adam,steps=3"])
def test_another_seed_gives_other_factors_in_every_layer(method):
    one = all_factors(started(tiny_llama(), method, seed=0))
    two = all_factors(started(tiny_llama(), method, seed=1))
    for name, (A, B) in one.items():
        assert not (torch.equal(A, two[name][0]) and torch.equal(B, two[name][1])), name


def test_layers_of_one_shape_get_different_draws():
    factors = all_factors(started(tiny_llama(), "init-ab", target_modules=["q_proj", "o_proj"]))
    matrices = [A for A, _ in factors.values()]
    assert len(matrices) == 4
    for i, A in enumerate(matrices):
        for other in matrices[:i]:
            assert abs(float(torch.cosine_similarity(A.flatten(), other.flatten(), dim=0))) < 0.5


def test_targets_left_out_do_not_change_the_others():
    few = all_factors(started(tiny_llama(), "init-ab", target_modules=["v_proj"]))
    many = all_factors(started(tiny_llama(), "init-ab", target_modules=["q_proj", "v_proj", "up_proj"]))
    assert same(few, {name: many[name] for name in few})


def test_a_string_is_the_method_it_names():
    for text, method in (
        ("init-ab:beta=2,scheme=sgd", hs.InitAB(beta=2, scheme="sgd")),
        ("pissa", hs.PiSSA()),
        ("inilora:solver=svd,gauge=random", hs.IniLoRA(solver="svd", gauge="random")),
    ):
        one, two = wrap(tiny_llama()), wrap(tiny_llama())
        reports = [hs.initialize_(one, text), hs.initialize_(two, method)]
        assert same(all_factors(one), all_factors(two))
        assert reports[0].method == reports[1].method == str(method)


@pytest.mark.parametrize("samples", [4, 3])
def test_lora_one_end_to_end(samples, batch):
    base = tiny_llama().double()
    model = wrap(copy.deepcopy(base), r=4, lora_alpha=8, lora_dropout=0.5)
    model.train()
    hs.initialize_(model, hs.LoRAOne(samples=samples, gamma=32), data=[batch])
    factors = all_factors(model)
    gradients = exact_gradients(base, [take(batch, list(range(samples)))], list(factors))
    assert len(factors) == 14
    for name, (A, B) in factors.items():
        G = gradients[name]
        S = torch.linalg.svdvals(G)
        assert relative(B.double() @ A.double(), -best(G, 4) / (float(S[0]) * 32)) < 1e-4, name
        root = (S[:4] / S[0] / 32).diag()
        assert torch.allclose(B.double().T @ B.double(), root, atol=1e-6), name
        assert torch.allclose(A.double() @ A.double().T, root, atol=1e-6), name


@pytest.mark.parametrize("samples", [4, 3])
def test_lora_ga_end_to_end(samples, batch):
    base = tiny_llama().double()
    model = wrap(copy.deepcopy(base), r=4, lora_alpha=8)
    expected = logits(model, batch)
    hs.initialize_(model, hs.LoRAGA(samples=samples, gamma=4), data=[batch])
    assert torch.equal(logits(model, batch), expected)
    factors = all_factors(model)
    gradients = exact_gradients(base, [take(batch, list(range(samples)))], list(factors))
    for name, (A, B) in factors.items():
        U, _, Vh = torch.linalg.svd(gradients[name])
        c = B.shape[0] ** 0.25 / 2
        for i in range(4):
            assert min(relative(A[i], sign * c * Vh[i]) for sign in (1, -1)) < 1e-4, name
            assert min(relative(B[:, i], sign * c * U[:, 4 + i]) for sign in (1, -1)) < 1e-4, name


def test_lora_one_starts_beside_the_base_model_downhill(batch):
    model = wrap(tiny_llama(), r=4, lora_alpha=1)
    model.eval()
    before = float(model(**batch).loss.detach())
    hs.initialize_(model, hs.LoRAOne(samples=4), data=[batch])
    assert float(model(**batch).loss.detach()) < before


@pytest.mark.parametrize("method", SUBTRACTING)
def test_residual_subtracts_the_product(method):
    before = {name: dense_weight(target) for name, target in targets_of(wrap(tiny_llama())).items()}
    model = started(tiny_llama(), method, form="residual")
    for name, target in targets_of(model).items():
        A, B = (factor.double() for factor in factors_of(target.module))
        expected = before[name] - 2.0 * B @ A  # s = 8 / 4
        assert relative(dense_weight(target), expected) < 1e-5 or float(expected.norm()) < 1e-5


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_autocast_around_the_verb_rounds_nothing(form):
    plain = started(tiny_llama(), "olora", form=form)
    with torch.autocast("cpu", torch.bfloat16):
        cast = started(tiny_llama(), "olora", form=form)
    for (name, parameter), other in zip(plain.named_parameters(), cast.parameters(), strict=True):
        assert torch.equal(parameter, other), name


@pytest.mark.parametrize(("budget", "largest"), [(None, 9), (1, 1), (2 * 4 * 3 * 32 * 32, 3)])
def test_the_budget_bounds_what_is_decomposed_together(budget, largest, monkeypatch):
    """Half of it is for the weights, half for what is computed beside them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    sizes, plain = [], hs.PiSSA.factors_batch

    def counted(self, layers, show):
        sizes.append(len(layers))
        return plain(self, layers, show)

    monkeypatch.setattr(hs.PiSSA, "factors_batch", counted)
    model = wrap(tiny_llama(num_hidden_layers=9), target_modules=["q_proj"])
    hs.initialize_(model, "pissa", memory_budget=budget, progress=False)
    assert max(sizes) == largest
