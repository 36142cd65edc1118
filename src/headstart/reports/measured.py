"""What the cells of a study measured, gathered for tables and charts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from statistics import fmean
from typing import Any

from headstart.errors import HeadstartError
from headstart.methods import parse_method
from headstart.runs.result import Result
from headstart.study.cells import Cell
from headstart.study.differences import Interval
from headstart.study.results import figure_of, value
from headstart.study.statistics import Comparison
from headstart.study.summary import Part, Summary

Pair = tuple[Cell, Result]

# Curves that one chart holds and one legend tells apart.
MOST_STARTS = 10


@dataclass(frozen=True)
class Spread:
    """Several seeds' figure.

    Attributes:
        mean: of the seeds; the worst infinity where one diverged, as of :data:`headstart.study.statistics.Point`.
        low, high: the least and the greatest of those that finished.
        count: how many finished.
    """

    mean: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """Return the spread of figures; None where none is known."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    finite = [value for value in known if math.isfinite(value)]
    worst = next((value for value in known if math.isinf(value)), None)
    ends = (min(finite), max(finite)) if finite else (math.nan, math.nan)
    return Spread(fmean(finite) if worst is None else worst, *ends, len(finite))


def ended(part: Part) -> dict[str, dict[float, list[Pair]]]:
    """Return by start and rate, ascending, the cells with a result that counts."""
    by_start: dict[str, dict[float, list[Pair]]] = {}
    for cell, result in part.cells:
        if result is not None and result.status != "failed":
            by_start.setdefault(cell.start, {}).setdefault(cell.rate, []).append((cell, result))
    return {start: dict(sorted(by_rate.items())) for start, by_rate in by_start.items()}


def figures(pairs: Iterable[Pair], figure: str, when: str = "end") -> list[float]:
    """Return a figure of each cell, as :func:`headstart.study.results.value` does."""
    return [value(result, figure, when) for _, result in pairs]


def standings(summary: Summary, part: Part, figure: str | None = None) -> list[Comparison]:
    """Return the starts at their best rates, the best first; those that can't be compared yet, too."""
    figure = figure or summary.first
    rows = list(part.compared.get(figure, ()))
    for start in part.choices:
        if not any(row.start == start for row in rows):
            point = spread(figures(part.at_best(start), figure))
            if point is not None:
                verdict = "not compared" if math.isfinite(point.mean) else "diverged"
                rows.append(Comparison(start, part.choices[start].rate, point.mean, point.count, verdict=verdict))
    higher = summary.better.get(figure, False)
    return sorted(rows, key=lambda row: (row.apart, -row.mean if higher else row.mean))


def own_interval(summary: Summary, part: Part, row: Comparison, figure: str) -> Interval | None:
    """Return the interval of a start's figure: over seeds, or of one seed over its items."""
    if row.interval is not None or row.seeds != 1 or summary.seeds > 1:
        return row.interval
    for _, result in part.at_best(row.start):
        known = figure_of(result, figure)
        if known is not None and known.low is not None and known.high is not None:
            return known.low, known.high
    return None


@dataclass(frozen=True)
class Cost:
    """What a start costs at its best rate, on average over seeds; None of what isn't known.

    Attributes:
        trainable: how many numbers train.
        start, training, measurement: seconds.
        memory: peak bytes, of the accelerator where there is one.
        cached: the start was found in the cache, at least in part.
        read_together: its data were read for other starts at the same time.
    """

    trainable: int | None
    start: float | None
    training: float | None
    measurement: float | None
    memory: float | None
    cached: bool
    read_together: bool

    @property
    def share(self) -> float | None:
        """What part of the time of start and training the start is."""
        if self.start is None or self.training is None or not self.start + self.training:
            return None
        return self.start / (self.start + self.training)


def cost(pairs: Sequence[Pair]) -> Cost:
    """Return what cells of one start cost."""
    results = [result for _, result in pairs]
    return Cost(
        next((result.trainable for result in results if result.trainable), None),
        _mean(result.start.get("seconds") for result in results),
        _mean(result.seconds.get("training") for result in results),
        _mean(result.seconds.get("measurement") for result in results),
        _mean((result.memory.get("device") or result.memory.get("resident")) for result in results),
        any(result.start.get("cached") for result in results),
        any(result.start.get("read_for") for result in results),
    )


def drawn_starts(summary: Summary, most: int = MOST_STARTS) -> list[str]:
    """Return the starts that charts with curves draw: all, or the reference and those that are best in some setting."""
    starts = list(summary.grid.starts)
    if len(starts) <= most:
        return starts
    places = {start: len(starts) for start in starts}
    for part in summary.parts:
        for place, row in enumerate(standings(summary, part)):
            places[row.start] = min(places[row.start], place)
    places[summary.grid.reference] = -1
    best = set(sorted(starts, key=lambda start: places[start])[:most])
    return [start for start in starts if start in best]


def left_out(summary: Summary, shown: int) -> str:
    """Return a sentence on the starts that charts leave out; empty where they show all."""
    total = len(summary.grid.starts)
    return "" if shown >= total else f"Of {total:,} starts the {shown} best are drawn; tables have all."


def at(run: Any, axis: str) -> Any:
    """Return a setting of a run by its dotted key."""
    for name in ("start.method" if axis == "start" else axis).split("."):
        run = getattr(run, name, None)
    return run


def axis_value(cell: Cell, result: Result | None, axis: str) -> float | None:
    """Return the number that an axis has in a cell; None where it is none."""
    number = at(cell.run, axis)
    if number is None and axis == "data.train_examples" and result is not None:
        number = result.data.get("train", {}).get("examples")
    return float(number) if isinstance(number, int | float) and not isinstance(number, bool) else None


def other_axes(summary: Summary) -> list[str]:
    """Return the axes beside start and rate."""
    return list(dict.fromkeys(axis for part in summary.parts for axis, _ in part.setting))


@dataclass(frozen=True)
class Family:
    """Starts of one method that differ in one number alone.

    Attributes:
        method: its name, with what else was set.
        setting: the number's name.
        members: (number, start), ascending.
    """

    method: str
    setting: str
    members: tuple[tuple[float, str], ...]


def families(part: Part) -> list[Family]:
    """Return the starts of one setting that differ in a number of their method alone."""
    groups: dict[tuple[str, ...], dict[float, str]] = {}
    cells = {cell.start: cell for cell, _ in reversed(part.cells)}
    for start in reversed(cells):
        cell = cells[start]
        name, settings = _method_settings(cell.run.start.method)
        around = json.dumps(
            cell.run.model_dump(mode="json", exclude={"optimizer": {"lr"}, "seed": True, "start": {"method"}})
        )
        for setting, number in settings.items():
            if isinstance(number, int | float) and not isinstance(number, bool):
                rest = json.dumps({key: repr(kept) for key, kept in settings.items() if key != setting})
                groups.setdefault((name, setting, rest, around), {}).setdefault(float(number), start)
    return [
        Family(key[0], key[1], tuple(sorted(members.items()))) for key, members in groups.items() if len(members) > 1
    ]


def method_name(cell: Cell) -> str:
    """Return the name of a cell's method, without its settings."""
    return _method_settings(cell.run.start.method)[0]


@lru_cache(maxsize=1024)
def _method_settings(text: str) -> tuple[str, dict[str, Any]]:
    try:
        method = parse_method(text)
    except HeadstartError:  # of a package that isn't installed here
        return text.partition(":")[0], {}
    return method.name, {field.name: getattr(method, field.name) for field in fields(method)}


def _mean(values: Iterable[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return fmean(known) if known else None
