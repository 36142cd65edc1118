"""Giving up a rate that is hopeless, after a third of the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from headstart.runs.watch import Judge
from headstart.study.cells import Cell, Grid
from headstart.study.results import Results

# A run is judged once, when so much of it is done, by the mean of its training loss over the last half of that.
_SHARE = 1 / 3
# Of what the best has gained until then, a run must have gained so much.
_LEAST = 0.25
_FEWEST_STEPS = 6


def hopeless(cell: Cell, grid: Grid, results: Results) -> Judge | None:
    """Return what judges a cell in training by its own start's finished cells of the same setting and seed.

    These see the same batches in the same order, so their losses up to the same step can be compared. A cell is given
    up where its loss has fallen by less than a quarter of what the best of them had gained by then. None where there
    is nothing to compare with.
    """
    others: list[Sequence[tuple[int, float]]] = []
    for other in grid.cells():
        if (other.start, other.setting, other.seed) == (cell.start, cell.setting, cell.seed) and other != cell:
            result = results.of(other)
            if result is not None and result.status == "done" and "loss" in result.series:
                others.append(result.series["loss"])
    if not others:
        return None

    def judge(series: Sequence[tuple[int, float]], steps: int) -> str | None:
        last = series[-1][0] if series else 0
        if steps < _FEWEST_STEPS or last != math.ceil(steps * _SHARE):
            return None
        best = max(_gain(other, last) for other in others)
        gain = _gain(series, last)
        if best <= 0 or gain >= _LEAST * best:
            return None
        return (
            f"given up after {last} of {steps} steps: its training loss had fallen by {gain:.4g}, "
            f"at its start's best rate so far by {best:.4g}"
        )

    return judge


def _gain(series: Sequence[tuple[int, float]], last: int) -> float:
    """Return what the loss has fallen by from the first step to the mean of the last half of the steps up to one."""
    losses = [loss for step, loss in series if step <= last]
    return losses[0] - fmean(losses[len(losses) // 2 :])
