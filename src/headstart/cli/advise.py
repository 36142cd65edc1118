"""``headstart advise``: before training, what each start costs and at which rate to train it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from headstart.cli.app import app
from headstart.cli.compare import split_methods
from headstart.cli.console import console, output
from headstart.cli.options import (
    Alpha,
    Data,
    MaxLength,
    Methods,
    Model,
    Rank,
    RsLora,
    Seed,
    Targets,
    Task,
    common_settings,
)
from headstart.progress import progress_bars

if TYPE_CHECKING:
    from headstart.advise.advise import Advice
    from headstart.runs.tree import Run

# Reported to fail under reinforcement learning (arXiv 2512.23165), where what they change of the model counts more.
_SPECTRAL = ("pissa", "milora", "corda", "lora-ga")


@app.command()
def advise(
    model: Model = "smollm2",
    methods: Methods = "lora,init-ab,pissa,milora,olora,lora-one:samples=64,lora-ga:samples=64",
    task: Task = None,
    data: Data = None,
    lr: Annotated[
        float, typer.Option("--lr", help="A good rate of plain LoRA here, from which the others follow.")
    ] = 2e-4,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    batches: Annotated[int, typer.Option("--batches", min=1, help="That the probe reads.")] = 4,
    steps: Annotated[
        int, typer.Option("--sweep", min=0, help="Train each start for so many steps at five rates; 0 for not.")
    ] = 0,
    rank: Rank = 8,
    alpha: Alpha = 16,
    rslora: RsLora = False,
    targets: Targets = "all-linear",
    seed: Seed = 0,
    train_examples: Annotated[int, typer.Option("--train-examples", min=1)] = 2_000,
    max_length: MaxLength = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Make each start once, time it, and probe how sharp the loss is along its first step; train nothing.

    But with --sweep, which tells rates better and takes as long as the trainings that it does.
    """
    from headstart.advise.advise import advise as probe_all
    from headstart.runs.read import validated

    settings = common_settings(model, task, data, train_examples, rank, alpha, rslora, targets, batch_size, max_length)
    settings["data"]["held_out_examples"] = 0
    run = validated({**settings, "optimizer": {"lr": lr}, "seed": seed}, "the options")
    with progress_bars(console) as show:
        rows = probe_all(run, split_methods(methods), batches=batches, steps=steps, show=show)
    if as_json:
        output.print(json.dumps([asdict(row) for row in rows], indent=1), markup=False, highlight=False, soft_wrap=True)
        return
    output.print(_table(rows, swept=steps > 0))
    for sentence in sentences(rows, run, batches, steps):
        output.print(sentence, markup=False, highlight=False, soft_wrap=True)
    output.print("A study's file that decides it (`headstart compare study.yaml`):", markup=False, highlight=False)
    output.print(_study(run, rows), markup=False, highlight=False, soft_wrap=True)


def sentences(rows: list[Advice], run: Run, batches: int, steps: int) -> list[str]:
    """Return what the table says, on what it rests, and what would change it."""
    said = [f"{row.method} can't be made here: {row.reason}" for row in rows if row.reason]
    sharp = [row for row in rows if row.probed is not None and row.probed < 0.7]
    said.append(
        f"Rates follow from {run.optimizer.lr:g} for plain lora, which is given and not measured: rate probed is what "
        f"{batches} batches of {run.batch.size} say of the curvature along the first step, rate published what arXiv "
        "2602.04998 found on Qwen3-0.6B at rank 128. Both are factors to begin a grid with, known within about 2."
    )
    if sharp:
        names = ", ".join(row.method for row in sharp)
        said.append(f"At lora's own rate these would be judged beyond their best: {names}.")
    if steps:
        said.append(
            f"Rate swept is the one of five with the lowest training loss in the last half of {steps} steps, of one "
            "seed; no more is said of which start is best: the comparison does, each at its own rate."
        )
    else:
        said.append(
            "Nothing was trained, so nothing here says which start is best: the comparison does, each at its own rate. "
            "A sweep tells rates better than the probe and takes longer: --sweep 15."
        )
    said.append(
        "What would change it: a higher rank or more data lower good rates (there by 6 from rank 8 to 256, by 3 from "
        "5,000 to 395,000 examples), larger batches raise them, and few steps leave more to the start."
    )
    if spectral := [row.method for row in rows if row.method.partition(":")[0] in _SPECTRAL]:
        said.append(
            f"For reinforcement learning take none of {', '.join(spectral)}: at one rate for all such starts were "
            "reported to collapse (arXiv 2512.23165), and the singular values in their factors are said to be why "
            "(arXiv 2606.31813). lora, rlpo, rlmo and olora-tail hold there, at a lower rate."
        )
    return said


def _table(rows: list[Advice], *, swept: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    heads = [
        "start",
        "trainable",
        "start-up s",
        "predicted",
        "peak memory",
        "rate published",
        "rate probed",
        *(["rate swept"] if swept else []),
        "train at",
    ]
    for head in heads:
        table.add_column(head, justify="left" if head == "start" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            f"{row.trainable:,}" if row.trainable else "-",
            f"{row.seconds:.2f}" if not row.reason else "-",
            f"{row.predicted.seconds:.2f} s, {row.predicted.memory / 2**20:,.0f} MiB" if row.predicted else "-",
            f"{row.memory / 2**20:,.0f} MiB" if row.memory else "-",
            _factor(row.published),
            _factor(row.probed),
            *([_rate(row.swept)] if swept else []),
            _rate(row.rate),
        )
    return table


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _factor(value: float | None) -> str:
    return "-" if value is None else f"lora × {value:.2g}"


def _study(run: Run, rows: list[Advice]) -> str:
    """Return the study that would decide, as its file, with grids around these rates."""
    from headstart.advise.advise import around
    from headstart.study.tree import RATE, START

    # The settings that the options gave, and none that they didn't.
    base = run.model_dump(mode="json", exclude_defaults=True)
    base["data"] = {**base.get("data", {}), "validation_examples": 48, "held_out_examples": 200}
    grids: dict[str, Any] = {}
    for row in rows:
        if not row.reason:
            grids[row.method] = around(row, run)
    study = {"base": base, "axes": {START: list(grids), RATE: grids}, "seeds": 3}
    return yaml.safe_dump(study, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120).rstrip()
