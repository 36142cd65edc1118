"""SmolLM2 on GSM8K with one GPU: every start's own best rate by held-out loss, then seeds at it, with graded answers.

Several runs share the GPU, which one run of so small a model leaves idle most of the time. What is done is not done
again; ``--only-page`` writes the page of what there is.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from bench.harness import table, write
from bench.study_tables import (
    ADAPTER,
    BASELINE,
    DATA,
    LOSS,
    WARMUP,
    Planned,
    at_rates,
    best,
    mean,
    measured,
    paragraphs,
    quiet,
    summary,
)
from headstart.errors import HeadstartError
from headstart.training.models import resolve_model

# Every start's rates: half a decade apart, around where its like is published to do well.
RATES = {
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "pissa": (3e-5, 1e-4, 3e-4, 1e-3),
    "init-ab": (1e-4, 3e-4, 1e-3, 3e-3),
    "lora-one:samples=256": (1e-4, 3e-4, 1e-3, 3e-3),
    "lora-sb:samples=256 r=64": (3e-4, 1e-3, 3e-3, 1e-2),
}
BATCH, LENGTH = 16, 384
Files = dict[str, Path]


def files_of(data: Path, out: Path, validation: int) -> Files:
    """Return GSM8K's training, validation and test rows as files; the last training rows are for validation."""
    out.mkdir(parents=True, exist_ok=True)
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    files = {"train": out / "train.jsonl", "validation": out / "validation.jsonl"}
    for name, rows in (("train", lines[:-validation]), ("validation", lines[-validation:])):
        files[name].write_text("".join(rows), encoding="utf-8")
    return files | {"test": data / "gsm8k" / "test.jsonl"}


def planned(label: str, lr: float, seed: int, graded: bool, chosen: argparse.Namespace, files: Files) -> Planned:
    """Return a run: of the sweep, measured on validation rows, or one whose answers to test rows are graded."""
    return Planned.of(
        "gsm8k",
        label,
        chosen.out,
        seed=seed,
        lr=lr,
        steps=chosen.steps if graded else chosen.sweep_steps,
        held_out=chosen.test if graded else chosen.validation,
        graded=chosen.test if graded else 0,
        model={"name": chosen.model, "dtype": chosen.dtype},
        data={
            "task": "gsm8k:prompt=plain",
            "train": str(files["train"]),
            "held_out": str(files["test" if graded else "validation"]),
        },
        batch={"size": BATCH, "max_length": LENGTH},
        evaluation={"max_new_tokens": 256, "batch_size": 128 if graded else 32},
        precision=chosen.dtype,
    )


def sweep(label: str, rates: Sequence[float], chosen: argparse.Namespace, files: Files) -> list[Planned]:
    return [planned(label, rate, 0, False, chosen, files) for rate in rates]


def further(label: str, rates: Sequence[float], chosen: argparse.Namespace, files: Files) -> float | None:
    """Return the rate beyond the edge at which a start's best lies; None where it lies within, or isn't known."""
    rows = [row for item in sweep(label, rates, chosen, files) if (row := item.row()) is not None]
    if len(rows) < len(rates):
        return None
    at = best(rows, label)[0]["lr"]
    if at in (min(rates), max(rates)):
        step = 10**0.5 if at == max(rates) else 10**-0.5
        return float(f"{at * step:.0e}")
    return None


class Sweeps:
    """The rates that each start is tried at: those planned, and beyond an edge at which the best lies."""

    def __init__(self, chosen: argparse.Namespace, files: Files) -> None:
        self.rates = {label: list(RATES[label]) for label in chosen.methods}
        self.chosen, self.files = chosen, files
        for label in self.rates:
            # What an earlier call has added.
            while (beyond := further(label, self.rates[label], chosen, files)) is not None:
                if planned(label, beyond, 0, False, chosen, files).row() is None:
                    break
                self.rates[label].append(beyond)

    def rows(self, label: str) -> list[dict[str, Any]]:
        """Return what a start's sweep has given so far."""
        items = sweep(label, self.rates[label], self.chosen, self.files)
        return [row for item in items if (row := item.row()) is not None]

    def best_rate(self, label: str) -> float:
        """Return the rate of a start's least loss so far."""
        return float(best(self.rows(label), label)[0]["lr"])

    def graded(self) -> Iterator[Planned]:
        """Yield the runs at the best rate of every start that has one, seeds outermost."""
        for seed in self.chosen.seeds:
            for label in filter(self.rows, self.rates):
                yield planned(label, self.best_rate(label), seed, True, self.chosen, self.files)


def do(item: Planned) -> str:
    """Do a run in a process of the pool; say what came of it."""
    quiet(1)
    began = time.monotonic()
    try:
        item.do()
        row = item.row()
        said = f"loss {row['start_loss']:.4f} -> {row['final_loss']:.4f}" if row else "no figures"
        said += f", {100 * row['accuracy']:.2f} % right" if row and "accuracy" in row else ""
    except HeadstartError as error:
        said = str(error)
    return f"{item.label} at {item.run.optimizer.lr:g}, seed {item.run.seed}: {said}, {time.monotonic() - began:.0f} s"


def run_all(chosen: argparse.Namespace, files: Files) -> None:
    """Do what isn't done: the sweep, edges where need be, then the seeds of whichever starts have their rate."""
    sweeps = Sweeps(chosen, files)
    with ProcessPoolExecutor(chosen.workers, multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[str], Planned] = {}

        def submit(items: Sequence[Planned]) -> None:
            known = {item.run.key for item in running.values()}
            for item in items:
                if item.row() is None and item.run.key not in known:
                    running[pool.submit(do, item)] = item

        width = max(len(rates) for rates in sweeps.rates.values())
        for place in range(width):
            for label, rates in sweeps.rates.items():
                submit(sweep(label, rates[place : place + 1], chosen, files))
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                item = running.pop(future)
                print(future.result(), flush=True)
                beyond = further(item.label, sweeps.rates[item.label], chosen, files)
                if beyond is not None and not item.run.evaluation.graded_examples and len(sweeps.rates[item.label]) < 6:
                    sweeps.rates[item.label].append(beyond)
                    submit([planned(item.label, beyond, 0, False, chosen, files)])
            if not any(not item.run.evaluation.graded_examples for item in running.values()):
                submit(list(sweeps.graded()))


def page(chosen: argparse.Namespace, files: Files) -> None:
    """Write the page of what is done."""
    sweeps = Sweeps(chosen, files)
    rates = sorted({rate for rates in sweeps.rates.values() for rate in rates})
    rows = []
    for label in sweeps.rates:
        groups = at_rates(sweeps.rows(label), label)
        low = min((mean(group, LOSS.key).value for group in groups.values()), default=math.inf)
        cells = [LOSS.of(groups[rate]) if rate in groups else "" for rate in rates]
        cells = [
            f"**{cell}**" if rate in groups and mean(groups[rate], LOSS.key).value == low else cell
            for rate, cell in zip(rates, cells, strict=True)
        ]
        rows.append([label, *cells])
    graded = [row for item in sweeps.graded() if (row := item.row()) is not None]
    lines = [
        *paragraphs(
            f"SmolLM2-135M-Instruct, all seven linear kinds, rank {ADAPTER['r']}, alpha {ADAPTER['alpha']}, rsLoRA "
            f"(core layers: their rank as named, s = 1). GSM8K, batches of {BATCH}, at most {LENGTH} tokens, AdamW "
            f"without weight decay, cosine with {100 * WARMUP:g} % warm-up; weights in "
            f"{chosen.dtype}. `python -m bench.gpu_study`, several runs at a time on the one GPU, so seconds are of a "
            "shared machine.",
            f"A rate is chosen by {chosen.sweep_steps} steps with seed 0 and the loss of {chosen.validation} training "
            "problems that no run learns from; where the best lay at an edge, up to two more were tried. Each start "
            f"is then trained at its best rate for {chosen.steps} steps from {len(chosen.seeds)} seeds, and the loss "
            f"and the answers are of the {chosen.test:,} test problems, none of which chose anything. An answer is "
            "right where its last number is (exact match).",
        ),
        "## Rates",
        "",
        f"Validation loss after {chosen.sweep_steps} steps (nats a completion token), the best in bold; empty where a",
        "run was not asked for, is not done, or failed:",
        "",
        *table(["start", *(f"{rate:g}" for rate in rates)], rows),
        "",
        "## At its best rate",
        "",
        measured(graded, len(chosen.seeds) * len(chosen.methods)),
        "",
        *(summary(graded, list(sweeps.rates)) if graded else []),
    ]
    write(chosen.page, "Starts on GSM8K, with a GPU", lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_study", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu_gsm8k"), help="gets a folder for each run")
    add("--data", type=Path, default=DATA, help="with gsm8k/train.jsonl and test.jsonl")
    add("--model", default="smollm2", help="a name or a GGUF file")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--sweep-steps", type=int, default=220)
    add("--steps", type=int, default=442, help="of the graded runs; 442 are an epoch")
    add("--validation", type=int, default=400, help="training problems that rates are chosen by")
    add("--test", type=int, default=1319, help="test problems")
    add("--workers", type=int, default=6, help="runs at a time")
    add("--only-page", action="store_true", help="run nothing")
    add("--page", default="gpu_gsm8k", help="in docs/results, or a path without .md")
    chosen = parser.parse_args()
    if BASELINE not in chosen.methods:
        parser.error(f"--methods needs {BASELINE}, which all others are compared with")
    quiet(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    files = files_of(chosen.data, chosen.out, chosen.validation)
    if not chosen.only_page:
        try:
            resolve_model(chosen.model, progress=False)  # converted once, before several would
        except HeadstartError as error:
            sys.exit(str(error))
        run_all(chosen, files)
    page(chosen, files)


if __name__ == "__main__":
    main()
