"""The examples of docs/training.md that start from a trainer's data or with a loss of one's own: each is run."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification, Trainer

import headstart as hs
from conftest import tiny_llama, tiny_unet, token_batch
from test_trainer_data import arguments, padded, rows
from test_trainer_data_trl import BAD, GOOD, PROMPTS, settings, tokenizer, trl

__all__ = ["tokenizer"]

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    if "report = hs.initialize_" in block
]


def pictures():
    diffusers = pytest.importorskip("diffusers")
    unet = tiny_unet()
    batch = dict(latents=torch.randn(8, 4, 8, 8), prompt=torch.randn(8, 5, 16))
    return dict(unet=unet, scheduler=diffusers.DDPMScheduler(), pictures=[batch])


def names_for(block, tmp_path, words):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    names = dict(hs=hs, torch=torch, get_peft_model=get_peft_model, LoraConfig=LoraConfig, Trainer=Trainer, lora=lora)
    names |= dict(base=tiny_llama(), tokenizer=words, collator=padded, rows=rows())
    names |= dict(arguments=arguments(tmp_path, max_steps=1))
    given = settings(tmp_path) | dict(max_steps=1, max_length=32)
    for name in ("SFT", "DPO", "Reward"):
        names[f"{name}Trainer"] = getattr(trl, f"{name}Trainer")
        names[f"{name.lower()}_arguments"] = getattr(trl, f"{name}Config")(**given)
    texts = [{"prompt": p, "completion": g} for p, g in zip(PROMPTS, GOOD, strict=True)]
    pairs = [{"prompt": p, "chosen": g, "rejected": b} for p, g, b in zip(PROMPTS, GOOD, BAD, strict=True)]
    names |= dict(texts=Dataset.from_list(texts), pairs=Dataset.from_list(pairs))
    teacher = tiny_llama().requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = {key: value for key, value in token_batch().items() if key != "labels"}
    names |= dict(teacher=teacher, batches=[batch, batch])
    if "judge" in block:
        names["lora"] = copy.replace(lora) if hasattr(copy, "replace") else copy.copy(lora)
        names["lora"].task_type = "SEQ_CLS"
        names["judge"] = LlamaForSequenceClassification(tiny_llama(num_labels=1, pad_token_id=0).config)
    return names | (pictures() if "unet" in block else {})


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_of_the_page_runs(block, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = names_for(block, tmp_path, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(block, names)
    report = names["report"]
    assert report.samples == 8
    assert not any("no gradient" in warning for warning in report.warnings)
    assert all(layer.norm_product > 0 for layer in report.layers)


def test_the_page_has_each_of_them():
    for name in ("Trainer(", "SFTTrainer(", "DPOTrainer(", "RewardTrainer(", "teacher", "unet"):
        assert any(name in block for block in BLOCKS), name
