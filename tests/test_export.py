"""Leaving: what save_lora writes, read back by PEFT in a process that never imported headstart."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import headstart as hs
from conftest import ARCHITECTURES, factors_of, logits, perturb, started, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from headstart.layers.find import lora_layers


def reloaded(base, path):
    return PeftModel.from_pretrained(base, path)


@torch.no_grad()
def deltas(model):
    """Each layer's whole update s (B A - B0 A0), dense and in float64."""
    from headstart.layers.anchored import anchors

    found = {}
    for target in lora_layers(model, "default"):
        A, B = (factor.double() for factor in factors_of(target.module))
        held = anchors(target.module, "default")
        A0, B0 = (part.double() for part in held) if held else (A * 0, B * 0)
        found[target.name] = target.scaling * (B @ A - B0 @ A0)
    return found


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", ["lora", "init-ab:beta=3", "init-ab-plus", "pissa"])
def test_plain_lora_has_the_same_logits(method, use_rslora, tmp_path, batch):
    model = started(
        tiny_llama(),
        method,
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 6, "layers.1.mlp.up_proj": 2},
        alpha_pattern={"down_proj": 3, "q_proj": 5},
    )
    perturb(model)
    assert hs.save_lora(model, tmp_path / "adapter") == 0.0
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = reloaded(tiny_llama(), tmp_path / "adapter")
    expected = logits(model, batch)
    assert (logits(plain, batch) - expected).norm() <= 1e-5 * expected.norm()
    assert not any("lora_start" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    factor = 1 if method in ("lora", "init-ab-plus") else 2
    assert plain.peft_config["default"].r == 4 * factor
    for mine, theirs in zip(lora_layers(model, "default"), lora_layers(plain, "default"), strict=True):
        assert theirs.r == factor * mine.r
        assert theirs.scaling == pytest.approx(mine.scaling, rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_leaves(architecture, tmp_path):
    make, batch_of, targets = ARCHITECTURES[architecture]
    model = started(make(), "init-ab:beta=2", target_modules=targets)
    perturb(model)
    hs.save_lora(model, tmp_path / "adapter")
    expected = logits(model, batch_of())
    found = logits(reloaded(make(), tmp_path / "adapter"), batch_of())
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_residual_leaves_for_the_untouched_base(tmp_path, batch):
    model = started(tiny_llama(), "pissa", form="residual")
    perturb(model)
    hs.save_lora(model, tmp_path / "adapter")
    expected = logits(model, batch)
    found = logits(reloaded(tiny_llama(), tmp_path / "adapter"), batch)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_trained_head_goes_along(tmp_path):
    batch = ARCHITECTURES["bert"][1]()
    model = started(tiny_bert(), "pissa", target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    perturb(model)
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1.0)
    hs.save_lora(model, tmp_path / "adapter")
    expected = logits(model, batch)
    found = logits(reloaded(tiny_bert(), tmp_path / "adapter"), batch)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_truncation_is_the_best_of_its_rank(rank, tmp_path, batch):
    model = started(tiny_llama(), "init-ab:beta=2")
    perturb(model, scale=0.2)
    error = hs.save_lora(model, tmp_path / "adapter", rank=rank)
    whole = deltas(model)
    plain = deltas(reloaded(tiny_llama(), tmp_path / "adapter"))
    lost = size = best = 0.0
    for name, delta in whole.items():
        assert torch.linalg.matrix_rank(plain[name], rtol=1e-5) <= rank
        lost += float((delta - plain[name]).square().sum())
        size += float(delta.square().sum())
        best += float(torch.linalg.svdvals(delta)[rank:].square().sum())
    assert error == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert error == pytest.approx((best / size) ** 0.5, rel=1e-4)
    assert error > 0


def test_a_rank_that_is_enough_loses_nothing(tmp_path, batch):
    model = started(tiny_llama(), "init-ab:beta=2")
    perturb(model)
    assert hs.save_lora(model, tmp_path / "adapter", rank=8) == 0.0
    assert hs.save_lora(model, tmp_path / "more", rank=100) == 0.0


def test_an_unaware_process_gets_the_same_logits(tmp_path):
    model = started(tiny_gpt2(), "init-ab:beta=2", target_modules=["c_attn", "c_proj"])
    perturb(model)
    hs.save_lora(model, tmp_path / "adapter")
    tiny_gpt2().save_pretrained(tmp_path / "base")
    batch = token_batch()
    save_file({**batch, "expected": logits(model, batch)}, tmp_path / "case.safetensors")
    script = f"""
import sys
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
case = load_file({str(tmp_path / "case.safetensors")!r})
expected = case.pop("expected")
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
assert "headstart" not in sys.modules
for each in (model, model.merge_and_unload()):
    found = each(**case).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_existing_path_is_kept_unless_forced(tmp_path):
    model = started(tiny_llama())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "precious").write_text("x")
    with pytest.raises(hs.CheckpointError, match="exists"):
        hs.save_lora(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "precious").exists()
    with pytest.raises(hs.CheckpointError, match="is neither an adapter's folder nor a model's"):
        hs.save_lora(model, tmp_path / "adapter", force=True)
    assert (tmp_path / "adapter" / "precious").exists()
    (tmp_path / "adapter" / "precious").rename(tmp_path / "adapter" / "adapter_config.json")
    hs.save_lora(model, tmp_path / "adapter", force=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_others_may_read_what_the_user_lets_them_read(tmp_path):
    before = os.umask(0o027)
    try:
        hs.save_lora(started(tiny_llama()), tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in [tmp_path / "adapter", *(tmp_path / "adapter").iterdir()]
    }
    assert modes == {"adapter": "0o750", "adapter_config.json": "0o640", "adapter_model.safetensors": "0o640"}


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    import headstart.layers.export as export

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(export, "save_config", broken)
    with pytest.raises(OSError, match="disk full"):
        hs.save_lora(started(tiny_llama()), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_rank_must_be_positive(tmp_path):
    with pytest.raises(hs.CheckpointError, match="rank=0"):
        hs.save_lora(started(tiny_llama()), tmp_path / "adapter", rank=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 80))
def test_exported_ranks_and_scalings_fit_the_tensors(r, rank):
    """Over all ranks, with both scalings: what the config says is what the tensors are."""
    from headstart.layers.adapter import make_plain, split

    A, B = torch.randn(r, 90), torch.randn(95, r)
    tensors = {
        "base_model.model.layer.lora_A.weight": torch.ones_like(A),
        "base_model.model.layer.lora_B.weight": -torch.ones_like(B),
        "base_model.model.layer.lora_start_A.weight": A,
        "base_model.model.layer.lora_start_B.weight": B,
    }
    for use_rslora in (False, True):
        config = LoraConfig(r=r, lora_alpha=12, use_rslora=use_rslora)
        layers, rest = split(tensors, config)
        plain = make_plain(layers, rest, config, rank)
        again, _ = split(plain.tensors, plain.config)
        assert plain.config.r == again["layer"].A.shape[0] == min(rank, 2 * r)
        assert again["layer"].scaling == pytest.approx(layers["layer"].scaling, rel=1e-6)
