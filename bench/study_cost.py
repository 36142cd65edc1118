"""What a study costs beside its trainings: how soon one of 10,000 cells goes on, and the time between cells."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness import Timing, paragraph, write
from headstart.runs.result import Result, write_result
from headstart.study.cells import Cell, Grid
from headstart.study.results import Results
from headstart.study.study import run_study
from headstart.study.tree import Study

CELLS, STEPS, ROUNDS = 10_000, 100, 5


class BegunError(Exception):
    """A cell has begun, which is all that is timed."""


def study(cells: int) -> Study:
    """Return a study of so many cells: four starts, ten rates, five ranks, and seeds."""
    rates = [1e-4 * 1.5**step for step in range(10)]
    axes: dict[str, Any] = {
        "start": ["lora", "pissa", "init-ab", "olora"],
        "optimizer.lr": rates,
        "adapter.r": [2, 4, 8, 16, 32],
    }
    return Study(base={"schedule": {"steps": STEPS}}, axes=axes, seeds=tuple(range(cells // 200)))


def finish(grid: Grid, folder: Path) -> None:
    """Write a result for all cells but the last one."""
    results = Results(folder)
    series = {"loss": [(step, 3.0 - step / STEPS) for step in range(1, STEPS + 1)]}
    for cell in grid.cells()[:-1]:
        place = results.place(cell)
        place.mkdir(parents=True)
        write_result(Result(cell.run.key, cell.run.model_dump(mode="json"), "done", series=series), place)


def until_begun(grid: Grid, folder: Path) -> float:
    """Return the seconds until the cell that is left begins."""
    began, took = time.perf_counter(), 0.0

    def stop(cell: Cell) -> None:
        nonlocal took
        took = time.perf_counter() - began
        raise BegunError

    try:
        run_study(grid.study, folder, begun=stop)
    except BegunError:
        return took
    sys.exit("no cell was left")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, grid = Path(name), Grid(study(CELLS))
        finish(grid, folder)
        seconds = [until_begun(grid, folder) for _ in range(ROUNDS)]
    lines = paragraph(
        f"A study of {CELLS:,} cells, {CELLS - 1:,} of which are done, with {STEPS} losses each: seconds from the call "
        f"until the cell that is left begins, after imports: {Timing(seconds)} (goal: 5), median and range of "
        f"{ROUNDS} rounds. Files were read by the round before, so they come from the system's memory."
    )
    write("study_cost", "What a study costs beside its trainings", lines)


if __name__ == "__main__":
    main()
