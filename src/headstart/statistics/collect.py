"""Collecting what a method wants: moments of the weights, and planned passes over the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from torch import nn

from headstart.context import Context
from headstart.errors import DataError, MethodError
from headstart.layers.original import Original
from headstart.layers.parts import Part
from headstart.statistics.gather import Statistics
from headstart.statistics.moments import kind_moments
from headstart.statistics.prepare import prepare
from headstart.statistics.training import TrainingData


@dataclass(frozen=True)
class Reading:
    """How data are read.

    Attributes:
        memory_budget: bytes for what a pass over the data sums, or a string such as "6GiB"; None for half of what is
            free.
        offload: "cpu" keeps these sums in CPU memory.
    """

    memory_budget: int | str | None = None
    offload: Literal["cpu"] | None = None

    def __post_init__(self) -> None:
        if self.offload not in (None, "cpu"):
            raise MethodError(f"offload={self.offload!r} is not one of None, 'cpu'.")


def collect(
    model: nn.Module, parts: Sequence[Part], data: TrainingData, reading: Reading, context: Context
) -> Iterator[tuple[Part, Statistics]]:
    """Yield what each part's method wants, pass by pass; free each item before asking for the next.

    First of all come the layers that no data are needed for, and with them every refusal; of each part that wants data,
    the passes over them follow.

    Raises:
        DataError, MethodError: see below.
    """
    copies = data.copies(len(parts))
    of_parts = [_of_part(model, part, own, reading, context) for part, own in zip(parts, copies, strict=True)]
    for passes in (1, None):
        for part, statistics in zip(parts, of_parts, strict=True):
            yield from ((part, item) for item in islice(statistics, passes))


def _of_part(
    model: nn.Module, part: Part, data: TrainingData, reading: Reading, context: Context
) -> Iterator[Statistics]:
    """Yield what a method wants of its layers.

    The first item is for those that no data are needed for; it holds no more than moments of the weights, and where
    those lie that quantisation has changed.

    Raises:
        DataError: data are wanted and there are none, or see :func:`headstart.statistics.prepare.prepare`.
        MethodError: no layer is left that the method's settings choose.
    """
    method, layers = part.method, part.layers
    wants = {layer.name: method.wants(layer.facts()) for layer in layers}
    read_for = {name: wanted for name, wanted in wants.items() if wanted.data}
    reads = method.reads_data or bool(read_for)
    if reads and data.batches is None:
        labels = " with labels" if any(wanted.backward for wanted in read_for.values()) else ""
        raise DataError(f"method {method.name!r} needs data: give batches{labels} as data=.")
    if reads and not read_for:
        raise MethodError(f"method '{method}' leaves out every layer that the adapter has; change its setting layers.")
    samples = method.sample_count(data.training.population) if read_for else 0
    measured = [layer for layer in layers if wants[layer.name].moments]
    quantised = [layer for layer in layers if wants[layer.name].original]
    path = wants[quantised[0].name].model_path if quantised else None
    original = Original.open(model, quantised, path) if quantised else None
    yield Statistics(
        original=original,
        layers=tuple(name for name in wants if name not in read_for),
        moments=kind_moments((layer.kind, layer.weight()) for layer in measured),
    )
    if data.batches is None or not read_for:
        return
    collector = prepare(
        model,
        {layer.name: layer.module for layer in layers},
        read_for,
        data.batches,
        samples,
        collator=data.collator,
        batch_size=data.batch_size,
        memory_budget=reading.memory_budget,
        offload=reading.offload,
        seed=context.seed,
        processes=context.processes,
        adapter=layers[0].adapter,
        loss=data.loss,
        single=data.single,
    )
    for statistics in collector.passes(context.show):
        context.notes += statistics.notes
        statistics.plan = str(collector.plan)
        statistics.original = original
        yield statistics
