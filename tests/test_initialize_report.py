"""The report of initialize_ against dense norms, as text and as JSON; its warnings; what progress is told."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig

import headstart as hs
from conftest import factors_of, tiny_llama, token_batch, wrap
from headstart.errors import HeadstartWarning
from snapshots import ALL, data_for, dense_weight, live_form, targets_of


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
        A, B = (factor.double() for factor in factors_of(targets[layer.name].module))
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
        assert layer.note == ""
        if "error" in layer.info:
            assert layer.info["error"] == pytest.approx(float((W / 3 - B @ A).square().sum()), rel=1e-5)
    assert report.form == live_form(method, form) and report.adapter == "default" and report.seed == 3
    assert report.seconds == pytest.approx(sum(report.seconds_by_step.values()))
    assert 0 < sum(layer.seconds for layer in report.layers) <= report.seconds_by_step["solve"] * 1.01
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
    report = hs.initialize_(model, "inilora:solver=adam,steps=20")
    ratios = []
    for layer, target in zip(report.layers, targets_of(model).values(), strict=True):
        A, B = (factor.double() for factor in factors_of(target.module))
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


@pytest.mark.parametrize(("method", "asked"), [("lora-one:samples=9", 9), ("lora-da", 256)])
def test_too_few_samples_are_a_warning(method, asked):
    sentence = f"the data held 3 samples, {asked} were asked for"
    with pytest.warns(HeadstartWarning, match=sentence):
        report = hs.initialize_(wrap(tiny_llama(), target_modules=["q_proj"]), method, data=[token_batch(3)])
    assert report.samples == 3
    assert report.warnings == [sentence]
    assert f"warning: {sentence}" in str(report)


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
    assert sum(p.numel() for p in third.parameters() if p.requires_grad) == 2 * (2 * 32 + 16 * 2)


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
