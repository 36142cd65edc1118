"""LoRA-DA against a plain gradient pass over the same batches, on SmolLM2, and its share of a fine-tune."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from peft import get_peft_model

import headstart as hs
from bench.gradient import RANK, config, plain_pass
from bench.harness import interleave, paired_ratio, paragraph, table, token_batches, write
from headstart.training.models import resolve_model

SAMPLES = 32
ROUNDS = 5
# GSM8K's training set: what one epoch reads, and N of the method.
POPULATION = 7_473
TRAINING_STEPS = 4


def start(base: Any, samples: int, data: list[dict[str, torch.Tensor]]) -> hs.Report:
    method = hs.LoRADA(samples=samples)
    return hs.initialize_(
        get_peft_model(base, config(use_rslora=True)),
        method,
        data=hs.TrainingData(data, training=hs.Training(POPULATION)),
    )


def seconds_a_sample(base: Any, data: list[dict[str, torch.Tensor]]) -> float:
    """Return what a fine-tuning step (AdamW, batches of 8) takes a sample, over batches of every length."""
    model = get_peft_model(copy.deepcopy(base), config(use_rslora=True)).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    chosen = data[:: max(1, len(data) // TRAINING_STEPS)]
    began = time.perf_counter()
    for batch in chosen:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - began) / sum(len(batch["labels"]) for batch in chosen)


def main() -> None:
    base, tokenizer, _ = resolve_model("smollm2")
    data, what = token_batches(SAMPLES, 8, tokenizer)
    reports: list[hs.Report] = []
    sides = {
        "plain gradient pass": (lambda: copy.deepcopy(base), lambda model: plain_pass(model, data)),
        "lora-da": (lambda: copy.deepcopy(base), lambda model: reports.append(start(model, SAMPLES, data))),
    }
    timings = interleave(sides, ROUNDS, warm=True)
    ratio = paired_ratio(timings, "lora-da", "plain gradient pass")
    rows = [
        [name, str(timing), f"{paired_ratio(timings, name, 'plain gradient pass'):.2f}"]
        for name, timing in timings.items()
    ]
    report = reports[-1]
    parts = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in report.seconds_by_step.items())
    errors = [layer.info["objective_error"] for layer in report.layers]
    conditions = sorted(layer.info["condition"] for layer in report.layers)
    repaired = sum(bool(layer.repair) for layer in report.layers)
    more, what_more = token_batches(256, 8, tokenizer)
    began = time.perf_counter()
    large = start(copy.deepcopy(base), 256, more)
    seconds = time.perf_counter() - began
    epoch = seconds_a_sample(base, more) * POPULATION
    write(
        "lora_da",
        "The cost of LoRA-DA",
        [
            *paragraph(
                f"SmolLM2-135M, all seven linear kinds, rank {RANK}, {what}. The plain pass is forward, backward and "
                "`.grad` of the target weights; lora-da is all of it, from the base model to the initialised PEFT one: "
                "gradient, both Kronecker factors, inverses, eigenproblems solved to 1e-6. Median of the interleaved "
                f"rounds with the range, {ROUNDS} rounds after one that isn't counted."
            ),
            "",
            *table(["side", "seconds", "over the plain pass"], rows),
            "",
            *paragraph(
                f"Goal: at most 1.6 times the plain pass; it is {ratio:.2f}. Steps of the last: {parts}. Condition "
                f"of the input factors: median {conditions[len(conditions) // 2]:.1e}, largest {conditions[-1]:.1e}; "
                f"largest estimated relative error of an objective {max(errors):.1e}; {repaired} of "
                f"{len(report.layers)} layers had their damping raised."
            ),
            "",
            "## As a share of a fine-tune",
            "",
            *paragraph(
                f"{what_more}: {seconds:.1f} s in one run ({large.plan}). An epoch of GSM8K ({POPULATION:,} samples, "
                f"batches of 8, extrapolated from {TRAINING_STEPS} timed steps) takes {epoch / 60:.0f} minutes, so "
                f"that the start-up is {seconds / (seconds + epoch):.1%} of it all. The paper's figure is 6 % (2:05 of "
                "34:13 minutes, rank 8)."
            ),
        ],
    )


if __name__ == "__main__":
    main()
