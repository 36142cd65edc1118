"""``headstart compare``: fine-tune from several starts, each at several rates, and end in a ranking and a page."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.app import app
from headstart.cli.console import console, output
from headstart.cli.options import (
    Alpha,
    Data,
    Force,
    Form,
    MaxLength,
    Methods,
    Model,
    Rank,
    RsLora,
    Seed,
    SubtractingForm,
    Targets,
    Task,
    common_settings,
)
from headstart.errors import RunError
from headstart.files import write_whole
from headstart.progress import progress_bars

if TYPE_CHECKING:
    from rich.console import RenderableType

    from headstart.study.cells import Grid
    from headstart.study.summary import Summary
    from headstart.study.tree import Study

# What a study's own file says, and how the work is done, may be said beside it.
_BESIDE_A_FILE = {"model", "out", "workers", "ray", "refine", "prune", "max_time", "dry_run", "force"}
_STUDY = "How the work is done"
_GRADED = 48


@app.command()
def compare(
    context: typer.Context,
    model: Model = "smollm2",
    methods: Methods = "lora,init-ab,pissa,lora-one:samples=64",
    task: Task = None,
    data: Data = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="Held-out examples, where --data has none.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The study's folder; the same folder goes on. [default: runs/ and the file's name]"
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1)] = 20,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    lr: Annotated[
        str,
        typer.Option("--lr", help="AdamW's rates, separated by commas: each start is compared at its own best."),
    ] = "1e-3",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many, from --seed on.")] = 1,
    rank: Rank = 8,
    alpha: Alpha = 16,
    rslora: RsLora = False,
    targets: Targets = "all-linear",
    seed: Seed = 0,
    form: Form = SubtractingForm.ANCHORED,
    train_examples: Annotated[int, typer.Option("--train-examples", min=1)] = 2_000,
    validation_examples: Annotated[
        int | None,
        typer.Option(
            "--validation-examples",
            min=0,
            help="Of the training data, by which rates are chosen. [default: 48; 0 where there is one rate]",
        ),
    ] = None,
    held_out_examples: Annotated[int, typer.Option("--held-out-examples", min=1)] = 48,
    graded_examples: Annotated[
        int | None,
        typer.Option(
            "--graded-examples",
            min=0,
            help="Answers to grade; 0: none. [default: 48; 0 where held-out examples have none to grade by]",
        ),
    ] = None,
    max_length: MaxLength = 512,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="For a graded answer; by default as many as the task allows."),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes at work; another command on the folder shares it, too.")
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help='A Ray cluster whose machines all see the folder, or "local".'),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Add rates where a start's best lies at the edge of its grid.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Give up hopeless rates after a third of the steps.")] = False,
    max_time: Annotated[
        str | None, typer.Option("--max-time", help="Begin no cell after so long: 90m, 8h, 2d; minutes without a unit.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is to do and how long; do nothing.")
    ] = False,
    force: Force = False,
) -> None:
    """Fine-tune from several starts, each at several rates, and compare each at its best; goes on where it was cut off.

    MODEL may be a study's YAML file, which then holds all settings.
    """
    from headstart.reports.answer import answer
    from headstart.reports.document import check_plotly
    from headstart.reports.page import write_page
    from headstart.reports.tables import markdown, ranking_table
    from headstart.study.cells import Grid
    from headstart.study.study import PAGES, run_study, start_over
    from headstart.study.summary import summarised

    seconds = seconds_of(max_time) if max_time is not None else None
    source = Path(model).expanduser()
    if source.suffix in (".yaml", ".yml"):
        study = _from_file(context, source)
        out = out or Path("runs") / source.stem
    else:
        out = out or Path("runs/compare")
        # Before a study is made of them, which would say it in a study's words.
        rates = [rate.strip() for rate in re.split(r",(?![^{]*\})", lr) if rate.strip()]
        several = len(rates) > 1 or "{" in lr
        settings = common_settings(
            model, task, data, train_examples, rank, alpha, rslora, targets, batch_size, max_length
        )
        settings["data"] |= {
            "held_out": held_out,
            "held_out_examples": held_out_examples,
            "validation_examples": (48 if several else 0) if validation_examples is None else validation_examples,
        }
        settings |= {
            "start": {"form": form.word},
            "schedule": {"steps": steps, "warmup": 0.1},
            "evaluation": {
                "graded_examples": _to_grade(settings) if graded_examples is None else graded_examples,
                "max_new_tokens": max_new_tokens,
            },
        }
        study = _from_options(
            settings,
            split_methods(methods),
            rates,
            tuple(range(seed, seed + seeds)),
        )
    grid = Grid(study)
    _check(grid)
    check_plotly()
    if dry_run:
        _tell(grid, out, workers)
        return
    if force:
        _read_all(grid)  # only once it is known that the new study has data
        start_over(out)
    page, text = (out / name for name in PAGES[:2])

    latest: list[RenderableType] = []

    def write() -> Summary | None:
        summary = summarised(grid, out, refine=refine)
        if not summary.counted().get("done"):
            return None  # there is nothing yet that a page could show
        write_whole(text, markdown(summary))
        write_page(page, summary)
        latest[:] = ranking_table(summary)[:1]
        return summary

    gc.freeze()  # what is imported stays, and each run would look through it several times for what can go
    with progress_bars(console, above=lambda: latest) as show:
        run_study(
            study,
            out,
            workers=workers,
            ray=ray,
            refine=refine,
            prune=prune,
            max_seconds=seconds,
            show=show,
            ended=write,
        )
    summary = write()
    if summary is not None:
        output.print(answer(summary), markup=False, highlight=False, soft_wrap=True)
        output.print()
        for renderable in ranking_table(summary):
            output.print(renderable)
        output.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)
    _end(summary or summarised(grid, out, refine=refine))


def split_methods(text: str) -> tuple[str, ...]:
    """Split a list of methods; a piece without a name of its own goes on with the settings of the one before.

    ``lora,init-ab:beta=2,scheme=sgd,pissa`` is three methods: ``scheme=sgd`` belongs to the second. What stands in
    braces stays together, as in ``per-layer:{"q_proj": "pissa", "*": "lora"}``.
    """
    methods: list[str] = []
    for piece in re.findall(r"(?:\{[^}]*\}|[^,\s])+", text):
        if methods and "=" in piece and ":" not in piece:
            methods[-1] += f",{piece}"
        else:
            methods.append(piece)
    return tuple(methods)


def seconds_of(text: str) -> float:
    """Return the seconds that a text such as ``90m``, ``8h``, ``2d`` or ``45`` (minutes) means.

    Raises:
        RunError: it means none.
    """
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text)
    if matched is None:
        raise RunError(f"--max-time {text!r} is no time: write 90m, 8h or 2d.")
    return float(matched[1]) * {"s": 1, "m": 60, "": 60, "h": 3600, "d": 86_400}[matched[2]]


def _from_file(context: typer.Context, source: Path) -> Study:
    from headstart.study.tree import read_study

    for name in context.params:
        given = str(context.get_parameter_source(name)).rpartition(".")[2]
        if given == "COMMANDLINE" and name not in _BESIDE_A_FILE:
            raise RunError(f"--{name.replace('_', '-')} goes with no study's file: write it into {source}.")
    return read_study(source)


def _from_options(base: dict[str, Any], methods: tuple[str, ...], rates: list[str], seeds: tuple[int, ...]) -> Study:
    from headstart.errors import MethodError
    from headstart.methods import parse_method
    from headstart.runs.read import validated
    from headstart.study.rates import rates_of
    from headstart.study.tree import RATE, START, Study

    if not methods:
        raise MethodError("no method to compare: name some, as in lora,pissa.")
    for method in methods:
        parse_method(method)
    if twice := next((method for method in methods if methods.count(method) > 1), None):
        raise MethodError(f"method {twice!r} is named twice: leave one out, or give it other settings.")
    validated(base, "the options")
    run = {**base, "optimizer": {"lr": 1e-3}}
    rates_of(rates, 1e-3, methods[0])
    return Study(base=run, axes={START: list(methods), RATE: list(rates)}, seeds=seeds)


def _to_grade(settings: dict[str, Any]) -> int:
    """Return how many answers are graded where nobody said: none where the held-out examples give nothing to grade by.

    Raises:
        HeadstartError: the data, or a setting, is none.
    """
    from headstart.runs.examples import load_examples
    from headstart.runs.measure import gradeable
    from headstart.runs.read import tasks_of, validated

    run = validated(settings, "the options")
    if gradeable(load_examples(run, *tasks_of(run)).held_out.examples):
        return _GRADED
    console.print("no held-out example has an answer to grade by, so losses alone are compared", highlight=False)
    return 0


def _check(grid: Grid) -> None:
    """Refuse, before a model is loaded, what no cell could do."""
    from headstart.runs.read import tasks_of

    for cell in {cell.start: cell for cell in grid.cells()}.values():
        tasks_of(cell.run)


def _read_all(grid: Grid) -> None:
    from headstart.runs.examples import load_examples
    from headstart.runs.read import tasks_of

    load_examples(grid.base, *tasks_of(grid.base))


def _tell(grid: Grid, out: Path, workers: int) -> None:
    """Say what there is to do, and, from what is done, for how long."""
    from headstart.study.estimate import estimated

    for line in estimated(grid, out, workers):
        output.print(line, markup=False, highlight=False, soft_wrap=True)


def _end(summary: Summary) -> None:
    """Print what is to be known beside the ranking; leave with 1 where a cell is left or failed."""
    said: set[str] = set()
    for cell, result in summary.cells:
        for warning in result.warnings if result else []:
            if (line := f"warning: {cell.start}: {warning}") not in said:
                said.add(line)
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for cell, result in summary.cells:
        if result is not None and result.status != "done":
            reasons.setdefault(f"{result.status}: {result.reason}", []).append(cell.name)
    for reason, names in reasons.items():
        which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        console.print(f"{which} {reason}", markup=False, highlight=False, soft_wrap=True)
    counts = summary.counted()
    if counts.get("missing"):
        console.print(f"{counts['missing']} cells are left: the same command goes on.", markup=False, highlight=False)
    if counts.get("failed") or counts.get("missing"):
        raise typer.Exit(1)
