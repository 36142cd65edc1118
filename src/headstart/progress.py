"""How far what takes long is: bars in terminals and notebooks, lines now and then in logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import TaskID

# Called with a step's name, how much of it is done, and how much there is. What follows a tab in the name is a detail
# that may change from call to call.
Show = Callable[[str, int, int], None]

_PATIENCE = 1.0

# Seconds before a step's first line in a log, and the share of its time that goes by before the next.
_LINE_PATIENCE, _LINE_SHARE = 30.0, 0.05


def silent(step: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def progress_bars(
    console: Console | None = None, above: Callable[[], Sequence[RenderableType]] = tuple
) -> Iterator[Show]:
    """Yield a function (step, done, total) that draws one bar for each step, once a second has gone by.

    Bars go to standard error. Where that is neither a terminal nor a notebook, a line says how far a step is once it
    has taken 30 seconds, and then whenever 30 seconds and a twentieth of its time have gone by. ``above`` gives what is
    shown over bars, such as a table that fills.
    """
    # Rich is only needed where something is drawn; methods and statistics import this file for its types.
    from rich import console as consoles
    from rich import progress as rich

    console = console or consoles.Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _Lines(console)
        return

    class Bars(rich.Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from above()
            yield self.make_tasks_table(self.tasks)

    bars = Bars(
        rich.TextColumn("{task.description:<34}"),
        rich.BarColumn(bar_width=28),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}
    began = time.monotonic()

    def show(step: str, done: int, total: int) -> None:
        name, _, detail = step.partition("\t")
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=total)
        description = f"{name} ({detail})" if detail else name
        bars.update(tasks[name], completed=done, total=total, description=description)
        if not bars.live.is_started and time.monotonic() - began > _PATIENCE:
            bars.start()

    try:
        yield show
    finally:
        if bars.live.is_started:
            bars.stop()


@dataclass
class _Step:
    """A step of which lines tell: when it began and how far it was then; when it was last told of; how far it is."""

    began: float
    at_first: int
    told: float
    done: int


class _Lines:
    """Says in lines how far each step is, and how long it may still take."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps: dict[str, _Step] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        name, _, detail = step.partition("\t")
        now = time.monotonic()
        told = self._steps.get(name)
        if told is None or done < told.done:  # of a study, the training of the next cell
            told = self._steps[name] = _Step(began=now, at_first=done, told=now, done=done)
        told.done = done
        elapsed = now - told.began
        if now - told.told < max(_LINE_PATIENCE, _LINE_SHARE * elapsed):
            return
        told.told = now
        line = f"{name}: {done} of {total} after {_clock(elapsed)}"
        if told.at_first < done < total:
            line += f", about {_clock(elapsed * (total - done) / (done - told.at_first))} left"
        self._console.print(f"{line}; {detail}" if detail else line, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Return a time as 4:05 or 1:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
