"""What a task is: a frozen dataclass of settings that makes examples of rows and grades what a model answers.

A task lives in a file of its own or with its family, is found there by :func:`headstart.tasks.registry.register`, and
says nothing of reading, which is :func:`headstart.tasks.rows.read`'s and alike for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

from headstart.errors import DataError, TaskError
from headstart.settings import check_types, spell

Kind = Literal["text", "classification", "regression"]
Row = Mapping[str, object]
# Runs a program and tells whether it came to its end without an error.
Run = Callable[[str], bool]


@dataclass(frozen=True)
class Message:
    """One message of a chat: ``role`` is one that the template knows, such as system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """What is given, what is to be learned, and what an answer is graded by.

    Attributes:
        prompt: the text before the completion; of a classification, the text; of a chat, which only a tokenizer can
            render, its last message before the completion.
        completion: the text to learn, with the blank before it where there is one; empty where the data hold none.
        messages: the chat up to and with its last assistant message, which is the completion; None for plain text.
        pair: the second text of a pair that is classified.
        label: of a classification the place in the task's ``labels``, of a regression the number.
        reference: what an answer is graded by, of plain types; None where there is nothing.
        choices: completions that compete for likelihood; ``completion`` is one of them.
        where: file and line, or dataset and row.
    """

    prompt: str
    completion: str = ""
    messages: tuple[Message, ...] | None = None
    pair: str | None = None
    label: int | float | None = None
    reference: Any = None
    choices: tuple[str, ...] = ()
    where: str = ""

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [{"role": message.role, "content": message.content} for message in self.messages or ()]


@dataclass(frozen=True)
class Task(ABC):
    """Base of all tasks: a frozen dataclass whose fields are its settings; of the class are the names below."""

    name: ClassVar[str]  # on the command line
    source: ClassVar[str] = ""  # paper, dataset, rows
    hub: ClassVar[str | None] = None  # owner/name or owner/name:configuration
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "test"}  # to the hub's; every name where empty
    files: ClassVar[tuple[str, ...]] = ()  # further names that its files and folders go by, as published
    columns: ClassVar[tuple[str, ...]] = ()  # of its tables, where they come without a header
    fields: ClassVar[tuple[str, ...]] = ()  # the only ones of a hub's row that are looked at; all where empty
    labels: ClassVar[tuple[str, ...]] = ()  # the classes' names in the order of their numbers
    metrics: ClassVar[tuple[str, ...]] = ()  # the headline first; where there is none, held-out loss is all there is
    together: ClassVar[bool] = False  # metrics are of all items at once (score), not means of the items' (grade)
    max_new_tokens: ClassVar[int] = 256  # of an answer
    lm_eval: ClassVar[str | None] = None  # the task of lm-eval that asks the same items, in its own prompt
    needs: ClassVar[tuple[str, ...]] = ()  # modules that grading imports
    runs_code: ClassVar[bool] = False  # answers are programs; grade_samples wants something that runs them

    def __post_init__(self) -> None:
        """Check that every setting has the type that its field declares."""
        check_types(f"task {self.name!r}", self, TaskError)

    @property
    def kind(self) -> Kind:
        """What a model is to give: text (default), one of ``labels``, or a number."""
        return "text"

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer; they and what follows don't count."""
        return ()

    @property
    def shown_split(self) -> str | None:
        """The split whose rows every example is given as its context, for few-shot prompts; None (default) for none."""
        return None

    def patterns(self, split: str) -> tuple[str, ...]:
        """Return the names that a folder may have for a split's files, without their endings, the best first."""
        there = self.splits.get(split, split)
        words = list(dict.fromkeys([split, there, *(("dev", "valid", "val") if there == "validation" else ())]))
        names = (self.name, *self.files)
        own = [f"{name}{mark}{word}" for name in names for mark in "./_-" for word in words]
        # A file without a split in its name may be any; of a task with one split it can be that alone.
        return (*own, *words, *(names if len(self.splits) == 1 else ()), f"{split}/*/*")

    def own_rows(self, split: str) -> Sequence[Row] | None:
        """Return the rows of a task that makes its data itself; None (default) for all others."""
        return None

    @abstractmethod
    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Make an example of a row as the published files or the hub have it; ``context`` is of ``shown_split``.

        Raises:
            DataError: a field is missing, empty or of the wrong type; the message names it.
        """

    def part_of_group(self, row: Row) -> tuple[str, Row]:
        """Return the dataset that a row belongs to of those that lm-eval's group reads, and the row as it has it.

        Raises:
            DataError: the row doesn't say; of a task that lm-eval has no group for, always.
        """
        raise DataError(f"task {self.name!r} isn't in parts")

    def check(self) -> None:
        """Raise TaskError, before a model is loaded, where a package that grading needs isn't installed."""
        for module in self.needs:
            if find_spec(module) is None:
                raise TaskError(f'grading task {self.name!r} needs {module}: pip install "headstart[eval]".')

    def cut(self, output: str) -> str:
        """Return an answer up to the first of the texts that end it."""
        return min((output.partition(end)[0] for end in self.stop), key=len, default=output)

    def grade(self, example: Example, output: str) -> dict[str, float]:
        """Return one number a metric for one answer; by default none.

        Raises:
            DataError: the example has no reference.
        """
        return {}

    def grade_samples(self, example: Example, outputs: Sequence[str], run: Run | None = None) -> dict[str, float]:
        """Return one number a metric for several answers to one item: by default means; ``run`` runs programs."""
        marks = [self.grade(example, output) for output in outputs]
        return {metric: sum(mark[metric] for mark in marks) / len(marks) for metric in (marks[0] if marks else ())}

    def prediction(self, output: str) -> float:
        """Return the label or number that an answer in words gives, of text tasks that are graded together."""
        raise TaskError(f"task {self.name!r} has no labels that an answer could name.")

    def score(self, predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
        """Return the metrics of all items together: of classes' numbers or of a regression's.

        Raises:
            DataError: there are none, or not as many of one as of the other.
        """
        raise TaskError(f"task {self.name!r} is graded answer by answer.")

    def record(self, example: Example, outputs: Sequence[str], marks: Mapping[str, float]) -> dict[str, Any]:
        """Return what is kept of an item, in plain types."""
        kept = {key: getattr(example, key) for key in ("where", "prompt", "reference", "label")}
        return kept | {"outputs": list(outputs), "marks": dict(marks)}

    def __str__(self) -> str:
        """Return the name and the settings that differ from their defaults, as ``parse_task`` reads them."""
        return spell(self.name, self)


def reference_of(example: Example) -> Any:
    """Return what an answer is graded by; raise DataError where there is nothing."""
    if example.reference is None:
        raise DataError(f"{example.where or 'an example'}: there is nothing in it to grade an answer by.")
    return example.reference


def text_of(row: Row, field: str, what: str | None = None) -> str:
    """Return a field that must be there, text, and not blank, or raise DataError; ``what`` is what messages call it."""
    what, value = what or f"field {field!r}", row.get(field)
    if field not in row:
        raise DataError(f"{what} is missing; the row has {', '.join(map(repr, list(row)[:8])) or 'no field at all'}.")
    if not isinstance(value, str):
        raise DataError(f"{what} must be text, but is of type {type(value).__name__}.")
    if not value.strip():
        raise DataError(f"{what} is empty.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half of a surrogate pair, which is no character.") from error
    return value
