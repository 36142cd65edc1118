"""What truncating a trained adapter loses, on SST-2: at its exact rank, at three quarters and at half of it.

``python -m bench.truncation --out runs/truncation``; cut off, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import random
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import headstart as hs
from bench.harness import table, write
from bench.study_glue import (
    BATCH,
    EVALUATED,
    LORA,
    WARMUP,
    Study,
    cut,
    fresh_model,
    measure,
    shuffled,
    train,
    training_batches,
)
from bench.study_tables import BASELINE, Mean, Run, mean, mean_of, measured, paragraphs, run_all
from headstart.errors import MethodError
from headstart.methods import parse_method
from headstart.training.wrap import accelerator

TASK = "sst2"
RATE, STEPS = 3e-4, 120
# Where factors have entries near one, a step of AdamW moves the weight that much further.
OWN_RATES = {"inilora-alpha": 3e-5, "inilora-beta": 1e-4}
METHODS = (
    BASELINE,
    "pissa",
    "milora",
    "olora",
    "init-ab",
    "inilora:solver=svd",
    "inilora-alpha:std=0.02",
    "inilora-alpha",
    "inilora-beta",
    "lora-ga:samples=64",
    "corda:samples=64",
)
SHARES = {"exact": 1.0, "3/4": 0.75, "1/2": 0.5}


class Truncation(Study):
    """The model and the rows, read once, and the runs on them."""

    def run(self, settings: Run) -> Run:
        """Start, train, write at each rank, and measure what PEFT alone computes with each."""
        seed, steps = settings["seed"], settings["steps"]
        draw = random.Random(seed)
        order = shuffled(self._train[TASK], steps * BATCH, draw)
        data = training_batches(order, steps, self._padding, draw)
        model = fresh_model(self._base, seed)
        method, population = parse_method(settings["method"]), len(self._train[TASK])
        samples = cut(order[: method.sample_count(population) or 1], self._padding)
        hs.initialize_(
            model,
            method,
            data=hs.TrainingData(samples, training=hs.Training(population)),
            seed=seed,
            cache=False,
            progress=False,
        )
        start = measure(model, self._dev[TASK])[0]
        losses = train(model, data, settings["lr"], seed)
        loss, right, total = measure(model, self._dev[TASK])
        written = {"exact": self._written(model, None)}
        exact = written["exact"]["rank"]
        written |= {name: self._written(model, round(share * exact)) for name, share in SHARES.items() if share < 1}
        return {
            "start_loss": start,
            "final_loss": loss,
            "right": right,
            "total": total,
            "losses": losses,
            "written": written,
            "device": str(accelerator()),
        }

    def _written(self, model: Any, rank: int | None) -> Run:
        """Write the adapter, load it with PEFT on the untouched encoder, and measure that."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            error = hs.save_lora(model, path, rank)
            plain = PeftModel.from_pretrained(copy.deepcopy(self._base).to(accelerator()), path)
        ranks = {parameter.shape[0] for name, parameter in plain.named_parameters() if ".lora_A." in name}
        if len(ranks) != 1:
            raise RuntimeError(f"the written adapter's layers have ranks {sorted(ranks)}; they should have one.")
        loss, right, total = measure(plain, self._dev[TASK])
        return {"rank": ranks.pop(), "error": error, "loss": loss, "accuracy": right / total}


Values = Mapping[int, float]  # by seed


def values(runs: Sequence[Run], method: str, share: str, key: str) -> Values:
    """Return one figure of a method's written adapters, by seed."""
    return {run["seed"]: run["written"][share][key] for run in runs if run["method"] == method}


def minus(scores: Values, reference: Values) -> Mean:
    """Return the mean over the seeds that both have of the difference."""
    return mean_of([scores[seed] - reference[seed] for seed in scores if seed in reference])


def ranks_table(runs: Sequence[Run], methods: Sequence[str]) -> list[str]:
    """Return one row for each method and rank: what is lost against the exact adapter, and against plain LoRA."""
    rows = []
    baseline = {key: values(runs, BASELINE, "exact", key) for key in ("loss", "accuracy")}
    for method, share in itertools.product(methods, SHARES):
        figures = {key: values(runs, method, share, key) for key in ("rank", "error", "loss", "accuracy")}
        exact = {key: values(runs, method, "exact", key) for key in ("loss", "accuracy")}
        whole = share == "exact"
        rows.append(
            [
                method,
                "/".join(f"{rank:g}" for rank in sorted(set(figures["rank"].values()))),
                "0" if whole else mean_of(list(figures["error"].values())).text(100, 2),
                mean_of(list(figures["loss"].values())).text(),
                "" if whole else minus(figures["loss"], exact["loss"]).text(plus="+"),
                mean_of(list(figures["accuracy"].values())).text(100, 2),
                "" if whole else minus(figures["accuracy"], exact["accuracy"]).text(100, 2, "+"),
                "" if method == BASELINE and whole else minus(figures["loss"], baseline["loss"]).text(plus="+"),
            ]
        )
    titles = [
        "method",
        "rank",
        "error %",
        "loss",
        "minus exact",
        "accuracy %",
        "minus exact",
        f"loss minus `{BASELINE}`",
    ]
    return table(titles, rows)


def sentences(runs: Sequence[Run], methods: Sequence[str]) -> list[str]:
    """Say what follows from the runs."""
    apart = max(abs(run["written"]["exact"]["loss"] - run["final_loss"]) for run in runs)
    lines = [f"- Loaded by PEFT, the exact adapter's loss is the trained model's own within {apart:.1e} in every run."]
    groups: dict[str, list[str]] = {}
    for share in SHARES:
        if share == "exact":
            continue
        groups = {}
        for method in methods:
            lost = minus(values(runs, method, share, "loss"), values(runs, method, "exact", "loss"))
            kind = {1: "a higher loss", -1: "a lower loss", 0: "not told apart"}[lost.sign]
            groups.setdefault("one seed" if lost.half is None else kind, []).append(f"`{method}` ({lost.value:+.4f})")
        said = "; ".join(f"{kind}: {', '.join(named)}" for kind, named in groups.items())
        lines.append(f"- At {share} of the exact rank, against the exact adapter: {said}.")
    groups = {}
    for method in methods:
        change = minus(values(runs, method, "1/2", "loss"), values(runs, BASELINE, "exact", "loss"))
        if method != BASELINE and change.half is not None:
            kind = {-1: "below", 1: "above", 0: "not told apart from"}[change.sign]
            groups.setdefault(kind, []).append(f"`{method}`")
    if groups:
        said = "; ".join(f"{kind} it: {', '.join(named)}" for kind, named in groups.items())
        lines.append(f"- Truncated to r, loss against that of `{BASELINE}`, which has rank r by itself: {said}.")
    return lines


def arguments() -> argparse.Namespace:
    """Read the command line, and refuse before anything is run what this study can't do."""
    parser = argparse.ArgumentParser(prog="python -m bench.truncation", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/truncation"), help="one JSON file a run; what is there is not redone")
    add("--steps", type=int, default=STEPS, help=f"of training (default {STEPS})")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--rate", type=float, default=RATE, help=f"of AdamW at its highest (default {RATE:g})")
    add("--methods", nargs="+", default=list(METHODS), help="what the runs start from")
    add("--limit-minutes", type=float, default=math.inf, help="start no run after that long; 0 only writes the page")
    add("--page", default="truncation", help="the page in docs/results, or a path without .md")
    chosen = parser.parse_args()
    for text in chosen.methods:
        try:
            parse_method(text)
        except MethodError as error:
            sys.exit(str(error))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and Transformers, at every model
    return chosen


def main() -> None:
    chosen = arguments()
    # Seeds outermost: what a time limit leaves is whole for the seeds that are done.
    plan = [
        {"method": method, "seed": seed, "lr": OWN_RATES.get(method, chosen.rate), "steps": chosen.steps}
        for seed, method in itertools.product(chosen.seeds, chosen.methods)
    ]
    runs = run_all(plan, chosen.out, chosen.limit_minutes, Truncation(chosen.out, plan).run)
    own = "".join(f", {rate:g} for `{method}`" for method, rate in OWN_RATES.items() if method in chosen.methods)
    lines = paragraphs(
        "The encoder all-MiniLM-L6-v2 with a random two-way head on SST-2. LoRA on query, key, value and the dense "
        f"layers, rank r = {LORA['r']}, alpha {LORA['lora_alpha']}, rsLoRA; {chosen.steps} AdamW steps of {BATCH} "
        f"examples at a rate of {chosen.rate:g}{own}, cosine with {100 * WARMUP:g} % warm-up, the head trained along. "
        "The trained adapter is written with `save_lora`: exactly, which takes rank 2 r after a start that is "
        "subtracted and rank r after plain LoRA, and truncated to three quarters and to half of that by SVD. Each is "
        "loaded on the untouched encoder with PEFT alone and measured.",
        "Error is what `save_lora` returns: the Frobenius norm of what is missing over that of the whole update, all "
        f"layers together. Loss (nats) and accuracy are of the {EVALUATED} rows of the dev set. ± is half of the 95 % "
        "interval over seeds (Student); differences are taken seed by seed.",
    )
    methods = [method for method in chosen.methods if any(run["method"] == method for run in runs)]
    lines += [measured(runs, len(plan)), ""]
    if runs:
        lines += [*ranks_table(runs, methods), "", *start_line(runs, methods), *sentences(runs, methods)]
    write(chosen.page, "What truncation loses", lines)


def start_line(runs: Sequence[Run], methods: Sequence[str]) -> list[str]:
    """Return the loss before training, by method."""
    starts = [
        f"`{method}` {mean([run for run in runs if run['method'] == method], 'start_loss').text()}"
        for method in methods
    ]
    return paragraphs(f"Before training the loss was: {', '.join(starts)}.")


if __name__ == "__main__":
    main()
