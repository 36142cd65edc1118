"""What is known of a study's cells, from their folders; and which rates lie beyond a grid whose best is at its edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from headstart.errors import RunError, nearest
from headstart.evaluation.figures import Figure
from headstart.runs.folder import SETTINGS
from headstart.runs.measure import VALIDATION
from headstart.runs.result import FILE, Result, read_result
from headstart.study.cells import Cell, Grid
from headstart.study.differences import Outcome
from headstart.study.rates import beyond
from headstart.study.statistics import Choice, best_rates
from headstart.tasks.registry import parse_task

CELLS, STARTS = "cells", "starts"

# A study adds no more rates to either end of a start's grid.
MOST_FURTHER = 3


class Results:
    """The results of the cells in a study's folder; those that are final are read once.

    Args:
        folder: of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._final: dict[str, Result] = {}

    def place(self, cell: Cell) -> Path:
        """Return the folder of a cell's run."""
        return self.folder / CELLS / cell.folder

    def of(self, cell: Cell) -> Result | None:
        """Return a cell's result; None where there is none yet.

        Raises:
            CheckpointError: its file is damaged.
        """
        if cell.folder not in self._final:
            result = read_result(self.place(cell))
            if result is None or result.status == "failed":
                return result
            self._final[cell.folder] = result
        return self._final[cell.folder]


class Snapshot(Results):
    """The results of one moment: a cell has what it had when it was first asked for, whatever is written meanwhile.

    What is chosen by results and what is said of the choices must be of the same results.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._seen: dict[str, Result | None] = {}

    def of(self, cell: Cell) -> Result | None:
        """Return a cell's result as it was at the first call; see :meth:`Results.of`."""
        if cell.folder not in self._seen:
            self._seen[cell.folder] = super().of(cell)
        return self._seen[cell.folder]


def chosen_by(grid: Grid) -> str:
    """Return the figure by which rates are chosen: a classifier's first metric, else the loss.

    Raises:
        RunError: the study names one that its runs don't have.
    """
    task, named = parse_task(grid.base.data.task), grid.study.chosen_by
    known = ["loss"] if task.kind == "text" else [*task.metrics, "loss"]
    if task.kind == "text" and not grid.base.data.validation_examples and grid.base.evaluation.graded_examples:
        known += task.metrics  # which are asked of held-out data alone
    if named is not None and named not in known:
        raise RunError(f"chosen_by={named!r} must be one of {', '.join(known)}.{nearest(named, known)}")
    return named or known[0]


def figure_of(result: Result | None, figure: str, when: str = "end") -> Figure | None:
    """Return a figure of a cell; None where it has none.

    Graded answers have no "/end": they are asked once; nor has what forgetting is, beside the losses that it lies
    between. Without held-out data there are validation data alone.
    """
    names = [figure, f"{figure}/{when}", f"{figure}/{VALIDATION}"] if when == "end" else [f"{figure}/{when}"]
    return next((result.metrics[name] for name in names if name in result.metrics), None) if result else None


def value(result: Result | None, figure: str, when: str = "end") -> float:
    """Return a figure of a cell: infinite where it diverged or was given up, not a number where there is none."""
    if result is None or result.status == "failed":
        return math.nan
    if result.status in ("diverged", "pruned"):
        return math.inf if figure.rpartition("/")[2] == "loss" else -math.inf
    known = figure_of(result, figure, when)
    return math.nan if known is None else known.value


def outcomes(cells: Sequence[Cell], results: Results, chosen: str, reported: str) -> list[Outcome]:
    """Return what the finished ones among cells came to, without their items.

    Where runs have no validation data the rate is chosen on what is reported, which flatters it; pages say so.
    """
    made = []
    for cell in cells:
        result = results.of(cell)
        if result is None or result.status == "failed":
            continue
        when = VALIDATION if cell.run.data.validation_examples else "end"
        figures = value(result, chosen, when), value(result, reported)
        if not any(map(math.isnan, figures)):
            made.append(Outcome(cell.start, cell.rate, cell.seed, *figures))
    return made


def higher_is_better(results: Results, cells: Sequence[Cell], figure: str) -> bool:
    """Return whether more of a figure is better, as the first result that has it says."""
    for cell in cells:
        if (known := figure_of(results.of(cell), figure)) is not None:
            return known.higher_is_better
    return figure.rpartition("/")[2] != "loss"


def choices(cells: Sequence[Cell], results: Results, chosen: str) -> dict[str, Choice]:
    """Return each start's best rate within one setting."""
    better = higher_is_better(results, cells, chosen)
    return best_rates(outcomes(cells, results, chosen, chosen), better)


def all_cells(grid: Grid, results: Results, *, refine: bool) -> list[Cell]:
    """Return the cells of a study; with ``refine`` those, too, of rates beyond a grid whose best lies at its edge.

    These follow from the results alone, so that every process that works on the study finds the same.
    """
    further: dict[str, list[float]] = {start: [] for start in grid.starts}
    if not refine:
        return grid.cells()
    chosen = chosen_by(grid)
    while True:
        cells, added = grid.cells(further), False
        for start in grid.starts:
            rates = sorted({*grid.rates[start], *further[start]})
            own = [cell for cell in cells if cell.start == start]
            known = [results.of(cell) for cell in own]
            if len(rates) < 2 or any(result is None or result.status == "failed" for result in known):
                continue
            for setting in dict.fromkeys(cell.setting for cell in own):
                within = [cell for cell in own if cell.setting == setting]
                choice = choices(within, results, chosen).get(start)
                if choice is None:
                    continue
                edge = choice.edge
                side = [rate for rate in further[start] if (rate > grid.rates[start][-1]) == (edge == "high")]
                if edge and len(side) < MOST_FURTHER:
                    further[start].append(beyond(rates, edge))
                    added = True
                    break
        if not added:
            return cells


def check_folder(folder: Path) -> None:
    """Raise RunError where a folder holds something else than a study."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CELLS).is_dir()):
        raise RunError(f"{folder} holds something else than a study, so nothing in it is touched: give another --out.")


def noted_cells(folder: Path) -> list[Path]:
    """Return the folders of all cells that a study's folder has, of this grid or of earlier ones."""
    return sorted({path.parent for name in (FILE, SETTINGS) for path in (folder / CELLS).glob(f"*/{name}")})
