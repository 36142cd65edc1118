"""``headstart dynamics``: the scaling theory of low-rank fine-tuning, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.app import app
from headstart.cli.console import console, output
from headstart.errors import DataError
from headstart.progress import progress_bars

if TYPE_CHECKING:
    from headstart.reports.findings import Findings

# Where the packages of Debian put them.
_MNIST = ("/usr/share/datasets/mnist", "data/mnist")
_FASHION = ("/usr/share/datasets/fashion-mnist", "data/fashion-mnist")

dynamics = typer.Typer(
    no_args_is_help=True, help="The scaling theory of low-rank fine-tuning, measured.", rich_markup_mode=None
)
app.add_typer(dynamics, name="dynamics")

Out = Annotated[Path, typer.Option("--out", help="A folder for what is finished, and the report; the command goes on.")]
Pictures = Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw the page's charts as PNG, too.")]


@dynamics.command()
def toy(
    mnist: Annotated[
        Path | None, typer.Option("--mnist", help=f"The folder of MNIST's IDX files; else {' or '.join(_MNIST)}.")
    ] = None,
    fashion: Annotated[
        Path | None, typer.Option("--fashion", help=f"That of FashionMNIST's; else {' or '.join(_FASHION)}.")
    ] = None,
    out: Out = Path("toy"),
    seeds: Annotated[int, typer.Option("--seeds", min=1)] = 10,
    width: Annotated[int, typer.Option("--width", min=1)] = 4096,
    rank: Annotated[int, typer.Option("--rank", min=1)] = 32,
    steps: Annotated[int, typer.Option("--steps", min=1)] = 100,
    pretrain: Annotated[str, typer.Option("--pretrain", help='"once" for all seeds, or "each" seed anew.')] = "once",
    pretrain_steps: Annotated[int, typer.Option("--pretrain-steps", min=1)] = 2000,
    test_images: Annotated[
        int | None, typer.Option("--test-images", min=1, help="The first so many; else all.")
    ] = None,
    pictures: Pictures = True,
) -> None:
    """The toy model of "Beyond Zero Initialization": its figure 2, with intervals, at the paper's own size."""
    from headstart.dynamics.experiment import Settings, read_toy, run_toy
    from headstart.dynamics.figure import findings, gathered
    from headstart.errors import RunError
    from headstart.reports.document import check_plotly

    if pretrain not in ("once", "each"):
        raise RunError(f'--pretrain is "once" or "each", not {pretrain!r}.')
    check_plotly()
    settings = Settings(
        width=width,
        rank=rank,
        steps=steps,
        pretrain="each" if pretrain == "each" else "once",
        pretrain_steps=pretrain_steps,
        seeds=seeds,
        test_images=test_images,
    )
    places = _folder(mnist, _MNIST, "--mnist"), _folder(fashion, _FASHION, "--fashion")
    with progress_bars() as show:
        run_toy(settings, *places, out.expanduser(), show)
    _report(findings(gathered(*read_toy(out.expanduser()))), out.expanduser(), pictures)


def _report(findings: Findings, folder: Path, pictures: bool) -> None:
    from headstart.reports.findings import write_findings
    from headstart.reports.tables import rich_table

    missing = write_findings(folder, findings, pictures=pictures)
    output.print(findings.answer, markup=False, highlight=False, soft_wrap=True)
    for heading, _, sheets in findings.sections:
        for sheet in sheets:
            output.print()
            output.print(heading, style="bold")
            output.print(rich_table(sheet))
            output.print(sheet.caption, style="dim", markup=False, highlight=False, soft_wrap=True)
    output.print(f"\npage: {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    if missing:
        console.print(missing, markup=False, highlight=False, soft_wrap=True)


def _folder(given: Path | None, usual: tuple[str, ...], option: str) -> Path:
    """Return the folder that was given, else the first usual one that is there.

    Raises:
        DataError: none is.
    """
    if given is not None:
        return given.expanduser()
    for name in usual:
        if Path(name).is_dir():
            return Path(name)
    raise DataError(
        f"give {option} the folder of the IDX files, as none of {', '.join(usual)} is there. Debian's package "
        "dataset-fashion-mnist has FashionMNIST; both are at github.com/zalandoresearch/fashion-mnist and "
        "yann.lecun.com/exdb/mnist."
    )
