"""What a run learns, what it is chosen by, and what is held out to be reported."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from headstart.errors import DataError
from headstart.runs.trainers import truncated
from headstart.runs.tree import Run
from headstart.tasks.base import Example, Task
from headstart.tasks.rows import Rows, read


@dataclass(frozen=True)
class Examples:
    """The rows of a run; parts that were not asked for have no examples.

    Attributes:
        train: what is learned.
        validation: what rates and states are chosen by.
        held_out: what is reported.
    """

    train: Rows
    validation: Rows
    held_out: Rows

    def by_name(self) -> dict[str, list[Example]]:
        """Return the examples of the parts that there are, in the order of the attributes."""
        parts = {"train": self.train, "validation": self.validation, "held_out": self.held_out}
        return {name: list(rows.examples) for name, rows in parts.items() if rows.examples}

    def about(self, run: Run, tokenizer: Any, model: Any) -> tuple[dict[str, Any], list[str]]:
        """Return counts and digests by part, and sentences about what was left out or cut."""
        parts = {"train": self.train, "validation": self.validation, "held_out": self.held_out}
        words = {"train": "training", "validation": "validation", "held_out": "held out"}
        sentences = []
        for name, rows in parts.items():
            total = len(rows.examples) + len(rows.bad)
            if rows.bad:
                sentences.append(
                    f"{words[name]}: {len(rows.bad)} of {total} rows were left out, the first: {rows.bad[0]}"
                )
            if rows.examples and (lost := truncated(rows.examples, tokenizer, model, run.batch.max_length)):
                lost_end = (
                    f"{words[name]}: {lost} of {len(rows.examples)} lost what is beyond {run.batch.max_length} tokens"
                )
                sentences.append(lost_end)
        return {name: _about(rows) for name, rows in parts.items()}, sentences


def load_examples(run: Run, task: Task, asked: Task) -> Examples:
    """Return what is learned, chosen by and held out: of a single file without a test split, its last rows.

    ``asked`` is the task of what is held out.

    Raises:
        DataError: see :func:`headstart.tasks.rows.read`; or nothing is left to train on.
    """
    wanted, data = max(run.data.held_out_examples, run.evaluation.graded_examples), run.data
    others = data.held_out or data.held_out_task
    if data.train is not None and not others and Path(data.train).expanduser().is_file():
        rows = read(task, data.train)
        cut = len(rows.examples) - min(wanted, len(rows.examples) // 5)
        train = replace(rows, examples=rows.examples[:cut])
        held_out = replace(rows, examples=rows.examples[cut:], bad=[])
    else:
        limit = None if data.train_examples is None else data.train_examples + data.validation_examples
        train = read(task, data.train, limit=limit)
        held_out = replace(train, examples=[], bad=[])
        if wanted:
            held_out = read(asked, data.held_out if others else data.train, split="test", limit=wanted)
    first = data.validation_examples
    if first >= len(train.examples):
        raise DataError(
            f"data.validation_examples={first} leaves nothing of {len(train.examples)} rows to train on: ask for fewer."
        )
    learned = train.examples[first:][: data.train_examples]
    validation = replace(train, examples=train.examples[:first], bad=[])
    return Examples(replace(train, examples=learned), validation, held_out)


def _about(rows: Rows) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([asdict(example) for example in rows.examples]).encode()).hexdigest()
    return {"where": rows.where, "examples": len(rows.examples), "bad": len(rows.bad), "sha256": digest}
