"""SmolLM2 on GSM8K with one GPU: each start's best rate by validation loss, then seeds at it, with graded answers.

Two studies of headstart's own, ``OUT/rates`` and ``OUT/graded``; several runs share the GPU, which one run of so small
a model leaves idle most of the time. What is done is not done again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.finetuned import ADAPTER, BASELINE, DATA, WARMUP
from headstart.errors import HeadstartError
from headstart.files import write_whole
from headstart.reports.page import write_page
from headstart.reports.tables import markdown
from headstart.study.study import PAGES, run_study
from headstart.study.summary import Summary, summarised
from headstart.study.tree import RATE, START, Study
from headstart.training.models import resolve_model

# Every start's rates: half a decade apart, around where its like is published to do well.
RATES: dict[str, tuple[float, ...]] = {
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "pissa": (3e-5, 1e-4, 3e-4, 1e-3),
    "init-ab": (1e-4, 3e-4, 1e-3, 3e-3),
    "lora-one:samples=256": (1e-4, 3e-4, 1e-3, 3e-3),
    "lora-sb:samples=256": (3e-4, 1e-3, 3e-3, 1e-2),
}
CORE = {"adapter.r": 64, "adapter.alpha": 64, "adapter.rslora": False}


def study(chosen: argparse.Namespace, rates: dict[str, Any], seeds: tuple[int, ...], graded: bool) -> Study:
    """Return the study of rates, measured on validation data, or that of graded answers."""
    starts: list[Any] = [
        {START: method, "label": method, **(CORE if method.startswith("lora-sb") else {})} for method in rates
    ]
    base = {
        "model": {"name": chosen.model, "dtype": chosen.dtype},
        "data": {
            "task": "gsm8k:prompt=plain",
            "train": str(chosen.data / "gsm8k" / "train.jsonl"),
            "held_out": str(chosen.data / "gsm8k" / "test.jsonl"),
            "validation_examples": chosen.validation,
            "held_out_examples": chosen.test if graded else 0,
        },
        "adapter": {**ADAPTER, "targets": "all-linear"},
        "optimizer": {"max_grad_norm": 0.0},
        "schedule": {"steps": chosen.steps if graded else chosen.sweep_steps, "warmup": WARMUP},
        "batch": {"size": chosen.batch, "max_length": 384},
        "evaluation": {
            "graded_examples": chosen.test if graded else 0,
            "max_new_tokens": 224,
            "batch_size": chosen.test_batch,
        },
        # Adapters in float32 on a half-precision base, as PEFT makes them: without autocast a step has fewer kernels,
        # and their number is what a step of so small a model takes.
        "precision": "float32",
    }
    axes: dict[str, Any] = {START: starts, RATE: {method: list(grid) for method, grid in rates.items()}}
    return Study(base=base, axes=axes, seeds=seeds, reference=BASELINE, chosen_by="loss")


def done(work: Study, folder: Path, chosen: argparse.Namespace, until: float, refine: bool) -> Summary:
    """Do what is left of a study, and write its pages."""
    grid = run_study(
        work, folder, workers=chosen.workers, refine=refine, max_seconds=max(0.0, until - time.monotonic())
    )
    summary = summarised(grid, folder)
    if summary.counted().get("done"):
        write_whole(folder / PAGES[1], markdown(summary))
        with suppress(HeadstartError):  # without Plotly, which a machine without network may lack: the text says it all
            write_page(folder / PAGES[0], summary)
    print(folder, summary.counted(), flush=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_study", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu_gsm8k"), help="gets a folder for each study")
    add("--data", type=Path, default=DATA, help="with gsm8k/train.jsonl and test.jsonl")
    add("--model", default="smollm2", help="a name or a GGUF file")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    add("--seeds", type=int, default=5, help="of the graded runs")
    add("--sweep-steps", type=int, default=110)
    add("--steps", type=int, default=442, help="of the graded runs; 442 are an epoch")
    add("--batch", type=int, default=16)
    add("--validation", type=int, default=400, help="training problems that rates are chosen by")
    add("--test", type=int, default=512, help="test problems")
    add("--test-batch", type=int, default=256, help="answers written, or losses read, at a time")
    add("--workers", type=int, default=8, help="runs at a time")
    add("--refine", action="store_true", help="add rates where a start's best lies at the edge of its grid")
    add("--seconds", type=float, default=420, help="no run begins after so long")
    chosen = parser.parse_args()
    if BASELINE not in chosen.methods:
        parser.error(f"--methods needs {BASELINE}, which all others are compared with")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    until, half = began + chosen.seconds, began + chosen.seconds / 2
    try:
        resolve_model(chosen.model, progress=False)  # converted once, before several would
        rates = {method: RATES[method] for method in chosen.methods}
        swept = done(study(chosen, rates, (0,), False), chosen.out / "rates", chosen, half, chosen.refine)
        best = {start: (choice.rate,) for start, choice in swept.parts[0].choices.items()}
        if best:
            done(study(chosen, best, tuple(range(chosen.seeds)), True), chosen.out / "graded", chosen, until, False)
    except HeadstartError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
