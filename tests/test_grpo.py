"""TRL's GRPO, started inside the trainer: policy and reference begin at the base model, and only factors train."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import headstart as hs
from conftest import logits, tiny_llama, token_batch, wrap
from headstart.layers.find import lora_layers
from test_preference import COMMON, datasets, letters, rows, tokenizer, trainer_of, trl

__all__ = ["tokenizer"]

STARTS = ["lora", "rlpo", "olora-tail", "pissa"]
PAGE = Path(__file__).parent.parent / "docs" / "training.md"
BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    if "GRPOTrainer(" in block
]


def made(words, folder, max_steps=2):
    """A trainer that wraps the model itself."""
    config = wrap(tiny_llama()).peft_config["default"]
    return trainer_of("GRPO", tiny_llama(), words, folder, max_steps=max_steps, peft_config=config)


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def of_reference(model, batch):
    """What the trainer takes the reference's log-probabilities from."""
    with model.disable_adapter():
        return logits(model, batch)


@pytest.mark.parametrize("method", STARTS)
def test_two_steps_from_the_base_model(method, tokenizer, tmp_path):
    batch, base = token_batch(), logits(tiny_llama(), token_batch())
    trainer = made(tokenizer, tmp_path)
    model = trainer.model
    assert "ref" not in model.peft_config
    hs.initialize_(model, method, progress=False)
    assert torch.equal(logits(model, batch), base)
    assert torch.equal(of_reference(model, batch), base)
    before = parameters(model)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(steps) == 2 and steps[0]["kl"] == 0 and steps[1]["kl"] > 0
    assert all(math.isfinite(step[name]) for step in steps for name in ("loss", "grad_norm", "kl", "reward"))
    assert all(step["grad_norm"] > 0 for step in steps)
    after = parameters(model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert changed == trainable and all(".lora_A." in name or ".lora_B." in name for name in changed)
    assert len(changed) == 2 * len(list(lora_layers(model, "default")))
    assert torch.equal(of_reference(model, batch), base)
    assert not torch.allclose(logits(model, batch), base, atol=1e-3)


@pytest.mark.parametrize("method", ["olora-tail", "pissa"])
def test_a_subtracted_start_changes_the_reference(method, tokenizer, tmp_path):
    """What anchors are for: the reference would be the base model less the start, and the first KL not zero."""
    batch, base = token_batch(), logits(tiny_llama(), token_batch())
    trainer = made(tokenizer, tmp_path, max_steps=1)
    hs.initialize_(trainer.model, method, form="residual", progress=False)
    assert not torch.allclose(of_reference(trainer.model, batch), base, atol=1e-3)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 1e-4


def test_the_first_step_is_the_same_from_all(tokenizer, tmp_path):
    """As all begin with the base model's logits, the same seed draws the same completions."""
    firsts = []
    for method in STARTS:
        trainer = made(tokenizer, tmp_path / method, max_steps=1)
        hs.initialize_(trainer.model, method, progress=False)
        trainer.train()
        first = trainer.state.log_history[0]
        firsts.append([first[name] for name in ("reward", "reward_std", "completions/mean_length", "entropy")])
    assert firsts == [firsts[0]] * len(STARTS)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_of_the_page_runs(block, tokenizer, tmp_path):
    settings = COMMON | dict(output_dir=str(tmp_path), max_steps=1, num_generations=2, max_completion_length=4)
    names = dict(hs=hs, base=tiny_llama(), tokenizer=tokenizer, lora=wrap(tiny_llama()).peft_config["default"])
    names |= dict(GRPOTrainer=trl.GRPOTrainer, grpo_arguments=trl.GRPOConfig(**settings, beta=0.1))
    names |= dict(prompts=datasets.Dataset.from_list(rows("GRPO")), reward=letters)
    exec(block, names)
    assert names["trainer"].state.global_step == 1
    moved = [target.module.lora_B["default"].weight for target in lora_layers(names["trainer"].model, "default")]
    assert moved and all(bool(weight.count_nonzero()) for weight in moved)


def test_the_page_has_the_code():
    assert len(BLOCKS) == 1
