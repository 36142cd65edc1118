"""What truncating a trained adapter loses, on SST-2: at its exact rank, at three quarters and at half of it.

``python -m bench.truncation --out runs/truncation``; cut off, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional

import headstart as hs
from bench.finetuned import (
    ADAPTER,
    BASELINE,
    TASKS,
    WARMUP,
    Mean,
    Planned,
    Row,
    mean,
    mean_of,
    measured,
    paragraphs,
    quiet,
    run_all,
    shared_arguments,
)
from bench.harness import table, write
from headstart.evaluation.answers import evaluating
from headstart.evaluation.own import Asker, Asking, classified
from headstart.files import write_json
from headstart.progress import silent
from headstart.runs.folder import TRAINED
from headstart.runs.model import load_base
from headstart.runs.read import tasks_of
from headstart.tasks.base import Example
from headstart.tasks.rows import read

TASK = "sst-2"
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


class Truncated(Planned):
    """A run whose trained adapter is written at each rank, and measured as PEFT alone computes with it."""

    @property
    def _written(self) -> Path:
        return self.folder / "written.json"

    def do(self) -> None:
        """Train, write and measure; what is done isn't done again."""
        super().do()
        if (self.folder / TRAINED / "checkpoint").is_dir() and not self._written.is_file():
            write_json(self._measured(), self._written)

    def row(self) -> Row | None:
        """Return the run's figures and those of what was written; None where there are none."""
        row = super().row() if self._written.is_file() else None
        return row and row | {"written": json.loads(self._written.read_text(encoding="utf-8"))}

    def _measured(self) -> dict[str, Row]:
        task, _ = tasks_of(self.run)
        base, tokenizer = load_base(self.run, task)
        model = hs.load_checkpoint(copy.deepcopy(base), self.folder / TRAINED / "checkpoint", trainable=False)
        examples = read(task, self.run.data.held_out, limit=self.run.data.held_out_examples).examples
        written: dict[str, Row] = {}
        for name, share in SHARES.items():
            rank = None if name == "exact" else round(share * written["exact"]["rank"])
            with tempfile.TemporaryDirectory() as folder:
                error = hs.save_lora(model, Path(folder) / "adapter", rank)
                plain = PeftModel.from_pretrained(copy.deepcopy(base), Path(folder) / "adapter")
                written[name] = {"rank": rank_of(plain), "error": error}
                written[name] |= self._scored(plain, tokenizer, examples, Path(folder))
        return written

    def _scored(self, model: Any, tokenizer: Any, examples: Sequence[Example], folder: Path) -> dict[str, float]:
        """Return the loss and the accuracy of a model."""
        asker = Asker(model, tokenizer, folder, Asking(batch_size=64), self.run.batch.max_length, silent)
        with evaluating(model):
            records, figures = classified(asker, tasks_of(self.run)[0], examples)
        logits = torch.tensor([record["logits"] for record in records], dtype=torch.float64)
        labels = torch.tensor([int(record["label"]) for record in records])
        return {"loss": float(functional.cross_entropy(logits, labels)), "accuracy": figures["accuracy"].value}


def rank_of(model: Any) -> int:
    """Return the rank of an adapter whose layers have one."""
    ranks = {parameter.shape[0] for name, parameter in model.named_parameters() if ".lora_A." in name}
    if len(ranks) != 1:
        raise RuntimeError(f"the written adapter's layers have ranks {sorted(ranks)}; they should have one.")
    return int(ranks.pop())


Values = Mapping[int, float]  # by seed


def values(runs: Sequence[Row], method: str, share: str, key: str) -> Values:
    """Return one figure of a method's written adapters, by seed."""
    return {run["seed"]: run["written"][share][key] for run in runs if run["method"] == method}


def minus(scores: Values, reference: Values) -> Mean:
    """Return the mean over the seeds that both have of the difference."""
    return mean_of([scores[seed] - reference[seed] for seed in scores if seed in reference])


def ranks_table(runs: Sequence[Row], methods: Sequence[str]) -> list[str]:
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
    titles = ["method", "rank", "error %", "loss", "minus exact", "accuracy %", "minus exact"]
    return table([*titles, f"loss minus `{BASELINE}`"], rows)


def sentences(runs: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """Say what follows from the runs."""
    apart = max(abs(run["written"]["exact"]["loss"] - run["final_loss"]) for run in runs)
    lines = [f"- Loaded by PEFT, the exact adapter's loss is the trained model's own within {apart:.1e} in every run."]
    for share in ("3/4", "1/2"):
        lost = {m: minus(values(runs, m, share, "loss"), values(runs, m, "exact", "loss")) for m in methods}
        told = grouped(lost, "a lower loss", "a higher loss", "not told apart")
        lines.append(f"- At {share} of the exact rank, against the exact adapter: {told}.")
    plain = values(runs, BASELINE, "exact", "loss")
    changes = {m: minus(values(runs, m, "1/2", "loss"), plain) for m in methods if m != BASELINE}
    if plain and changes:
        told = grouped(changes, "below it", "above it", "not told apart from it")
        lines.append(f"- Truncated to r, loss against that of `{BASELINE}`, which has rank r by itself: {told}.")
    return lines


def grouped(changes: Mapping[str, Mean], below: str, above: str, neither: str) -> str:
    """Return the methods by what their interval says."""
    groups: dict[str, list[str]] = {}
    for method, change in changes.items():
        kind = "one seed" if change.half is None else {-1: below, 1: above, 0: neither}[change.sign]
        groups.setdefault(kind, []).append(f"`{method}` ({change.value:+.4f})")
    return "; ".join(f"{kind}: {', '.join(named)}" for kind, named in groups.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.truncation", description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=STEPS, help=f"of training (default {STEPS})")
    add("--rate", type=float, default=RATE, help=f"of AdamW at its highest (default {RATE:g})")
    add("--methods", nargs="+", default=list(METHODS), help="what the runs start from")
    add("--held-out", type=int, default=872, help="rows that are measured on (default 872, all)")
    shared_arguments(parser)
    chosen = parser.parse_args()
    quiet(chosen.threads)
    out, common = chosen.out or Path("runs/truncation"), {"steps": chosen.steps, "held_out": chosen.held_out}
    # Seeds outermost: what a time limit leaves is whole for the seeds that are done.
    plan = [
        Truncated.of(TASK, method, out, seed=seed, lr=OWN_RATES.get(method, chosen.rate), **common)
        for seed, method in itertools.product(chosen.seeds, chosen.methods)
    ]
    runs = run_all(plan, chosen.limit_minutes)
    own = "".join(f", {rate:g} for `{method}`" for method, rate in OWN_RATES.items() if method in chosen.methods)
    lines = paragraphs(
        "The encoder all-MiniLM-L6-v2 with a random two-way head on SST-2. LoRA on query, key, value and the dense "
        f"layers, rank r = {ADAPTER['r']}, alpha {ADAPTER['alpha']}, rsLoRA; {chosen.steps} AdamW steps of "
        f"{TASKS[TASK]['batch']['size']} examples at a rate of {chosen.rate:g}{own}, cosine with {100 * WARMUP:g} % "
        "warm-up, the head trained along. The trained adapter is written with `save_lora`: exactly, which takes rank "
        "2 r after a start that is subtracted and rank r after plain LoRA, and truncated to three quarters and to half "
        "of that by SVD. Each is loaded on the untouched encoder with PEFT alone and measured.",
        "Error is what `save_lora` returns: the Frobenius norm of what is missing over that of the whole update, all "
        f"layers together. Loss (nats) and accuracy are of {chosen.held_out} rows of the dev set. ± is half of the "
        "95 % interval over seeds (Student); differences are taken seed by seed.",
    )
    methods = [method for method in chosen.methods if any(run["method"] == method for run in runs)]
    lines += [measured(runs, len(plan)), ""]
    if runs:
        by_method = {method: [run for run in runs if run["method"] == method] for method in methods}
        starts = ", ".join(f"`{name}` {mean(group, 'start_loss').text()}" for name, group in by_method.items())
        lines += [*ranks_table(runs, methods), "", *paragraphs(f"Before training the loss was: {starts}.")]
        lines += sentences(runs, methods)
    write(chosen.page or "truncation", "What truncation loses", lines)


if __name__ == "__main__":
    main()
