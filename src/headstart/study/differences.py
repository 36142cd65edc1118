"""What tells the runs of two starts apart: the difference seed by seed, or item by item, with its interval and p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, stdev
from typing import Any

import numpy as np

from headstart.errors import DataError
from headstart.evaluation.intervals import CONFIDENCE

Interval = tuple[float, float]
Array = np.ndarray[Any, Any]
# Of the bootstrap over items. No p is less than 2 in so many, which a correction for a hundred starts leaves under 5 %.
_RESAMPLES = 4000
# Differences that differ by less, relative to the figures that they are of, are equal but for rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Outcome:
    """What one run of a study came to.

    Attributes:
        start, rate, seed: the label of its start, its peak learning rate, its seed.
        validation: the figure that the rate is chosen on; not finite where the run diverged or was pruned.
        test: the figure that is reported; not finite likewise.
        items: what the test figure is of, such as answers (0 or 1) or summed losses, the same items in the same order
            in all runs; empty where unknown. The figure is their sum over the sum of the weights.
        weights: of the items, such as tokens; empty where each has the weight 1.
    """

    start: str
    rate: float
    seed: int
    validation: float
    test: float
    items: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Difference:
    """A start's test figure minus the reference's.

    Attributes:
        value: the mean difference, in the figure's units.
        count: of the pairs, seeds or items, that it is the mean of.
        method: what interval and p are from: "t", "sign", "McNemar", "bootstrap"; empty where there is neither.
        interval: of the difference, at 95 %; None where it can't be had.
        p: two-sided, of no difference, not corrected; None where it can't be had.
    """

    value: float
    count: int
    method: str = ""
    interval: Interval | None = None
    p: float | None = None


def paired_over_seeds(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Return the mean difference within pairs, one a seed: by t, or by sign where all differences are the same."""
    from scipy.stats import t

    differences = [figure - other for figure, other in pairs]
    count, value = len(pairs), fmean(differences)
    if count < 2:
        return Difference(value, count)
    rounding = _ROUNDING * max(abs(figure) for pair in pairs for figure in pair)
    if max(differences) - min(differences) <= rounding:
        return Difference(value, count, "sign", p=1.0 if abs(value) <= rounding else 2.0 ** (1 - count))
    error = stdev(differences) / math.sqrt(count)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    p = float(2 * t.sf(abs(value) / error, count - 1))
    return Difference(value, count, "t", (value - half, value + half), p)


def paired_over_items(pairs: Sequence[tuple[Outcome, Outcome]]) -> Difference | None:
    """Return the difference item by item, averaged over seeds first: McNemar's test of answers of one seed, else the
    bootstrap; None where items are unknown.

    Raises:
        DataError: the runs' items differ in number or weights, or are not finite.
    """
    from scipy.stats import binomtest

    runs = [run for pair in pairs for run in pair]
    if not runs:
        return None
    weights = np.array(runs[0].weights or [1.0] * len(runs[0].items))
    alike = all(run.weights == runs[0].weights and len(run.items) == len(weights) for run in runs)
    if not alike or min(weights) <= 0 or not all(map(math.isfinite, chain(*(run.items for run in runs)))):
        names = f"{runs[0].start!r} and {runs[1].start!r}"
        raise DataError(f"{names} need the same finite items, with the same positive weights: test them alike.")
    own, others = (np.array([pair[side].items for pair in pairs], dtype=float) for side in (0, 1))
    if len(pairs) > 1 or not np.isin([own, others], (0, 1)).all() or (weights != 1).any():
        return _bootstrap(own.mean(axis=0) - others.mean(axis=0), weights)
    count, alone, differing = len(weights), int((own > others).sum()), int((own != others).sum())
    if not differing:
        return Difference(0.0, count, "McNemar", p=1.0)
    test = binomtest(alone, differing)
    share = test.proportion_ci(CONFIDENCE, method="exact")
    value, low, high = (differing * (2 * of - 1) / count for of in (alone / differing, share.low, share.high))
    return Difference(value, count, "McNemar", (low, high), float(test.pvalue))


def _bootstrap(differences: Array, weights: Array) -> Difference:
    """Return the ratio of sums; its p is the least level at which the percentile interval leaves out 0."""
    from scipy.stats import bootstrap

    count, value = len(differences), float(differences.sum() / weights.sum())
    if count < 2:
        return Difference(value, count)
    drawn = bootstrap(
        (differences, weights),
        lambda changes, of, axis: changes.sum(axis=axis) / of.sum(axis=axis),
        **dict(paired=True, vectorized=True, method="percentile", confidence_level=CONFIDENCE),
        **dict(n_resamples=_RESAMPLES, batch=max(1, 100_000 // count), random_state=np.random.default_rng(0)),
    )
    values, (low, high) = drawn.bootstrap_distribution, drawn.confidence_interval
    least = min(int((values <= 0).sum()), int((values >= 0).sum()))
    p = min(1.0, 2 * (least + 1) / (_RESAMPLES + 1))
    return Difference(value, count, "bootstrap", (float(low), float(high)), p)
