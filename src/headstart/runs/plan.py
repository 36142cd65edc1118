"""What a run would do, told without weights: layers, trainable parameters, memory and steps."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from headstart.layers.find import lora_layers
from headstart.layers.matrices import matrices_of
from headstart.layers.parts import divide
from headstart.methods import Training, parse_method
from headstart.runs.model import head_of, made_ready
from headstart.runs.tree import Run
from headstart.solve import check
from headstart.tasks.registry import parse_task
from headstart.training.models import skeleton_of

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        parameters: of the pretrained model.
        shapes: how many layers of each (d_out, d_in) the adapter has.
        trainable: numbers that train, a classifier's head included; ``head`` is how many of them are the head's.
        memory: bytes by what they are for: the frozen weights, and weights, gradients and the optimizer's state of
            what trains. Activations come on top.
        steps: of the optimizer; None where that depends on data that were not looked at.
    """

    parameters: int
    shapes: dict[tuple[int, int], int]
    trainable: int
    head: int
    memory: dict[str, int]
    steps: int | None

    def table(self) -> Table:
        """Return it for the terminal."""
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("adapted layers", ", ".join(f"{count} of {o} x {i}" for (o, i), count in self.shapes.items()) or "none"),
            ("trainable", f"{self.trainable:,} ({100 * self.trainable / self.parameters:.3f} %)"),
            *([("of these the head", f"{self.head:,}")] if self.head else []),
            *((f"memory: {what}", f"{count / 2**30:.2f} GiB") for what, count in self.memory.items()),
            ("steps", "not known without the data" if self.steps is None else f"{self.steps:,}"),
        ]
        table = Table(box=None, pad_edge=False, show_header=False)
        for row in rows:
            table.add_row(*row)
        return table


def planned(run: Run) -> Plan:
    """Return what a run would do, from the model's config alone.

    Raises:
        HeadstartError: the config can't be read, or the adapter doesn't fit the model.
    """
    task = parse_task(run.data.task)
    options: dict[str, Any] = {} if run.model.revision is None else {"revision": run.model.revision}
    if task.kind != "text":
        options["num_labels"] = 1 if task.kind == "regression" else len(task.labels)
    base = skeleton_of(run.model.name, head=head_of(task), **options)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    with torch.device("meta"):
        model = made_ready(base, run.model_copy(update={"model": run.model.model_copy(update={"bits": 16})}), task)
    shapes: Counter[tuple[int, int]] = Counter()
    names = [(name, parameter.numel()) for name, parameter in model.named_parameters() if parameter.requires_grad]
    trainable = sum(count for _, count in names)
    head = 0
    if run.trains in ("adapter", "lora-fa"):
        head = sum(count for name, count in names if "lora_" not in name and "vera_" not in name)
        targets = matrices_of(lora_layers(model, "default"))
        shapes.update((target.d_out, target.d_in) for target in targets)
        method = parse_method(run.start.method)
        for part in divide(method, targets) if targets else []:  # a VeRA adapter has none of LoRA's
            check(part.method, part.layers, Training(first_lr=run.optimizer.lr))
            if part.method.form == "core":
                trainable += sum(target.r**2 - target.trainable for target in part.layers)
            elif run.trains == "lora-fa":
                trainable -= sum(target.r * target.d_in for target in part.layers)
    width = run.model.bits / 8 if run.model.bits != 16 else _BYTES[run.model.dtype]
    states = 8 if run.optimizer.name == "adamw" else 4 * bool(run.optimizer.momentum)
    memory = {
        "pretrained weights": round(parameters * width),
        "trained weights, gradients, optimizer": trainable * (8 + states),
    }
    return Plan(parameters, dict(shapes), trainable, head, memory, _steps(run))


def _steps(run: Run) -> int | None:
    if run.schedule.steps is not None:
        return run.schedule.steps
    if run.data.train_examples is None or run.batch.packing:
        return None
    a_step = run.batch.size * run.batch.accumulation
    return math.ceil((run.schedule.epochs or 1) * math.ceil(run.data.train_examples / a_step))
