"""``headstart train``, ``recipes``, ``tasks``: fine-tune by a file, and what files and tasks there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from headstart.cli.app import app
from headstart.cli.console import console, output


@app.command()
def train(
    source: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A YAML file, or the name of a recipe.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as optimizer.lr=2e-4 start=pissa.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run's folder; by default one of its own in runs/.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print every setting and where it came from; do nothing.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Count layers, parameters, memory and steps without weights; do nothing.")
    ] = False,
) -> None:
    """Fine-tune from a start, measure, and write the result; cut off, the same command goes on."""
    from headstart.processes import Processes
    from headstart.runs.read import flat_settings, read_run

    # Of several processes the first one speaks.
    output.quiet = Processes.numbered().rank > 0
    words = list(overrides or [])
    if source is not None and "=" in source and not Path(source).is_file():
        words = [source, *words]
        source = None
    run, origins = read_run(source, words)
    _check_names(run)
    if show:
        table = Table(box=None, pad_edge=False)
        for title in ("setting", "value", "from"):
            table.add_column(title)
        for key, value in flat_settings(run).items():
            table.add_row(key, _text(value), origins.get(key, "default"))
        output.print(table)
        output.print(f"key {run.key}, folder {run.folder_name}", markup=False, highlight=False)
        return
    if check:
        from headstart.runs.plan import planned

        output.print(planned(run).table())
        return
    from headstart.progress import progress_bars
    from headstart.runs.stages import execute

    folder = out or Path("runs") / run.folder_name
    if output.quiet:
        _silence()
        execute(run, folder)
        return
    told: list[str] = []

    def tell(warning: str) -> None:
        told.append(warning)
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)

    console.print(f"run: {folder}", markup=False, highlight=False, soft_wrap=True)
    with progress_bars(console) as draw:
        result = execute(run, folder, show=draw, tell=tell)
    _print_result(result, folder, told)


@app.command()
def recipes() -> None:
    """List the recipes that come with headstart."""
    from headstart.runs.read import recipes as all_recipes

    for name, path in all_recipes():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        output.print(f"{name:<48} {first.lstrip('# ')}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def tasks() -> None:
    """List the tasks to learn from and to be graded by, with their metrics and where their data come from."""
    from headstart.tasks.registry import task_class, task_names

    table = Table(box=None, pad_edge=False)
    for title in ("task", "metrics", "data", "source"):
        table.add_column(title)
    for name in task_names():
        cls = task_class(name)
        table.add_row(name, ", ".join(cls.metrics) or "held-out loss", cls.hub or "your own files", cls.source)
    output.print(table)


def _silence() -> None:
    """Leave the bars and warnings of the libraries to the first process."""
    import warnings

    import datasets
    import transformers

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _check_names(run: Any) -> None:
    """Look up the method and the tasks, before anything is loaded.

    Raises:
        RunError: there is no such name or setting.
    """
    from headstart.errors import MethodError, RunError, TaskError
    from headstart.methods import parse_method
    from headstart.runs.read import tasks_of

    try:
        parse_method(run.start.method)
        tasks_of(run)
        if run.evaluation.tasks:
            from headstart.evaluation.evaluate import check_names
            from headstart.evaluation.own import Asking

            asking = Asking(data=run.evaluation.data, run_code=run.evaluation.allow_code_execution)
            check_names(run.evaluation.tasks, asking)
    except (MethodError, TaskError) as error:
        raise RunError(str(error)) from error


def _print_result(result: Any, folder: Path, told: list[str]) -> None:
    for warning in (one for one in result.warnings if one not in told):
        output.print(f"warning: {warning}", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("metric", "value", "95 % interval", "items"):
        table.add_column(title, justify="left" if title == "metric" else "right")
    for name, figure in result.metrics.items():
        interval = "" if figure.low is None else f"{figure.low:.4f} to {figure.high:.4f}"
        table.add_row(name, f"{figure.value:.4f}", interval, str(figure.count))
    output.print(table)
    output.print(f"{result.status}{f': {result.reason}' if result.reason else ''}; wrote {folder}", markup=False)
    if result.status != "done":
        raise typer.Exit(1)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
