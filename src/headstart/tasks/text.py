"""Plain examples in one of three ways: prompt and completion, question and answer, or a chat."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from headstart.errors import DataError, nearest
from headstart.tasks.base import Example, Message, Row, Task, text_of
from headstart.tasks.registry import register
from headstart.tasks.word_problems import final_number, same_number

_LAYOUTS = (("prompt", "completion"), ("question", "answer"), ("messages",))
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


@register("text")
@dataclass(frozen=True)
class Text(Task):
    """A file of one's own, in one of three ways.

    - ``prompt`` and ``completion``, as they are.
    - ``question`` and ``answer`` (GSM8K's words) become ``"Question: …\\nAnswer:"`` and ``" …"``, without GSM8K's
      calculator annotations (``<<48/2=24>>``).
    - ``messages``, a chat whose last assistant message is learned; what comes after it is left out.

    A further field in a file is an error; in a dataset of the hub it isn't looked at. An answer is right where it ends
    in the same number after ``####`` as the completion or, where that has none, in the same text.
    """

    source: ClassVar[str] = "a file of one's own"
    splits: ClassVar[Mapping[str, str]] = {}
    fields: ClassVar[tuple[str, ...]] = tuple(field for layout in _LAYOUTS for field in layout)
    metrics: ClassVar[tuple[str, ...]] = ("exact_match",)

    @property
    def stop(self) -> tuple[str, ...]:
        """A model that goes on asks itself the next question."""
        return ("Question:",)

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Make an example of a row in any of the three ways."""
        fields = _layout_of(row)
        if further := [field for field in row if field not in fields]:
            hint = nearest(further[0], fields)
            raise DataError(f"unknown field {further[0]!r} beside {_listed(fields)}.{hint} Remove it, or rename it.")
        if fields == ("messages",):
            return chat(row["messages"], "messages", "role", "content")
        prompt, completion = (text_of(row, field) for field in fields)
        if fields == ("question", "answer"):
            prompt = f"Question: {prompt.strip()}\nAnswer:"
            completion = f" {without_annotations(completion)}"
        return Example(prompt, completion, reference=final_number(completion))

    def grade(self, example: Example, output: str) -> dict[str, float]:
        """Compare the numbers after ``####``, or the whole texts."""
        output = self.cut(output)
        if example.reference is None:
            return {"exact_match": float(output.strip() == example.completion.strip())}
        return {"exact_match": float(same_number(final_number(output), example.reference))}


def without_annotations(answer: str) -> str:
    """Return a worked answer of GSM8K without what its calculator was told; raise DataError where nothing is left."""
    return text_of({"answer": _ANNOTATION.sub("", answer)}, "answer").strip()


def chat(
    value: object, field: str, role_field: str, text_field: str, roles: Mapping[str, str] | None = None
) -> Example:
    """Make an example of a list of objects with a role and a text; ``roles`` are the template's by the data's.

    The last assistant message is learned, and what comes after it left out; where there is none, DataError.
    """
    if not isinstance(value, list):
        raise DataError(f"field {field!r} must be a list, but is of type {type(value).__name__}.")
    messages = []
    for index, message in enumerate(value):
        what = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise DataError(f"{what} must be an object with {role_field!r} and {text_field!r}.")
        # A table gives every message every column: a further field that is None is no one's intent.
        further = [key for key, entry in message.items() if key not in (role_field, text_field) and entry is not None]
        if further and roles is None:
            hint = nearest(further[0], (role_field, text_field))
            raise DataError(f"{what} has the unknown field {further[0]!r}.{hint}")
        role, content = (text_of(message, key, f"{key!r} of {what}") for key in (role_field, text_field))
        if roles is not None and role not in roles:
            raise DataError(f"{what} is from {role!r}, which is none of {_listed(roles)}.")
        messages.append(Message(roles[role] if roles is not None else role, content))
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if len(messages) < 2:
        raise DataError(f"field {field!r} needs an assistant message, to be learned, after another one.")
    completion = messages[-1].content
    return Example(messages[-2].content, completion, tuple(messages), reference=final_number(completion))


def _layout_of(row: Row) -> tuple[str, ...]:
    """Return the one layout whose fields are all there; where none is, name what is missing."""
    complete = [fields for fields in _LAYOUTS if all(field in row for field in fields)]
    if len(complete) > 1:
        raise DataError(f"has both {_listed(complete[0])} and {_listed(complete[1])}; keep one of them.")
    if complete:
        return complete[0]
    for fields in _LAYOUTS:
        missing = [field for field in fields if field not in row]
        if len(missing) < len(fields):
            further = [field for field in row if field not in Text.fields]
            guesses = (f" Did you mean it by {field!r}?" for field in further if nearest(field, missing))
            raise DataError(f"field {missing[0]!r} is missing.{next(guesses, '')}")
    guess = next((text for field in row if (text := nearest(field, Text.fields))), "")
    has = f"has {_listed(list(row)[:6])}" if row else "is empty"
    raise DataError(f"needs 'prompt' and 'completion', 'question' and 'answer', or 'messages', but {has}.{guess}")


def _listed(fields: Iterable[object]) -> str:
    return " and ".join(repr(field) for field in fields)
