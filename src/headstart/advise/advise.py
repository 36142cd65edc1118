"""Advice for a model and data: what each start costs, and at which rate to train it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headstart.advise.costs import Cost, Machine, measured, predicted
from headstart.advise.probe import Probe, probe
from headstart.advise.sweep import sweep
from headstart.context import Clock
from headstart.errors import HeadstartError
from headstart.initialize import initialize_
from headstart.methods import parse_method
from headstart.methods.registry import method_class
from headstart.progress import Show, silent
from headstart.runs.examples import load_examples
from headstart.runs.model import load_base, made_ready
from headstart.runs.read import tasks_of
from headstart.runs.shared import Shared
from headstart.runs.trainers import make_trainer
from headstart.runs.tree import Run
from headstart.runs.watch import Watch

REFERENCE = "lora"
# Sharpness tells how rates differ less than in proportion: published rates fall by 18 where it rises by 60, and by 10
# for 12 (arXiv 2602.04998, figure of medians beside the table of rates), which is a power of 0.7 to 0.9.
POWER = 0.75


@dataclass(frozen=True)
class Advice:
    """What is known of a start before training.

    Attributes:
        method: its name with settings.
        trainable: numbers that train.
        predicted: what its start costs, from shapes and a measured pass.
        seconds, memory: what making it here took, and the peak of the process, or the device, by then, in bytes.
        published: its best rate over plain LoRA's in arXiv 2602.04998; None where it isn't there.
        probe: the curvature along its first step; None where it could not be made.
        probed: from the probe, its rate over plain LoRA's; None where either has none.
        swept: the rate of the lowest training loss in a short sweep; None without one.
        rate: what to train at: ``swept``, else the reference's rate times ``probed``, else times ``published``, else
            unknown.
        reason: why it could not be made; empty where it could.
    """

    method: str
    trainable: int = 0
    predicted: Cost | None = None
    seconds: float = 0.0
    memory: int = 0
    published: float | None = None
    probe: Probe | None = None
    probed: float | None = None
    swept: float | None = None
    rate: float | None = None
    reason: str = ""


def advise(run: Run, methods: Sequence[str], *, batches: int = 4, steps: int = 0, show: Show = silent) -> list[Advice]:
    """Make each start once on the run's model and data, time it, and probe its curvature; plain LoRA comes first.

    Args:
        run: the model, its adapter, the data, batch size, seed; ``optimizer.lr`` is taken for plain LoRA's good rate,
            from which the others' follow.
        methods: names with settings; plain LoRA is added where it is missing.
        batches: that the probe reads, of the run's batch size.
        steps: of a sweep of rates around those that the probe gives, or the reference's where it gives none; 0 for
            none.
        show: draws progress.

    Raises:
        HeadstartError: the model or the data can't be read.
    """
    names = list(dict.fromkeys([REFERENCE, *methods]))
    for name in names:
        parse_method(name)
    (task, asked), rows = tasks_of(run), []
    parts = {"train": load_examples(run, task, asked).by_name()["train"]}
    machine: Machine | None = None
    with tempfile.TemporaryDirectory() as folder:
        shared = Shared(Path(folder))
        for place, name in enumerate(names):
            show("probing starts", place, len(names))
            own = run.model_copy(update={"start": run.start.model_copy(update={"method": name})})
            base, tokenizer = shared.base(run, lambda: load_base(run, task, progress=False))
            model, known = made_ready(base, own, task), shared.tokens(run)
            trainer, data = make_trainer(own, task, model, tokenizer, parts, Path(folder), Watch(silent), known)
            known.update(data)
            machine = machine or measured(model, _batches(trainer, 1))
            rows.append(_advised(own, trainer, machine, batches))
    show("probing starts", len(names), len(names))
    rated = [_rated(row, rows[0], run.optimizer.lr) for row in rows]
    if not steps:
        return rated
    rates = sweep(run, {row.method: around(row, run) for row in rated if not row.reason}, steps, show)
    return [
        replace(row, swept=rates[row.method], rate=rates[row.method]) if row.method in rates else row for row in rated
    ]


def around(row: Advice, run: Run) -> list[float]:
    """Return the rates to try of a start: five, each twice the one before, with what is known of it in the middle."""
    middle = run.optimizer.lr if row.rate is None else row.rate
    return [float(f"{middle * factor:.2g}") for factor in (0.25, 0.5, 1, 2, 4)]


def _advised(run: Run, trainer: Any, machine: Machine, count: int) -> Advice:
    """Make one start and probe it."""
    name, clock = run.start.method, Clock()
    method = parse_method(name)
    published = vars(method_class(method.name)).get("rate") if method.name != "per-layer" else None
    cost = predicted(method, machine, len(trainer.train_dataset))
    try:
        with clock("start"):
            report = initialize_(
                trainer.model, method, data=trainer, seed=run.seed, form=run.start.form, cache=False, progress=False
            )
        probing = probe(trainer.model, _batches(trainer, count), run.optimizer.name)
    except HeadstartError as error:
        return Advice(name, predicted=cost, published=published, reason=str(error))
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return Advice(name, trainable, cost, clock.seconds["start"], report.peak_memory, published, probing)


def _batches(trainer: Any, count: int) -> list[dict[str, Any]]:
    """Return the first batches of the training data, the same for every start, as the trainer collates them."""
    device = next(trainer.model.parameters()).device
    rows = trainer._remove_unused_columns(trainer.train_dataset, description="training")
    size = trainer.args.per_device_train_batch_size
    made = []
    for first in range(0, min(count * size, len(rows)), size):
        batch = trainer.data_collator([rows[place] for place in range(first, min(first + size, len(rows)))])
        made.append({key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)})
    return made


def _rated(row: Advice, reference: Advice, rate: float) -> Advice:
    probed = None
    if row.probe is not None and reference.probe is not None:
        ratio = row.probe.rate / reference.probe.rate
        probed = ratio**POWER if math.isfinite(ratio) and ratio > 0 else None
    factor = probed if probed is not None else row.published
    return replace(row, probed=probed, rate=None if factor is None else rate * factor)
