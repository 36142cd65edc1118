"""Peak memory of gradient starts, each in a process of its own, on SmolLM2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from peft import get_peft_model

import headstart as hs
from bench.gradient import RANK, SAMPLES, config, peft_lora_ga, plain_pass
from bench.harness import table, token_batches, write
from headstart.context import peak_resident
from headstart.training.models import resolve_model

Side = Callable[[Any, list[dict[str, Any]]], None]


def ours(method: str) -> Side:
    def start(base: Any, data: list[dict[str, Any]]) -> None:
        hs.initialize_(get_peft_model(base, config()), f"{method}:samples={SAMPLES}", data=data)

    return start


# What is run, and the samples in a batch.
SIDES: dict[str, tuple[Side, int]] = {
    "plain gradient pass": (plain_pass, 8),
    "headstart lora-one": (ours("lora-one"), 8),
    "headstart lora-da": (ours("lora-da"), 8),
    "PEFT lora_ga": (peft_lora_ga, 8),
    "headstart lora-da, one sample a batch": (ours("lora-da"), 1),
}


def run_side(name: str) -> None:
    """Run one side and print the growth of the peak resident set, in MiB, since model and data were there."""
    base, tokenizer, _ = resolve_model("smollm2")
    side, size = SIDES[name]
    data, what = token_batches(SAMPLES, size, tokenizer)
    before = peak_resident() // 1024
    side(base, data)
    print(before // 1024, peak_resident() // 2**20, what, sep="\t")


def main() -> None:
    rows, what = [], ""
    for name in SIDES:
        done = subprocess.run([sys.executable, "-m", "bench.memory", name], check=True, capture_output=True, text=True)
        before, after, described = done.stdout.strip().splitlines()[-1].split("\t")
        what = what or described
        rows.append([name, before, after, str(int(after) - int(before))])
    write(
        "memory",
        "Peak memory of gradient starts",
        [
            f"SmolLM2-135M, all seven linear kinds, rank {RANK}, {what}. Peak resident set of a process of its",
            "own (Linux), in MiB: with model and data loaded, after the start, and the difference. One run a side.",
            "",
            *table(["side", "loaded", "peak", "difference"], rows),
        ],
    )


if __name__ == "__main__":
    run_side(sys.argv[1]) if len(sys.argv) > 1 else main()
