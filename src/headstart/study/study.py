"""A study from its settings to its results: every cell once, by one process or several, and on after any kill."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from headstart.errors import CheckpointError, HeadstartError
from headstart.files import write_json
from headstart.progress import Show, silent
from headstart.runs.folder import ITEMS, LOSSES, SAVES, SETTINGS, START, TRAINED
from headstart.runs.result import FILE
from headstart.store.claims import alone_in
from headstart.study.cells import Cell, Grid
from headstart.study.results import CELLS, STARTS, check_folder, chosen_by, noted_cells
from headstart.study.tree import Study, validated_study
from headstart.study.work import BAR, Terms, Worker
from headstart.study.workers import work_together

STUDY = "study.json"
# What the command line writes into a study's folder, beside its cells.
PAGES = ("report.html", "report.md", "pictures")

# Pages are written anew once this many times what the last one took has gone by.
_SHARE = 50


def run_study(
    study: Study,
    folder: Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    refine: bool = False,
    prune: bool = False,
    max_seconds: float | None = None,
    show: Show = silent,
    begun: Callable[[Cell], None] = lambda cell: None,
    ended: Callable[[], object] = lambda: None,
) -> Grid:
    """Do what is left of a study in its folder; return its grid, whose results lie there.

    Args:
        study: the settings.
        folder: gets a folder for each cell, one for starts that cells share, and the study's settings. Interrupted, the
            same call goes on; others may work in the same folder at the same time.
        workers: how many processes.
        ray: the address of a Ray cluster, whose machines all see ``folder``; "local" for this machine alone.
        refine: add rates where a start's best lies at the edge of its grid.
        prune: give up rates that are hopeless after a third of the steps.
        max_seconds: begin no cell after so long.
        show: draws progress.
        begun: called with each cell that this process itself begins.
        ended: called now and then after cells have ended, the last time after the last one.

    Raises:
        RunError: a setting is none, or the folder holds something else.
        HeadstartError: no cell could be begun.
    """
    grid = Grid(study)
    grid.cells()
    chosen_by(grid)
    check_folder(folder)
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    write_json(study.model_dump(mode="json"), folder / STUDY)
    until = None if max_seconds is None else time.time() + max_seconds
    terms = Terms(refine, prune, Terms.now(), until)
    rarely = _Rarely(ended)
    if ray is not None:
        from headstart.study.on_ray import work_on_ray

        work_on_ray(grid, folder, terms, ray, workers, show=show, ended=rarely)
    elif workers > 1:
        work_together(grid, folder, terms, workers, show=show, ended=rarely)
    else:
        _work_alone(grid, folder, terms, show, begun, rarely)
    ended()
    return grid


def noted_study(folder: Path) -> Study:
    """Return the study whose cells a folder holds.

    Raises:
        CheckpointError: it holds none, or its file is damaged.
    """
    path = folder / STUDY
    try:
        return validated_study(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no study: there is no {STUDY} in it.") from None
    except (OSError, ValueError, HeadstartError) as error:
        raise CheckpointError(f"{path} is damaged, or another release's: give the study's own file again.") from error


def start_over(folder: Path) -> None:
    """Delete what a study wrote in a folder: cells, starts and pages; all else in it stays.

    Raises:
        RunError: it holds something else than a study, or a living process is at one of its cells.
    """
    check_folder(folder)
    places = noted_cells(folder)
    for place in places:
        with alone_in(place):  # else what it trains would be taken from under it
            pass
    for place in places:
        for name in (START, TRAINED, SAVES):
            shutil.rmtree(place / name, ignore_errors=True)
        # The settings last: a folder that a kill leaves is still known to be a run's.
        for name in (FILE, ITEMS, LOSSES, SETTINGS):
            (place / name).unlink(missing_ok=True)
        with suppress(OSError):  # something of the user's is in it
            place.rmdir()
    shutil.rmtree(folder / STARTS, ignore_errors=True)
    for name in (*PAGES, STUDY):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    for place in (folder / CELLS, folder):
        with suppress(OSError):
            place.rmdir()


def _work_alone(
    grid: Grid, folder: Path, terms: Terms, show: Show, begun: Callable[[Cell], None], rarely: Callable[[], None]
) -> None:
    current = ""

    def begins(cell: Cell) -> None:
        nonlocal current
        current = cell.name
        begun(cell)

    def shown(step: str, done: int, total: int) -> None:
        # One bar for each kind of step, whichever cell is at it.
        name, _, detail = step.partition("\t")
        show(name if name == BAR else "\t".join([name, ", ".join(filter(None, [current, detail]))]), done, total)

    Worker(grid, folder, terms, show=shown, begun=begins, ended=lambda cell: rarely()).work()


class _Rarely:
    """Calls a function, but not so often that it would cost more than a fiftieth of the time."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function, self._next = function, 0.0

    def __call__(self) -> None:
        began = time.monotonic()
        if began >= self._next:
            self._function()
            took = time.monotonic() - began
            self._next = time.monotonic() + _SHARE * took
