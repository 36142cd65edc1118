"""What a study shows: within each setting, the starts each at its own best rate, compared; for tables and pages."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from headstart.errors import RunError, nearest
from headstart.runs.folder import ITEMS, LOSSES
from headstart.runs.result import Result
from headstart.study.cells import Cell, Grid
from headstart.study.differences import Outcome
from headstart.study.results import Results, Snapshot, all_cells, chosen_by, higher_is_better, outcomes
from headstart.study.statistics import (
    Choice,
    Comparison,
    Robustness,
    best_rates,
    compared,
    false_alarms,
    judged,
    robustness,
    to_reach,
)

# How much worse than a start's best is nearly as good: of a loss in nats, of all else in the figure's units.
WITHIN_LOSS, WITHIN = 0.01, 0.01
# A training loss is a batch's, and batches differ, so it is only compared in means of so many.
_FEWEST = 5


@dataclass(frozen=True)
class Part:
    """The cells of one setting, which differ in start, rate and seed alone.

    Attributes:
        setting: what the values of the other axes are called, by axis; empty where there are none.
        cells: with their results; None of those that have none yet.
        choices: each start's best rate, of the starts that have finished cells.
        compared: by reported figure, the starts at their best rates, the best first.
        robustness: how each start's figure, the first reported one, changes with the rate.
    """

    setting: tuple[tuple[str, str], ...]
    cells: list[tuple[Cell, Result | None]]
    choices: dict[str, Choice]
    compared: dict[str, list[Comparison]]
    robustness: dict[str, Robustness]

    @property
    def name(self) -> str:
        """The setting in words; empty where there is one only."""
        return ", ".join(f"{axis.rpartition('.')[2]} {label}" for axis, label in self.setting)

    @property
    def uneven(self) -> bool:
        """Whether the rates of a start, or the starts at their best rates, are of different seeds."""
        seeds: dict[tuple[str, float], set[int]] = {}
        for cell, result in self.cells:
            if result is not None and result.status != "failed":
                seeds.setdefault((cell.start, cell.rate), set()).add(cell.seed)
        return len(set(map(frozenset, seeds.values()))) > 1

    def to_reach(self, start: str, reference: str) -> tuple[float, float] | None:
        """Return the steps and seconds, start-up included, to the training loss that the reference ends with.

        Both at their best rates, seed by seed and then on average; losses are means of a tenth of the steps, at least
        5. None where a seed never gets there, or has no partner.
        """
        partners = {cell.seed: result for cell, result in self.at_best(reference)}
        reached = []
        for cell, result in self.at_best(start):
            series, other = result.series.get("loss", []), partners.get(cell.seed)
            if other is None or not series or not other.series.get("loss"):
                return None
            window = min(len(series), max(_FEWEST, len(series) // 10))
            target = fmean(loss for _, loss in other.series["loss"][-window:])
            step_seconds = result.seconds.get("training", 0.0) / series[-1][0]
            came = to_reach(series, target, step_seconds, result.start.get("seconds", 0.0), window)
            if came is None:
                return None
            reached.append(came)
        if not reached:
            return None
        return fmean(steps for steps, _ in reached), fmean(seconds for _, seconds in reached)

    def at_best(self, start: str) -> list[tuple[Cell, Result]]:
        """Return a start's finished cells at its best rate, by seed."""
        if start not in self.choices:
            return []
        rate = self.choices[start].rate
        return [(cell, result) for cell, result in self.cells if result and (cell.start, cell.rate) == (start, rate)]


@dataclass(frozen=True)
class Summary:
    """A study as far as it has come.

    Attributes:
        grid: the study.
        folder: its folder.
        parts: one for each setting.
        chosen_by: the figure by which rates are chosen.
        reported: the figures that are reported, the first one first.
        better: by figure, whether more of it is better.
        against: the start that maps of differences are drawn against; None for the reference, or where it doesn't vary,
            for the smallest number of the map.
    """

    grid: Grid
    folder: Path
    parts: list[Part]
    chosen_by: str
    reported: tuple[str, ...]
    better: dict[str, bool]
    against: str | None = None

    @property
    def first(self) -> str:
        """The figure that rankings go by."""
        return self.reported[0]

    @cached_property
    def cells(self) -> list[tuple[Cell, Result | None]]:
        """All cells with their results."""
        return [pair for part in self.parts for pair in part.cells]

    @property
    def validated(self) -> bool:
        """Whether rates are chosen on other data than are reported."""
        return all(cell.run.data.validation_examples and cell.run.data.held_out_examples for cell, _ in self.cells)

    @property
    def seeds(self) -> int:
        """How many seeds the study has."""
        return len(self.grid.study.seeds)

    @property
    def rates(self) -> int:
        """How many rates the start with the most of them has."""
        return max(len(rates) for rates in self.grid.rates.values())

    def counted(self) -> dict[str, int]:
        """Return how many cells there are by status; "missing" are those without a result."""
        counts: dict[str, int] = {}
        for _, result in self.cells:
            status = result.status if result else "missing"
            counts[status] = counts.get(status, 0) + 1
        return counts

    def sentences(self) -> list[str]:
        """Return what is to be known for reading the figures, in words."""
        said = [false_alarms(others, len(self.parts))] if (others := len(self.grid.starts) - 1) else []
        if any(part.uneven for part in self.parts):
            said.append(
                "Not every rate has every seed yet: a start's best rate is chosen by the seeds that all its rates "
                "have, and starts are ranked by those that all of them have."
            )
        if self.rates > 1 and not self.validated:
            said.append(
                "Rates are chosen on the very data that are reported, which flatters each start, and those with more "
                "rates more: set data.validation_examples and data.held_out_examples."
            )
        elif self.rates > 1:
            said.append("Rates are chosen on validation data, and figures are of held-out data.")
        if self.rates == 1 and len(self.grid.starts) > 1:
            said.append(
                "All starts have one rate. Each has its own best one: a comparison at one rate may rank them wrongly."
            )
        if self.seeds == 1:
            said.append("One seed: intervals are over items, and another seed moves every number.")
        return said


def summarised(
    grid: Grid,
    folder: Path,
    *,
    refine: bool = True,
    first: str | None = None,
    against: str | None = None,
) -> Summary:
    """Return what a study's folder shows at one moment, whoever goes on writing to it.

    Args:
        grid: the study.
        folder: its folder.
        refine: count the cells beyond a grid's edge, where there are such with results.
        first: the reported figure that rankings and charts go by; the study's first one by default.
        against: see :class:`Summary`.

    Raises:
        CheckpointError: a result is damaged.
        RunError: there is no such figure, or no such start.
    """
    results = Snapshot(folder)
    if against is not None and against not in grid.starts:
        raise RunError(
            f"the study has no start {against!r}.{nearest(against, grid.starts)} It has: {', '.join(grid.starts)}."
        )
    cells = _known(grid, results, refine)
    chosen, better = chosen_by(grid), {}
    reported = grid.study.reported or _reported(cells, results, chosen)
    if first is not None:
        if first not in reported:
            hint = f"{nearest(first, reported)} There are: {', '.join(reported)}."
            raise RunError(f"the study reports no figure {first!r}.{hint}")
        reported = (first, *(figure for figure in reported if figure != first))
    for figure in {chosen, *reported}:
        better[figure] = higher_is_better(results, cells, figure)
    parts = []
    for setting in dict.fromkeys(cell.setting for cell in cells):
        within = [cell for cell in cells if cell.setting == setting]
        parts.append(_part(setting, within, results, chosen, reported, better, grid.reference))
    for figure in reported:
        having = [part for part in parts if figure in part.compared]
        rows = judged([part.compared[figure] for part in having], better[figure])
        for part, corrected in zip(having, rows, strict=True):
            part.compared[figure] = corrected
    return Summary(grid, folder, parts, chosen, reported, better, against)


def _known(grid: Grid, results: Results, refine: bool) -> list[Cell]:
    """Return the cells of the grid, and those beyond its edges that have results."""
    own = grid.cells()
    if not refine:
        return own
    names = {cell.folder for cell in own}
    every = all_cells(grid, results, refine=True)
    return [cell for cell in every if cell.folder in names or results.of(cell) is not None]


def _part(
    setting: tuple[tuple[str, str], ...],
    cells: list[Cell],
    results: Results,
    chosen: str,
    reported: Sequence[str],
    better: dict[str, bool],
    reference: str,
) -> Part:
    rows = [(cell, results.of(cell)) for cell in cells]
    choices = best_rates(outcomes(cells, results, chosen, chosen), better[chosen])
    comparisons = {}
    for figure in reported:
        made = outcomes(cells, results, chosen, figure)
        at_best = [_with_items(one, rows, results, figure) for one in made if _is_best(one, choices)]
        if any(one.start == reference for one in at_best):
            comparisons[figure] = compared(at_best, reference, better[figure], choices)
    robust = {}
    if choices:
        within = WITHIN_LOSS if reported[0].endswith("loss") else WITHIN
        robust = robustness(outcomes(cells, results, chosen, reported[0]), within, better[reported[0]], choices)
    return Part(setting, rows, choices, comparisons, robust)


def _is_best(outcome: Outcome, choices: dict[str, Choice]) -> bool:
    return outcome.rate == choices[outcome.start].rate


def _with_items(outcome: Outcome, rows: Sequence[tuple[Cell, Result | None]], results: Results, figure: str) -> Outcome:
    """Return an outcome with what its held-out items gave, where that is kept and the figure is a mean of it."""
    if not math.isfinite(outcome.test):
        return outcome
    key = (outcome.start, outcome.rate, outcome.seed)
    place = results.place(next(cell for cell, _ in rows if (cell.start, cell.rate, cell.seed) == key))
    kept = _json(place / LOSSES)
    held_out = kept.get("held_out", {}) if isinstance(kept, dict) else {}
    if figure == "loss" and held_out:
        return replace(outcome, items=tuple(held_out["losses"]), weights=tuple(held_out["weights"]))
    if figure == "accuracy" and "labels" in held_out:
        pairs = zip(held_out["predictions"], held_out["labels"], strict=True)
        return replace(outcome, items=tuple(float(prediction == label) for prediction, label in pairs))
    records = _json(place / ITEMS)
    marks = [record.get("marks", {}).get(figure) for record in records] if isinstance(records, list) else []
    if marks and all(isinstance(mark, int | float) for mark in marks):
        return replace(outcome, items=tuple(map(float, marks)))
    return outcome


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _reported(cells: Sequence[Cell], results: Results, chosen: str) -> tuple[str, ...]:
    """Return the held-out figures that the first finished cell has, that by which rates are chosen first."""
    for cell in cells:
        result = results.of(cell)
        if result is not None and result.status == "done":
            names = [
                name.removesuffix("/end") for name in result.metrics if not name.endswith(("/start", "/validation"))
            ]
            return tuple(sorted(dict.fromkeys(names), key=lambda name: name != chosen)) or (chosen,)
    return (chosen,)
