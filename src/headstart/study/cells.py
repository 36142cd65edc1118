"""The cells of a study: a run for each value of each axis and each seed, in an order that fills the picture evenly."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from headstart.errors import RunError, nearest
from headstart.methods import parse_method
from headstart.runs.read import run_with
from headstart.runs.tree import Run
from headstart.study.rates import rates_of
from headstart.study.tree import RATE, START, Study, base_run, changes_of

OTHERS = "*"


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        start: what its start is called.
        setting: what the values of all other axes but the rate are called, by axis: starts are compared within one
            setting.
        rate: the peak rate.
        seed: of the run.
        run: its settings.
    """

    start: str
    setting: tuple[tuple[str, str], ...]
    rate: float
    seed: int
    run: Run

    @cached_property
    def folder(self) -> str:
        """The name of its run's folder."""
        return self.run.folder_name

    @property
    def name(self) -> str:
        """What a progress bar and a table call it."""
        words = [self.start, *(f"{axis.rpartition('.')[2]}={label}" for axis, label in self.setting)]
        return " ".join([*words, f"lr={self.rate:g}", f"seed {self.seed}"])


class Grid:
    """The axes of a study, read: what each start is called, which rates it takes, and which other settings there are.

    Attributes:
        study, base: as given, and its base run.
        starts: what the starts are called.
        reference: the one that others are compared with.
        rates: each start's, in ascending order.

    Raises:
        RunError: a value is none of a run's, two are called the same, or two axes set the same.
        MethodError: a start is no method.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.base = study, base_run(study)
        own = [self.base.start.method]
        starts = study.axes.get(START, own)
        self._starts = _labelled(START, starts)
        self.starts = tuple(self._starts)
        self.reference = study.reference or self.starts[0]
        if self.reference not in self._starts:
            hint = nearest(self.reference, self.starts)
            raise RunError(f"reference: there is no start {self.reference!r} in the study.{hint}")
        self._others = {
            axis: _labelled(axis, values) for axis, values in study.axes.items() if axis not in (START, RATE)
        }
        self._check_settings()
        self.rates = self._rates(study.axes.get(RATE, [self.base.optimizer.lr]))
        self._runs: dict[Any, Run] = {}
        self._cells: dict[Any, list[Cell]] = {}

    def cells(self, further: Mapping[str, Sequence[float]] | None = None) -> list[Cell]:
        """Return all cells: seed after seed, the rates of each from the middle and the ends to what lies between.

        Args:
            further: rates by start, beside those of the grid.

        Raises:
            RunError: a value is none of a run's; the message names the axis.
            MethodError: a start is no method.
        """
        # Whoever works on a study asks after each cell, and there may be ten thousand of them.
        added = tuple((start, tuple(rates)) for start, rates in (further or {}).items() if rates)
        if added not in self._cells:
            self._cells[added] = self._made(dict(added))
        return self._cells[added]

    def _made(self, further: Mapping[str, Sequence[float]]) -> list[Cell]:
        cells = []
        settings = list(product(*(self._others[axis].items() for axis in self._others)))
        for place, seed in enumerate(self.study.seeds):
            for start, values in product(self.starts, settings):
                rates = sorted({*self.rates[start], *further.get(start, ())})
                for level, rate in zip(_levels(len(rates)), rates, strict=True):
                    cells.append(((place, level), self._cell(start, values, rate, seed)))
        return [cell for _, cell in sorted(cells, key=lambda pair: pair[0])]

    def _cell(self, start: str, values: Sequence[tuple[str, dict[str, Any]]], rate: float, seed: int) -> Cell:
        setting = tuple((axis, label) for axis, (label, _) in zip(self._others, values, strict=True))
        if (start, setting) not in self._runs:
            self._runs[start, setting] = self._run(start, setting, values, rate)
        run = self._runs[start, setting]
        # Without validating ten thousand runs that differ in these alone.
        optimizer = run.optimizer.model_copy(update={"lr": rate})
        return Cell(start, setting, rate, seed, run.model_copy(update={"optimizer": optimizer, "seed": seed}))

    def _run(self, start: str, setting: Any, values: Sequence[tuple[str, dict[str, Any]]], rate: float) -> Run:
        changes = dict(self._starts[start])
        for _, further in values:
            changes |= further
        words = [start, *(label for _, label in setting)]
        try:
            run = run_with(self.study.base, {**changes, RATE: rate}, " ".join(words))
        except RunError:
            # Where a value is refused by itself, it is under the name of its axis.
            for key, value in changes.items():
                run_with(self.study.base, {key: value}, f"axes.{key}")
            raise
        if run.trains in ("adapter", "lora-fa"):
            parse_method(run.start.method)
        return run

    def _check_settings(self) -> None:
        """Refuse what two places of a study set, of which one would be passed over."""
        setters = {RATE: f"axes.{RATE}"} if RATE in self.study.axes else {}
        setters["seed"] = "seeds"
        for axis, values in {START: self._starts, **self._others}.items():
            for label, changes in values.items():
                for key in changes:
                    if taken := next((other for other in setters if _overlap(key, other)), None):
                        raise RunError(
                            f"axes.{axis}: {label!r} sets {key}, which {setters[taken]} sets too: leave one out."
                        )
                    if axis != START and _overlap(key, RATE):
                        raise RunError(
                            f"axes.{axis}: {label!r} sets {key}: rates are each start's own, in axes.{RATE}."
                        )
            setters |= {key: f"axes.{axis}" for changes in values.values() for key in changes}

    def _rates(self, values: Any) -> dict[str, tuple[float, ...]]:
        by_start = values if isinstance(values, Mapping) else {OTHERS: values}
        if unknown := next((start for start in by_start if start != OTHERS and start not in self._starts), None):
            raise RunError(f"axes.{RATE}: there is no start {unknown!r} in the study.{nearest(unknown, self.starts)}")
        if missing := next((start for start in self.starts if start not in by_start and OTHERS not in by_start), None):
            raise RunError(f'axes.{RATE}: start {missing!r} has no rates; "*" gives those of all that are not named.')
        base = self.base.optimizer.lr
        rates = {}
        for start, changes in self._starts.items():
            own = changes.get(RATE, by_start.get(start, by_start.get(OTHERS)))
            rates[start] = rates_of(own, base, self.reference)
        return rates


def _labelled(axis: str, values: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Return the changes of an axis's values by what each is called."""
    labelled: dict[str, dict[str, Any]] = {}
    for value in values:
        label, changes = changes_of(axis, value)
        if label in labelled:
            raise RunError(f"axes.{axis}: {label!r} is there twice: leave one out, or give them labels.")
        labelled[label] = changes
    return labelled


def _overlap(key: str, other: str) -> bool:
    """Return whether two dotted keys are one, or one is a branch that holds the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _levels(count: int) -> list[int]:
    """Return when each point of a grid has its turn: the middle, the ends, and then halves of what lies between."""
    middle, last = count // 2, count - 1
    order, gaps = [middle, 0, last], deque([(0, middle), (middle, last)])
    while gaps:
        low, high = gaps.popleft()
        if high - low > 1:
            half = (low + high) // 2
            order.append(half)
            gaps += [(low, half), (half, high)]
    turns = {point: turn for turn, point in enumerate(dict.fromkeys(order))}
    return [turns[point] for point in range(count)]
