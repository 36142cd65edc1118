"""LoftQ on quantised bases: what quantisation took away is given back, as far as a rank can."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file, save_file

import headstart as hs
from conftest import tiny_gpt2, tiny_llama, token_batch, wrap
from headstart.errors import CheckpointError, HeadstartError, LayerError, ModelError
from headstart.layers.find import lora_layers
from headstart.methods.base import Layer
from inputs import normal, product
from oracles import relative, tail
from test_quantised import BITS, WIDE, folder, quantised

bitsandbytes = pytest.importorskip("bitsandbytes")

__all__ = ["folder"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    tiny_llama(**WIDE).save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def dequantised(base):
    """By bitsandbytes' own functions: (d_out, d_in)."""
    weight = base.weight
    if type(weight).__name__ == "Params4bit":
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB).double()


def rounded(W, steps=9):
    """A stand-in for quantisation: to a grid of each row's largest entry."""
    grid = W.abs().amax(1, keepdim=True) / steps
    return (W / grid).round() * grid


# The factors.


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(2, 24),
    d_in=st.integers(2, 24),
    s=st.floats(0.05, 50),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_what_is_left_is_the_least_that_a_rank_can_leave(d_out, d_in, s, size, seed, data):
    r = data.draw(st.integers(1, min(d_out, d_in)))
    W = size * normal(d_out, d_in, seed=seed).float()
    Q = rounded(W)
    start = hs.LoftQ().factors(Layer("layer", d_out, d_in, r, s, quantised="4-bit", weight=Q, original=W))
    E = W.double() - Q.double()
    left, before = float((E - product(start, s)).square().sum()), float(E.square().sum())
    assert left == pytest.approx(tail(E, r), rel=1e-4, abs=1e-8 * before) and left <= before * (1 + 1e-6)
    assert start.info["error"] == pytest.approx(tail(E, r), rel=1e-3, abs=1e-6 * before)
    assert start.info["error_quantised"] == pytest.approx(before, rel=1e-4)
    S = torch.linalg.svdvals(E)[:r]
    for gram in (start.A @ start.A.T, start.B.T @ start.B):
        assert torch.allclose(gram.double(), torch.diag(S / s), rtol=1e-3, atol=1e-4 * float(S[0]) / s)


@pytest.mark.parametrize("s", [1.0, 2.0])
def test_the_product_is_pefts_at_a_scaling_of_1_and_leaves_out_none_at_others(s):
    """PEFT's decomposition knows of no scaling: its layer adds s times what it should."""
    W = normal(20, 16).float()
    Q = rounded(W)
    start = hs.LoftQ().factors(Layer("layer", 20, 16, 4, s, quantised="4-bit", weight=Q, original=W))
    found = _low_rank_decomposition(W - Q, reduced_rank=4)
    pefts = s * found["L"] @ found["R"]
    assert relative(s * product(start), pefts) == pytest.approx(1 - 1 / s, abs=1e-4)
    E = (W - Q).double()
    assert float((E - product(start, s)).norm()) <= float((E - pefts).norm()) + 1e-6


def test_a_quantisation_without_error_leaves_nothing_to_give_back():
    """Two zero factors would never train: the layer starts as 'lora' does."""
    W = normal(8, 6).float()
    start = hs.LoftQ().factors(Layer("layer", 8, 6, 2, 1.0, quantised="8-bit", weight=W, original=W))
    assert float(start.B.abs().max()) == 0 < float(start.A.abs().max())
    assert "starts as 'lora' does" in start.note


# On bitsandbytes' layers.


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("where", ["folder", "shards", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_comes_as_near_to_its_unquantised_weight_as_can_be(folder, shards, bits, where, dtype):
    model = wrap(quantised(folder, bits, dtype))
    path = {"folder": None, "shards": str(shards), "file": str(folder / "model.safetensors")}[where]
    report = hs.initialize_(model, hs.LoftQ(model_path=path))
    stored = load_file(folder / "model.safetensors")
    assert report.form == "kept" and not report.warnings
    for target in lora_layers(model, "default"):
        base = target.module.get_base_layer()
        E = stored[f"{target.name}.weight"].double() - dequantised(base)
        A, B = (part["default"].weight.detach().double() for part in (target.module.lora_A, target.module.lora_B))
        left = float((E - target.scaling * B @ A).square().sum())
        assert left == pytest.approx(tail(E, target.r), rel=1e-3), target.name
        assert left < 0.9 * float(E.square().sum())


@pytest.mark.parametrize("dora", [False, True])
def test_the_model_comes_nearer_to_the_unquantised_one(folder, dora):
    """In training mode, in which bitsandbytes computes what has a gradient; there is no dropout."""
    batch = token_batch()
    exact, base = tiny_llama(**WIDE).train()(**batch).logits.detach(), quantised(folder).train()
    before = float((base(**batch).logits.detach() - exact).norm())
    model = wrap(base, r=32, use_dora=dora).train()
    hs.initialize_(model, "loftq")
    after = float((model(**batch).logits.detach() - exact).norm())
    assert after < 0.5 * before
    model(**batch).loss.backward()


def test_weights_that_conv1d_stores_turned_are_turned(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    base = quantised(tmp_path)
    model = wrap(base, target_modules=["c_attn", "c_fc", "c_proj"])
    report = hs.initialize_(model, "loftq")
    stored = load_file(tmp_path / "model.safetensors")
    for line, target in zip(report.layers, lora_layers(model, "default"), strict=True):
        E = stored[f"{target.name}.weight"].double().T - target.weight().double()
        # Turned the wrong way, square weights would be off by more than they are large.
        assert float(E.norm()) < 0.5 * line.norm_weight
        A, B = (part["default"].weight.detach().double() for part in (target.module.lora_A, target.module.lora_B))
        left = float((E - target.scaling * B @ A).square().sum())
        assert left == pytest.approx(tail(E, target.r), rel=1e-3), target.name


@pytest.mark.parametrize("rename", ["inner", "outer"])
def test_a_checkpoint_of_the_model_inside_or_around_will_do(folder, tmp_path, rename):
    """As where the base of a causal model was saved by itself, or all of it inside another."""
    stored = load_file(folder / "model.safetensors")
    change = {"inner": lambda name: name.removeprefix("model."), "outer": lambda name: f"whole.{name}"}[rename]
    save_file({change(name): tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    model, twin = wrap(quantised(folder)), wrap(quantised(folder))
    hs.initialize_(model, hs.LoftQ(model_path=str(tmp_path)))
    hs.initialize_(twin, "loftq")
    for one, other in zip(lora_layers(model, "default"), lora_layers(twin, "default"), strict=True):
        assert torch.equal(one.module.lora_A["default"].weight, other.module.lora_A["default"].weight)


def test_a_model_of_the_hub_is_read_where_it_was_downloaded(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = wrap(quantised(folder))
    hs.initialize_(model, "loftq:model_path=someone/tiny")
    assert all(bool(target.module.lora_B["default"].weight.count_nonzero()) for target in lora_layers(model, "default"))
    with pytest.raises(ModelError, match="no downloaded model of that name: set model_path"):
        hs.initialize_(wrap(quantised(folder)), "loftq:model_path=someone/else")


# What is refused, before anything is changed.


def refused(model, method="loftq"):
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(HeadstartError) as caught:
        hs.initialize_(model, method)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return caught.value


def test_a_base_that_is_not_quantised_is_refused():
    error = refused(wrap(tiny_llama()))
    assert isinstance(error, LayerError) and "is not quantised" in str(error) and "BitsAndBytesConfig" in str(error)


@pytest.mark.parametrize("path", ["/no/such/folder", "no such name!"])
def test_a_path_to_nothing_is_refused(folder, path):
    error = refused(wrap(quantised(folder)), hs.LoftQ(model_path=path))
    assert isinstance(error, ModelError) and path in str(error) and "set model_path" in str(error)


def test_a_model_of_unknown_origin_is_refused(folder):
    base = quantised(folder)
    base.config._name_or_path = ""
    error = refused(wrap(base))
    assert isinstance(error, ModelError) and "does not say where it came from" in str(error)


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    error = refused(wrap(quantised(folder)), hs.LoftQ(model_path=str(tmp_path)))
    assert isinstance(error, ModelError) and "has neither model.safetensors nor" in str(error)


def test_files_that_hold_quantised_weights_are_refused(folder, tmp_path):
    base = quantised(folder)
    base.save_pretrained(tmp_path)
    error = refused(wrap(base), hs.LoftQ(model_path=str(tmp_path)))
    assert isinstance(error, LayerError) and "is no unquantised weight of 64 x 64" in str(error) and "U8" in str(error)


def test_a_missing_tensor_names_its_layer(folder, tmp_path):
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.self_attn.k_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    error = refused(wrap(quantised(folder)), hs.LoftQ(model_path=str(tmp_path)))
    assert isinstance(error, LayerError) and str(error).startswith("layer 'model.layers.1.self_attn.k_proj'")


@pytest.mark.parametrize("damage", ["truncated", "missing", "index"])
def test_damaged_files_are_named(folder, shards, tmp_path, damage):
    shutil.copytree(shards, tmp_path / "base")
    first = sorted((tmp_path / "base").glob("*.safetensors"))[0]
    index = tmp_path / "base" / "model.safetensors.index.json"
    name = first.name
    if damage == "missing":
        first.unlink()
    elif damage == "truncated":
        first.write_bytes(first.read_bytes()[:-100])
    else:
        index.write_text(json.dumps({"weight_map": ["no", "map"]}))
        name = index.name
    error = refused(wrap(quantised(folder)), hs.LoftQ(model_path=str(tmp_path / "base")))
    assert isinstance(error, CheckpointError) and name in str(error)


def test_another_models_weights_are_refused(folder, tmp_path):
    torch.manual_seed(7)
    stored = load_file(folder / "model.safetensors")
    save_file(
        {name: torch.randn_like(tensor) * 0.02 for name, tensor in stored.items()}, tmp_path / "model.safetensors"
    )
    error = refused(wrap(quantised(folder)), hs.LoftQ(model_path=str(tmp_path)))
    assert isinstance(error, LayerError) and "it is another model's" in str(error)


def test_files_with_infinities_are_refused(folder, tmp_path):
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = math.inf
    save_file(stored, tmp_path / "model.safetensors")
    error = refused(wrap(quantised(folder)), hs.LoftQ(model_path=str(tmp_path)))
    assert isinstance(error, LayerError) and "'model.layers.1.mlp.up_proj': its weight has NaN or infinity" in str(
        error
    )


def test_the_cache_keeps_no_start_that_rests_on_files(folder, tmp_path):
    report = hs.initialize_(wrap(quantised(folder)), "loftq", cache=str(tmp_path / "cache"))
    again = hs.initialize_(wrap(quantised(folder)), "loftq", cache=str(tmp_path / "cache"))
    assert report.cached == again.cached == 0
    assert math.isfinite(again.layers[0].info["error"])
