"""The statistics of studies: starts compared, each at its own best learning rate, over seeds and over items.

The rate is chosen on the validation figure and the test figure is reported: the best of several noisy figures is better
than any of them is on average, so the figure that chose would flatter. That is gone where the noise of the two is
independent. What a run's seed does to both alike is not, and it favours a start that was tried at more rates. Give all
starts as many, or choose by other seeds than are reported: ``compared(..., choices=best_rates(other_outcomes, ...))``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean
from typing import Any

import numpy as np

from headstart.errors import DataError
from headstart.evaluation.intervals import CONFIDENCE
from headstart.study.differences import (
    Array,
    Difference,
    Interval,
    Outcome,
    paired_over_items,
    paired_over_seeds,
)

Point = tuple[float, float, int]  # rate, mean figure (the worst infinity where a seed diverged), seeds that finished


@dataclass(frozen=True)
class Choice:
    """A start's best rate.

    Attributes:
        start, rate: its label and the best rate.
        curve: the validation figure at every rate that was judged, ascending, over the same seeds; see :data:`Point`.
        edge: "low" or "high" where the best is the first or last of several rates, so that a better one may lie beyond;
            else empty.
    """

    start: str
    rate: float
    curve: tuple[Point, ...]
    edge: str


@dataclass(frozen=True)
class Comparison:
    """A start at its chosen rate, and what tells it from the reference.

    Attributes:
        start, rate: its label and its chosen rate.
        mean, seeds: of the test figure over the seeds that all starts have, and how many of them finished; the worst
            infinity where one diverged.
        interval: Student's of that mean, at 95 %; None of one seed, or of seeds that are all the same.
        over_seeds: the difference to the reference seed by seed; None without a common seed.
        over_items: the difference item by item, averaged over common seeds first; None where items are unknown.
        p: of ``decisive``, corrected by :func:`holm` for all starts, and settings, that are judged together.
        verdict: "better", "worse", "not told apart", "diverged" (at every rate a seed did), "reference", or
            "not compared" (no p can be had).
        apart: it has none of the seeds that the others are judged by, so that its mean, over its own, ranks nowhere.
    """

    start: str
    rate: float
    mean: float
    seeds: int
    interval: Interval | None = None
    over_seeds: Difference | None = None
    over_items: Difference | None = None
    p: float | None = None
    verdict: str = "diverged"
    apart: bool = False

    @property
    def decisive(self) -> Difference | None:
        """The difference that the verdict goes by: over seeds where that has a p, else over items."""
        return self.over_seeds if self.over_seeds is not None and self.over_seeds.p is not None else self.over_items


@dataclass(frozen=True)
class Robustness:
    """What a start loses at rates beside its best.

    Attributes:
        start, rate: its label and its chosen rate, its best.
        span: the lowest and highest rate around it that are nearly as good; None where the start diverged.
        open_low, open_high: the span reaches that end of the grid, so it may go on beyond.
        area: the mean excess over the start's own figure at its best rate, over the logarithm of the rate within
            ``common``, in the figure's units, positive where worse; None where that range can't be had.
        area_to_best: likewise over the figure of the best start at its best rate: ``area`` and what the start lacks.
        common: the lowest and highest rate over best rate at which all starts have figures; None where nothing is
            common, and for a start with a figure at its best rate alone, which narrows no other's range.
    """

    start: str
    rate: float
    span: Interval | None = None
    open_low: bool = False
    open_high: bool = False
    area: float | None = None
    area_to_best: float | None = None
    common: Interval | None = None


def best_rates(outcomes: Sequence[Outcome], higher_is_better: bool) -> dict[str, Choice]:
    """Return each start's rate with the best mean validation figure over the seeds that all its rates have.

    A run that diverged counts as one of its seed's, so none wins by what it was spared. Where no seed has all rates,
    the rates of the seed that has the most of them are judged. Of equals the smallest is taken.

    Raises:
        DataError: a run is there twice, or a rate is not positive.
    """
    choices = {}
    for start, runs in _by_start(outcomes).items():
        curve = _curve(_alike(runs, lambda run: run.rate), lambda run: run.validation, higher_is_better)
        best = min(curve, key=lambda at: (math.isinf(at[1]), -at[2], _loss(at[1], higher_is_better), at[0]))
        edge = "low" if best is curve[0] else "high" if best is curve[-1] else ""
        choices[start] = Choice(start, best[0], curve, edge if len(curve) > 1 else "")
    return choices


def compared(
    outcomes: Sequence[Outcome], reference: str, higher_is_better: bool, choices: Mapping[str, Choice] | None = None
) -> list[Comparison]:
    """Return one row a start at its chosen rate, the best mean test figure first, those that diverged last.

    Means are over the seeds that all starts have, where there are such, so that an easy seed ranks no start that alone
    has it; differences are over all seeds that a start and the reference have.

    Over seeds, Student's paired t takes seeds for independent and their differences for roughly normal, which few seeds
    can't show. Where all differences are equal there is no spread to judge by: no interval, and p is that of so many
    equal signs, 2 / 2^seeds, or 1 where the difference is 0.

    Over items, taken for independent, McNemar's exact test (given how many answers differ) judges right and wrong
    answers of one seed; all else the percentile bootstrap, whose intervals are too narrow of few items (of skewed
    losses 87 % held the truth at 30, 93 % at 150). Items say nothing of other seeds: where seeds have a p, it decides.

    Args:
        outcomes: of all starts.
        reference: the label of the start that the others are compared with.
        higher_is_better: of the test figure, and of the validation figure where ``choices`` are not given.
        choices: of all starts, made by other seeds or on a figure of the other direction.

    Raises:
        DataError: the reference or a choice is missing, a rate is not positive, a run is there twice or missing at its
            chosen rate, or runs differ in their items' number or weights, or have some that are not finite.
    """
    chosen = _chosen(outcomes, higher_is_better, choices)
    if reference not in chosen:
        raise DataError(f"no outcome of the reference {reference!r}: the starts are {', '.join(sorted(chosen))}.")
    alike = _by_start(_alike([run for runs in chosen.values() for run in runs], lambda run: run.start))
    counted = {start: alike.get(start, runs) for start, runs in chosen.items()}
    points = {start: _curve(runs, lambda run: run.test, higher_is_better)[0] for start, runs in counted.items()}
    rows = []
    for start, (rate, mean, seeds) in points.items():
        row = Comparison(start, rate, mean, seeds, apart=start not in alike)
        if math.isfinite(mean):
            interval = paired_over_seeds([(run.test, 0.0) for run in counted[start]]).interval
            row = replace(row, interval=interval, verdict="reference" if start == reference else "not compared")
            if start != reference and math.isfinite(points[reference][1]):
                row = _against(row, chosen[start], chosen[reference])
        rows.append(row)
    rows = judged([rows], higher_is_better)[0]
    return sorted(rows, key=lambda row: (row.apart, _loss(row.mean, higher_is_better), row.start))


def judged(settings: Sequence[Sequence[Comparison]], higher_is_better: bool) -> list[list[Comparison]]:
    """Return the rows of several settings with p corrected for all of them together, and the verdicts by that."""
    raw = [row.decisive.p for rows in settings for row in rows if row.decisive and row.decisive.p is not None]
    corrected = iter(holm(raw))

    def of(row: Comparison) -> Comparison:
        if row.decisive is None or row.decisive.p is None:
            return row
        loss, p = _loss(row.decisive.value, higher_is_better), next(corrected)
        verdict = "not told apart" if p > 1 - CONFIDENCE else "better" if loss < 0 else "worse"
        return replace(row, p=p, verdict=verdict)

    return [[of(row) for row in rows] for rows in settings]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values in the given order (Scandinavian Journal of Statistics 6, 1979).

    Where those at or under a level count as differences, the chance of even one false alarm is at most that level,
    however the tests depend on each other.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    raised = (min(1.0, (len(order) - rank) * p_values[place]) for rank, place in enumerate(order))
    adjusted = dict(zip(order, accumulate(raised, max), strict=True))
    return [adjusted[place] for place in range(len(order))]


def false_alarms(starts: int, settings: int = 1, confidence: float = CONFIDENCE) -> str:
    """Return a sentence on what chance alone would show among starts compared with the reference, in each setting."""
    chance, count = f"{100 * (1 - confidence):.3g} %", starts * settings
    if count == 1:
        return f"One start is compared with the reference: were they equal, {chance} of studies would tell them apart."
    said = f"{starts} starts are" if starts > 1 else "One start is"
    within = f", in {settings} settings each" if settings > 1 else ""
    return (
        f"{said} compared with the reference{within}: were all equal, {count * (1 - confidence):.2g} of these {count} "
        "comparisons would be expected to show a difference by chance alone if each were judged by itself; Holm's "
        f"correction raises their p-values so that even one does in at most {chance} of studies."
    )


def robustness(
    outcomes: Sequence[Outcome], within: float, higher_is_better: bool, choices: Mapping[str, Choice] | None = None
) -> dict[str, Robustness]:
    """Return how much worse each start's mean test figure is beside its chosen rate; see :class:`Robustness`.

    Between rates it is taken for linear in the logarithm of the rate; at one that diverged nothing is known, so spans
    and areas end at the last rate before it. ``within`` is how much worse is nearly as good, in the figure's units; the
    rest and the errors are :func:`compared`'s.
    """
    chosen = _chosen(outcomes, higher_is_better, choices)
    rows, curves, losses = {}, {}, {}
    for start, runs in _by_start(outcomes).items():
        rate, alike = chosen[start][0].rate, _alike(runs, lambda run: run.rate, chosen[start][0].rate)
        rows[start], curve = Robustness(start, rate), _curve(alike, lambda run: run.test, higher_is_better)
        logs = np.log([point[0] / rate for point in curve])
        heights = np.array([_loss(point[1], higher_is_better) for point in curve])
        if np.isfinite(heights[logs == 0]).all():
            losses[start] = float(heights[logs == 0][0])
            rows[start] = _spanned(rows[start], logs, heights - losses[start], within)
            part = _around(logs, np.isfinite(heights))
            if len(logs[part]) > 1:
                curves[start] = logs[part], heights[part] - losses[start]
    low = max((logs[0] for logs, _ in curves.values()), default=0.0)
    high = min((logs[-1] for logs, _ in curves.values()), default=0.0)
    for start, (logs, excess) in curves.items() if low < high else ():
        places = np.array([low, *logs[(logs > low) & (logs < high)], high])
        heights = np.interp(places, logs, excess)
        area = float(np.diff(places) @ (heights[1:] + heights[:-1]) / 2 / (high - low))
        lacks, common = losses[start] - min(losses.values()), (math.exp(low), math.exp(high))
        rows[start] = replace(rows[start], area=area, area_to_best=area + lacks, common=common)
    return rows


def to_reach(
    series: Sequence[tuple[int, float]], target: float, seconds_per_step: float, startup_seconds: float, window: int = 1
) -> tuple[int, float] | None:
    """Return the steps and the seconds until a series of losses is first at or below a target; None where it never is.

    The series is of (step, loss), ascending; the seconds are the start's own and those of the steps. ``window`` is how
    many of the last losses are averaged, at least 1; before there are so many none counts.
    """
    for end in range(window, len(series) + 1):
        if sum(loss for _, loss in series[end - window : end]) / window <= target:
            return series[end - 1][0], startup_seconds + seconds_per_step * series[end - 1][0]
    return None


def _loss(figure: float, higher_is_better: bool) -> float:
    """Return the figure turned so that less is better."""
    return -figure if higher_is_better else figure


def _by_start(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    for (start, rate, seed), count in Counter((run.start, run.rate, run.seed) for run in outcomes).items():
        if count > 1 or not 0 < rate < math.inf:
            raise DataError(f"{start!r} at rate {rate!r} with seed {seed}: give it once, at a positive rate.")
    return {start: [run for run in outcomes if run.start == start] for start in sorted({run.start for run in outcomes})}


def _alike(runs: Sequence[Outcome], group: Callable[[Outcome], Any], among: Any = None) -> list[Outcome]:
    """Return the runs of the seeds that all groups of runs have, so that their means are of the same seeds.

    Where no seed is in all groups, those groups are left that have the seed that the most have; with ``among`` a seed
    that this group has. Runs that diverged are left in any case: what is known of a rate is that it may.
    """
    groups: dict[Any, set[int]] = {}
    for run in runs:
        groups.setdefault(group(run), set()).add(run.seed)
    counts = Counter(seed for seeds in groups.values() for seed in seeds)
    known = counts.keys() if among is None else groups[among]
    first = min(known, key=lambda seed: (-counts[seed], seed))
    common = set.intersection(*(seeds for seeds in groups.values() if first in seeds))
    return [
        run
        for run in runs
        if (first in groups[group(run)] and run.seed in common) or not math.isfinite(run.test + run.validation)
    ]


def _curve(runs: Sequence[Outcome], figure: Callable[[Outcome], float], higher_is_better: bool) -> tuple[Point, ...]:
    points = []
    for rate in sorted({run.rate for run in runs}):
        figures = [figure(run) for run in runs if run.rate == rate]
        finite = [value for value in figures if math.isfinite(value)]
        # A mean of those that finished would flatter where one diverged.
        mean = fmean(finite) if len(finite) == len(figures) else _loss(math.inf, higher_is_better)
        points.append((rate, mean, len(finite)))
    return tuple(points)


def _chosen(
    outcomes: Sequence[Outcome], higher_is_better: bool, choices: Mapping[str, Choice] | None
) -> dict[str, list[Outcome]]:
    """Return each start's runs at its chosen rate."""
    choices = best_rates(outcomes, higher_is_better) if choices is None else choices
    chosen = {}
    for start, runs in _by_start(outcomes).items():
        chosen[start] = [run for run in runs if start in choices and run.rate == choices[start].rate]
        if not chosen[start]:
            raise DataError(f"{start!r} has no run at a chosen rate: choose one among those done, or give no choices.")
    return chosen


def _against(row: Comparison, runs: Sequence[Outcome], others: Sequence[Outcome]) -> Comparison:
    """Return the row with its differences, and a p that is not corrected yet."""
    by_seed = {run.seed: run for run in others}
    pairs = [(run, by_seed[run.seed]) for run in sorted(runs, key=lambda run: run.seed) if run.seed in by_seed]
    over_seeds = paired_over_seeds([(run.test, other.test) for run, other in pairs]) if pairs else None
    over_items = paired_over_items([pair for pair in pairs if pair[0].items and pair[1].items])
    row = replace(row, over_seeds=over_seeds, over_items=over_items)
    return row if row.decisive is None else replace(row, p=row.decisive.p)


def _around(logs: Array, good: Array) -> slice:
    """Return the unbroken row of good rates that the best is in, whose logarithm is 0."""
    best, bad = int(np.flatnonzero(logs == 0)[0]), np.flatnonzero(~good)
    return slice(max(bad[bad < best], default=-1) + 1, min(bad[bad > best], default=len(logs)))


def _spanned(row: Robustness, logs: Array, excess: Array, within: float) -> Robustness:
    ends = []
    part = _around(logs, excess <= within)
    for last, step in ((part.start, -1), (part.stop - 1, 1)):
        is_open = not 0 <= last + step < len(logs)
        near = [last] if is_open else [last, last + step]
        ends.append((row.rate * math.exp(np.interp(within, excess[near], logs[near])), is_open))
    (low, open_low), (high, open_high) = ends
    return replace(row, span=(low, high), open_low=open_low, open_high=open_high)
