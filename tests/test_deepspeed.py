"""DeepSpeed's ZeRO-3, the real engine, on CPUs: a start before it, and a start's folder loaded into split weights."""

from __future__ import annotations

import os

import pytest
import torch
from peft import PeftModel
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import headstart as hs
from conftest import logits, started, tiny_gpt2, tiny_llama, token_batch
from test_processes import together

pytest.importorskip("deepspeed")

FORMS = {"kept": "init-ab-plus", "anchored": "pissa", "core": "lora-xs:std=0.5"}
# Weights are split as early as Transformers does it (from_pretrained under zero.Init), or by the engine.
WAYS = ("start, engine", "split, load_checkpoint, engine", "split, from_pretrained, engine")
ZERO = {
    "train_micro_batch_size_per_gpu": 3,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
STEPS, RATE = 3, 0.5


def descent(model):
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=RATE)


def fresh_start(form):
    return started(tiny_llama(), FORMS[form], target_modules=["q_proj", "v_proj"])


def with_start(form, way, folder):
    """Return a model with its start, and what keeps Transformers splitting weights."""
    from transformers.integrations import HfDeepSpeedConfig

    if way == "start, engine":
        return fresh_start(form), None
    splitting = HfDeepSpeedConfig(ZERO)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    assert base.lm_head.weight.numel() == 0
    if "load_checkpoint" in way:
        return hs.load_checkpoint(base, folder / form), splitting
    return PeftModel.from_pretrained(base, folder / form, is_trainable=True), splitting


def in_the_engine(rank, folder):
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    losses, batch = {}, token_batch()
    for form in FORMS:
        for way in WAYS:
            model, splitting = with_start(form, way, folder)
            engine, *_ = deepspeed.initialize(model=model, optimizer=descent(model), config=ZERO)
            losses[form, way] = []
            for _ in range(STEPS):
                loss = engine(**batch).loss
                engine.backward(loss)
                engine.step()
                losses[form, way].append(loss.item())
            hs.save_lora(model, folder / f"{form}, {way}, plain")
            hs.save_checkpoint(model, folder / f"{form}, {way}, whole")
            with pytest.raises(hs.LayerError, match=r"sharded by FSDP1 or DeepSpeed.*load what headstart init wrote"):
                hs.initialize_(engine, "pissa", progress=False)
            engine.destroy()
            del splitting
    return losses


def test_a_start_before_the_engine_or_loaded_into_split_weights_trains_as_without_it(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    batch, trained, expected = token_batch(), {}, {}
    for form in FORMS:
        model = fresh_start(form)
        hs.save_checkpoint(model, tmp_path / form)
        optimizer, expected[form] = descent(model), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            expected[form].append(loss.item())
        assert expected[form][-1] < expected[form][0] - 1e-4
        trained[form] = logits(model, batch)
    for losses in together(tmp_path, in_the_engine, tmp_path):
        for (form, _), values in losses.items():
            assert values == pytest.approx(expected[form], abs=1e-5)
    for form in FORMS:
        for way in WAYS:
            plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / f"{form}, {way}, plain")
            whole = hs.load_checkpoint(tiny_llama(), tmp_path / f"{form}, {way}, whole")
            for again in (plain, whole):
                assert torch.allclose(logits(again, batch), trained[form], atol=1e-5), (form, way)


def into_split_weights(rank, folder):
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": "1", "LOCAL_RANK": str(rank)}
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed(dist_backend="gloo")
    splitting = HfDeepSpeedConfig(ZERO)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    with pytest.raises(hs.LayerError, match="residual weights have to be made before that"):
        hs.load_checkpoint(base, folder / "residual")
    # Shapes and weights are compared with what is split, whichever way round the layer holds them.
    hs.load_checkpoint(GPT2LMHeadModel.from_pretrained(folder / "gpt2"), folder / "start")
    other = GPT2LMHeadModel.from_pretrained(folder / "other")
    with pytest.raises(hs.CheckpointError, match="belongs to another base model"):
        hs.load_checkpoint(other, folder / "start")
    del splitting
    return True


def test_a_folder_is_compared_with_split_weights_and_a_residual_one_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = started(tiny_llama(), "pissa", form="residual", target_modules=["q_proj"])
    hs.save_checkpoint(model, tmp_path / "residual")
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    hs.save_checkpoint(started(tiny_gpt2(), "pissa", target_modules=["c_attn"]), tmp_path / "start")
    other = tiny_gpt2()
    with torch.no_grad():
        other.transformer.h[0].attn.c_attn.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    assert all(together(tmp_path, into_split_weights, tmp_path, count=1))
