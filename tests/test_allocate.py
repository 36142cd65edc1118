"""Ranks that a method shares out before another one starts the layers."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel

import headstart as hs
from conftest import logits, tiny_llama, token_batch, wrap
from headstart.errors import DataError, HeadstartWarning, LayerError, MethodError
from headstart.layers.find import lora_layers

DATA = [token_batch(seed=seed) for seed in range(2)]


def ranks_of(model):
    return {layer.name: layer.r for layer in lora_layers(model, "default")}


@pytest.mark.parametrize("method", ["eva:samples=8,rho=2", "gora:samples=8"])
def test_ranks_are_those_of_the_method_itself_and_the_start_is_loras(method):
    alone = wrap(tiny_llama())
    hs.initialize_(alone, method, data=DATA)
    model = wrap(tiny_llama())
    before = logits(model, DATA[0])
    scalings = {layer.name: layer.scaling for layer in lora_layers(model, "default")}
    given = hs.allocate_ranks_(model, method, data=DATA)
    kept = {name: rank for name, rank in given.items() if rank}
    assert kept == ranks_of(model) == ranks_of(alone)
    assert len(set(given.values())) > 1
    torch.testing.assert_close(logits(model, DATA[0]), before)
    for layer in lora_layers(model, "default"):
        assert float(layer.module.lora_B["default"].weight.abs().max()) == 0
        assert float(layer.module.lora_A["default"].weight.std()) > 0
        assert layer.scaling == pytest.approx(scalings[layer.name])
    if method.startswith("eva"):
        assert sum(given.values()) == 4 * len(given)


@pytest.mark.parametrize("start", ["pissa", "init-ab", "lora-one:samples=8"])
def test_any_start_may_follow_and_is_saved_right(start, tmp_path):
    model = wrap(tiny_llama())
    given = hs.allocate_ranks_(model, "eva:samples=8", data=DATA)
    report = hs.initialize_(model, start, data=DATA)
    assert {layer.name: layer.r for layer in report.layers} == {name: rank for name, rank in given.items() if rank}
    expected = logits(model, DATA[0])
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    again = hs.load_checkpoint(tiny_llama(), tmp_path / "checkpoint")
    torch.testing.assert_close(logits(again, DATA[0]), expected, rtol=1e-4, atol=1e-5)
    hs.save_lora(model, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain, DATA[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["eva:samples=256", "eva:samples=1,rho=4", "gora:samples=256", "astra:samples=256"])
def test_what_was_not_as_asked_for_is_said_as_by_the_verb(method):
    one_token = {name: value[:1, :4] for name, value in token_batch(padded=False).items()}
    data = [one_token] if "samples=1," in method else DATA
    asked = "astra:samples=256,ranks=chosen" if method.startswith("astra") else method
    said = []
    for verb, text in ((hs.initialize_, asked), (hs.allocate_ranks_, method)):
        model = wrap(tiny_llama())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            verb(model, text, data=data, progress=False)
        said.append([str(one.message) for one in caught if one.category is HeadstartWarning])
        assert {one.filename for one in caught if one.category is HeadstartWarning} <= {__file__}
    assert said[0] and said[1] == said[0]


def test_what_shares_no_ranks_is_refused_before_data_are_read():
    def unread():
        raise AssertionError("a sample was read")
        yield

    model = wrap(tiny_llama())
    with pytest.raises(MethodError, match="method 'pissa' shares no ranks out among layers; eva does"):
        hs.allocate_ranks_(model, "pissa", data=unread())
    with pytest.raises(DataError, match="method 'eva' needs data"):
        hs.allocate_ranks_(model, "eva")
    with pytest.raises(LayerError, match="no LoRA layer"):
        hs.allocate_ranks_(tiny_llama(), "eva", data=DATA)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model = wrap(tiny_llama())
    before = ranks_of(model)
    config = model.peft_config["default"]
    monkeypatch.setattr("headstart.allocate.LoRA", None)
    with pytest.raises(TypeError):
        hs.allocate_ranks_(model, "eva:samples=8", data=DATA)
    assert ranks_of(model) == before
    assert model.peft_config["default"] is config
