"""The verb on tiny models: its report, its determinism, its refusals, and the model it gives back when it fails."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import conftest
import headstart as hs
from conftest import WRAPPERS, all_factors, logits, perturb, started, tiny_gpt2, tiny_llama, tiny_vit, token_batch, wrap
from headstart.layers import anchored
from headstart.layers.anchored import anchors
from headstart.layers.find import lora_layers, record
from headstart.layers.mark import make_mark
from headstart.statistics.batches import take
from oracles import best, exact_gradients, relative

ZERO_PRODUCT = ["lora", "init-a", "init-b", "gaussian", "orthogonal"]
SUBTRACTING = ["init-ab", "inilora-alpha", "inilora-beta", "inilora:steps=3", "inilora:solver=svd", "pissa"]
SUBTRACTING += ["milora", "olora"]
WITH_DATA = ["lora-ga:samples=4", "lora-one:samples=4"]
ALL = [*ZERO_PRODUCT, *SUBTRACTING, "init-ab-plus", *WITH_DATA]
RANDOM = [*ZERO_PRODUCT, "init-ab", "init-ab-plus", "inilora-alpha", "inilora-beta"]


def data_for(method):
    return [token_batch()] if "samples" in str(method) or method in ("lora-ga", "lora-one") else None


def targets_of(model, adapter="default"):
    return {target.name: target for target in lora_layers(model, adapter)}


def factors_of(target):
    return conftest.factors_of(target.module, target.adapter)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(A, other[name][0]) and torch.equal(B, other[name][1]) for name, (A, B) in one.items()
    )


def dense_weight(target):
    W = target.module.get_base_layer().weight.detach().double()
    return W.T if getattr(target.module, "fan_in_fan_out", False) else W


def live_form(method, form):
    own = hs.methods.parse_method(method).form
    return form if own == "anchored" else own


def snapshot(model):
    """All that an initialisation could leave behind."""
    return {
        "parameters": {n: (p.detach().clone(), p.requires_grad, p.dtype) for n, p in model.named_parameters()},
        "identities": {n: id(p) for n, p in model.named_parameters()},
        "buffers": {n: b.detach().clone() for n, b in model.named_buffers()},
        "keys": sorted(model.state_dict()),
        "variants": {n: dict(m.lora_variant) for n, m in model.named_modules() if hasattr(m, "lora_variant")},
        "disabled": {n: m._disable_adapters for n, m in model.named_modules() if hasattr(m, "_disable_adapters")},
        "configs": {n: copy.deepcopy(c.to_dict()) for n, c in getattr(model, "peft_config", {}).items()},
        "modes": {n: m.training for n, m in model.named_modules() if "lora_start" not in n and "residual" not in n},
        "hooks": {
            n: len(m._forward_hooks) for n, m in model.named_modules() if "lora_start" not in n and "residual" not in n
        },
        "records": {n: record(t) for a in getattr(model, "peft_config", {}) for n, t in targets_of(model, a).items()},
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after["parameters"].keys() == before["parameters"].keys()
    for name, (value, flag, dtype) in before["parameters"].items():
        now = after["parameters"][name]
        assert torch.equal(torch.nan_to_num(now[0]), torch.nan_to_num(value)), name
        assert (now[1], now[2]) == (flag, dtype), name
    for name, value in before["buffers"].items():
        assert torch.equal(after["buffers"][name], value), name
    for part in ("identities", "keys", "variants", "disabled", "configs", "modes", "hooks", "records"):
        assert after[part] == before[part], part
    assert after["buffers"].keys() == before["buffers"].keys()
    assert all(p.grad is None for p in model.parameters())


# The report.


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("method", ALL)
def test_report_against_dense_norms(method, form):
    model = wrap(tiny_llama(), r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"])
    before = {name: dense_weight(target) for name, target in targets_of(model).items()}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = hs.initialize_(model, method, data=data_for(method), form=form, seed=3)
    targets = targets_of(model)
    assert [layer.name for layer in report.layers] == list(targets)
    assert len(report.layers) == 6
    for layer in report.layers:
        A, B = (factor.double() for factor in factors_of(targets[layer.name]))
        W = before[layer.name]
        assert (layer.d_out, layer.d_in) == tuple(W.shape)
        assert layer.r == 4
        assert layer.norm_A == pytest.approx(float(A.norm()), rel=1e-5)
        assert layer.norm_B == pytest.approx(float(B.norm()), rel=1e-5)
        # Where B A is zero but for rounding: 1e-7 of the factors' norms.
        slack = 1e-6 * float(A.norm() * B.norm())
        assert layer.norm_product == pytest.approx(float((3.0 * B @ A).norm()), rel=1e-5, abs=slack)
        assert layer.norm_weight == pytest.approx(float(W.norm()), rel=1e-6)
        assert layer.relative_product == pytest.approx(layer.norm_product / layer.norm_weight)
        assert layer.seconds >= 0
        assert layer.note == ""
        if "error" in layer.info:
            assert layer.info["error"] == pytest.approx(float((W / 3 - B @ A).square().sum()), rel=1e-5)
    assert report.form == live_form(method, form) and report.adapter == "default" and report.seed == 3
    assert report.seconds == pytest.approx(sum(report.seconds_by_step.values()))
    assert 0 < sum(layer.seconds for layer in report.layers) <= report.seconds_by_step["factorise"] * 1.01
    assert report.peak_memory > 2**20
    assert report.trainable == trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = token_batch()
    assert report.samples == (4 if data_for(method) else 0)
    assert report.tokens == (int(batch["attention_mask"].sum()) if data_for(method) else 0)
    assert report.warnings == []


@pytest.mark.parametrize("method", ALL)
def test_report_as_text_and_as_json(method):
    model = wrap(tiny_llama(), target_modules=["q_proj", "v_proj"])
    report = hs.initialize_(model, method, data=data_for(method))
    shown = str(report)
    name = method.partition(":")[0]
    assert name in shown
    assert "q_proj" in shown and "32x32" in shown and "v_proj" in shown and "16x32" in shown
    assert "4 layers" in shown and report.form in shown
    assert all(len(line) <= 120 for line in shown.splitlines())
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["method"].startswith(name)
    assert again["layers"][1]["name"] == report.layers[1].name
    assert again["layers"][1]["norm_A"] == report.layers[1].norm_A
    assert again["seconds_by_step"] == report.seconds_by_step


def test_report_shows_error_over_bound():
    model = wrap(tiny_llama(), r=4, target_modules=["q_proj"])
    report = hs.initialize_(model, "inilora:steps=20")
    ratios = []
    for layer, target in zip(report.layers, targets_of(model).values(), strict=True):
        A, B = (factor.double() for factor in factors_of(target))
        W = dense_weight(target) / target.scaling
        ratios.append(float((W - B @ A).square().sum() / torch.linalg.svdvals(W)[4:].square().sum()))
        assert layer.info["error"] / layer.info["bound"] == pytest.approx(ratios[-1], rel=1e-5)
    assert f"{max(ratios):.3f}" in str(report)


def test_tokens_and_samples_are_those_read():
    model = wrap(tiny_llama(), target_modules=["q_proj"])
    batches = [token_batch(4, seed=1), token_batch(4, seed=2), token_batch(4, seed=3)]
    report = hs.initialize_(model, "lora-one:samples=6", data=batches)
    assert report.samples == 6
    masks = torch.cat([batch["attention_mask"] for batch in batches])
    assert report.tokens == int(masks[:6].sum())
    assert "6 samples" in str(report)


def test_too_few_samples_are_a_warning():
    report = hs.initialize_(wrap(tiny_llama()), "lora-one:samples=9", data=[token_batch(4)])
    assert report.samples == 4
    assert any("9" in warning for warning in report.warnings)
    assert "warning:" in str(report)


def test_trainable_counts_the_adapter_that_was_started():
    """As the report's docstring says: parameters of the adapter that train."""
    model = wrap(tiny_llama(), target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"]))
    report = hs.initialize_(model, "lora", adapter="default")
    A, B = 4 * 32, 32 * 4
    assert report.trainable == 2 * (A + B)
    model.set_adapter("second")
    third = wrap(tiny_llama(), target_modules=["q_proj"])
    third.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"]))
    # Not active, so none of them trains now: these are what trains once it is.
    assert hs.initialize_(third, "lora", adapter="second").trainable == 2 * (2 * 32 + 16 * 2)
    third.set_adapter("second")
    assert sum(each.numel() for each in third.parameters() if each.requires_grad) == 2 * (2 * 32 + 16 * 2)


@pytest.mark.parametrize("method", ["init-ab", "pissa", "lora-one:samples=4"])
def test_progress_counts_up_to_the_total(method):
    calls = []
    model = wrap(tiny_llama())
    hs.initialize_(model, method, data=data_for(method), progress=lambda *call: calls.append(call))
    steps = {}
    for step, done, total in calls:
        assert 0 <= steps.get(step, 0) <= done <= total
        steps[step] = done
    assert steps["factorising"] == len(targets_of(model))
    assert any(step.startswith("data: 1 pass, ") for step in steps) == (data_for(method) is not None)


# PEFT's own settings.


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
        A, B = (factor.double() for factor in factors_of(targets_of(model)[layer.name]))
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
    hs.initialize_(model, "inilora:steps=0")
    for kind in ("q_proj", "down_proj"):
        names = [name for name in weights if name.endswith(kind)]
        sigma = sum(float(weights[name].std(correction=0)) for name in names) / len(names)
        for name in names:
            drawn = torch.cat([factor.flatten() for factor in all_factors(model)[name]]).double()
            # 1,000 entries and more; five standard errors of the mean square, relative: 5 sqrt(2/n).
            assert float(drawn.square().mean()) / sigma**2 == pytest.approx(1, abs=5 * math.sqrt(2 / len(drawn)))


# Determinism.


@pytest.mark.parametrize("method", ALL)
def test_the_same_seed_gives_the_same_factors(method):
    one = started(tiny_llama(), method, seed=4, data=data_for(method))
    torch.manual_seed(999)
    two = started(tiny_llama(), hs.methods.parse_method(method), seed=4, data=data_for(method))
    assert same(all_factors(one), all_factors(two))


@pytest.mark.parametrize("method", [*RANDOM, "inilora:steps=3"])
def test_another_seed_gives_other_factors_in_every_layer(method):
    one = all_factors(started(tiny_llama(), method, seed=0))
    two = all_factors(started(tiny_llama(), method, seed=1))
    for name, (A, B) in one.items():
        assert not (torch.equal(A, two[name][0]) and torch.equal(B, two[name][1])), name


def test_layers_of_one_shape_get_different_draws():
    found = all_factors(started(tiny_llama(), "init-ab", target_modules=["q_proj", "o_proj"]))
    matrices = [A for A, _ in found.values()]
    assert len(matrices) == 4
    for i, A in enumerate(matrices):
        for other in matrices[:i]:
            assert abs(float(torch.cosine_similarity(A.flatten(), other.flatten(), dim=0))) < 0.5


def test_targets_left_out_do_not_change_the_others():
    few = all_factors(started(tiny_llama(), "init-ab", target_modules=["v_proj"]))
    many = all_factors(started(tiny_llama(), "init-ab", target_modules=["q_proj", "v_proj", "up_proj"]))
    assert same(few, {name: many[name] for name in few})


@pytest.mark.parametrize("method", ALL)
def test_torchs_own_generator_is_left_alone(method):
    model = wrap(tiny_llama())
    state = torch.random.get_rng_state()
    hs.initialize_(model, method, data=data_for(method))
    assert torch.equal(torch.random.get_rng_state(), state)


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


# Gradient starts, end to end.


@pytest.mark.parametrize("samples", [4, 3])
def test_lora_one_end_to_end(samples, batch):
    base = tiny_llama().double()
    model = wrap(copy.deepcopy(base), r=4, lora_alpha=8, lora_dropout=0.5)
    model.train()
    hs.initialize_(model, hs.LoRAOne(samples=samples, gamma=32), data=[batch])
    found = all_factors(model)
    gradients = exact_gradients(base, [take(batch, list(range(samples)))], list(found))
    assert len(found) == 14
    for name, (A, B) in found.items():
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
    found = all_factors(model)
    gradients = exact_gradients(base, [take(batch, list(range(samples)))], list(found))
    for name, (A, B) in found.items():
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


# What must be left alone.


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("method", ALL)
def test_other_adapters_buffers_and_frozen_weights_are_left_alone(method, form):
    model = wrap(tiny_llama(), init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    settings = dict(r=2, lora_alpha=4, target_modules=["v_proj", "down_proj"])
    model.add_adapter("second", LoraConfig(**settings))
    model.set_adapter("second")
    before = snapshot(model)
    subtracts = method in SUBTRACTING or "lora-ga" in method
    if subtracts and form == "residual":
        # The first adapter lives on one of the weights that would change.
        refused(model, hs.LayerError, "holds adapter 'default' as well", method, data=data_for(method), form=form)
        return
    hs.initialize_(model, method, data=data_for(method), form=form)
    after = snapshot(model)
    touched = {n for n in before["parameters"] if ".second." in n}
    for name, (value, flag, dtype) in before["parameters"].items():
        assert after["parameters"][name][1:] == (flag, dtype)
        if name not in touched:
            assert torch.equal(after["parameters"][name][0], value), name
    new = after["parameters"].keys() - before["parameters"].keys()
    assert bool(new) == subtracts
    assert all("second" in name and not after["parameters"][name][1] for name in new)
    for name, value in before["buffers"].items():
        assert torch.equal(after["buffers"][name], value)
    assert after["configs"]["default"] == before["configs"]["default"]
    assert after["modes"] == before["modes"]
    assert after["disabled"] == before["disabled"]
    assert all("default" not in variants for variants in after["variants"].values())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", SUBTRACTING)
def test_residual_subtracts_the_product(method):
    before = {name: dense_weight(target) for name, target in targets_of(wrap(tiny_llama())).items()}
    model = started(tiny_llama(), method, form="residual")
    for name, target in targets_of(model).items():
        A, B = (factor.double() for factor in factors_of(target))
        expected = before[name] - 2.0 * B @ A  # s = 8 / 4
        assert relative(dense_weight(target), expected) < 1e-5 or float(expected.norm()) < 1e-5


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("method", ALL)
def test_the_config_is_marked_where_plain_peft_would_misread_the_adapter(method, form):
    model = started(tiny_llama(), method, form=form, data=data_for(method), target_modules=["q_proj"])
    subtracts = method in SUBTRACTING or "lora-ga" in method
    mark = model.peft_config["default"].init_lora_weights
    assert mark == make_mark({"q_proj": form}) if subtracts else mark is True
    (target, _) = lora_layers(model, "default")
    assert (record(target)["method"].partition(":")[0], record(target)["form"]) == (
        method.partition(":")[0],
        live_form(method, form),
    )
    held = anchors(target.module, "default")
    assert (held is not None) == subtracts
    for anchor, factor in zip(held or (), factors_of(target), strict=False):
        assert torch.equal(anchor, factor) and anchor.data_ptr() != factor.data_ptr()


# A failure half-way.

STEPS = [
    ("anchored", "init-ab", "start_at"),
    ("anchored", "pissa", "set_record"),
    ("residual", "init-ab", "set_anchors"),
    ("residual", "init-ab", "subtract_product"),
    ("residual", "pissa", "set_record"),
    ("anchored", "lora", "set_record"),
    ("anchored", "init-ab-plus", "set_record"),
    ("anchored", "init-ab", "fingerprint"),
    ("residual", "lora-ga:samples=4", "subtract_product"),
]


def fail_at(monkeypatch, place, real, error, at, when):
    """Replace a function by one that fails at its ``at``-th call, before or after it has done its work."""
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == at and when == "before":
            raise error("no more")
        result = real(*args, **kwargs)
        if len(calls) == at:
            raise error("no more")
        return result

    monkeypatch.setattr(place, fails)
    return calls


@pytest.mark.parametrize(
    ("at", "when", "error"),
    [(1, "before", KeyboardInterrupt), (4, "before", RuntimeError), (4, "after", KeyboardInterrupt)],
)
@pytest.mark.parametrize(("form", "method", "step"), STEPS)
def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch, batch, form, method, step, at, when, error):
    import headstart.layers.install as install

    model = wrap(tiny_llama(), target_modules=["q_proj", "v_proj", "down_proj"])
    before, expected = snapshot(model), logits(model, batch)
    with monkeypatch.context() as patch:
        place = f"headstart.layers.install.{step}"
        calls = fail_at(patch, place, getattr(install, step), error, at, when)
        with pytest.raises(error, match="no more"):
            hs.initialize_(model, method, data=data_for(method), form=form)
        assert len(calls) >= at  # putting things back may call it again
    assert_unchanged(model, before)
    assert torch.equal(logits(model, batch), expected)
    assert all(anchors(target.module, "default") is None for target in lora_layers(model, "default"))
    # And then it works, in either form.
    other = "residual" if form == "anchored" else "anchored"
    for again in (form, other) if (at, when) == (4, "after") else (form,):
        second, fresh = copy.deepcopy(model), wrap(tiny_llama(), target_modules=["q_proj", "v_proj", "down_proj"])
        hs.initialize_(second, method, data=data_for(method), form=again)
        hs.initialize_(fresh, method, data=data_for(method), form=again)
        assert same(all_factors(second), all_factors(fresh))
        assert second.state_dict().keys() == fresh.state_dict().keys()
        assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in second.state_dict().items())


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("at", [1, 2, 5, 6])
def test_a_failure_between_the_two_anchors(monkeypatch, form, at):
    """Memory can run out after a layer's A0 and before its B0 (even calls)."""
    model = wrap(tiny_llama(), target_modules=["q_proj", "v_proj", "down_proj"])
    before = snapshot(model)
    calls = []

    def parameter(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise MemoryError("no more")
        return nn.Parameter(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(anchored, "nn", SimpleNamespace(Parameter=parameter, ModuleDict=nn.ModuleDict))
        with pytest.raises(MemoryError, match="no more"):
            hs.initialize_(model, "init-ab", form=form)
    assert_unchanged(model, before)
    hs.initialize_(model, "init-ab", form=form)
    assert same(
        all_factors(model),
        all_factors(started(tiny_llama(), form=form, target_modules=["q_proj", "v_proj", "down_proj"])),
    )


@pytest.mark.parametrize("bad", ["nan", "shape"])
@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_a_method_that_gives_nonsense_is_caught_before_any_layer_changes(monkeypatch, form, bad):
    real = hs.InitAB.factors

    def nonsense(self, layer):
        found = real(self, layer)
        if layer.name != "model.layers.1.mlp.down_proj":
            return found
        B = found.B[:, :-1] if bad == "shape" else torch.full_like(found.B, float("nan"))
        return hs.Factors(found.A, B)

    monkeypatch.setattr(hs.InitAB, "factors", nonsense)
    model = wrap(tiny_llama())
    before = snapshot(model)
    with pytest.raises(hs.LayerError, match=r"model\.layers\.1\.mlp\.down_proj"):
        hs.initialize_(model, "init-ab", form=form)
    assert_unchanged(model, before)


def test_an_interrupt_while_reading_data_leaves_the_model_as_it_was():
    def batches():
        yield token_batch()
        raise KeyboardInterrupt

    model = wrap(tiny_llama(), lora_dropout=0.1)
    model.train()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        hs.initialize_(model, "lora-one:samples=8", data=batches())
    assert_unchanged(model, before)
    hs.initialize_(model, "lora-one:samples=4", data=[token_batch()])


# Refusals.


def refused(model, error, match, method="init-ab", **given):
    """The error is raised, and nothing has changed."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        hs.initialize_(model, method, **given)
    assert_unchanged(model, before)


class Small(nn.Module):
    """A convolution, a linear layer that is used and one that is not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.used = nn.Linear(8, 6)
        self.unused = nn.Linear(8, 6)

    def forward(self, x, labels):
        scores = self.used(self.conv(x).mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def small(*targets, **settings):
    torch.manual_seed(0)
    return get_peft_model(Small(), LoraConfig(**(dict(r=2, lora_alpha=4, target_modules=list(targets)) | settings)))


def small_batch():
    return {"x": normal(4, 3, 6, 6), "labels": torch.tensor([0, 1, 2, 3])}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


EVERY = ["init-ab", "lora", "pissa", "lora-one:samples=4"]


@pytest.mark.parametrize("method", EVERY)
def test_a_rank_over_the_smaller_side(method):
    match = r"model\.layers\.0\.self_attn\.v_proj.*rank 17.*16.*16 x 32"
    refused(wrap(tiny_llama(), r=17), hs.LayerError, match.replace("v_proj", "[kv]_proj"), method, data=[token_batch()])
    model = wrap(tiny_llama(), rank_pattern={"layers.1.self_attn.v_proj": 20})
    refused(model, hs.LayerError, r"model\.layers\.1\.self_attn\.v_proj.*rank 20.*16", method, data=[token_batch()])


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("method", EVERY)
def test_an_embedding(method, form):
    model = wrap(tiny_llama(), target_modules=["q_proj", "embed_tokens"])
    refused(model, hs.LayerError, r"model\.embed_tokens.*Embedding", method, data=[token_batch()], form=form)


@pytest.mark.parametrize("method", EVERY)
def test_a_convolution(method):
    refused(small("conv", "used"), hs.LayerError, r"'conv'.*Conv2d", method, data=[small_batch()])
    vit = tiny_vit()
    name = next(name for name, module in vit.named_modules() if isinstance(module, nn.Conv2d))
    refused(wrap(vit, target_modules=[name]), hs.LayerError, rf"{name}.*Conv2d", "init-ab")


@pytest.mark.parametrize("method", EVERY)
def test_a_tied_head(method):
    model = wrap(tiny_llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    refused(model, hs.LayerError, r"lm_head.*embed_tokens.*tied", method, data=[token_batch()])


def test_a_head_of_its_own_is_fine():
    report = hs.initialize_(wrap(tiny_llama(), target_modules=["lm_head"]), "pissa")
    assert [layer.name for layer in report.layers] == ["lm_head"]


@pytest.mark.parametrize("method", EVERY)
def test_a_merged_adapter(method):
    model = wrap(tiny_llama())
    model.merge_adapter()
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj.*merged.*unmerge", method, data=[token_batch()])
    model.unmerge_adapter()
    hs.initialize_(model, method, data=[token_batch()])


@pytest.mark.parametrize("method", EVERY)
def test_a_trained_adapter(method):
    model = wrap(tiny_llama())
    with torch.no_grad():
        targets_of(model)["model.layers.1.mlp.up_proj"].module.lora_B["default"].weight[0, 0] = 1e-6
    refused(model, hs.LayerError, r"model\.layers\.1\.mlp\.up_proj.*trained", method, data=[token_batch()])
    perturb(model)
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj.*trained", method, data=[token_batch()])


@pytest.mark.parametrize("start", [False, "pissa", "olora"])
def test_pefts_own_starts_that_are_not_zero(start):
    refused(wrap(tiny_llama(), init_lora_weights=start), hs.LayerError, r"q_proj.*not zero.*init_lora_weights=True")


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("first", ["lora", "orthogonal", "init-ab", "init-ab-plus", "pissa"])
@pytest.mark.parametrize("method", EVERY)
def test_an_initialised_adapter(method, first, form):
    model = started(tiny_llama(), first, form=form, target_modules=["q_proj"])
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj.*already init", method, data=[token_batch()])
    if form == "residual" and first in SUBTRACTING:
        return  # its base is spoilt; test_a_residual_base_is_not_started_from_again
    # The way out that the message gives.
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    hs.initialize_(model, method, adapter="default", data=[token_batch()])


@pytest.mark.parametrize("method", ["init-ab", "pissa", "lora-ga:samples=4"])
def test_dora_with_a_start_that_is_subtracted(method):
    model = wrap(tiny_llama(), use_dora=True)
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj.*DoRA", method, data=[token_batch()])


def test_lora_bias():
    model = wrap(tiny_llama(), lora_bias=True, target_modules=["q_proj"])
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj.*lora_bias")


@pytest.mark.parametrize("method", EVERY)
def test_no_peft_at_all(method):
    for model in (tiny_llama(), nn.Linear(4, 4)):
        refused(model, hs.LayerError, "get_peft_model", method, data=[token_batch()])


def test_another_kind_of_adapter():
    model = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    refused(model, hs.LayerError, "IA3Config")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize(
    "method", ["pissa", "milora", "olora", "inilora:steps=2", "inilora:solver=svd", "lora-one:samples=4", "lora-ga"]
)
def test_a_weight_that_is_not_finite_is_named(method, form, value):
    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight.data[3, 2] = value
    match = r"model\.layers\.1\.mlp\.up_proj.*(NaN|infinity)"
    refused(wrap(base), hs.LayerError, match, method, data=[token_batch()], form=form)


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_a_weight_that_is_not_finite_is_named_by_draws_too(form):
    """The docstring of initialize_: a LayerError for NaN or infinity in weights, whatever the method."""
    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    refused(wrap(base), hs.LayerError, r"model\.layers\.1\.mlp\.up_proj.*NaN", "init-ab", form=form)


def test_an_unknown_form():
    refused(wrap(tiny_llama()), hs.MethodError, r"form='subtracted'.*anchored.*residual", form="subtracted")


def test_an_unknown_method_or_setting():
    model = wrap(tiny_llama())
    refused(model, hs.MethodError, r"'pisa'.*'pissa'", "pisa")
    refused(model, hs.MethodError, r"'bta'.*'beta'", "init-ab:bta=3")


def test_a_class_in_place_of_a_method():
    """The likeliest slip: hs.PiSSA for hs.PiSSA()."""
    refused(wrap(tiny_llama()), hs.MethodError, "PiSSA", hs.PiSSA)


def test_an_unknown_adapter():
    refused(wrap(tiny_llama()), hs.LayerError, r"'defult'.*'default'", adapter="defult")


@pytest.mark.parametrize("method", ["lora-one", "lora-ga"])
def test_data_missing_or_empty(method):
    model = wrap(tiny_llama())
    refused(model, hs.DataError, rf"{method}.*data", method)
    refused(model, hs.DataError, "no sample", method, data=[])
    refused(model, hs.DataError, "no sample", method, data=iter(()))
    batch = token_batch()
    refused(model, hs.DataError, "no sample", method, data=[{key: value[:0] for key, value in batch.items()}])


def test_data_that_cannot_be_learned_from():
    model = wrap(tiny_llama())
    batch = token_batch()
    batch["labels"][1] = -100
    refused(model, hs.DataError, r"sample 1 ", "lora-one:samples=4", data=[batch])
    del batch["labels"]
    refused(model, hs.DataError, "labels", "lora-one:samples=4", data=[batch])


def test_several_active_adapters():
    model = wrap(tiny_llama(), target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    refused(model, hs.LayerError, r"default.*second.*adapter=")
    untouched = all_factors(model, "default")
    untouched = {name: (A.clone(), B.clone()) for name, (A, B) in untouched.items()}
    hs.initialize_(model, "init-ab", adapter="second")
    assert same(all_factors(model, "default"), untouched)
    assert all(B.any() for _, B in all_factors(model, "second").values())


def test_an_alpha_of_zero_names_the_layer():
    refused(wrap(tiny_llama(), lora_alpha=0), hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj", "pissa")


def test_lora_ga_over_half_the_side_names_the_layer():
    model = wrap(tiny_llama(), r=9)
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.[kv]_proj.*at most 8", "lora-ga", data=[token_batch()])


def test_an_odd_rank_names_the_layer():
    model = wrap(tiny_llama(), rank_pattern={"layers.1.mlp.up_proj": 5})
    refused(model, hs.LayerError, r"model\.layers\.1\.mlp\.up_proj.*even", "orthogonal")


# Layers that no gradient reaches.


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("method", ["lora-one", "lora-ga"])
def test_a_layer_without_gradient_falls_back_and_is_named(method, form):
    model = small("used", "unused")
    plain = all_factors(started_small("lora", "used", "unused"))
    report = hs.initialize_(model, f"{method}:samples=4", data=[small_batch()], form=form)
    found = all_factors(model)
    assert torch.equal(found["unused"][0], plain["unused"][0])
    assert not found["unused"][1].any()
    assert found["used"][1].any()
    (warning,) = report.warnings
    assert "unused" in warning and "no gradient" in warning
    assert "warning: unused" in str(report)
    notes = {layer.name: layer.note for layer in report.layers}
    assert notes["used"] == "" and "no gradient" in notes["unused"]
    assert model(**small_batch())["loss"].isfinite()


def started_small(method, *targets):
    model = small(*targets)
    hs.initialize_(model, method)
    return model


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("method", ["lora-one", "lora-ga"])
def test_strict_refuses_a_layer_without_gradient(method, form):
    given = dict(data=[small_batch()], form=form, strict=True)
    refused(small("used", "unused"), hs.LayerError, r"unused.*no gradient", f"{method}:samples=4", **given)
    # With gradients everywhere strict has nothing to refuse.
    report = hs.initialize_(small("used"), f"{method}:samples=4", **given)
    assert report.warnings == []


def test_strict_does_not_mind_methods_without_data():
    for method in RANDOM:
        assert hs.initialize_(small("used", "unused"), method, strict=True).warnings == []


# What outlives an adapter, and what is shared between models.


def test_a_config_can_serve_several_models():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    for _ in range(2):
        model = get_peft_model(tiny_llama(), config)
        hs.initialize_(model, "pissa")
        assert model.peft_config["default"].init_lora_weights == make_mark({"q_proj": "anchored"})
    assert config.init_lora_weights is True


def test_a_residual_base_is_not_started_from_again():
    model = started(tiny_llama(), "pissa", form="residual", target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    refused(model, hs.LayerError, "made residual by adapter 'default'", adapter="second")
    again = get_peft_model(model.unload(), LoraConfig(r=2, target_modules=["q_proj"]))
    refused(again, hs.LayerError, "load the base model again")


def test_residual_weights_beside_another_adapter_are_refused():
    model = wrap(tiny_llama(), target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    refused(model, hs.LayerError, "holds adapter 'second' as well", form="residual", adapter="default")


def test_fallbacks_warn():
    from headstart.errors import HeadstartWarning

    with pytest.warns(HeadstartWarning, match="3 samples, 9 were asked for"):
        hs.initialize_(wrap(tiny_llama()), "lora-one:samples=9", data=[token_batch(3)])


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_autocast_around_the_verb_rounds_nothing(form):
    plain = started(tiny_llama(), "olora", form=form)
    with torch.autocast("cpu", torch.bfloat16):
        cast = started(tiny_llama(), "olora", form=form)
    for (name, mine), theirs in zip(plain.named_parameters(), cast.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


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
