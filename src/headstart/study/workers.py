"""Several processes of one machine at one study: started, watched, and replaced where one dies."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from headstart.errors import HeadstartError
from headstart.progress import Show, silent
from headstart.study.cells import Cell, Grid
from headstart.study.results import Results, all_cells
from headstart.study.tree import Study
from headstart.study.work import BAR, Terms, Worker, note_lost

# A cell whose worker dies is begun again by another one, so often; so are workers that die before they begin any.
_ATTEMPTS = 2
_PATIENCE = 1.0
_GRACE = 10.0


@dataclass
class _Hand:
    """A worker's process, where it is heard, and what it is at."""

    process: BaseProcess
    pipe: Connection
    number: int
    cell: str = ""


def work_together(
    grid: Grid,
    folder: Path,
    terms: Terms,
    workers: int,
    *,
    show: Show = silent,
    ended: Callable[[], None] = lambda: None,
) -> None:
    """Work on a study with several processes, until nothing is left that could be begun.

    A worker that dies is replaced; a cell at which a second worker dies counts as failed.

    Args:
        grid, folder, terms: see :class:`headstart.study.work.Worker`.
        workers: how many processes.
        show: draws progress.
        ended: called now and then after cells have ended.

    Raises:
        HeadstartError: a worker found a reason that keeps all cells from being begun.
    """
    crew = _Crew(grid, folder, terms, workers)
    try:
        for number in range(workers):
            crew.hire(number)
        while crew.hands:
            for hand in crew.speaking():
                kind, content = _heard(hand.pipe)
                if kind == "begun":
                    crew.begins(hand, content)
                elif kind == "ended":
                    hand.cell = ""
                    ended()
                elif kind == "show":
                    show(*content)
                elif kind == "reason":
                    raise HeadstartError(content)
                else:
                    crew.replace(hand)
    finally:
        crew.dismiss()


class _Crew:
    """The workers of a study, and how often one has died at a cell."""

    def __init__(self, grid: Grid, folder: Path, terms: Terms, workers: int) -> None:
        self.hands: list[_Hand] = []
        self._grid, self._folder, self._terms, self._workers = grid, folder, terms, workers
        self._context = multiprocessing.get_context("spawn")
        self._deaths: Counter[str] = Counter()

    def hire(self, number: int) -> None:
        """Begin a worker."""
        here, there = self._context.Pipe(duplex=False)
        arguments = (self._grid.study.model_dump(mode="json"), str(self._folder), self._terms, number, there)
        process = self._context.Process(target=_work, args=arguments, name=f"headstart worker {number}")
        with _environment(number, self._workers):
            process.start()
        there.close()
        self.hands.append(_Hand(process, here, number))

    def speaking(self) -> list[_Hand]:
        """Return the workers that have something to say, or have died; none after a while."""
        pipes = wait([hand.pipe for hand in self.hands], timeout=_PATIENCE)
        return [hand for hand in self.hands if hand.pipe in pipes]

    def begins(self, hand: _Hand, cell: str) -> None:
        """Note what a worker is at; so there is none that keeps all from beginning."""
        hand.cell = cell
        self._deaths.pop("", None)

    def replace(self, hand: _Hand) -> None:
        """Hire another one for a worker that has died; let one go that has nothing left to do."""
        self.hands.remove(hand)
        hand.process.join(_GRACE)
        if hand.process.exitcode == 0:
            return
        self._deaths[hand.cell] += 1
        if self._deaths[hand.cell] >= _ATTEMPTS:
            self._give_up(hand)
        self.hire(hand.number)

    def dismiss(self) -> None:
        """End all workers."""
        for hand in self.hands:
            hand.process.terminate()
        for hand in self.hands:
            hand.process.join(_GRACE)
            hand.process.kill()

    def _give_up(self, hand: _Hand) -> None:
        """Note that the cell failed at which workers die; without a cell, it is no cell that they die of."""
        code = hand.process.exitcode
        how = (
            f"by signal {-code} ({signal.Signals(-code).name})"
            if code is not None and code < 0
            else f"with code {code}"
        )
        if not hand.cell:
            raise HeadstartError(f"a worker ended {how} before it began a cell.")
        results = Results(self._folder)
        for cell in all_cells(self._grid, results, refine=self._terms.refine):
            if cell.folder == hand.cell:
                note_lost(cell, results, f"its worker ended {how}, {_ATTEMPTS} times; memory may have run out")


def _heard(pipe: Connection) -> tuple[str, Any]:
    """Return what a worker says; "died" where it can't say anything any more."""
    try:
        kind, content = pipe.recv()
    except (EOFError, OSError):
        return "died", None
    return str(kind), content


@contextmanager
def _environment(number: int, workers: int) -> Iterator[None]:
    """Have a new process take its share of the threads, and one accelerator after another."""
    import torch

    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    if torch.cuda.device_count() > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        share["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    share = {name: value for name, value in share.items() if name not in os.environ}
    os.environ.update(share)
    try:
        yield
    finally:
        for name in share:
            del os.environ[name]


def _work(settings: dict[str, Any], folder: str, terms: Terms, number: int, pipe: Connection) -> None:
    """Be a worker: tell the driver what is done, and end with it."""
    parent = os.getppid()
    # The driver ends its workers; at Ctrl-C both are told.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    last = 0.0

    def tell(kind: str, content: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the driver is gone; what was begun is gone on with next time
        with suppress(BrokenPipeError):
            pipe.send((kind, content))

    def begun(cell: Cell) -> None:
        tell("begun", cell.folder)
        current.append(cell.name)

    def show(step: str, done: int, total: int) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last > 0.2:
            last = time.monotonic()
            kind = step.partition("\t")[0]
            name = step if step == BAR else f"worker {number}\t{current[-1] if current else ''}: {kind}"
            tell("show", (name, done, total))

    current: list[str] = []
    try:
        _quieten()
        gc.freeze()  # what is imported stays, and each run would look through it several times for what can go
        grid = Grid(Study.model_validate(settings))
        Worker(grid, Path(folder), terms, show=show, begun=begun, ended=lambda cell: tell("ended", cell.folder)).work()
    except HeadstartError as error:
        tell("reason", str(error))
        sys.exit(3)


def _quieten() -> None:
    """Leave the terminal to the driver."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
