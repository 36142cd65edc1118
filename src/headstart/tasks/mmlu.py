"""MMLU: four choices in 57 subjects, with five answered questions of the subject before each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from headstart.errors import DataError, TaskError
from headstart.tasks.base import Example, Row, Task, reference_of, text_of
from headstart.tasks.registry import register


@register("mmlu")
@dataclass(frozen=True)
class MMLU(Task):
    """MMLU: as its authors publish it, ``test/SUBJECT_test.csv`` and ``dev/SUBJECT_dev.csv``, or as on the hub.

    Attributes:
        shots: how many answered questions of the ``dev`` split come before each question, 0 to 5 (default 5).
        subject: one subject's name, such as ``anatomy``, or "all" (default); of local files.
    """

    source: ClassVar[str] = "Hendrycks et al. 2021, arXiv 2009.03300; cais/mmlu; 57 subjects, 14,042 to test"
    hub: ClassVar[str | None] = "cais/mmlu:all"
    splits: ClassVar[Mapping[str, str]] = {"test": "test", "dev": "dev"}
    columns: ClassVar[tuple[str, ...]] = ("question", *"ABCD", "answer")
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    max_new_tokens: ClassVar[int] = 8
    lm_eval: ClassVar[str | None] = "mmlu"

    shots: int = 5
    subject: str = "all"

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if not 0 <= self.shots <= 5:
            raise TaskError(f"task {self.name!r}: shots={self.shots} must be from 0 to 5, as 'dev' has five a subject.")

    @property
    def shown_split(self) -> str | None:
        """The answered questions."""
        return "dev" if self.shots else None

    def patterns(self, split: str) -> tuple[str, ...]:
        """One file a subject, in a folder of the split's or without."""
        subject = "*" if self.subject == "all" else self.subject
        return (f"{split}/{subject}_{split}", f"{subject}_{split}")

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Read ``question``, the choices as ``A`` to ``D`` or a list ``choices``, and ``answer``, a letter or place."""
        subject = _subject(row)
        shown = islice((other for other in context if _subject(other) == subject), self.shots)
        lead = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
        told = "\n\n".join([lead, *(f"{_asked(other)} {_answer(other)}" for other in shown), _asked(row)])
        answer = _answer(row)
        return Example(told, f" {answer}", reference=answer, choices=(" A", " B", " C", " D"))

    def part_of_group(self, row: Row) -> tuple[str, Row]:
        """Return the subject, and the question with a list of choices and the right one's place."""
        published = {"question": text_of(row, "question"), "choices": _choices(row)}
        return _subject(row).replace(" ", "_"), published | {"answer": "ABCD".index(_answer(row))}

    def grade(self, example: Example, output: str) -> dict[str, float]:
        """Take the letter that the answer begins with."""
        letter = re.match(r"\s*\(?([A-D])\b", output)
        return {"accuracy": float(letter is not None and letter[1] == reference_of(example))}


def _subject(row: Row) -> str:
    return str(row.get("subject") or str(row.get("file", "")).rpartition("_")[0] or "general knowledge")


def _asked(row: Row) -> str:
    lines = [f"{letter}. {choice.strip()}" for letter, choice in zip("ABCD", _choices(row), strict=True)]
    return "\n".join([text_of(row, "question").strip(), *lines, "Answer:"])


def _choices(row: Row) -> list[str]:
    choices: Any = row.get("choices", [row.get(letter) for letter in "ABCD"])
    if not isinstance(choices, list) or len(choices) != 4:
        raise DataError(f"field 'choices' must be a list of four, but is {choices!r:.60}.")
    named = dict(zip("ABCD", choices, strict=True))
    return [text_of(named, letter, f"choice {letter}") for letter in named]


def _answer(row: Row) -> str:
    value = row.get("answer")
    letter = "ABCD"[value : value + 1] if isinstance(value, int) and value >= 0 else str(value).strip()
    if letter not in ("A", "B", "C", "D"):
        raise DataError(f"field 'answer' is {value!r}, not one of A, B, C, D.")
    return letter
