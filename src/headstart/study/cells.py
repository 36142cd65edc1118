"""The cells of a study: a run for each value of each axis and each seed, in an order that fills the picture evenly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        RunError: a value is none of a run's, or two are called the same.
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
        self.rates = self._rates(study.axes.get(RATE, [self.base.optimizer.lr]))
        self._runs: dict[Any, Run] = {}

    def cells(self, further: Mapping[str, Sequence[float]] | None = None) -> list[Cell]:
        """Return all cells: seed after seed, the rates of each from the middle and the ends to what lies between.

        Args:
            further: rates by start, beside those of the grid.

        Raises:
            RunError: a value is none of a run's; the message names the axis.
            MethodError: a start is no method.
        """
        cells = []
        settings = list(product(*(self._others[axis].items() for axis in self._others)))
        for place, seed in enumerate(self.study.seeds):
            for start, values in product(self.starts, settings):
                rates = sorted({*self.rates[start], *(further or {}).get(start, ())})
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
        for key, value in changes.items():
            # So that what a run refuses is refused under the axis's own name.
            run_with(self.study.base, {key: value}, f"axes.{key}")
        words = [start, *(label for _, label in setting)]
        run = run_with(self.study.base, {**changes, RATE: rate}, " ".join(words))
        if run.trains in ("adapter", "lora-fa"):
            parse_method(run.start.method)
        return run

    def _rates(self, values: Any) -> dict[str, tuple[float, ...]]:
        by_start = values if isinstance(values, Mapping) else {OTHERS: values}
        if unknown := next((start for start in by_start if start != OTHERS and start not in self._starts), None):
            raise RunError(f"axes.{RATE}: there is no start {unknown!r} in the study.{nearest(unknown, self.starts)}")
        if missing := next((start for start in self.starts if start not in by_start and OTHERS not in by_start), None):
            raise RunError(f'axes.{RATE}: start {missing!r} has no rates; "*" gives those of all that are not named.')
        base = self.base.optimizer.lr
        return {
            start: rates_of(by_start.get(start, by_start.get(OTHERS)), base, self.reference) for start in self.starts
        }


def _labelled(axis: str, values: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Return the changes of an axis's values by what each is called."""
    labelled: dict[str, dict[str, Any]] = {}
    for value in values:
        label, changes = changes_of(axis, value)
        if label in labelled:
            raise RunError(f"axes.{axis}: {label!r} is there twice: leave one out, or give them labels.")
        labelled[label] = changes
    return labelled


def _levels(count: int) -> list[int]:
    """Return when each point of a grid has its turn: the middle, the ends, and then halves of what lies between."""
    levels = [0] * count
    queue, turn = [(0, count - 1)], 1
    levels[count // 2] = 0
    done = {count // 2}
    for end in (0, count - 1):
        if end not in done:
            levels[end], turn = turn, turn + 1
            done.add(end)
    while queue:
        low, high = queue.pop(0)
        middle = (low + high + 1) // 2
        if middle not in done:
            levels[middle], turn = turn, turn + 1
            done.add(middle)
        if high - low > 1:
            queue += [(low, middle), (middle, high)] if low < middle < high else []
    return levels
