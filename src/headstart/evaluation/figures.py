"""Measured numbers with their intervals: shares by Wilson, all else by the bootstrap over items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.evaluation.held_out import mean_loss
from headstart.evaluation.intervals import bootstrap, bootstrap_counts, wilson
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
            figures[name] = Figure(value, *wilson(round(value * len(labels)), len(labels)), len(labels))
        elif name in _OF_COUNTS:
            # A prediction that is none is a class of its own.
            classes = [-1.0, *map(float, range(len(task.labels)))]
            given = [-1.0 if math.isnan(prediction) else prediction for prediction in predictions]
            low, high = bootstrap_counts(_OF_COUNTS[name], given, labels, classes) or (None, None)
            figures[name] = Figure(value, low, high, len(labels))
        else:
            figures[name] = resampled(lambda p, t, name=name: task.score(p, t)[name], predictions, labels, value=value)
    return figures


def _matthews(counts: Any) -> Any:
    """Return Matthews' correlation of several tables of counts by label and prediction; 0 where one is constant."""
    total, right = counts.sum((1, 2)).astype(float), np.trace(counts, axis1=1, axis2=2)
    given, wanted = counts.sum(1).astype(float), counts.sum(2).astype(float)
    covariance = right * total - (given * wanted).sum(1)
    spread = (total**2 - (given**2).sum(1)) * (total**2 - (wanted**2).sum(1))
    return np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


def _f1(counts: Any) -> Any:
    """Return F1 of the last class, the second of two; 0 where it is neither predicted nor there."""
    named = counts[:, :, -1].sum(1) + counts[:, -1, :].sum(1)
    return 2 * counts[:, -1, -1] / np.maximum(named, 1)


_OF_COUNTS = {"matthews": _matthews, "f1": _f1}
