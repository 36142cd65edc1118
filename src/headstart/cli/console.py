"""Where messages go, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Results go to standard output; everything else, so that pipes stay clean, to standard error.
console = Console(stderr=True)
# Into a file or a pipe nothing is gained by folding tables at 80 columns.
output = Console(width=None if sys.stdout.isatty() else 160)

Show = Callable[[str, int, int], None]


@contextmanager
def progress_bars() -> Iterator[Show]:
    """Yield a function (step, done, total) that draws one bar for each step."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield show
