"""Intervals beside measured numbers: Wilson's for shares, the bootstrap for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 2000


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, which holds where the count is small or the share near 0 or 1."""
    from scipy.stats import binomtest

    interval = binomtest(right, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(statistic: Callable[..., Any], *columns: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of a statistic over items; None of fewer than two items.

    Args:
        statistic: of one array for each column, such as a ratio of sums or a correlation.
        columns: one number an item each, paired.
        seed: of the resampling.
    """
    arrays = [np.asarray(column, dtype=float) for column in columns]
    count = len(arrays[0])
    if count < 2:
        return None
    draw = np.random.default_rng(seed)
    values = []
    for _ in range(_RESAMPLES):
        chosen = draw.integers(0, count, count)
        value = float(statistic(*(array[chosen] for array in arrays)))
        if np.isfinite(value):
            values.append(value)
    return _between(values)


def bootstrap_counts(
    statistic: Callable[[Any], Any],
    predictions: Sequence[float],
    labels: Sequence[float],
    classes: Sequence[float],
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return :func:`bootstrap`'s interval of a statistic of how often which class was predicted for which.

    Items of the same label and prediction are alike, so a resample is a draw of counts: a thousand times faster.

    Args:
        statistic: of counts (resamples, classes, classes), by label and by prediction.
        predictions, labels: one of each an item.
        classes: all that there may be, in ascending order.
        seed: of the resampling.
    """
    size, total = len(classes), len(labels)
    if total < 2:
        return None
    pairs = np.searchsorted(classes, labels) * size + np.searchsorted(classes, predictions)
    shares = np.bincount(pairs, minlength=size * size) / total
    counts = np.random.default_rng(seed).multinomial(total, shares, _RESAMPLES)
    values = statistic(counts.reshape(_RESAMPLES, size, size))
    return _between(values[np.isfinite(values)])


def _between(values: Sequence[float]) -> tuple[float, float] | None:
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
