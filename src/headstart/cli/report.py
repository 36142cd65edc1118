"""``headstart report``: what runs came to, for others to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.cli.app import app
from headstart.cli.console import console, output


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or with runs in them.")],
    peft: Annotated[
        Path, typer.Option("--peft", metavar="FOLDER", help="Write each result as PEFT's method_comparison has it.")
    ],
) -> None:
    """Write runs' results, one JSON file a run, in the schema of PEFT's method_comparison."""
    from headstart.runs.method_comparison import export

    for made in export([path.expanduser() for path in runs], peft.expanduser()):
        if made.unknown:
            console.print(
                f"warning: the run of {made.name} doesn't know {', '.join(made.unknown)}; the table of PEFT's "
                "comparison takes no file without.",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        output.print(f"wrote {peft / made.name}", markup=False, highlight=False, soft_wrap=True)
