"""LoRA-DA through the verb: against autograd, one sample at a time, and what becomes of the model and its report."""

from __future__ import annotations

import copy
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

import headstart as hs
from conftest import ARCHITECTURES, all_factors, logits, perturb, started, tiny_llama, token_batch, wrap
from fisher import check, eye, linear, published
from headstart.errors import HeadstartWarning
from headstart.layers.anchored import anchors
from headstart.layers.find import lora_layers
from oracles import exact_factors, exact_gradients, relative
from snapshots import small, small_batch


def whole(G, Z, Y, *, N, damping, variance=0.03):
    """As `dense`, for layers of which the Fisher matrix is too large: by METHODS' formulas, tested above."""
    Zi = torch.linalg.inv(Z + damping * eye(len(Z)))
    Yi = torch.linalg.inv((Y.diag() if Y.dim() == 1 else Y) + damping * eye(len(Y)))
    delta = -Yi @ G @ Zi
    sigma = float(torch.linalg.matrix_norm(delta, 2))
    parts = variance * Yi.trace() / N * Zi / sigma**2, delta.T @ delta / sigma**2
    norm = max(float(torch.linalg.matrix_norm(part, 2)) for part in parts)
    omega = parts[0] - parts[1]
    return SimpleNamespace(delta=delta / sigma, omega=(omega + omega.T) / 2, sigma=sigma, norm=norm)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [(architecture, {}) for architecture in ARCHITECTURES]
    + [("llama", dict(fisher="full")), ("t5", dict(fisher="full")), ("llama", dict(variance=30.0))],
)
def test_the_verb_against_autograd(architecture, options):
    """Damped enough that the statistics' float32 does not show."""
    make, batch_of, targets = ARCHITECTURES[architecture]
    base = make()
    batches = [batch_of(seed=1), batch_of(seed=2)]
    model = wrap(copy.deepcopy(base), target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadstartWarning)
        report = hs.initialize_(model, published(samples=8, damping=1e-2, **options), data=batches)
    factors = all_factors(model)
    truth = exact_factors(base, batches, list(factors))
    for layer in report.layers:
        A, B = factors[layer.name]
        t = truth[layer.name]
        Y = t.Y if options.get("fisher") == "full" else t.Y.diagonal()
        expected = whole(t.gradient, t.Z, Y, N=8, damping=1e-2, variance=options.get("variance", 0.03))
        assert layer.repair == "" and layer.note == ""
        made = SimpleNamespace(A=A, B=B, info=layer.info, core=None, note="")
        check(made, expected, 4, loose=3e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tokens_with_a_label(architecture):
    make, batch_of, targets = ARCHITECTURES[architecture]
    base, batches = make(), [batch_of(seed=1)]
    model = wrap(copy.deepcopy(base), target_modules=targets)
    report = hs.initialize_(model, published(samples=4, damping=1e-2, tokens="labels"), data=batches)
    factors = all_factors(model)
    truth = exact_factors(base, batches, list(factors), tokens="labels")
    for layer in report.layers:
        A, B = factors[layer.name]
        t = truth[layer.name]
        expected = whole(t.gradient, t.Z, t.Y.diagonal(), N=4, damping=1e-2)
        check(SimpleNamespace(A=A, B=B, info=layer.info, core=None, note=""), expected, 4, loose=3e-5)


@pytest.mark.parametrize("budget", [None, "20KB"])
def test_the_gradients_subspace_without_fisher_information(budget):
    base, data = tiny_llama(), [token_batch()]
    truth = exact_gradients(base, data, [name for name, _ in linear(base) if name != "lm_head"])
    model = wrap(tiny_llama())
    method = published(samples=4, variance=0, fisher="none")
    report = hs.initialize_(model, method, data=data, memory_budget=budget)
    assert report.warnings == []
    factors = all_factors(model)
    assert factors.keys() == truth.keys()
    for name, (A, B) in factors.items():
        G, A = truth[name], 32 * A.double()
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        assert float((G @ A.T).square().sum()) == pytest.approx(float(S[:4].square().sum()), rel=1e-5)
        assert relative(32 * B.double() @ A, -(U[:, :4] * S[:4] / S[0]) @ Vh[:4]) < 1e-4


INFO = {"objective", "objective_error", "steps", "dense", "condition", "damping", "damping_outputs", "sigma"}
INFO |= {"variance_share", "noise", "rank_inputs", "energy_inputs", "in_rounding", "in_noise"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_verb_with_published_settings(architecture):
    make, batch_of, targets = ARCHITECTURES[architecture]
    model = wrap(make(), target_modules=targets)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadstartWarning)
        report = hs.initialize_(model, published(samples=4), data=[batch_of()])
    assert report.method == str(published(samples=4))
    assert report.samples == 4
    assert [layer.name for layer in report.layers] == [target.name for target in lora_layers(model, "default")]
    for layer in report.layers:
        assert set(layer.info) == INFO
        assert all(isinstance(v, int | float) and math.isfinite(v) for v in layer.info.values())
        assert layer.info["objective_error"] <= 1e-6
        # The rows of A are orthonormal over 32.
        assert layer.norm_A == pytest.approx(2 / 32, rel=1e-5)
        assert 0 < layer.norm_B <= (1 + 1e-5) * 2 / 32
        assert layer.info["damping_outputs"] == 1e-6
        assert (layer.repair != "") == (layer.info["damping"] > 1e-6)
    repaired = [layer.name for layer in report.layers if layer.repair]
    assert all(any(name in sentence for sentence in report.repairs()) for name in repaired)
    assert bool(repaired) == bool(report.repairs()) == ("repaired: " in str(report))
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["info"].keys() == INFO
    # The start is W + s B A: W untouched, nothing subtracted.
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name]), name
    assert all(anchors(target.module, target.adapter) is None for target in lora_layers(model, "default"))


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_the_start_is_beside_the_base_model(form):
    base, batch = tiny_llama(), token_batch()
    model = wrap(copy.deepcopy(base), lora_alpha=16, use_rslora=True)
    hs.initialize_(model, "lora-da:samples=4,gamma=16", data=[batch], form=form)
    moved = copy.deepcopy(base)
    s = 16 / math.sqrt(4)
    with torch.no_grad():
        for name, (A, B) in all_factors(model).items():
            moved.get_submodule(name).weight.add_(s * B @ A)
    assert torch.allclose(logits(model, batch), logits(moved, batch), atol=1e-5)
    assert float((logits(model, batch) - logits(base, batch)).norm()) > 1e-2


def test_the_start_is_downhill():
    """Delta is a preconditioned descent direction: tr(G' Delta) < 0, and of its projection as well."""
    base, batch = tiny_llama(), token_batch(padded=False)
    gradients = exact_gradients(base, [batch], [n for n, _ in linear(base) if n != "lm_head"])
    for options in ({}, dict(bias=0), dict(fisher="none", variance=0)):
        model = wrap(copy.deepcopy(base))
        hs.initialize_(model, published(samples=4, damping=1e-2, **options), data=[batch])
        factors = all_factors(model)
        assert sum(float((gradients[name] * (B.double() @ A.double())).sum()) for name, (A, B) in factors.items()) < 0


@pytest.mark.parametrize("options", ["", ",fisher=full"])
def test_the_optimum_has_no_seed(options):
    one, two = (
        all_factors(started(tiny_llama(), f"lora-da:samples=4{options}", seed=seed, data=[token_batch()]))
        for seed in (3, 4)
    )
    for name, (A, B) in one.items():
        assert relative(two[name][1] @ two[name][0], B @ A) < 1e-4, name


def test_the_population_of_the_verb():
    def started(method, **given):
        model = wrap(tiny_llama(), target_modules=["q_proj", "down_proj"])
        report = hs.initialize_(model, method, **(dict(data=[token_batch(), token_batch(seed=1)]) | given))
        return [layer.info["objective"] for layer in report.layers]

    four = dict(samples=4)
    # The length of the data, not what was read of them.
    assert started(published(**four)) == started(published(**four, population=8))
    batches = [token_batch(), token_batch(seed=1)]
    known = hs.TrainingData(batches, training=hs.Training(population=1000))
    assert started(published(**four), data=known) == started(published(**four, population=1000))
    # The setting goes before what the data tell.
    assert started(published(**four, population=8), data=known) == started(published(**four))
    # What has no length: the samples.
    assert started(published(**four), data=iter([token_batch()])) == started(published(**four, population=4))
    assert started(published(**four)) != started(published(**four), data=known)


def test_repairs_are_reported_once_for_many_layers():
    """Four samples of one token see four of eight directions; without damping that can't be inverted."""
    report = hs.initialize_(small("used"), published(samples=4, damping=0), data=[small_batch()], strict=True)
    assert len(report.repairs()) == 1
    assert report.repairs()[0].startswith("used: damping of inputs to ")
    assert report.warnings == []
    assert "repaired: used" in str(report)
    assert report.layers[0].info["damping"] > 0
    enough = hs.initialize_(small("used"), published(samples=24, damping=1e-6), data=[small_batch(24)])
    assert enough.repairs() == [] and enough.layers[0].info["damping"] == 1e-6


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_saved_and_read_by_plain_peft(tmp_path, form):
    base, batch = tiny_llama(), token_batch()
    model = wrap(copy.deepcopy(base))
    hs.initialize_(model, "lora-da:samples=4,gamma=16", data=[batch], form=form)
    perturb(model)
    expected = logits(model, batch)
    assert hs.save_lora(model, tmp_path / "adapter") == 0.0
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    # Rank as it was: nothing had to be subtracted.
    assert again.peft_config["default"].r == 4
    assert torch.allclose(logits(again, batch), expected, atol=1e-6)
    again = again.merge_and_unload()
    assert torch.allclose(logits(again, batch), expected, atol=1e-5)


def test_half_precision_models_and_other_ranks():
    model = wrap(tiny_llama(), rank_pattern={"down_proj": 7}).to(torch.bfloat16)
    report = hs.initialize_(model, "lora-da:samples=4", data=[token_batch()])
    for layer in report.layers:
        A, B = all_factors(model)[layer.name]
        assert bool(torch.isfinite(A).all() and torch.isfinite(B).all())
        assert layer.r == (7 if "down_proj" in layer.name else 4)
