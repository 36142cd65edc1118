"""Word problems made on the spot: a task that needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from headstart.tasks.base import Row
from headstart.tasks.registry import register
from headstart.tasks.text import Text
from headstart.tasks.word_problems import Split, generate_problems


@register("problems")
@dataclass(frozen=True)
class Problems(Text):
    """Grade-school word problems, made from templates; no problem of one split is in the other, whatever the seeds.

    Attributes:
        size: how many there are of a split, 1000 by default.
        seed: which; the same seed gives the same, and a smaller size the first of a larger one's.
    """

    source: ClassVar[str] = "generated here (headstart.tasks.word_problems); worked as GSM8K's are, ending in '#### N'"
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "test"}
    max_new_tokens: ClassVar[int] = 96

    size: int = 1000
    seed: int = 0

    def own_rows(self, split: str) -> Sequence[Row]:
        """Return the problems of a split; raise DataError where there aren't so many."""
        return generate_problems(self.size, seed=self.seed, split=cast(Split, split))
