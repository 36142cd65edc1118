"""Where the command line writes."""

from __future__ import annotations

import sys

from rich.console import Console

# Results go to standard output; everything else, so that pipes stay clean, to standard error.
console = Console(stderr=True)
# Into a file or a pipe nothing is gained by folding tables at 80 columns.
output = Console(width=None if sys.stdout.isatty() else 160)
