"""ShareGPT: conversations to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from headstart.errors import DataError
from headstart.tasks.base import Example, Row, Task
from headstart.tasks.registry import register
from headstart.tasks.text import chat

_ROLES = {"human": "user", "user": "user", "system": "system"}
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard"), "assistant")


@register("sharegpt")
@dataclass(frozen=True)
class ShareGPT(Task):
    """ShareGPT: conversations of people with ChatGPT; the last answer is learned.

    As in FastChat's training script, answers before the first question are passed over; a conversation in which one
    side speaks twice in a row is a bad row.
    """

    source: ClassVar[str] = "ShareGPT 2023; Aeala/ShareGPT_Vicuna_unfiltered"
    hub: ClassVar[str | None] = "Aeala/ShareGPT_Vicuna_unfiltered"
    splits: ClassVar[Mapping[str, str]] = {"train": "train"}
    files: ClassVar[tuple[str, ...]] = ("ShareGPT", "ShareGPT_V3_unfiltered_cleaned_split")
    max_new_tokens: ClassVar[int] = 1024

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Read ``conversations``, a list of objects with ``from`` and ``value``."""
        turns = row.get("conversations")
        while isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            if _ROLES.get(str(turns[0].get("from"))) != "assistant":
                break
            turns = turns[1:]
        example = chat(turns, "conversations", "from", "value", _ROLES)
        roles = [message.role for message in example.messages or ()]
        for before, after in pairwise(roles):
            if before == after:
                raise DataError(f"field 'conversations' has two messages of the {before} in a row.")
        return example
