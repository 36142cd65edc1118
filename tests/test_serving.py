"""What is written is laid out as the programs that serve adapters read it.

The readers below are the facts of two of them, in a few lines each: vLLM (vllm/lora/peft_helper.py, lora_weights.py and
utils.py, vllm/config/lora.py) and llama.cpp (convert_lora_to_gguf.py, src/llama-adapter.h). Each returns the update of
every layer as that program would compute it, and fails where that program would.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import headstart as hs
from conftest import logits, perturb, started, tiny_bert, tiny_llama, token_batch, wrap
from headstart.cli import main
from headstart.layers.core import core_of
from headstart.layers.find import lora_layers

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class RefusedError(Exception):
    """What the program would say."""


def files(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def vllm_updates(folder, max_lora_rank):
    """Read as vLLM does: one rank and one scaling for all layers, those of the config."""
    config, tensors = files(folder)
    assert max_lora_rank in VLLM_RANKS
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    if config["r"] > max_lora_rank:
        raise RefusedError(f"LoRA rank {config['r']} is greater than max_lora_rank {max_lora_rank}")
    for field, plain in (("modules_to_save", None), ("use_dora", False), ("bias", "none")):
        if (config.get(field) or plain) != plain:
            raise RefusedError(field)
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    slots = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[:2] != ["base_model", "model"] or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise RefusedError(f"{name} is unsupported LoRA weight")
        # Each goes into a buffer of the largest rank; what is over the adapter's own stays zero.
        rows, columns = tensor.shape
        shape = (max_lora_rank, columns) if parts[-2] == "lora_A" else (rows, max_lora_rank)
        buffer = torch.zeros(shape, dtype=torch.float64)
        buffer[:rows, :columns] = tensor
        slots.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = buffer
    return {name: scaling * pair["lora_B"] @ pair["lora_A"] for name, pair in slots.items()}


def llama_cpp_updates(folder):
    """Read as llama.cpp's converter and its loader do: alpha of the config over the rank of each tensor."""
    config, tensors = files(folder)
    pairs = {}
    for name, tensor in tensors.items():
        base = name.replace("base_model.model.", "")
        for role in ("lora_A", "lora_B"):
            if f".{role}.weight" in name:
                pairs.setdefault(base.replace(f".{role}.weight", ""), {})[role] = tensor.double()
                break
        else:
            if "_layernorm" not in name and ".norm" not in name:
                raise RefusedError(f"Unexpected name '{name}': Not a lora_A or lora_B tensor")
    alpha = float(config["lora_alpha"])
    assert alpha != 0  # which it takes for "no scaling"
    return {name: alpha / pair["lora_B"].shape[1] * pair["lora_B"] @ pair["lora_A"] for name, pair in pairs.items()}


def peft_updates(folder, make=tiny_llama):
    """Read as PEFT does, which is what the adapter means."""
    plain = PeftModel.from_pretrained(make(), folder)
    return {
        target.name: target.module.get_delta_weight("default").detach().double()
        for target in lora_layers(plain, "default")
    }


def agree(found, expected):
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert update.norm() > 0
        assert (found[name] - update).norm() <= 1e-5 * update.norm(), name


@torch.no_grad()
def trained(method, make=tiny_llama, **changes):
    model = started(make(), method, **changes)
    perturb(model, scale=0.05)
    for target in lora_layers(model, "default"):
        R = core_of(target.module, "default")
        if R is not None:
            R.add_(0.5 * torch.randn(R.shape, generator=torch.Generator().manual_seed(7)))
    return model


FORMS = {"pissa": 2, "lora-xs:std=0.5": 1, "init-ab-plus": 1, "lora": 1}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", FORMS)
def test_every_form_is_read_alike_by_all(method, use_rslora, tmp_path, batch):
    model = trained(method, use_rslora=use_rslora)
    hs.save_lora(model, tmp_path / "a")
    config, tensors = files(tmp_path / "a")
    assert config["r"] == 4 * FORMS[method]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert config["lora_alpha"] / config["r"] == pytest.approx(8 / 2 if use_rslora else 8 / 4)
    assert {tensor.shape[".lora_B." in name] for name, tensor in tensors.items()} == {config["r"]}
    expected = peft_updates(tmp_path / "a")
    assert len(expected) == 14
    agree(vllm_updates(tmp_path / "a", 8), expected)
    agree(llama_cpp_updates(tmp_path / "a"), expected)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    wanted = logits(model, batch)
    assert (logits(plain, batch) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_engine_that_stops_at_r_takes_the_truncated_one(use_rslora, tmp_path):
    model = trained("pissa", r=8, use_rslora=use_rslora)
    hs.save_lora(model, tmp_path / "exact")
    with pytest.raises(RefusedError, match="LoRA rank 16 is greater than max_lora_rank 8"):
        vllm_updates(tmp_path / "exact", 8)
    assert 0 < hs.save_lora(model, tmp_path / "cut", rank=8) < 1
    expected = peft_updates(tmp_path / "cut")
    agree(vllm_updates(tmp_path / "cut", 8), expected)
    agree(llama_cpp_updates(tmp_path / "cut"), expected)


PATTERNS = {"rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"down_proj": 3, "q_proj": 5}}


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", FORMS)
def test_patterns_are_dissolved_for_engines(method, use_rslora, rank, tmp_path):
    model = trained(method, use_rslora=use_rslora, **PATTERNS)
    error = hs.save_lora(model, tmp_path / "patterns", rank=rank)
    assert hs.save_lora(model, tmp_path / "uniform", rank=rank, uniform=True) == error
    expected = peft_updates(tmp_path / "patterns")
    config, tensors = files(tmp_path / "uniform")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] == (5 if rank else 6 * FORMS[method])
    assert {tensor.shape[".lora_B." in name] for name, tensor in tensors.items()} == {config["r"]}
    agree(peft_updates(tmp_path / "uniform"), expected)
    agree(vllm_updates(tmp_path / "uniform", 16), expected)
    agree(llama_cpp_updates(tmp_path / "uniform"), expected)
    # And it matters: read with the patterns, both would compute something else.
    for misread in (vllm_updates(tmp_path / "patterns", 16), llama_cpp_updates(tmp_path / "patterns")):
        assert any((misread[name] - expected[name]).norm() > 0.1 * expected[name].norm() for name in expected)


def test_a_pattern_that_covers_every_layer_is_dissolved_too(tmp_path):
    model = trained("pissa", target_modules=["q_proj"], rank_pattern={"q_proj": 6}, alpha_pattern={"q_proj": 5})
    hs.save_lora(model, tmp_path / "a", uniform=True)
    config, _ = files(tmp_path / "a")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (12, 10, {}, {})
    agree(vllm_updates(tmp_path / "a", 16), peft_updates(tmp_path / "a"))


def test_the_command_line_dissolves_patterns(tmp_path, capsys):
    model = trained("pissa", **PATTERNS)
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    arguments = ["export", str(tmp_path / "checkpoint"), "--uniform", "--out"]
    main([*arguments, str(tmp_path / "a")])
    agree(vllm_updates(tmp_path / "a", 16), peft_updates(tmp_path / "a"))
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "b"), "--to", "merged"])
    assert "--uniform does not go with --to merged" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_head_that_trains_beside_is_for_peft_alone(tmp_path):
    model = started(tiny_bert(), "pissa", target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    hs.save_lora(model, tmp_path / "a")
    with pytest.raises(RefusedError, match="modules_to_save"):
        vllm_updates(tmp_path / "a", 8)
    with pytest.raises(RefusedError, match="Not a lora_A or lora_B"):
        llama_cpp_updates(tmp_path / "a")


@pytest.mark.parametrize("method", FORMS)
def test_merging_needs_no_engine_that_knows_adapters(method, tmp_path, batch):
    from transformers import AutoModelForCausalLM

    model = trained(method)
    expected = logits(model, batch)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), batch)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))


def test_the_base_is_named(tmp_path):
    base = tiny_llama()
    base.name_or_path = base.config._name_or_path = "somebody/tiny"
    model = wrap(base)
    hs.initialize_(model, "pissa", progress=False)
    hs.save_lora(model, tmp_path / "a")
    assert files(tmp_path / "a")[0]["base_model_name_or_path"] == "somebody/tiny"
    assert logits(model, token_batch()).isfinite().all()
