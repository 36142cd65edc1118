"""The verb with the cache: looked up before it is computed, and the same to the bit."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

import headstart as hs
from conftest import factors_of, started, tiny_gpt2, tiny_llama, token_batch, wrap
from headstart.cache import open_cache
from headstart.errors import HeadstartWarning
from headstart.layers.find import lora_layers
from headstart.stream import stream_start

KEPT = [
    "pissa",
    "milora",
    "olora",
    "rlmo",
    "geora",
    "loram",
    "lora-xs",
    "inilora:solver=adam,steps=30",
    "inilora:solver=svd",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("HEADSTART_CACHE_LIMIT")
    return tmp_path / "cache"


def factors(model):
    found = {}
    for target in lora_layers(model, "default"):
        found[target.name, "A"], found[target.name, "B"] = factors_of(target.module)
        if hasattr(target.module, "lora_core"):
            found[target.name, "R"] = target.module.lora_core["default"].weight.detach().clone()
    return found


def run(base, method, folder, **settings):
    model = wrap(base)
    report = hs.initialize_(model, method, cache=folder, **settings)
    return factors(model), report


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("method", "base"), [*((method, tiny_llama) for method in KEPT), ("pissa", tiny_gpt2), ("olora", tiny_gpt2)]
)
def test_what_is_served_is_what_would_be_computed(folder, base, method):
    anew, never = run(base(), method, False)
    first, made = run(base(), method, folder)
    second, served = run(base(), method, folder)
    assert same(anew, first) and same(first, second)
    assert (never.cached, made.cached, served.cached) == (0, 0, len(served.layers))
    assert "layers from the cache" in served.summary() and "cache" not in made.summary()
    for one, other in zip(made.layers, served.layers, strict=True):
        assert one.info == other.info


def test_a_changed_weight_setting_rank_or_scaling_is_computed_anew(folder):
    run(tiny_llama(), "pissa", folder)
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    count = len(run(tiny_llama(), "milora", False)[1].layers)
    assert run(changed, "pissa", folder)[1].cached == count - 1
    for settings in ({"r": 2}, {"lora_alpha": 4}):
        model = wrap(tiny_llama(), **settings)
        assert hs.initialize_(model, "pissa", cache=folder).cached == 0
    assert run(tiny_llama(), "lora-xs", folder)[1].cached == 0
    assert run(tiny_llama(), "lora-xs:scale=input", folder)[1].cached == 0


def test_the_seed_matters_where_it_draws(folder):
    run(tiny_llama(), "inilora:solver=adam,steps=5", folder, seed=0)
    assert run(tiny_llama(), "inilora:solver=adam,steps=5", folder, seed=1)[1].cached == 0


@pytest.mark.parametrize("method", ["lora", "init-ab", "inilora-alpha"])
def test_draws_are_not_kept(folder, method):
    run(tiny_llama(), method, folder)
    assert not folder.exists()


def test_data_driven_starts_are_not_kept(folder):
    run(tiny_llama(), "lora-one:samples=4", folder, data=[token_batch()])
    assert not folder.exists()


def test_a_flipped_bit_is_found_and_reported(folder):
    first, _ = run(tiny_llama(), "pissa", folder)
    entry = open_cache(folder).entries()[0]
    content = bytearray(entry.path.read_bytes())
    content[-3] ^= 4
    entry.path.write_bytes(content)
    model = wrap(tiny_llama())
    with pytest.warns(HeadstartWarning, match="damaged"):
        report = hs.initialize_(model, "pissa", cache=folder)
    assert any("damaged" in warning for warning in report.warnings)
    assert report.cached == len(report.layers) - 1
    assert same(first, factors(model))
    assert run(tiny_llama(), "pissa", folder)[1].cached == len(report.layers)


def test_a_limit_of_zero_switches_it_off(folder, monkeypatch):
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "0")
    run(tiny_llama(), "pissa", folder)
    assert not folder.exists()


def test_the_users_folder_is_used_by_default(folder, monkeypatch):
    monkeypatch.setenv("HEADSTART_CACHE", str(folder))
    started(tiny_llama(), "pissa")
    assert not open_cache(True).entries()  # costs less than looking it up
    for count, method in enumerate(
        ("inilora:solver=adam,steps=3", "milora", "mica", "olora-tail", "rlmo", "geora"), start=1
    ):
        started(tiny_llama(), method)
        assert len(open_cache(True).entries()) == 14 * count, method


@pytest.mark.parametrize("method", KEPT)
def test_streaming_and_memory_serve_each_other(folder, method, tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    _, report = run(base, method, folder)
    count = len(report.layers)
    streamed = stream_start(tmp_path / "base", method, config, tmp_path / "one", cache=folder, progress=False)
    assert streamed.cached == count
    anew = stream_start(tmp_path / "base", method, config, tmp_path / "three", cache=False, progress=False)
    assert anew.cached == 0
    files = [(tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("one", "three")]
    assert files[0] == files[1]
