"""What tells two starts apart, over seeds and over items."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from headstart.errors import DataError
from headstart.study.differences import Outcome
from headstart.study.statistics import best_rates, compared, holm, robustness
from outcomes import answered, cells, curves, row_of

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Over seeds.


def test_the_paired_t_is_scipys():
    ours, theirs = [1.0, 2.0, 4.0, 3.5], [1.5, 2.25, 4.75, 3.25]
    for higher in (False, True):
        row = row_of(cells("b", ours) + cells("a", theirs), higher_is_better=higher)
        known = stats.ttest_rel(ours, theirs)
        assert row.over_seeds.p == pytest.approx(known.pvalue)
        assert row.over_seeds.interval == pytest.approx(tuple(known.confidence_interval(0.95)))
        assert row.interval == pytest.approx(tuple(stats.ttest_1samp(ours, 0).confidence_interval(0.95)))
        assert (row.mean, row.seeds, row.over_seeds.count, row.over_seeds.method) == (2.625, 4, 4, "t")
        assert row.over_seeds.value == pytest.approx(np.mean(ours) - np.mean(theirs))


def test_only_common_seeds_are_paired():
    ours = [replace(cell, seed=cell.seed + 1) for cell in cells("b", [1.0, 2.0, 9.0])]
    row = row_of(ours + cells("a", [50.0, 1.5, 1.0]))
    assert row.over_seeds.count == 2 and row.over_seeds.value == 0.25 and (row.mean, row.seeds) == (1.5, 2)
    far = [replace(cell, seed=cell.seed + 9) for cell in ours]
    row = row_of(far + cells("a", [50.0, 1.5, 1.0]))
    assert (row.over_seeds, row.p, row.verdict, row.apart) == (None, None, "not compared", True)


def test_one_seed_has_a_difference_and_no_verdict():
    row = row_of(cells("b", [1.0]) + cells("a", [3.0]))
    assert row.over_seeds.value == -2 and row.over_seeds.interval is None and row.over_seeds.p is None
    assert row.interval is None and row.verdict == "not compared" and row.decisive is None


@pytest.mark.parametrize("shift", [0.0, 0.1, -0.3])
@pytest.mark.parametrize("count", [2, 5, 7])
def test_without_spread_only_the_signs_count(shift, count):
    theirs = [0.1 * seed for seed in range(count)]  # whose differences are equal but for rounding
    row = row_of(cells("b", [test + shift for test in theirs]) + cells("a", theirs))
    # As many heads as tosses, or as many tails.
    assert row.over_seeds.p == row.p == (2 * 0.5**count if shift else 1.0)
    assert row.over_seeds.interval is None and row.over_seeds.method == "sign"
    assert row.verdict == ("not told apart" if not shift or count < 7 else "better" if shift < 0 else "worse")
    assert row_of(cells("b", [0.1 + 0.2, 0.3]) + cells("a", [1.0, 2.0])).interval is None


def test_rows_are_ordered_and_what_diverged_is_last():
    outcomes = [
        *cells("reference", [3.0, 3.1, 2.9]),
        *cells("worse", [9.0, 9.1, 8.8]),
        *cells("better", [1.0, 1.1, 0.8]),
        *cells("close", [2.9, 3.2, 2.95]),
        *cells("diverged", [0.0, INF, 0.0]),
        *cells("diverged", [NAN, NAN, NAN], rate=2.0),
    ]
    rows = compared(outcomes, "reference", False)
    verdicts = {row.start: row.verdict for row in rows}
    assert list(verdicts) == ["better", "reference", "close", "worse", "diverged"]
    told = {"close": "not told apart", **{name: name for name in ("reference", "better", "worse", "diverged")}}
    assert verdicts == told
    assert rows[1].over_seeds is rows[1].over_items is rows[1].p is None and rows[1].interval is not None
    assert rows[-1].mean == INF and rows[-1].seeds == 2 and rows[-1].p is rows[-1].over_seeds is None
    # Raw p are smaller: three starts are compared.
    assert [row.p for row in rows if row.p] == holm([row.over_seeds.p for row in rows if row.p])
    higher = compared(outcomes, "reference", True)
    assert [row.start for row in higher] == ["worse", "close", "reference", "better", "diverged"]
    assert [row.verdict for row in higher][:4] == ["better", "not told apart", "reference", "worse"]
    assert {row.verdict for row in compared(outcomes, "diverged", False)} == {"not compared", "diverged"}


def test_what_is_missing_is_named():
    with pytest.raises(DataError, match="'c': the starts are a, b"):
        compared(cells("b", [1.0]) + cells("a", [1.0]), "c", False)
    outcomes = curves(a=[1, 2], b=[1, 2])
    choices = best_rates(outcomes, False)
    with pytest.raises(DataError, match="'b' has no run at a chosen rate"):
        compared(outcomes, "a", False, {"a": choices["a"]})
    with pytest.raises(DataError, match="'a' has no run at a chosen rate"):
        robustness(outcomes, 1.0, False, choices | {"a": replace(choices["a"], rate=3.0)})


def test_rates_may_be_chosen_on_losses_where_accuracies_are_reported():
    outcomes = [Outcome("a", r, s, loss, accuracy) for s in (0, 1) for r, loss, accuracy in ((1, 2, 0.5), (2, 1, 0.7))]
    choices = best_rates(outcomes, False)
    assert choices["a"].rate == 2 and compared(outcomes, "a", True, choices)[0].mean == 0.7
    assert compared(outcomes, "a", True)[0].mean == 0.5


# Over items.


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (1, 0), (6, 0), (0, 6), (9, 3), (3, 9), (20, 20), (40, 21)])
def test_mcnemars_is_the_binomial_by_brute_force(ours, theirs):
    differing, both = ours + theirs, 30
    b = [1.0] * ours + [0.0] * theirs + [1.0, 0.0] * both
    a = [0.0] * ours + [1.0] * theirs + [1.0, 0.0] * both
    row = row_of(answered("b", b) + answered("a", a), higher_is_better=True)
    ways = [math.comb(differing, heads) for heads in range(differing + 1)]
    as_extreme = sum(way for way in ways if way <= ways[ours])
    assert row.over_items.p == pytest.approx(as_extreme / 2**differing)
    assert row.over_items.value == pytest.approx((ours - theirs) / len(b))
    assert row.over_items.method == "McNemar" and row.over_items.count == len(b)
    assert row.decisive is row.over_items
    if differing:
        low, high = row.over_items.interval
        assert low <= row.over_items.value <= high
        assert (low > 0 or high < 0) == (row.over_items.p <= 0.05) == (row.verdict != "not told apart")


def test_losses_are_compared_as_ratios_of_sums():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 50, 200).astype(float)
    theirs = weights * rng.normal(2, 0.5, 200)
    ours = theirs - weights * rng.normal(0.3, 0.3, 200)
    outcomes = answered("b", ours, weights=weights) + answered("a", theirs, weights=weights)
    row = row_of(outcomes)
    assert row.over_items.value == pytest.approx(row.over_seeds.value) and row.over_items.method == "bootstrap"
    assert row.verdict == "better" and row.p == pytest.approx(2 / 4001)
    # Linearised: the ratio's standard error.
    error = np.std((ours - theirs) - row.over_items.value * weights) / weights.mean() / math.sqrt(200)
    low, high = row.over_items.interval
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.08)
    assert row_of(outcomes) == row  # the same resamples
    # Tokens count: items of few are no longer worth as much as those of many.
    assert row_of(answered("b", ours / weights) + answered("a", theirs / weights)).over_items.value != pytest.approx(
        row.over_items.value, rel=1e-3
    )


def test_items_are_averaged_over_common_seeds_and_seeds_go_first():
    rng = np.random.default_rng(1)
    a = [(rng.random(400) < 0.5).astype(float) for _ in range(3)]
    # Much better in every item's mean, and by very different amounts in the seeds.
    b = [np.maximum(a[0], rng.random(400) < 0.9), np.maximum(a[1], rng.random(400) < 0.02), a[2]]
    row = row_of(answered("b", *b) + answered("a", *a), higher_is_better=True)
    assert row.over_items.p < 0.01 and row.over_items.method == "bootstrap"
    assert row.over_items.value == pytest.approx(np.mean(b) - np.mean(a))
    assert row.decisive is row.over_seeds and row.p > 0.05 and row.verdict == "not told apart"
    # With that seed alone, items decide; where one side has none, nothing does.
    one = answered("b", b[0]) + answered("a", a[0])
    assert row_of(one, higher_is_better=True).verdict == "better"
    bare = [replace(cell, items=()) for cell in answered("a", a[0])]
    assert row_of(answered("b", b[0]) + bare, higher_is_better=True).over_items is None


def test_items_in_another_order_of_seeds_are_the_same_to_the_last_digit():
    rng = np.random.default_rng(10)
    outcomes = answered("b", *rng.normal(size=(4, 20))) + answered("a", *rng.normal(size=(4, 20)))
    assert row_of(outcomes[::-1]).over_items == row_of(outcomes).over_items


def test_right_answers_with_weights_and_items_without_differences_are_resampled_too():
    right, wrong = [1.0, 1.0] * 20, [1.0, 0.0] * 20
    weights = [1.0, 3.0] * 20
    row = row_of(answered("b", right, weights=weights) + answered("a", wrong, weights=weights))
    assert row.over_items.method == "bootstrap" and row.over_items.value == pytest.approx(0.25)
    same = row_of(answered("b", right, weights=weights) + answered("a", right, weights=weights))
    assert same.p == 1.0 and same.over_items.interval == (0.0, 0.0) and same.verdict == "not told apart"
    single = row_of(answered("b", [2.5]) + answered("a", [2.0]))
    assert single.over_items.interval is single.over_items.p is None and single.verdict == "not compared"


@pytest.mark.parametrize(
    ("items", "weights"), [([1.0], ()), ([1.0, 2.0], (1.0, 2.0)), ([1.0, NAN], ()), ([1.0, 2.0], (1.0, 0.0))]
)
def test_items_that_can_not_be_paired_are_refused(items, weights):
    cell = Outcome("b", 1.0, 0, 1.0, 1.0, tuple(items), weights)
    with pytest.raises(DataError, match="'b' and 'a' need the same finite items"):
        compared([cell, *answered("a", [1.0, 2.0], weights=())], "a", False)


def test_weights_of_zero_are_refused():
    with pytest.raises(DataError, match="positive weights"):
        compared([*answered("b", [1, 2], weights=(1, 0)), *answered("a", [1, 2], weights=(1, 0))], "a", False)
