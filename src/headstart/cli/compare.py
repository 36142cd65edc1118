"""``headstart compare``: fine-tune from several starts, and end in a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.app import app
from headstart.cli.console import console, output
from headstart.cli.options import (
    Alpha,
    Force,
    Form,
    MaxLength,
    Model,
    Rank,
    RsLora,
    Seed,
    SubtractingForm,
    Targets,
    target_modules,
)
from headstart.files import write_whole
from headstart.progress import progress_bars

if TYPE_CHECKING:
    from headstart.runs.result import Result


@app.command()
def compare(
    model: Model = "smollm2",
    methods: Annotated[
        str, typer.Option("--methods", "-m", help="Separated by commas or blanks, settings after a colon.")
    ] = "lora,init-ab,pissa,lora-one:samples=64",
    task: Annotated[
        str | None,
        typer.Option(
            "--task", help="See `headstart tasks`; text where there are --data, else problems.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="A file, a folder with train and test files, or a hub name.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="Held-out examples, where --data has none.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs; the same folder goes on.")] = Path(
        "runs/compare"
    ),
    steps: Annotated[int, typer.Option("--steps", min=1)] = 20,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    lr: Annotated[float, typer.Option("--lr", help="AdamW's rate, the same for all methods.")] = 1e-3,
    rank: Rank = 8,
    alpha: Alpha = 16,
    rslora: RsLora = False,
    targets: Targets = "all-linear",
    seed: Seed = 0,
    form: Form = SubtractingForm.ANCHORED,
    train_examples: Annotated[int, typer.Option("--train-examples", min=1)] = 2_000,
    held_out_examples: Annotated[int, typer.Option("--held-out-examples", min=1)] = 48,
    graded_examples: Annotated[int, typer.Option("--graded-examples", min=0, help="Answers to grade; 0: none.")] = 48,
    max_length: MaxLength = 512,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="For a graded answer; by default as many as the task allows."),
    ] = None,
    force: Force = False,
) -> None:
    """Fine-tune from several starts with the same seed and data order; resumes where it was cut off."""
    from headstart.runs.read import tasks_of, validated
    from headstart.runs.stages import load_examples
    from headstart.study.compare import compare as run_all
    from headstart.study.compare import described, runs_of, start_over
    from headstart.study.page import check_plotly, write_page
    from headstart.study.tables import markdown, method_of, rich_table

    settings: dict[str, Any] = {
        "model": model,
        "data": {
            "task": task or ("text" if data is not None else "problems"),
            "train": data,
            "held_out": held_out,
            "train_examples": train_examples,
            "held_out_examples": held_out_examples,
        },
        "adapter": {"r": rank, "alpha": alpha, "rslora": rslora, "targets": target_modules(targets)},
        "start": {"form": form.word},
        "optimizer": {"lr": lr},
        "schedule": {"steps": steps, "warmup": 0.1},
        "batch": {"size": batch_size, "max_length": max_length},
        "evaluation": {"graded_examples": graded_examples, "max_new_tokens": max_new_tokens},
        "seed": seed,
    }
    base = validated(settings, "the options")
    named = split_methods(methods)
    runs_of(base, named)
    tasks = tasks_of(base)
    check_plotly()

    def keep(results: list[Result]) -> None:
        write_whole(out / "table.md", markdown(results))
        write_page(out / "report.html", "Starts compared", described(base, results), results)

    if force:
        # Only once it is known that the new comparison has data.
        load_examples(base, *tasks)
        start_over(out)
    with progress_bars(console) as show:
        results = run_all(base, named, out, show=show, finished=keep)
    output.print(described(base, results), markup=False, highlight=False)
    output.print(rich_table(results))
    for result in results:
        for warning in result.warnings:
            console.print(f"warning: {method_of(result)}: {warning}", markup=False)
    output.print(f"page: {out / 'report.html'}", markup=False, highlight=False)
    ended = [result for result in results if result.status != "done"]
    for result in ended:
        console.print(f"{method_of(result)} {result.status}: {result.reason}", markup=False, highlight=False)
    if ended:
        raise typer.Exit(1)


def split_methods(text: str) -> tuple[str, ...]:
    """Split a list of methods; a piece without a name of its own goes on with the settings of the one before.

    ``lora,init-ab:beta=2,scheme=sgd,pissa`` is three methods: ``scheme=sgd`` belongs to the second.
    """
    methods: list[str] = []
    for piece in text.replace(" ", ",").split(","):
        if not piece:
            continue
        if methods and "=" in piece and ":" not in piece:
            methods[-1] += f",{piece}"
        else:
            methods.append(piece)
    return tuple(methods)
