"""The results of a comparison as rows of text, for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from headstart.training.run import Result

TITLES = (
    "method",
    "start loss",
    "final loss",
    "accuracy",
    "95 % interval",
    "trainable",
    "start-up s",
    "training s",
)


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's interval of a proportion, which holds where the count is small or the share near 0 or 1."""
    share, square = right / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * (share * (1 - share) / total + square / (4 * total * total)) ** 0.5
    return centre - half, centre + half


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Return one row a result, in the order of :data:`TITLES`."""
    return [_row(result) for result in results]


def _row(result: Result) -> tuple[str, ...]:
    accuracy = interval = "-"
    if result.graded:
        low, high = wilson(result.right, result.graded)
        accuracy = f"{100 * result.right / result.graded:.1f} % ({result.right}/{result.graded})"
        interval = f"{100 * low:.0f} to {100 * high:.0f} %"
    return (
        result.method,
        f"{result.start_loss:.4f}",
        f"{result.final_loss:.4f}",
        accuracy,
        interval,
        f"{result.trainable:,}",
        f"{result.startup_seconds:.2f}",
        f"{result.training_seconds:.1f}",
    )


def rich_table(results: Sequence[Result]) -> Table:
    """Return a table for the terminal."""
    table = Table(box=None, pad_edge=False)
    for title in TITLES:
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    return table


def markdown(results: Sequence[Result]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    return "\n".join(lines) + "\n"
