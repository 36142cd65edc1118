"""Bases whose weights are elsewhere: kept by accelerate's hooks, or nowhere."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import has_offloaded_params
from peft import LoraConfig, VeraConfig, get_peft_model

import headstart as hs
from conftest import KINDS, listed_factors, logits, perturb, quick, tiny_gpt2, tiny_llama, token_batch, wrap
from headstart.errors import LayerError
from headstart.layers.anchored import start_at
from headstart.layers.find import lora_layers

METHODS = [quick(name) for name in KINDS]


def on_cpu(base, folder):
    cpu_offload(base, execution_device=torch.device("cpu"))


def on_disk(base, folder):
    disk_offload(base, folder, execution_device=torch.device("cpu"))


def by_device_map(base, folder):
    """Half of the blocks stay."""
    kept = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    places = dict.fromkeys(kept, "cpu") | {"model.layers.1": "disk"}
    dispatch_model(base, places, main_device="cpu", offload_dir=folder)


def trained(model, batch):
    """Three steps of SGD; return the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("offload", [on_cpu, on_disk, by_device_map])
@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_that_of_the_base_in_memory_and_trains_alike(method, offload, tmp_path):
    base, batch = tiny_llama(), token_batch()
    offloaded = copy.deepcopy(base)
    offload(offloaded, str(tmp_path))
    here, there = (
        wrap(base, target_modules=["q_proj", "down_proj"]),
        wrap(offloaded, target_modules=["q_proj", "down_proj"]),
    )
    reports = [hs.initialize_(model, method, data=[batch], preserve=[batch], progress=False) for model in (here, there)]
    for own, other in zip(listed_factors(there), listed_factors(here), strict=True):
        assert own.device.type == "cpu"
        assert torch.equal(own, other)
    assert [layer.norm_weight for layer in reports[1].layers] == [layer.norm_weight for layer in reports[0].layers]
    assert not reports[1].warnings
    assert trained(there, batch) == pytest.approx(trained(here, batch), rel=1e-5)
    targets = list(lora_layers(there, "default"))
    assert has_offloaded_params(targets[-1].module.get_base_layer())
    assert targets[-1].module.get_base_layer().weight.device.type == "meta"


def test_a_conv1d_that_is_elsewhere(tmp_path):
    base = tiny_gpt2()
    offloaded = copy.deepcopy(base)
    on_cpu(offloaded, tmp_path)
    here, there = (wrap(each, target_modules=["c_attn"]) for each in (base, offloaded))
    for model in (here, there):
        hs.initialize_(model, "pissa", progress=False)
    for own, other in zip(listed_factors(there), listed_factors(here), strict=True):
        assert torch.equal(own, other)


def test_a_start_that_fails_leaves_the_factors_as_they_were(monkeypatch, tmp_path):
    base = tiny_llama()
    on_cpu(base, tmp_path)
    model = wrap(base, target_modules=["q_proj"])
    before = [id(part["default"].weight) for t in lora_layers(model, "default") for part in (t.module.lora_A,)]
    calls = []

    def fails(module, adapter):
        calls.append(module)
        start_at(module, adapter)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("headstart.layers.install.start_at", fails)
    with pytest.raises(KeyboardInterrupt):
        hs.initialize_(model, "init-ab", progress=False)
    after = [id(part["default"].weight) for t in lora_layers(model, "default") for part in (t.module.lora_A,)]
    assert after == before


def test_residual_weights_are_refused_where_the_weight_is_elsewhere(tmp_path):
    base = tiny_llama()
    on_cpu(base, tmp_path)
    model = wrap(base, target_modules=["q_proj"])
    with pytest.raises(LayerError, match=r"q_proj.*accelerate keeps.*anchored"):
        hs.initialize_(model, "pissa", form="residual", progress=False)


def test_factors_that_accelerate_keeps_elsewhere_are_named(tmp_path):
    model = wrap(tiny_llama(), target_modules=["q_proj"])
    on_cpu(model, tmp_path)
    with pytest.raises(LayerError, match=r"layer 'model.layers.0.self_attn.q_proj': accelerate keeps the factors"):
        hs.initialize_(model, "lora", progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_values_is_named(method):
    with torch.device("meta"):
        base = tiny_llama()
    model = wrap(base, target_modules=["q_proj"])
    with pytest.raises(LayerError, match=r"layer 'model.layers.0.self_attn.q_proj' .*meta device.*load the model's"):
        hs.initialize_(model, method, data=[token_batch()], preserve=[token_batch()], progress=False)


def test_a_layer_whose_hook_is_on_a_module_above_it_is_named(tmp_path):
    """Such a hook fills the layer in when the module above is run, and gives no way to read it alone."""
    base = tiny_llama()
    base.model.layers[1].to("meta")
    model = wrap(base, target_modules=["q_proj"])
    with pytest.raises(LayerError, match=r"layer 'model.layers.1.self_attn.q_proj' .*meta device.*accelerate"):
        hs.initialize_(model, "lora", progress=False)


def test_vera_without_values_is_named():
    with torch.device("meta"):
        base = tiny_llama()
    model = get_peft_model(base, VeraConfig(r=4, target_modules=["q_proj"], save_projection=True))
    with pytest.raises(LayerError, match=r"layer 'model.layers.0.self_attn.q_proj' .*meta device"):
        hs.initialize_(model, "lora", progress=False)


def test_factors_that_peft_left_without_values_get_them():
    """With low_cpu_mem_usage=True PEFT makes the factors on the meta device, for a checkpoint to fill."""
    base = tiny_llama()
    plain = wrap(copy.deepcopy(base), target_modules=["q_proj"])
    empty = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]), low_cpu_mem_usage=True)
    assert all(p.device.type == "meta" for n, p in empty.named_parameters() if "lora_" in n)
    for model in (plain, empty):
        hs.initialize_(model, "pissa", progress=False)
    for own, other in zip(listed_factors(empty), listed_factors(plain), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("method", ["pissa", "lora-xs", "init-ab-plus"])
def test_a_checkpoint_is_loaded_onto_a_base_that_is_elsewhere(method, tmp_path):
    base, batch = tiny_llama(), token_batch()
    offloaded = copy.deepcopy(base)
    on_cpu(offloaded, tmp_path)
    model = wrap(base, target_modules=["q_proj"])
    hs.initialize_(model, method, progress=False)
    perturb(model)
    hs.save_checkpoint(model, tmp_path / "out")
    loaded = hs.load_checkpoint(offloaded, tmp_path / "out")
    assert torch.allclose(logits(loaded, batch), logits(model, batch), atol=1e-6)
