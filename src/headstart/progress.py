"""Progress bars for what takes longer than a second, in terminals and notebooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import TaskID

# Called with a step's name, how much of it is done, and how much there is. What follows a tab in the name is a detail
# that may change from call to call.
Show = Callable[[str, int, int], None]

_PATIENCE = 1.0


def silent(step: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def progress_bars(
    console: Console | None = None, above: Callable[[], Sequence[RenderableType]] = tuple
) -> Iterator[Show]:
    """Yield a function (step, done, total) that draws one bar for each step, once a second has gone by.

    Bars go to standard error; where that is neither a terminal nor a notebook, nothing is drawn. ``above`` gives what
    is shown over them, such as a table that fills.
    """
    # Rich is only needed where something is drawn; methods and statistics import this file for its types.
    from rich import console as consoles
    from rich import progress as rich

    console = console or consoles.Console(stderr=True)

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
        disable=not (console.is_terminal or console.is_jupyter),
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
