"""Embeddings leave with an adapter that needs them, as they do where PEFT saves it, and no hub is asked."""

from __future__ import annotations

import socket

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import headstart as hs
from conftest import VOCABULARY, logits, perturb, tiny_llama, wrap
from headstart.layers.unwrap import unwrapped

NEW = {"input_ids": torch.tensor([[1, VOCABULARY + 1, 2, VOCABULARY]])}


@pytest.fixture(scope="module", params=[False, True], ids=["two matrices", "tied"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama(tie_word_embeddings=request.param).save_pretrained(path)
    return path


def grown(folder, seed):
    """The base model with three more tokens, whose rows every process draws anew."""
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    return model


def keys(path):
    return set(load_file(path / "adapter_model.safetensors"))


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_resized_embeddings_leave_with_the_adapter(method, folder, tmp_path):
    model = wrap(grown(folder, 1), target_modules=["q_proj", "v_proj"])
    hs.initialize_(model, method, progress=False)
    perturb(model)
    wanted = logits(model, NEW)
    hs.save_lora(model, tmp_path / "lora")
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    loaded = PeftModel.from_pretrained(grown(folder, 2), tmp_path / "lora")
    assert (logits(loaded, NEW) - wanted).norm() <= 1e-6 * wanted.norm()
    loaded = hs.load_checkpoint(grown(folder, 3), tmp_path / "checkpoint")
    assert (logits(loaded, NEW) - wanted).norm() <= 1e-6 * wanted.norm()
    hs.save_lora(model, tmp_path / "without", save_embedding_layers=False)
    assert {key for key in keys(tmp_path / "lora") if ".lora_" not in key} == {
        f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")
    }
    assert all(".lora_" in key for key in keys(tmp_path / "without"))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], r".*\.(q_proj|lm_head)", "all-linear"])
@pytest.mark.parametrize("more", [0, 3])
def test_it_is_peft_that_decides(targets, more, folder, tmp_path):
    if "tied" in str(folder) and "lm_head" in str(targets):
        pytest.skip("PEFT itself warns of adapters on tied weights")
    base = grown(folder, 1) if more else LlamaForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "peft")
    hs.save_lora(model, tmp_path / "ours")
    assert keys(tmp_path / "ours") == keys(tmp_path / "peft")


def test_a_head_of_a_residual_layer_leaves_as_the_untouched_model_has_it(folder, tmp_path):
    base = LlamaForCausalLM.from_pretrained(folder)
    if base.config.tie_word_embeddings:
        pytest.skip("tied weights are refused")
    model = wrap(base, target_modules=["q_proj", "lm_head"])
    hs.initialize_(model, "pissa", form="residual", progress=False)
    perturb(model)
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    wanted = logits(model, batch)
    hs.save_lora(model, tmp_path / "lora")
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    assert "base_model.model.lm_head.base_layer.weight" in keys(tmp_path / "lora")
    for loaded in (
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path / "lora"),
        hs.load_checkpoint(LlamaForCausalLM.from_pretrained(folder), tmp_path / "checkpoint"),
    ):
        assert (logits(loaded, batch) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", ["someone/some-model", "smollm2", "/a/folder that is gone", ""])
def test_nothing_is_asked_of_a_hub(name, tmp_path, monkeypatch):
    """A machine without a network would hang there."""

    def dial(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", dial)
    model = wrap(tiny_llama(), target_modules=["q_proj"], base_model_name_or_path=name)
    model.peft_config["default"].base_model_name_or_path = name
    hs.save_lora(model, tmp_path / "a")
    assert all(".lora_" in key for key in keys(tmp_path / "a"))


def test_a_failed_load_puts_the_embeddings_back(folder, tmp_path, monkeypatch):
    import headstart.layers.checkpoint as checkpoint

    model = wrap(grown(folder, 1), target_modules=["q_proj"])
    hs.initialize_(model, "pissa", progress=False)
    hs.save_checkpoint(model, tmp_path / "c")
    other = grown(folder, 2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "mark_config", broken)
    with pytest.raises(KeyboardInterrupt):
        hs.load_checkpoint(other, tmp_path / "c")
    with unwrapped(other) as inside:
        assert {name: bool(torch.equal(t, before[name])) for name, t in inside.state_dict().items()} == dict.fromkeys(
            before, True
        )
