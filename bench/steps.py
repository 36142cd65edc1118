"""What a training step of the LoRA-SB and LoRA-XS studies takes, method by method, with nothing else running.

``python -m bench.steps 2`` takes two rounds instead of the usual number. The studies' own runs share the machine with
each other, so that their seconds say little.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import headstart as hs
from bench.finetuned import BASELINE, Planned
from bench.harness import interleave, paired_ratio, paragraph, shared_copy, table, token_batches, write
from headstart.runs.model import load_base, made_ready
from headstart.runs.read import tasks_of
from headstart.tasks.rows import read

# LoRA-SB's layers are LoRA-XS's: only where they start is another.
METHODS = (BASELINE, "lora-xs r=16", "lora-xs r=32", "lora-xs r=64")
ROUNDS = 12
Batch = dict[str, torch.Tensor]


def prepared(task: str) -> tuple[dict[str, Any], Batch, str]:
    """Return a study's model with each method's layers, a batch of the study's size, and what it is."""
    runs = {label: Planned.of(task, label, Path("runs"), seed=0, lr=1e-5, steps=1, held_out=1).run for label in METHODS}
    first = runs[BASELINE]
    learned, _ = tasks_of(first)
    base, tokenizer = load_base(first, learned)
    models = {}
    for label, run in runs.items():
        models[label] = made_ready(shared_copy(base), run, learned)
        hs.initialize_(models[label], run.start.method, progress=False, cache=False)
    size = first.batch.size
    if task == "gsm8k":
        data, what = token_batches(size, size, tokenizer)
        batch = data[0]
    else:
        rows, what = read(learned, first.data.train, limit=size).examples, f"{size} rows of SST-2"
        batch = dict(tokenizer([row.prompt for row in rows], padding=True, return_tensors="pt"))
        batch["labels"] = torch.tensor([row.label for row in rows])
    return models, {key: value.to(base.device) for key, value in batch.items()}, what


def lines_of(title: str, models: dict[str, Any], batch: Batch, what: str, rounds: int) -> list[str]:
    """Time forward, backward and AdamW of each model on one batch, in turn."""
    sides = {}
    for label, model in models.items():
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)

        def step(_: None, model: Any = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        sides[label] = (lambda: None, step)
    timings = interleave(sides, rounds, warm=True)
    rows = [
        [
            label,
            f"{adapter_size(model):,}",
            f"{timings[label].median:.3f} ({min(timings[label].seconds):.3f} to {max(timings[label].seconds):.3f})",
            f"{paired_ratio(timings, label, BASELINE):.3f}",
        ]
        for label, model in models.items()
    ]
    head = paragraph(f"{what}, median of {rounds} interleaved steps with the range.")
    columns = ["method", "parameters", "seconds a step", f"over `{BASELINE}`"]
    return [f"## {title}", "", *head, "", *table(columns, rows), ""]


def adapter_size(model: Any) -> int:
    """Return how many of the adapter's numbers train; heads beside it left out."""
    return sum(
        parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" in name
    )


def main(rounds: int = ROUNDS) -> None:
    lines = paragraph(
        "Forward, backward and AdamW, as in the studies on GSM8K and GLUE: plain LoRA of rank 8, and core layers, "
        "LoRA-XS's and LoRA-SB's alike (they differ in where they start). The ratio is the median of the rounds'."
    )
    lines.append("")
    lines += lines_of("SmolLM2-135M, all seven linear kinds", *prepared("gsm8k"), rounds)
    lines += lines_of("all-MiniLM-L6-v2, all linear layers", *prepared("sst-2"), rounds)
    write("core_steps", "LoRA-SB and LoRA-XS: what a step takes", lines)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
