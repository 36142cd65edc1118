"""Where the command line writes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from headstart.errors import HeadstartWarning

# Results go to standard output; everything else, so that pipes stay clean, to standard error.
console = Console(stderr=True)
# Into a file or a pipe nothing is gained by folding tables at 80 columns.
output = Console(width=None if sys.stdout.isatty() else 160)


@contextmanager
def warnings_said() -> Iterator[None]:
    """Print headstart's warnings within the block, which no report will repeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", HeadstartWarning)
        before = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, HeadstartWarning):
                console.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)
            else:
                before(message, category, *place, **more)

        warnings.showwarning = show
        yield
