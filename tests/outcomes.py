"""Outcomes of runs whose truth is known, for the tests of a study's statistics."""

from __future__ import annotations

import math

from headstart.study.differences import Outcome
from headstart.study.statistics import compared


def outcomes_of(truth, seeds, rng, *, seed_noise=0.0, run_noise=0.0, validation_noise=0.0, test_noise=0.0):
    """Return outcomes of the true figures by start and rate, with normal noise of known standard deviations."""
    outcomes = []
    of_seed = {seed: rng.normal(0, seed_noise) for seed in seeds}
    for start, curve in truth.items():
        for rate, figure in curve.items():
            for seed in seeds:
                mean = figure + of_seed[seed] + rng.normal(0, run_noise)
                shown = (mean + rng.normal(0, noise) for noise in (validation_noise, test_noise))
                outcomes.append(Outcome(start, rate, seed, *map(float, shown)))
    return outcomes


def curves(**figures):
    """Return outcomes of one seed, validation and test alike, at rates 1, 2, 4, …"""
    return [
        Outcome(start, 2.0**power, 0, figure, figure)
        for start, curve in figures.items()
        for power, figure in enumerate(curve)
    ]


def cells(start, tests, rate=1.0):
    return [Outcome(start, rate, seed, test, test) for seed, test in enumerate(tests)]


def answered(start, *items, weights=()):
    """Return outcomes of seeds 0, 1, … with these items."""
    tests = [sum(column) / (sum(weights) or len(column)) for column in items]
    pairs = enumerate(zip(tests, items, strict=True))
    return [Outcome(start, 1.0, seed, test, test, tuple(column), tuple(weights)) for seed, (test, column) in pairs]


def row_of(outcomes, start="b", reference="a", higher_is_better=False, **further):
    rows = compared(outcomes, reference, higher_is_better, **further)
    return next(row for row in rows if row.start == start)


def is_within_error(share, truth, count, errors=3.0):
    return abs(share - truth) <= errors * math.sqrt(truth * (1 - truth) / count)
