"""A training step with anchored and with core layers against one with PEFT's plain LoRA, on SmolLM2."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import headstart as hs
from bench.harness import interleave, paired_ratio, table, token_batches, write
from headstart.training.models import resolve_model

RANK = 8


def main() -> None:
    base, tokenizer, _ = resolve_model("smollm2")
    data, what = token_batches(8, 8, tokenizer)
    batch = data[0]

    def prepared(method: str | None) -> tuple[Any, torch.optim.Optimizer]:
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(copy.deepcopy(base), config)
        if method is not None:
            hs.initialize_(model, method)
        model.train()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(state: tuple[Any, torch.optim.Optimizer]) -> None:
        model, optimizer = state
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    held = {
        "PEFT LoRA": prepared(None),
        "anchored (init-ab)": prepared("init-ab"),
        "core (lora-xs)": prepared("lora-xs"),
    }
    sides = {name: (lambda state=state: state, step) for name, state in held.items()}
    timings = interleave(sides, 12, warm=True)
    rows = [[name, str(timing), f"{paired_ratio(timings, name, 'PEFT LoRA'):.3f}"] for name, timing in timings.items()]
    write(
        "step",
        "A training step",
        [
            f"SmolLM2-135M, all seven linear kinds, rank {RANK}, one batch of {what}: forward, backward, AdamW.",
            "Median of 12 interleaved steps with the range; the ratio is the median of the rounds' ratios.",
            "",
            *table(["layers", "seconds", "over PEFT LoRA"], rows),
            "",
            "Goals: anchored at most 1.08 times, core at most 1.0 times.",
        ],
    )


if __name__ == "__main__":
    main()
