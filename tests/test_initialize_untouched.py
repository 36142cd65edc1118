"""What initialize_ leaves alone: other adapters, frozen weights, torch's generator; on failure, the whole model."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import headstart as hs
from conftest import all_factors, factors_of, logits, started, tiny_llama, token_batch, wrap
from headstart.layers import anchored
from headstart.layers.anchored import anchors
from headstart.layers.find import lora_layers, record
from headstart.layers.mark import make_mark
from snapshots import ALL, SUBTRACTING, assert_unchanged, data_for, live_form, refused, same, snapshot


@pytest.mark.parametrize("method", ALL)
def test_torchs_own_generator_is_left_alone(method):
    model = wrap(tiny_llama())
    state = torch.random.get_rng_state()
    hs.initialize_(model, method, data=data_for(method))
    assert torch.equal(torch.random.get_rng_state(), state)


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
    both_anchors = anchors(target.module, "default")
    assert (both_anchors is not None) == subtracts
    for anchor, factor in zip(both_anchors or (), factors_of(target.module), strict=False):
        assert torch.equal(anchor, factor) and anchor.data_ptr() != factor.data_ptr()


def test_a_config_can_serve_several_models():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    for _ in range(2):
        model = get_peft_model(tiny_llama(), config)
        hs.initialize_(model, "pissa")
        assert model.peft_config["default"].init_lora_weights == make_mark({"q_proj": "anchored"})
    assert config.init_lora_weights is True


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
        patch.setattr(anchored, "nn", SimpleNamespace(Parameter=parameter, ModuleDict=nn.ModuleDict, Linear=nn.Linear))
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
        start = real(self, layer)
        if layer.name != "model.layers.1.mlp.down_proj":
            return start
        B = start.B[:, :-1] if bad == "shape" else torch.full_like(start.B, float("nan"))
        return hs.Factors(start.A, B)

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
