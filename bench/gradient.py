"""Gradient starts against a plain gradient pass over the same batches, on SmolLM2."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import headstart as hs
from bench.harness import interleave, paired_ratio, table, token_batches, write
from headstart.training.models import resolve_model

RANK = 8
SAMPLES = 32
ROUNDS = 5


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **changes)


def plain_pass(base: Any, data: list[dict[str, torch.Tensor]]) -> None:
    """Forward, backward, ``.grad`` of the target weights: what any gradient start has to do at the least."""
    base.eval()
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.requires_grad_(True)
    for batch in data:
        base(**batch).loss.backward()


def peft_lora_ga(base: Any, data: list[dict[str, torch.Tensor]]) -> None:
    from peft import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    chosen = config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    # Its preparation doesn't know PEFT's own shorthand for all linear layers.
    chosen.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    def train_step() -> None:
        for batch in data:
            base(**batch).loss.backward()

    preprocess_loraga(base, chosen, train_step)
    get_peft_model(base, chosen)


def main() -> None:
    base, tokenizer, _ = resolve_model("smollm2")
    data, what = token_batches(SAMPLES, 8, tokenizer)

    def fresh() -> Any:
        return copy.deepcopy(base)

    def start(method: str) -> Any:
        return lambda model: hs.initialize_(get_peft_model(model, config()), method, data=data)

    sides = {
        "plain gradient pass": (fresh, lambda model: plain_pass(model, data)),
        "headstart lora-one": (fresh, start(f"lora-one:samples={SAMPLES}")),
        "headstart lora-ga": (fresh, start(f"lora-ga:samples={SAMPLES}")),
        "PEFT lora_ga": (fresh, lambda model: peft_lora_ga(model, data)),
    }
    timings = interleave(sides, ROUNDS, warm=True)
    rows = [
        [name, str(timing), f"{paired_ratio(timings, name, 'plain gradient pass'):.2f}"]
        for name, timing in timings.items()
    ]
    write(
        "gradient",
        "Gradient starts",
        [
            f"SmolLM2-135M, all seven linear kinds, rank {RANK}, {what}. The plain pass is forward, backward and",
            "`.grad` of the target weights; the starts are all from the base model to the initialised PEFT model.",
            f"Median of {ROUNDS} interleaved rounds, after one that isn't counted, with the range; the ratio is the",
            "median of the rounds' ratios.",
            "",
            *table(["side", "seconds", "over the plain pass"], rows),
            "",
            "Goal: a gradient start in at most 1.25 times the plain pass.",
        ],
    )


if __name__ == "__main__":
    main()
