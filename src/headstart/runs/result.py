"""What came of a run: one JSON file, whose unknown fields readers pass over."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headstart.errors import CheckpointError
from headstart.evaluation.figures import Figure
from headstart.files import write_json

SCHEMA = 1
FILE = "result.json"

Status = Literal["begun", "done", "diverged", "pruned", "failed"]


@dataclass
class Result:
    """What came of a run, or has come so far.

    Attributes:
        key, settings: of the run.
        created_at: when it began, in UTC as ISO 8601 writes it.
        status: "done", "diverged" (a loss that is no number), "pruned" (a study gave it up) or "failed", with the
            ``reason`` in words; "begun" is kept in the folders of a run's stages, so that what is known outlives a
            kill.
        metrics: by name; ``loss/start`` and ``loss/end`` are held-out losses before and after.
        series: by name, rows of (step, value), such as the training loss.
        monitor: of watched layers, at some steps, what :class:`headstart.monitor.Quantities` names.
        windows: of training, up to each held-out measurement and to the end: see
            :func:`headstart.runs.watch.windows`.
        trainable, parameters: how many numbers train, and how many the model has without an adapter.
        total: how many the model has in training, with all that is frozen beside it.
        revision: the commit of the pretrained model on the hub; None of a local one.
        processes: how many trained together; ``batch.size`` is of each.
        start: the report of the start; empty where there is none. Of methods that approximate the weight it has their
            ``relative_error``; ``shared`` says that another run of the study had made it.
        seconds: by stage.
        memory: peak bytes: "resident" of the process, "device" of the accelerator; of what CUDA's allocator reserved,
            "reserved" is the peak, "reserved_mean" and "reserved_99th" (percentile) are over the steps.
        file_size: bytes of the weights that were trained, as saved: the plain adapter's, or the model's.
        data: digests and counts of what was learned and measured.
        environment: versions, machine, and the git commit of the working folder.
        warnings: sentences.
    """

    key: str
    settings: dict[str, Any]
    status: Status = "begun"
    reason: str = ""
    created_at: str = ""
    metrics: dict[str, Figure] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    monitor: list[dict[str, Any]] = field(default_factory=list)
    windows: list[dict[str, float]] = field(default_factory=list)
    trainable: int = 0
    parameters: int = 0
    total: int = 0
    revision: str | None = None
    processes: int = 1
    start: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    file_size: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def write_result(result: Result, folder: Path) -> None:
    """Write a result into the folder of a run, or of one of its stages."""
    write_json({"schema": SCHEMA, **dataclasses.asdict(result)}, folder / FILE)


def read_result(folder: Path) -> Result | None:
    """Return the result in the folder of a run, or of one of its stages; None where there is none.

    Raises:
        CheckpointError: the file is damaged, or a later release wrote it in another way.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] > SCHEMA:
            raise CheckpointError(f"{path} was written by a later release of headstart: update it to read the file.")
        known = {field.name for field in dataclasses.fields(Result)}
        values = {name: value for name, value in content.items() if name in known}
        figures = {field.name for field in dataclasses.fields(Figure)}
        values["metrics"] = {
            name: Figure(**{key: part for key, part in figure.items() if key in figures})
            for name, figure in values.get("metrics", {}).items()
        }
        values["series"] = {name: [(step, value) for step, value in rows] for name, rows in values["series"].items()}
        return Result(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: remove {folder}, and what was in it is done again.") from error
