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
from headstart.study.comparison import Comparison
from headstart.training.recipe import Recipe

if TYPE_CHECKING:
    from headstart.training.run import Result

# The defaults are those of the two dataclasses, so that a comparison made in Python is the same.
_COMPARISON = Comparison(model="smollm2")
_RECIPE = _COMPARISON.recipe


@app.command()
def compare(
    model: Model = "smollm2",
    methods: Annotated[
        str, typer.Option("--methods", "-m", help="Separated by commas or blanks, settings after a colon.")
    ] = ",".join(_COMPARISON.methods),
    data: Annotated[
        str, typer.Option("--data", help="JSONL file, folder with train.jsonl and test.jsonl, hub name, or problems.")
    ] = _COMPARISON.data,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="Held-out examples, where --data has none.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs; the same folder goes on.")] = Path(
        "runs/compare"
    ),
    steps: Annotated[int, typer.Option("--steps", min=1)] = _RECIPE.steps,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = _RECIPE.batch_size,
    lr: Annotated[float, typer.Option("--lr", help="AdamW's rate, the same for all methods.")] = _RECIPE.lr,
    rank: Rank = _RECIPE.r,
    alpha: Alpha = _RECIPE.lora_alpha,
    rslora: RsLora = False,
    targets: Targets = "all-linear",
    seed: Seed = 0,
    form: Form = SubtractingForm.ANCHORED,
    train_examples: Annotated[int, typer.Option("--train-examples", min=1)] = _COMPARISON.train_examples,
    held_out_examples: Annotated[int, typer.Option("--held-out-examples", min=1)] = _COMPARISON.held_out_examples,
    graded_examples: Annotated[
        int, typer.Option("--graded-examples", min=0, help="Answers to grade; 0: none.")
    ] = _COMPARISON.graded_examples,
    max_length: MaxLength = _RECIPE.max_length,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", min=1, help="For a graded answer; by default as long as the longest held out."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Fine-tune from several starts with the same seed and data order; resumes where it was cut off."""
    comparison = Comparison(
        model=model,
        methods=split_methods(methods),
        data=data,
        held_out=held_out,
        train_examples=train_examples,
        held_out_examples=held_out_examples,
        graded_examples=graded_examples,
        recipe=Recipe(
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=target_modules(targets),
            form=form.word,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
        ),
    )
    comparison.check()

    from headstart.study.compare import compare as run_all
    from headstart.study.compare import described, prepare, start_over
    from headstart.study.page import check_plotly, write_page
    from headstart.study.tables import markdown, rich_table
    from headstart.training.models import resolve_model

    check_plotly()

    def load() -> tuple[Any, Any]:
        loaded, tokenizer, _ = resolve_model(model)
        return loaded, tokenizer

    def keep(results: list[Result]) -> None:
        write_whole(out / "table.md", markdown(results))
        write_page(out / "report.html", "Starts compared", described(comparison, results), results)

    if force:
        # Only once it is known that the new comparison can be made.
        prepare(comparison, load()[1])
        start_over(out, comparison)
    with progress_bars(console) as show:
        results = run_all(
            comparison,
            out,
            load,
            progress=lambda method, step, done, total: show(f"{method}: {step}", done, total),
            finished=keep,
        )
    output.print(described(comparison, results), markup=False, highlight=False)
    output.print(rich_table(results))
    for result in results:
        for warning in result.warnings:
            console.print(f"warning: {result.method}: {warning}", markup=False)
    output.print(f"page: {out / 'report.html'}", markup=False, highlight=False)


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
