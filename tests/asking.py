"""Models, adapters and data for the tests of evaluations."""

from __future__ import annotations

import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from headstart.evaluation.evaluate import evaluate
from headstart.evaluation.own import Asking
from headstart.evaluation.target import find_target


def adapter_folder(path, model):
    """Write an adapter that changes a good deal, as if it had been trained."""
    base = AutoModelForCausalLM.from_pretrained(model)
    wrapped = get_peft_model(base, LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    wrapped.save_pretrained(path)
    return path


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def truths(path, count=12):
    """Write what LLM-Adapters' BoolQ looks like."""
    asked = "Please answer the following question with true or false, question: is {} so?\n\nAnswer format: true/false"
    rows = [
        {"instruction": asked.format("abcdefgh"[i % 8] * (1 + i % 3)), "input": "", "answer": ("true", "false")[i % 2]}
        for i in range(count)
    ]
    return write_lines(path, rows)


def asked(target, tasks, folder, **asking):
    """Evaluate, and return the result and each task's items."""
    target = find_target(str(target)) if not hasattr(target, "load") else target
    result = evaluate(target, tasks, Asking(**asking), folder)
    items = [read_lines(path) for path in sorted(folder.glob("*/items.jsonl"))]
    return result, [item for lines in items for item in lines]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
