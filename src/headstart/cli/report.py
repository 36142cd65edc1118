"""``headstart report``: what a study or runs came to, for others to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.cli.app import app
from headstart.cli.console import console, output
from headstart.errors import RunError


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="A study's folder; with --peft, also folders of or with runs."),
    ],
    peft: Annotated[
        Path | None,
        typer.Option("--peft", metavar="FOLDER", help="Write each result as PEFT's method_comparison has it."),
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw the page's charts as PNG, too.")
    ] = True,
    figure: Annotated[
        str | None,
        typer.Option("--figure", metavar="NAME", help="The figure to rank and draw by; the study's first by default."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="START", help="What maps of differences are drawn against, not the reference."),
    ] = None,
) -> None:
    """Write a study's page (HTML), the same as Markdown, and its charts as PNG; or runs in PEFT's schema."""
    if peft is not None:
        _in_peft_schema(folders, peft.expanduser())
        return
    for folder in folders:
        _of_study(folder.expanduser(), pictures, figure, base)


def _of_study(folder: Path, pictures: bool, figure: str | None, base: str | None) -> None:
    from headstart.files import write_whole
    from headstart.reports.answer import answer
    from headstart.reports.charts import charts
    from headstart.reports.document import check_plotly
    from headstart.reports.page import write_page
    from headstart.reports.pictures import write_pictures
    from headstart.reports.tables import markdown, ranking_table
    from headstart.study.cells import Grid
    from headstart.study.study import PAGES, noted_study
    from headstart.study.summary import summarised

    summary = summarised(Grid(noted_study(folder)), folder, first=figure, against=base)
    if not summary.counted().get("done"):
        raise RunError(f"{folder} has no finished cell yet, so there is nothing to report.")
    check_plotly()
    page, text, drawn = (folder / name for name in PAGES)
    write_whole(text, markdown(summary))
    write_page(page, summary)
    output.print(answer(summary), markup=False, highlight=False, soft_wrap=True)
    output.print()
    for renderable in ranking_table(summary):
        output.print(renderable)
    _say(f"page: {page}")
    if pictures:
        missing = write_pictures(drawn, charts(summary))
        _say(missing or f"pictures: {drawn}")


def _in_peft_schema(runs: list[Path], folder: Path) -> None:
    from headstart.runs.method_comparison import export

    places = [place for path in runs for place in _runs_of(path.expanduser())]
    for made in export(places, folder):
        if made.unknown:
            console.print(
                f"warning: the run of {made.name} doesn't know {', '.join(made.unknown)}; the table of PEFT's "
                "comparison takes no file without.",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        _say(f"wrote {folder / made.name}")


def _runs_of(folder: Path) -> list[Path]:
    """Return the folders of a study's finished runs, and say what is left out; any other folder as it is."""
    from headstart.runs.result import read_result
    from headstart.study.results import CELLS, noted_cells

    if not (folder / CELLS).is_dir():
        return [folder]
    cells = noted_cells(folder)
    ended = [place for place in cells if read_result(place) is not None]
    if not ended:
        raise RunError(f"{folder} has no finished cell yet, so there is nothing to report.")
    if left := len(cells) - len(ended):
        console.print(f"{left} of {len(cells)} cells of {folder} aren't done, and are left out.", highlight=False)
    return ended


def _say(text: str) -> None:
    output.print(text, markup=False, highlight=False, soft_wrap=True)
