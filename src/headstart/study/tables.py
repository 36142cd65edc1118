"""The results of a comparison as rows of text, for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from headstart.evaluation.figures import Figure
from headstart.runs.result import Result
from headstart.tasks.registry import parse_task

LOSS = "final loss"


def titles(results: Sequence[Result]) -> list[str]:
    """Return the columns' titles; the score is that which the task puts first."""
    return ["method", "start loss", LOSS, _score(results), "95 % interval", "trainable", "start-up s", "training s"]


def rows(results: Sequence[Result]) -> list[list[str]]:
    """Return one row a result, in the order of :func:`titles`."""
    name = _score(results)
    return [_row(result, name) for result in results]


def method_of(result: Result) -> str:
    """Return the method that a run started from."""
    return str(result.settings["start"]["method"])


def rich_table(results: Sequence[Result]) -> Table:
    """Return a table for the terminal."""
    table = Table(box=None, pad_edge=False)
    for title in titles(results):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    return table


def markdown(results: Sequence[Result]) -> str:
    """Return a table in Markdown."""
    heads = titles(results)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    return "\n".join(lines) + "\n"


def _row(result: Result, score: str) -> list[str]:
    start, end = (result.metrics.get(f"loss/{when}") for when in ("start", "end"))
    figure = result.metrics.get(score) or result.metrics.get(f"{score}/end")
    cached = " (cache)" if result.start.get("cached") else ""
    return [
        method_of(result),
        _number(start),
        _number(end) if result.status == "done" else result.status,
        "-" if figure is None else f"{figure.value:.4f} of {figure.count}",
        "-" if figure is None or figure.low is None else f"{figure.low:.3f} to {figure.high:.3f}",
        f"{result.trainable:,}" if result.trainable else "-",
        f"{result.start['seconds']:.2f}{cached}" if result.start else "-",
        f"{result.seconds['training']:.1f}" if "training" in result.seconds else "-",
    ]


def _number(figure: Figure | None) -> str:
    return "-" if figure is None else f"{figure.value:.4f}"


def _score(results: Sequence[Result]) -> str:
    data = results[0].settings["data"]
    metrics = parse_task(data.get("held_out_task") or data["task"]).metrics
    return metrics[0] if metrics else "score"
