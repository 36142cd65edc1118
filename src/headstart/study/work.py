"""Doing a study's cells: whoever works on its folder takes the next one that nobody has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from headstart.errors import HeadstartError, RunError
from headstart.progress import Show, silent
from headstart.runs.result import Result
from headstart.runs.shared import Shared
from headstart.runs.stages import execute, write_failed
from headstart.store.claims import claims
from headstart.study.cells import Cell, Grid
from headstart.study.prune import hopeless
from headstart.study.results import CELLS, STARTS, Results, all_cells

# The step that is shown of the study as a whole; all others are a cell's.
BAR = "cells"
_PAUSE = 0.5


@dataclass(frozen=True)
class Terms:
    """How a study is worked on.

    Attributes:
        refine: add rates where a start's best lies at the edge of its grid.
        prune: give up rates that are hopeless after a third of the steps.
        since: when the work began, in UTC as ISO 8601 writes it: a cell that failed before is tried again, once.
        until: seconds since the epoch after which no cell is begun; None for no end.
    """

    refine: bool = False
    prune: bool = False
    since: str = ""
    until: float | None = None

    @staticmethod
    def now() -> str:
        """Return the time as ``since`` has it."""
        return datetime.now(UTC).replace(microsecond=0).isoformat()


class Worker:
    """Takes cells of a study, one after another, as other processes on the same folder do.

    Args:
        grid, folder, terms: the study, its folder, and how it is worked on.
        show: draws progress.
        begun, ended: called with each cell that this worker begins, and ends, in whatever way.
    """

    def __init__(
        self,
        grid: Grid,
        folder: Path,
        terms: Terms,
        *,
        show: Show = silent,
        begun: Callable[[Cell], None] = lambda cell: None,
        ended: Callable[[Cell], None] = lambda cell: None,
    ) -> None:
        self._shared = Shared(folder / STARTS, [cell.run for cell in grid.cells()])
        self._grid, self._folder, self._terms = grid, folder, terms
        self._show, self._begun, self._ended = show, begun, ended
        self._results = Results(folder)

    def work(self) -> None:
        """Do cells until none is left that could be begun; wait for those that others are at, as they may add rates.

        Raises:
            HeadstartError: a cell can't be begun, for a reason that is not its own.
        """
        while not self._late():
            cells = all_cells(self._grid, self._results, refine=self._terms.refine)
            left = [cell for cell in cells if not self._is_final(cell)]
            self._show(BAR, len(cells) - len(left), len(cells))
            if not left:
                self._shared.forget_statistics()
                return
            if not self._do_one(left):
                self._show("waiting for cells that others do", len(cells) - len(left), len(cells))
                time.sleep(_PAUSE)

    def _do_one(self, cells: Sequence[Cell]) -> bool:
        """Do the first cell that nobody has; return whether there was one."""
        for cell in cells:
            with claims(self._folder / CELLS, [cell.folder]) as claimed:
                # Another may have done it since it was looked for.
                if not claimed or self._is_final(cell):
                    continue
                self._begun(cell)
                self._do(cell)
                self._ended(cell)
                return True
        return False

    def _do(self, cell: Cell) -> None:
        judge = hopeless(cell, self._grid, self._results) if self._terms.prune else None
        try:
            execute(cell.run, self._results.place(cell), shared=self._shared, judge=judge, show=self._show)
        except HeadstartError:
            result = self._results.of(cell)
            if result is None or result.status != "failed":
                raise

    def _is_final(self, cell: Cell) -> bool:
        return is_final(self._results.of(cell), self._terms)

    def _late(self) -> bool:
        return self._terms.until is not None and time.time() >= self._terms.until


def is_final(result: Result | None, terms: Terms) -> bool:
    """Return whether nothing is to be done for a cell in this piece of work."""
    return result is not None and (result.status != "failed" or result.created_at >= terms.since)


def note_lost(cell: Cell, results: Results, reason: str) -> None:
    """Write that a cell failed, whose worker died more than once."""
    place = results.place(cell)
    place.mkdir(parents=True, exist_ok=True)
    try:
        write_failed(cell.run, place, reason)
    except OSError as error:
        raise RunError(f"{place} can't be written: {error.strerror or error}.") from error
