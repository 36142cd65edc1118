"""Runs of fine-tuning that measurements rest on: their settings, the loop over them, and means over seeds."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from scipy.stats import t as student
from transformers.utils import logging

from headstart.errors import HeadstartError
from headstart.evaluation.intervals import CONFIDENCE
from headstart.methods import parse_method
from headstart.runs.read import validated
from headstart.runs.result import read_result
from headstart.runs.stages import execute
from headstart.runs.tree import Run

BASELINE = "lora"
DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
TARGETS = r".*\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
ADAPTER: dict[str, Any] = {"r": 8, "alpha": 16, "rslora": True}
WARMUP = 0.03
Row = dict[str, Any]


def _glue(task: str, train: str, held_out: str) -> dict[str, Any]:
    data = {"task": task, "train": str(DATA / "glue" / train), "held_out": str(DATA / "glue" / held_out)}
    return {
        "model": {"name": "minilm"},
        "data": data,
        "adapter": {"targets": TARGETS},
        "batch": {"size": 32, "max_length": 128},
    }


# What the runs of a task have in common.
TASKS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "model": {"name": "smollm2"},
        "data": {"task": "text", "train": str(DATA / "gsm8k")},
        "adapter": {"targets": "all-linear"},
        "batch": {"size": 4, "max_length": 512},
    },
    "sst-2": _glue("sst-2", "sst2/train.tsv", "sst2/dev.tsv"),
    "mrpc": _glue("mrpc", "mrpc/train.txt", "mrpc/test.txt"),
}


def spelled(label: str) -> tuple[str, dict[str, Any]]:
    """Return a label's method and the settings of the adapter that it changes: "lora-xs r=16" has rank 16 and s = 1."""
    method, _, rank = label.partition(" r=")
    return method, {"r": int(rank), "alpha": int(rank), "rslora": False} if rank else {}


@dataclass(frozen=True)
class Planned:
    """A run of a study.

    Attributes:
        task: of :data:`TASKS`.
        label: what tables call its start; see :func:`spelled`.
        run: the settings.
        out: the folder of the study, in which the run has one of its own.
    """

    task: str
    label: str
    run: Run
    out: Path

    @classmethod
    def of(
        cls,
        task: str,
        label: str,
        out: Path,
        *,
        seed: int,
        lr: float,
        steps: int,
        held_out: int,
        graded: int = 0,
        targets: str | None = None,
        **further: Any,
    ) -> Self:
        """Return a run of a study, on the task's own targets where none are given; end the program if it can't be.

        ``further`` are settings of the run by branch, in place of the study's own or beside them.
        """
        method, changes = spelled(label)
        common = TASKS[task]
        settings: dict[str, Any] = {
            **common,
            "data": {**common["data"], "held_out_examples": held_out},
            "adapter": {**ADAPTER, "targets": targets or common["adapter"]["targets"], **changes},
            "start": {"method": method},
            "optimizer": {"lr": lr, "max_grad_norm": 0.0},
            "schedule": {"steps": steps, "warmup": WARMUP},
            "evaluation": {"graded_examples": graded, "max_new_tokens": 192},
            "seed": seed,
        }
        for branch, changed in further.items():
            settings[branch] = {**settings.get(branch, {}), **changed} if isinstance(changed, dict) else changed
        try:
            parse_method(method)
            return cls(task, label, validated(settings, f"{label} on {task}"), out)
        except HeadstartError as error:
            sys.exit(str(error))

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.out / self.run.folder_name

    def do(self) -> None:
        """Do what is left of the run; raise HeadstartError where it fails."""
        execute(self.run, self.folder)

    def row(self) -> Row | None:
        """Return the figures that the tables are made of; None where the run isn't done."""
        result = read_result(self.folder)
        if result is None or result.status not in ("done", "diverged"):
            return None
        if result.start["cached"]:
            sys.exit(f"{self.folder} has a start from the cache, so what it takes isn't known: give another --out.")
        losses = [loss for _, loss in result.series["loss"]]
        diverged = result.status == "diverged"
        row: Row = {
            "task": self.task,
            "method": self.label,
            "seed": self.run.seed,
            "lr": self.run.optimizer.lr,
            "start_loss": result.metrics["loss/start"].value,
            "final_loss": math.inf if diverged else result.metrics["loss/end"].value,
            "training_loss": sum(losses) / len(losses),
            "trainable": result.trainable,
            "startup_seconds": result.start["seconds"],
            "run_seconds": sum(result.seconds.values()),
            "threads": result.environment["threads"],
            "device": result.environment["device"],
            "warnings": result.warnings,
        }
        if self.task != "gsm8k" or self.run.evaluation.graded_examples:
            name = "exact_match" if self.task == "gsm8k" else "accuracy/end"
            score = result.metrics.get(name)
            row |= {"accuracy": score.value if score else math.inf, "total": score.count if score else 0}
        return row


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every study is told."""
    add = parser.add_argument
    add("--out", type=Path, help="gets a folder for each run; what is done is not done again (default runs/PAGE)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--threads", type=int, default=1, help="of PyTorch; two processes with other --seeds do more than two")
    add("--limit-minutes", type=float, default=math.inf, help="start no run after that long; 0 only writes the page")
    add("--page", help="the page in docs/results, or a path without .md")


def quiet(threads: int) -> None:
    """Set PyTorch's threads, and silence what other libraries say at every model."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # What a start takes is shown, so none may be looked up.
    os.environ["HEADSTART_CACHE_LIMIT"] = "0"


def run_all(plan: Sequence[Planned], limit_minutes: float) -> list[Row]:
    """Do what isn't done, a printed line each, until the time is up; return the rows of all that is done."""
    began = time.monotonic()
    for number, item in enumerate(plan, start=1):
        if item.row() is not None:
            continue
        if time.monotonic() - began >= 60 * limit_minutes:
            print("time is up", flush=True)
            break
        started = time.monotonic()
        try:
            item.do()
            row = item.row()
            losses = f"loss {row['start_loss']:.4f} -> {row['final_loss']:.4f}" if row else "no figures"
            said = f"{losses}, {time.monotonic() - started:.0f} s"
        except HeadstartError as error:
            said = str(error)
        print(f"[{number}/{len(plan)}] {item.task} {item.label} seed {item.run.seed}: {said}", flush=True)
    return [row for item in plan if (row := item.row()) is not None]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; ``half`` is half its 95 % interval, None where one seed or a run that diverged gives none."""

    value: float
    half: float | None
    count: int

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies wholly on one side of zero, else 0."""
        if self.half is None or abs(self.value) <= self.half:
            return 0
        return 1 if self.value > 0 else -1

    def text(self, scale: float = 1, digits: int = 4, plus: str = "") -> str:
        """Return ``mean ± half``."""
        if not math.isfinite(self.value):
            return "diverged" if self.count else "-"
        mean = f"{scale * self.value:{plus}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {scale * self.half:.{digits}f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean and its interval; a value that is not finite makes the mean infinite."""
    if not values or not all(map(math.isfinite, values)):
        return Mean(math.inf, None, len(values))
    half = None
    if len(values) > 1:
        quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), half, len(values))


def mean(runs: Sequence[Row], key: str) -> Mean:
    """Return the mean of one figure of the runs."""
    return mean_of([run[key] for run in runs])


def paragraphs(*texts: str) -> list[str]:
    """Return the texts as wrapped lines with an empty line after each."""
    return [line for text in texts for line in (*textwrap.wrap(text, 118), "")]


def measured(runs: Sequence[Row], asked: int) -> str:
    """Return how much of the plan is done, and on what."""
    if not runs:
        return f"None of {asked} runs is done."
    threads = " or ".join(str(count) for count in sorted({run["threads"] for run in runs}))
    devices = " or ".join(sorted({run["device"] for run in runs}))
    seconds = statistics.median(run["run_seconds"] for run in runs)
    on = f"threads: {threads}, {devices}; a run took {seconds:.0f} s in the median"
    said = " ".join(dict.fromkeys(warning for run in runs for warning in run["warnings"]))
    return f"{len(runs)} of {asked} runs are done; {on}." + (f" Warnings: {said}" if said else "")
