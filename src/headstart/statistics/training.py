"""What the verb reads: batches or a dataset, and what they tell of the fine-tuning to come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from itertools import count as counted_up
from typing import Any

from headstart.errors import MethodError
from headstart.methods.base import Training
from headstart.processes import Processes, digest
from headstart.statistics.batches import Collator, size_of
from headstart.statistics.kept import KeptStatistics
from headstart.statistics.runs import Loss


@dataclass(frozen=True)
class TrainingData:
    """The fine-tuning data, as a start reads them.

    Attributes:
        batches: an iterable of batches, or, with ``collator``, a dataset of single samples; None for no data.
        collator: makes a batch of a list of samples.
        batch_size: samples a batch, where a collator is given.
        loss: computes a batch's loss, (model, batch) -> a scalar, in place of the model.
        single: each batch is one sample, whatever its tensors hold.
        training: what is known of the fine-tuning to come.
        kept: where what is read of these data is kept for other starts; None for nowhere.
    """

    batches: Iterable[Any] | None = None
    collator: Collator | None = None
    batch_size: int = 8
    loss: Loss | None = None
    single: bool = False
    training: Training = field(default_factory=Training)
    kept: KeptStatistics | None = None

    def __post_init__(self) -> None:
        if not self.batch_size > 0:
            raise MethodError(f"batch_size={self.batch_size!r} must be positive.")

    @classmethod
    def of(
        cls, data: object, collator: Collator | None, batch_size: int, loss: Loss | None, processes: Processes
    ) -> TrainingData:
        """Return what a user gave as data, with the number of samples where that can be known without reading them.

        Raises:
            MethodError: ``batch_size`` is not positive.
        """
        if isinstance(data, TrainingData):
            return data
        batches: Any = data
        training = Training(_known_length(batches, collator, processes))
        return cls(batches, collator, batch_size, loss, training=training)

    def copies(self, count: int) -> list[TrainingData]:
        """Return so many of itself, each of which reads the same data from the beginning.

        Also where they can be iterated once only, or come in another order each time, as a loader's that shuffles.
        """
        if count == 1 or self.batches is None or isinstance(self.batches, list | tuple | _Replayed):
            return [self] * count
        return [replace(self, batches=_Replayed(self.batches))] * count

    def twice(self) -> tuple[TrainingData, TrainingData]:
        """Return two of itself: one to keep, one to read."""
        first, second = self.copies(2)
        return first, second


def _known_length(data: Iterable[Any] | None, collator: object, processes: Processes) -> int | None:
    """Return how many samples the data hold, where that can be known without reading them."""
    if collator is None and isinstance(data, list | tuple):
        # The lists of several processes may be the same one, or parts of it.
        first = digest(dict(data[0])) if processes.several and data and isinstance(data[0], Mapping) else ""
        sizes = processes.gather((sum(size_of(batch) for batch in data), first))
        same = len({first for _, first in sizes}) == 1
        return sizes[0][0] if same else sum(size for size, _ in sizes)
    # The length of a loader itself is a number of batches; the data set of one that is divided is whole.
    counted = data if collator is not None else getattr(data, "dataset", None)
    return len(counted) if isinstance(counted, Sized) else None


class _Replayed:
    """Data that are iterated once, as far as any reader gets: what one has read, others read again from memory."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._rest: Iterator[Any] | None = None
        self._items: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for place in counted_up():
            if place == len(self._items):
                if self._rest is None:
                    self._rest = iter(self._data)
                try:
                    item = next(self._rest)
                except StopIteration:
                    return
                self._items.append(item)
            yield self._items[place]
