"""``headstart dynamics``: the scaling theory of low-rank fine-tuning, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.app import app
from headstart.cli.compare import split_methods
from headstart.cli.console import console, output
from headstart.errors import DataError
from headstart.progress import progress_bars

if TYPE_CHECKING:
    from headstart.reports.findings import Findings

# Where they are looked for: Debian's packages, and a folder of one's own.
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
    rates: Annotated[str | None, typer.Option("--rates", help="Numbers with commas; else the paper's ten.")] = None,
    deviations: Annotated[
        str | None, typer.Option("--deviations", help="Of the start: numbers with commas; else the paper's twelve.")
    ] = None,
    pictures: Pictures = True,
) -> None:
    """The toy model of "Beyond Zero Initialization": its figure 2, with intervals, at the paper's own size."""
    from headstart.dynamics.experiment import DEVIATIONS, RATES, Settings, run_toy
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
        rates=_numbers("--rates", rates) if rates else RATES,
        deviations=_numbers("--deviations", deviations) if deviations else DEVIATIONS,
        seeds=seeds,
        test_images=test_images,
    )
    places = _folder(mnist, _MNIST, "--mnist"), _folder(fashion, _FASHION, "--fashion")
    with progress_bars() as show:
        made = run_toy(settings, *places, out.expanduser(), show)
    _report(findings(gathered(*made)), out.expanduser(), pictures)


@dynamics.command()
def exponents(
    methods: Annotated[
        str | None, typer.Option("--methods", help="Starts, made by the verb, in place of the paper's own.")
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", help="Exponents of A0, B0 and the rate in their place: -0.5,zero,-0.75[,RATE OF B]."),
    ] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="Of these: adam, lora+ or sgd.")] = "adam",
    widths: Annotated[str | None, typer.Option("--widths", help="Numbers with commas; else 256 to 32,768.")] = None,
    rates: Annotated[
        str, typer.Option("--rates", help="Of --methods: exponents of A's rate; LoRA+'s of B is n times that.")
    ] = "-0.5,-0.75,-1",
    rank: Annotated[int, typer.Option("--rank", min=1)] = 8,
    steps: Annotated[int, typer.Option("--steps", min=2, help="The step that is measured.")] = 4,
    seeds: Annotated[int, typer.Option("--seeds", min=2)] = 20,
    rate: Annotated[float, typer.Option("--rate", help="The constant before the power of n.")] = 0.1,
    out: Out = Path("exponents"),
    pictures: Pictures = True,
) -> None:
    """How sizes, updates and the loss of a low-rank layer grow with its width: measured beside predicted."""
    from headstart.dynamics.exponents import as_plain, findings
    from headstart.dynamics.theory import of_start, parsed, schemes
    from headstart.dynamics.widths import Settings, measure_all
    from headstart.errors import RunError
    from headstart.files import write_json
    from headstart.methods import parse_method
    from headstart.reports.document import check_plotly

    check_plotly()
    if optimizer not in ("adam", "lora+", "sgd"):
        raise RunError(f"--optimizer is adam, lora+ or sgd, not {optimizer!r}.")
    names = split_methods(methods) if methods else []
    usual = (256, 512, 1024, 2048) if names else Settings().widths
    grid = tuple(int(n) for n in _numbers("--widths", widths)) if widths else usual
    settings = Settings(widths=tuple(sorted(grid)), rank=rank, steps=steps, seeds=seeds, rate=rate)
    chosen = [parsed(text, optimizer) for text in scheme or ()]
    with progress_bars() as show:
        made = measure_all(chosen or ([] if names else schemes()), settings, show=show)
        for name in names:
            from headstart.dynamics.starts import of_method

            own = [of_start(name, power, optimizer) for power in _numbers("--rates", rates)]
            made += measure_all(own, settings, of_method(parse_method(name), settings), show)
    folder = out.expanduser()
    write_json(as_plain(made, settings), folder / "exponents.json")
    _report(findings(made, settings), folder, pictures)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """Return numbers that commas part.

    Raises:
        RunError: one is none.
    """
    from headstart.errors import RunError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RunError(f"{option} takes numbers with commas between them, not {text!r}.") from None


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
    from headstart.dynamics.images import WHERE

    raise DataError(f"give {option} the folder of the IDX files, as none of {', '.join(usual)} is there. {WHERE}.")
