"""Measured numbers with their intervals: shares by Wilson, all else by the bootstrap over items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from headstart.evaluation.held_out import mean_loss
from headstart.evaluation.intervals import bootstrap, wilson
from headstart.tasks.base import Task


@dataclass(frozen=True)
class Figure:
    """A measured number with its interval.

    Attributes:
        value: the number.
        low, high: its 95 % interval; None where there is none.
        count: of how many items.
        higher_is_better: what a comparison takes for better.
    """

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0
    higher_is_better: bool = True


def figure(values: Sequence[float]) -> Figure:
    """Return the mean of items with its interval."""
    mean = sum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        low, high = wilson(round(sum(values)), len(values))
        return Figure(mean, low, high, len(values))
    return resampled(lambda column: column.mean(), values, value=mean)


def resampled(
    statistic: Callable[..., Any], *columns: Sequence[float], value: float, higher_is_better: bool = True
) -> Figure:
    """Return a statistic's value and :func:`~headstart.evaluation.intervals.bootstrap`'s interval."""
    low, high = bootstrap(statistic, *columns) or (None, None)
    return Figure(value, low, high, len(columns[0]), higher_is_better)


def loss_figure(losses: Sequence[float], weights: Sequence[float]) -> Figure:
    """Return nats a token from each item's nats and tokens (or other units that they are spread over)."""
    value = sum(losses) / sum(weights)
    return resampled(mean_loss, losses, weights, value=value, higher_is_better=False)


def score_figures(task: Task, predictions: Sequence[float], labels: Sequence[float]) -> dict[str, Figure]:
    """Return the metrics of a task that is graded together."""
    figures = {}
    for name, value in task.score(predictions, labels).items():
        if name == "accuracy":
            low, high = wilson(round(value * len(labels)), len(labels))
            figures[name] = Figure(value, low, high, len(labels))
        else:
            figures[name] = resampled(lambda p, t, name=name: task.score(p, t)[name], predictions, labels, value=value)
    return figures
