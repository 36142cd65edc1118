"""What hs.Monitor adds to a training step of SmolLM2: with and without it, in turn.

``python -m bench.monitor 3`` takes three rounds instead of the usual number.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import headstart as hs
from bench.harness import interleave, paired_ratio, paragraph, table, token_batches, write
from headstart.training.models import resolve_model
from headstart.training.wrap import wrap_lora

ROUNDS, STEPS, EVERY = 6, 10, 10


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    base, tokenizer, _ = resolve_model("smollm2")
    model = wrap_lora(base, "all-linear", r=8, lora_alpha=16)
    hs.initialize_(model, "init-ab", progress=False)
    model.train()
    batch = token_batches(4, 4, tokenizer)[0][0]
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-5)
    seconds: list[float] = []

    def steps(monitor: hs.Monitor | None) -> None:
        for _ in range(STEPS):
            model(**batch).loss.backward()
            optimizer.step()
            if monitor is not None:
                monitor.step()
            optimizer.zero_grad()

    def watched(_: Any) -> None:
        with hs.Monitor(model, every=EVERY) as monitor:
            steps(monitor)
        seconds.append(monitor.seconds)

    sides = {"plain": (lambda: None, lambda _: steps(None)), "watched": (lambda: None, watched)}
    timings = interleave(sides, rounds, warm=True)
    rows = [
        [name, f"{one.median / STEPS:.3f} s ({min(one.seconds) / STEPS:.3f} to {max(one.seconds) / STEPS:.3f})"]
        for name, one in timings.items()
    ]
    tokens = batch["input_ids"].numel()
    text = [
        *paragraph(
            f"SmolLM2-135M, rank 8 on all linear layers, batches of 4 rows ({tokens} tokens), AdamW. hs.Monitor "
            f"watches 7 layers, one of each kind; of {STEPS} steps the first and the tenth are recorded, twice as many "
            f"as a loop's default (every {EVERY}) has in the long run. Seconds a step, median and range of {rounds} "
            "rounds in turn."
        ),
        "",
        *table(["", "seconds a step"], rows),
        "",
        *paragraph(
            f"Watched takes {paired_ratio(timings, 'watched', 'plain'):.3f} times as long (goal: under 1.03); the "
            f"monitor itself counts {sorted(seconds)[len(seconds) // 2] / 2:.3f} s a record of all 7 layers."
        ),
    ]
    write("monitor", "What the monitor costs", text)


if __name__ == "__main__":
    main()
