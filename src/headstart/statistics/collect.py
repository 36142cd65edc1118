"""Collecting what a method wants: moments of the weights, and planned passes over the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import nn

from headstart.context import Context
from headstart.errors import DataError, LayerError, MethodError
from headstart.layers.convolutions import ConvLayer
from headstart.layers.experts import ExpertLayer
from headstart.layers.original import Original
from headstart.layers.parts import Part
from headstart.layers.weights import model_device
from headstart.methods.base import Method, Wants
from headstart.statistics.collector import Collector
from headstart.statistics.gather import Statistics
from headstart.statistics.moments import kind_moments
from headstart.statistics.plan import parse_bytes
from headstart.statistics.prepare import prepare
from headstart.statistics.routed import routed_layers
from headstart.statistics.stacks import stacks_of
from headstart.statistics.training import TrainingData

# Of memory, for what is known to fit.
_NO_LIMIT = 2**62


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
    model: nn.Module,
    parts: Sequence[Part],
    data: TrainingData,
    preserve: TrainingData,
    reading: Reading,
    context: Context,
) -> Iterator[tuple[Part, Statistics]]:
    """Yield what each part's method wants, pass by pass; free each item before asking for the next.

    First of all come the layers that no data are needed for, and with them every refusal; of each part that wants data,
    the passes over them follow.

    Raises:
        DataError, MethodError: see below.
    """
    copies = zip(parts, data.copies(len(parts)), preserve.copies(len(parts)), strict=True)
    of_parts = [_of_part(model, part, own, kept, reading, context) for part, own, kept in copies]
    for passes in (1, None):
        for part, statistics in zip(parts, of_parts, strict=True):
            yield from ((part, item) for item in islice(statistics, passes))


def _of_part(
    model: nn.Module, part: Part, data: TrainingData, preserve: TrainingData, reading: Reading, context: Context
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
    _check_given(method, wants, data, preserve)
    measured = [layer for layer in layers if wants[layer.name].moments]
    quantised = [layer for layer in layers if wants[layer.name].original]
    path = wants[quantised[0].name].model_path if quantised else None
    original = Original.open(model, quantised, path) if quantised else None
    yield Statistics(
        original=original,
        layers=tuple(name for name in wants if name not in read_for),
        moments=kind_moments((layer.kind, layer.weight()) for layer in measured),
    )
    to_learn = {name: wanted for name, wanted in read_for.items() if wanted.task}
    to_keep = {name: Wants(inputs=True, tokens=wanted.tokens) for name, wanted in read_for.items() if wanted.preserved}
    passes = _Passes(model, part, reading, context)
    if to_learn:
        # Each of the two gets half of the memory where both are read.
        for statistics in passes.over(data, to_learn, shared=bool(to_keep)):
            names = [name for name in statistics.layers if name in to_keep]
            if names:
                preserve, again = preserve.twice()
                _add_preserved(statistics, passes.at_once(again, {name: to_keep[name] for name in names}))
            statistics.original = original
            yield statistics
    alone = {name: wanted for name, wanted in to_keep.items() if name not in to_learn}
    if alone:
        for statistics in passes.over(preserve, alone, shared=False):
            statistics.preserved, statistics.kronecker = statistics.kronecker, {}
            yield statistics


def _check_given(method: Method, wants: Mapping[str, Wants], data: TrainingData, preserve: TrainingData) -> None:
    """Refuse data that are missing, and settings that leave no layer to read them for."""
    to_learn = [wanted for wanted in wants.values() if wanted.task]
    to_keep = [wanted for wanted in wants.values() if wanted.preserved]
    if (method.reads_task or to_learn) and data.batches is None:
        labels = " with labels" if any(wanted.backward for wanted in to_learn) else ""
        raise DataError(f"method {method.name!r} needs data: give batches{labels} as data=.")
    if (method.reads_preserved or to_keep) and preserve.batches is None:
        raise DataError(
            f"method {method.name!r} needs data of the ability that is to stay: give batches of it as preserve=."
        )
    if method.reads_data and not to_learn and not to_keep:
        raise MethodError(f"method '{method}' leaves out every layer that the adapter has; change its setting layers.")
    if to_learn:
        method.sample_count(data.training.population)  # which may refuse data whose size isn't known


class _Passes:
    """Reads data for one part's layers."""

    def __init__(self, model: nn.Module, part: Part, reading: Reading, context: Context) -> None:
        self._model, self._part, self._reading, self._context = model, part, reading, context

    def over(self, data: TrainingData, wants: Mapping[str, Wants], *, shared: bool) -> Iterator[Statistics]:
        """Yield what is wanted, in as many passes as memory makes it; ``shared`` plans for half of it."""
        budget = self._reading.memory_budget
        if shared:
            where = torch.device("cpu") if self._reading.offload == "cpu" else model_device(self._model)
            budget = parse_bytes(budget, where) // 2
        for statistics in self._kept_or_read(data, wants, budget):
            self._context.notes += statistics.notes
            yield statistics

    def _kept_or_read(
        self, data: TrainingData, wants: Mapping[str, Wants], budget: int | str | None
    ) -> Iterator[Statistics]:
        """Yield what is wanted, from where it is kept for several starts if it is."""

        def read(wanted: Mapping[str, Wants]) -> Iterator[Statistics]:
            collector = self._prepared(data, wanted, budget)
            for statistics in collector.passes(self._context.show):
                statistics.plan = str(collector.plan)
                yield statistics

        layers = {layer.name: layer.facts() for layer in self._part.layers}
        kept = None if self._context.processes.several else data.kept
        common = kept and kept.common(self._part.method, list(layers.values()), data.training.population)
        if not kept or not common:
            yield from read(wants)
            return
        for statistics, seconds in kept.passes(common, wants, layers, read, self._context.show):
            # A start costs its reading, whichever of them it was read for.
            self._context.clock.seconds["collect"] = self._context.clock.seconds.get("collect", 0.0) + seconds
            yield statistics

    def at_once(self, data: TrainingData, wants: Mapping[str, Wants]) -> Statistics:
        """Return what is wanted of layers that are all read in one pass."""
        (statistics,) = self._prepared(data, wants, _NO_LIMIT).passes(self._context.show)
        self._context.notes += statistics.notes
        return statistics

    def _prepared(self, data: TrainingData, wants: Mapping[str, Wants], budget: int | str | None) -> Collector:
        layers, method = self._part.layers, self._part.method
        assert data.batches is not None
        return prepare(
            self._model,
            {layer.name: layer.module for layer in layers if not isinstance(layer, ExpertLayer | ConvLayer)},
            wants,
            data.batches,
            method.sample_count(data.training.population),
            collator=data.collator,
            batch_size=data.batch_size,
            memory_budget=budget,
            offload=self._reading.offload,
            seed=self._context.seed,
            processes=self._context.processes,
            adapter=layers[0].adapter,
            loss=data.loss,
            single=data.single,
            stacks=stacks_of([layer for layer in layers if layer.name in wants]),
            experts=routed_layers(
                [layer for layer in layers if layer.name in wants and wants[layer.name].input_moments]
            ),
        )


def _add_preserved(statistics: Statistics, kept: Statistics) -> None:
    """Add the moments of data to preserve to those of the data to learn, of which each process solves the same layers.

    Raises:
        LayerError: the layers were shared out differently, as their inputs are grouped differently.
    """
    for name, owner in kept.owners.items():
        if statistics.owners[name] != owner:
            raise LayerError(
                f"layer {name!r} reads its input together with other layers in one set of data and not in the other; "
                "initialise in one process."
            )
    statistics.preserved = kept.kronecker
