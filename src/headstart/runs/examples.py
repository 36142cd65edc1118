"""What a run learns, what it is chosen by, and what is held out to be reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from headstart.errors import DataError, RunError
from headstart.runs.trainers import too_long
from headstart.runs.tree import Run
from headstart.tasks.base import Example, Task
from headstart.tasks.rows import Rows, read

# What sentences call the parts, and the setting that says where each is from.
_WORDS = {"train": "training", "validation": "validation", "held_out": "held out"}
_SOURCE = {"train": "train", "validation": "train", "held_out": "held_out"}


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

    @property
    def parts(self) -> dict[str, Rows]:
        """The rows by part."""
        return {"train": self.train, "validation": self.validation, "held_out": self.held_out}

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the examples of each part, in their order."""
        return {
            name: hashlib.sha256(json.dumps([asdict(example) for example in rows.examples]).encode()).hexdigest()
            for name, rows in self.parts.items()
        }

    def check_unchanged(self, noted: Mapping[str, str], whose: str) -> None:
        """Raise RunError where the examples of a part are others than what has been done was done with.

        Args:
            noted: their digests then, of the parts that are known.
            whose: what was begun, for the message.
        """
        for name, digest in self.digests.items():
            if noted.get(name, digest) != digest:
                raise RunError(
                    f"{whose} was begun with other {_WORDS[name]} data than are there now (data.{_SOURCE[name]}: "
                    f"{self.parts[name].where or 'none'}): put the data back, or give another --out."
                )

    def by_name(self) -> dict[str, list[Example]]:
        """Return the examples of the parts that there are, in the order of the attributes."""
        return {name: list(rows.examples) for name, rows in self.parts.items() if rows.examples}

    def about(self, run: Run, tokenizer: Any, model: Any) -> tuple[dict[str, Any], list[str]]:
        """Return counts and digests by part, and sentences about what was left out or cut."""
        noted: dict[str, Any] = {
            name: {"where": rows.where, "examples": len(rows.examples), "bad": len(rows.bad), "sha256": digest}
            for (name, rows), digest in zip(self.parts.items(), self.digests.values(), strict=True)
        }
        sentences = list(self._unlike())
        wanted = max(run.data.held_out_examples, run.evaluation.graded_examples)
        if len(self.held_out.examples) < wanted:
            of_one = self.held_out.where == self.train.where and "; of a single file a fifth at most is held out"
            sentences.append(
                f"held out: {len(self.held_out.examples)} examples in place of {wanted} (data.held_out_examples)"
                f"{of_one or ''}"
            )
        for name, rows in self.parts.items():
            total = len(rows.examples) + len(rows.bad)
            if rows.bad:
                sentences.append(
                    f"{_WORDS[name]}: {len(rows.bad)} of {total} rows were left out, the first: {rows.bad[0]}"
                )
            cut, dropped = too_long(rows.examples, tokenizer, model, run) if rows.examples else (0, 0)
            beyond = f"{run.batch.max_length} tokens (batch.max_length)"
            if cut:
                sentences.append(f"{_WORDS[name]}: {cut} of {len(rows.examples)} lost what is beyond {beyond}")
            if dropped:
                sentences.append(
                    f"{_WORDS[name]}: {dropped} of {len(rows.examples)} were left out, as their prompts alone take "
                    f"{beyond}"
                )
                noted[name] |= {"examples": len(rows.examples) - dropped, "dropped": dropped}
        return noted, sentences

    def _unlike(self) -> Iterator[str]:
        """Yield a sentence on each part that lacks a label which another has, as of a file that is sorted by label."""
        labels = {name: {example.label for example in rows.examples} for name, rows in self.parts.items()}
        known = {label for some in labels.values() for label in some if isinstance(label, int)}
        for name, own in labels.items():
            if own and own <= known and (lacking := sorted(known - own)):
                yield (
                    f"{_WORDS[name]}: none of {len(self.parts[name].examples)} examples has the label "
                    f"{', '.join(map(str, lacking))}, which others have: parts are cut from a file as it lies, so "
                    "shuffle its rows."
                )


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
