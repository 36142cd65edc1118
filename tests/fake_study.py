"""Studies with results that a function makes up, so that reports can be held against what is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headstart.evaluation.figures import Figure
from headstart.files import write_json
from headstart.runs.folder import LOSSES
from headstart.runs.result import Result, write_result
from headstart.study.cells import Cell, Grid
from headstart.study.results import CELLS
from headstart.study.study import validated_study
from headstart.study.summary import Summary, summarised

# Of a cell: its held-out loss; or fields of its result; or None where it has none yet.
Truth = Callable[[Cell], float | Mapping[str, Any] | None]

BASE = {
    "model": "tiny",
    "data": {"task": "text", "train": "sums.jsonl", "validation_examples": 4, "held_out_examples": 4},
    "schedule": {"steps": 6},
}


def fake_study(folder: Path, truth: Truth, axes: Mapping[str, Any], base: Any = None, **settings: Any) -> Summary:
    """Write the results of a study as ``truth`` has them, and return what the study shows."""
    grid = Grid(validated_study({"base": base or BASE, "axes": dict(axes), **settings}, "here"))
    for cell in grid.cells():
        made = truth(cell)
        if made is not None:
            write_result(fake_result(cell, made), folder / CELLS / cell.run.folder_name)
    return summarised(grid, folder)


def fake_result(cell: Cell, made: float | Mapping[str, Any]) -> Result:
    """Return a cell's result, from its held-out loss alone or from that under "end" and other fields."""
    fields = dict(made) if isinstance(made, Mapping) else {"end": made}
    loss = fields.pop("end", 1.0)
    metrics = {
        "loss/start": Figure(5.0, 4.9, 5.1, 4, False),
        "loss/end": Figure(loss, loss - 0.1, loss + 0.1, 4, False),
    }
    if cell.run.data.validation_examples:
        metrics["loss/validation"] = Figure(loss + 0.25, count=4, higher_is_better=False)
    defaults: dict[str, Any] = {
        "status": "done",
        "metrics": metrics | fields.pop("metrics", {}),
        "series": {
            "loss": [(step, 5 - step * (5 - loss) / 6) for step in range(1, 7)],
            "gradient norm": [(step, 1 / step) for step in range(1, 7)],
        },
        "trainable": 100,
        "parameters": 1000,
        "start": {"method": cell.run.start.method, "seconds": 0.5, "cached": 0},
        "seconds": {"training": 9.5, "measurement": 1.0},
        "memory": {"resident": 2**30, "device": 0},
        "environment": {"versions": {"headstart": "0.1.0", "torch": "2.13"}, "device": "cpu"},
    }
    return Result(cell.run.key, cell.run.model_dump(mode="json"), **(defaults | fields))


def with_items(folder: Path, summary: Summary, items: Callable[[Cell], list[float]]) -> Summary:
    """Give the cells of a study what each held-out item lost, and return what it shows then."""
    for cell, result in summary.cells:
        if result is not None:
            losses = items(cell)
            kept = {"held_out": {"losses": losses, "weights": [1.0] * len(losses)}}
            write_json(kept, folder / CELLS / cell.run.folder_name / LOSSES)
    return summarised(summary.grid, folder)
