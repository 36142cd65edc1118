"""``headstart eval``: what a model, an adapter or a run is worth, task by task."""

from __future__ import annotations

import enum
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from headstart.cli.app import app
from headstart.cli.console import console, output, warnings_said
from headstart.errors import TaskError


class EngineName(enum.StrEnum):
    """Who asks."""

    AUTO = "auto"
    LM_EVAL = "lm-eval"
    HEADSTART = "headstart"


class Dtype(enum.StrEnum):
    """The precision of weights in memory."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@app.command("eval")
def eval_(
    target: Annotated[str, typer.Argument(metavar="MODEL|ADAPTER|RUN", help="A model, or the folder of one of these.")],
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="Such as gsm8k,boolq,loss:text.txt.")] = "",
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Measure the loss on a text, a file or a hub dataset.")
    ] = None,
    forgetting: Annotated[
        list[str] | None,
        typer.Option("--forgetting", metavar="TEXT", help="Measure the base model's, too, and what training has cost."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="[TASK=]PATH", help="A file, folder or hub dataset in place of the task's own."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write; by default one of its own in evaluations/.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The base model, if not the adapter's own.")] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Of the weights; by default the run's.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="The first so many items of a task, or windows of a text.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="What is asked.")] = "test",
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", min=0, help="Examples before each item; by default as lm-eval has it.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option("--engine", help="auto takes lm-eval wherever it has the task.")
    ] = EngineName.AUTO,
    likelihood: Annotated[
        bool, typer.Option("--likelihood", help="Without lm-eval: compare choices' likelihoods; generate nothing.")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers to an item, for pass@k.")] = 1,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.01, help="Of the draws; 0.8 where there are several samples.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Items at a time.")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Of an answer.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, help="Of a text's windows; by default at most 2048."),
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run programs that the model writes, confined.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Ask a model tasks, and print figures with 95 % intervals; cut off, the same command goes on."""
    from headstart.evaluation.evaluate import FORGETTING, TEXT, check_names, default_folder, evaluate, split_names
    from headstart.evaluation.own import Asking
    from headstart.evaluation.target import find_target
    from headstart.progress import progress_bars

    names = [*split_names(tasks), *(f"{TEXT}{place}" for place in text or ())]
    names += [f"{FORGETTING}{place}" for place in forgetting or ()]
    asking = Asking(
        data=_sources(data or ()),
        split=split,
        limit=limit,
        fewshot=fewshot,
        engine=engine.value,
        likelihood=likelihood,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        seed=seed,
        batch_size=batch_size,
        run_code=allow_code_execution,
    )
    try:
        check_names(names, asking)
    except TaskError as error:
        raise typer.BadParameter(str(error), param_hint="--tasks") from error
    what = find_target(target, base=base, dtype=dtype.value if dtype else None)
    folder = out or default_folder(what, names, asking)

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    with progress_bars() as draw, warnings_said():
        result = evaluate(what, names, asking, folder, show=draw, say=say)
    if as_json:
        output.print_json(json.dumps(asdict(result)))
        return
    _print(result)
    output.print(f"wrote {folder}", markup=False, highlight=False)


def _sources(texts: Any) -> dict[str, str]:
    """Return data by task; a path without a task is for all."""
    sources: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).expanduser().exists():
            name, path = "", text
        if name in sources:
            raise typer.BadParameter(f"data of {name or 'all tasks'} are given twice", param_hint="--data")
        sources[name] = path
    return sources


def _print(result: Any) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("task", "metric", "value", "95 % interval", "items", "by"):
        table.add_column(title, justify="right" if title in ("value", "95 % interval", "items") else "left")
    for key, figure in result.metrics.items():
        task = next(name for name in sorted(result.engines, key=len, reverse=True) if key.startswith(f"{name}/"))
        interval = "" if figure.low is None else f"{figure.low:.4f} to {figure.high:.4f}"
        metric = key.removeprefix(f"{task}/")
        table.add_row(task, metric, f"{figure.value:.4f}", interval, str(figure.count), result.engines[task])
    output.print(table)
