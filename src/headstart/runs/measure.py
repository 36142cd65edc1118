"""What a run measures: losses and classes of what is held out, and its answers, graded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.errors import DataError
from headstart.evaluation.figures import Figure, loss_figure, score_figures
from headstart.evaluation.held_out import HeldOut, held_out
from headstart.evaluation.own import Asker, Asking, graded, written
from headstart.files import write_json
from headstart.processes import Processes, together
from headstart.progress import Show
from headstart.runs.folder import ITEMS, LOSSES, TRAINED
from headstart.runs.result import Result
from headstart.runs.tree import Run
from headstart.tasks.base import Example, Task

# As what figures of the validation data are named.
VALIDATION = "validation"


def measured(
    trainer: Any, dataset: Any, task: Task, show: Show, when: str
) -> tuple[dict[str, Figure], dict[str, list[float]]]:
    """Return loss and a classifier's metrics on prepared data, with intervals; and what each item gave."""
    step = "validation loss" if when == VALIDATION else f"loss at the {when}"
    measured = held_out(trainer, dataset, regression=task.kind == "regression", progress=show, step=step)
    items = {"losses": measured.losses.tolist(), "weights": measured.weights.tolist()}
    figures = {f"loss/{when}": loss_figure(items["losses"], items["weights"])}
    if task.kind == "text":
        return figures, items
    items |= {"predictions": _predicted(measured, task), "labels": [float(label) for label in measured.labels]}
    scores = score_figures(task, items["predictions"], items["labels"])
    return figures | {f"{name}/{when}": score for name, score in scores.items()}, items


def measured_at_the_end(
    trainer: Any, data: Mapping[str, Any], task: Task, folder: Path, main: bool, show: Show
) -> dict[str, Figure]:
    """Measure validation and held-out data; keep what each item gave, by which runs are compared in pairs."""
    figures: dict[str, Figure] = {}
    items: dict[str, dict[str, list[float]]] = {}
    for name, when in (("validation", VALIDATION), ("held_out", "end")):
        if name in data:
            scores, items[name] = measured(trainer, data[name], task, show, when)
            figures |= scores
    if main and items:
        write_json(items, folder / LOSSES)
    return figures


def note_lost(result: Result) -> None:
    """Note that a run diverged whose last step made the weights no numbers: no training loss has seen them."""
    for name in (f"loss/{VALIDATION}", "loss/end"):
        if name in result.metrics and not math.isfinite(result.metrics[name].value):
            result.status, result.reason = "diverged", f"{name} is no number after the last step"


def _predicted(measured: HeldOut, task: Task) -> list[float]:
    logits = measured.logits
    outputs = logits.reshape(len(measured.labels)) if task.kind == "regression" else logits.argmax(1)
    return [float(value) for value in outputs]


def gradeable(examples: Sequence[Example]) -> list[Example]:
    """Return the examples that have an answer to grade by."""
    return [example for example in examples if example.reference is not None or example.label is not None]


def to_be_graded(run: Run, task: Task, examples: Sequence[Example]) -> list[Example]:
    """Return the held-out examples that are to be answered; whatever keeps them from it is said before training.

    Raises:
        TaskError: a package that grades is missing.
        DataError: no example has an answer to grade by.
    """
    asked = run.evaluation.graded_examples
    if task.kind != "text" or not asked:
        return []
    task.check()
    chosen = gradeable(examples)[:asked]
    if not chosen:
        raise DataError(
            f"evaluation.graded_examples={asked}: no held-out example has an answer to grade by; set it to 0."
        )
    return chosen


def graded_answers(
    model: Any, tokenizer: Any, run: Run, task: Task, chosen: Sequence[Example], folder: Path, show: Show
) -> dict[str, Figure]:
    """Return the grades of the model's answers, asked as ``headstart eval`` asks; each process asks for its share."""
    processes, place = Processes.joined(), folder / TRAINED
    if processes.several:
        place /= f"answers-{processes.rank}-of-{processes.count}"
        place.mkdir(exist_ok=True)
    asking = Asking(max_new_tokens=run.evaluation.max_new_tokens, batch_size=run.answers_at_once)
    asker = Asker(model, tokenizer, place, asking, run.batch.max_length, show)
    with together(processes):
        share = written(asker, task, processes.share(chosen))
    shares = processes.gather(share)
    if processes.rank:
        return {}
    outputs = [shares[item % processes.count][item // processes.count] for item in range(len(chosen))]
    records, figures = graded(task, chosen, outputs, show)
    write_json(records, folder / ITEMS)
    return figures
