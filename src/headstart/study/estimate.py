"""What a study has to do, and how long that takes, from the cells that are done."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from headstart.runs.result import Result
from headstart.store.claims import duration
from headstart.study.cells import Grid
from headstart.study.results import Results


def estimated(grid: Grid, folder: Path, workers: int = 1) -> list[str]:
    """Return in words how many cells are done and left, and about how long what is left takes.

    A start's cells are taken to need what its finished ones needed in the mean, those of a start without any what all
    others did; a start that cells share is counted with each of them, so it is rather too much than too little.
    """
    results = Results(folder)
    cells = grid.cells()
    known = [(cell, result) for cell in cells if (result := results.of(cell)) is not None and result.status != "failed"]
    left = len(cells) - len(known)
    rates = ", ".join(f"{start}: {', '.join(f'{rate:g}' for rate in grid.rates[start])}" for start in grid.starts)
    lines = [
        f"{len(cells)} cells: {len(grid.starts)} starts, {len(grid.study.seeds)} seeds; rates of {rates}",
        f"{len(known)} are done, {left} are left",
    ]
    if not left:
        return lines
    if not known:
        return [*lines, "how long they take is known once the first cells are done"]
    by_start: dict[str, list[float]] = {}
    for cell, result in known:
        by_start.setdefault(cell.start, []).append(_seconds(result))
    mean = fmean(seconds for every in by_start.values() for seconds in every)
    done = {cell.run.key for cell, _ in known}
    total = sum(fmean(by_start.get(cell.start, [mean])) for cell in cells if cell.run.key not in done) / workers
    at_a_time = "one after another" if workers == 1 else f"{workers} at a time, where that slows none down"
    return [*lines, f"about {duration(total)} for these, {at_a_time}"]


def _seconds(result: Result) -> float:
    return sum(result.seconds.values())
