"""Comparisons of starts: what is chosen, what is said of it, and how often that is right where the truth is known."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headstart.errors import DataError
from headstart.study.differences import Outcome
from headstart.study.statistics import Choice, best_rates, compared, false_alarms, holm, judged, robustness, to_reach
from outcomes import answered, cells, curves, is_within_error, outcomes_of, row_of

INF, NAN = math.inf, math.nan
STEADY = settings(derandomize=True, deadline=None, max_examples=40)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# The choice of rates.


def test_the_best_mean_validation_is_chosen_and_the_test_figure_has_no_say():
    tests = {1.0: 0.0, 2.0: 9.0, 4.0: 0.0}
    validations = {1.0: (3.0, 5.0), 2.0: (2.0, 3.0), 4.0: (1.0, 7.0)}
    outcomes = [Outcome("a", r, s, validations[r][s], tests[r]) for r in (4.0, 1.0, 2.0) for s in (0, 1)]
    choice = best_rates(outcomes, False)["a"]
    assert choice == Choice("a", 2.0, ((1.0, 4.0, 2), (2.0, 2.5, 2), (4.0, 4.0, 2)), "")
    # Of the two that are equal in the other direction the smaller.
    assert best_rates(outcomes, True)["a"].rate == 1.0


@pytest.mark.parametrize(
    ("figures", "rate", "edge"),
    [
        ([1, 2, 3], 1.0, "low"),
        ([3, 2, 1], 4.0, "high"),
        ([2, 1, 2], 2.0, ""),
        ([1], 1.0, ""),
        ([2, 1, INF], 2.0, ""),  # the grid goes on to where it diverges
        ([INF, 2, 1], 4.0, "high"),
    ],
)
def test_a_best_rate_at_an_end_of_the_grid_says_so(figures, rate, edge):
    choice = best_rates(curves(a=figures), False)["a"]
    assert (choice.rate, choice.edge, len(choice.curve)) == (rate, edge, len(figures))


def test_a_rate_that_diverged_is_not_chosen_where_another_is_there():
    good, few = cells("a", [5.0, 5.0, 5.0], 1.0), cells("a", [6.0, 6.0], 2.0)
    for lost in (INF, -INF, NAN):
        diverged = cells("a", [0.0, 0.0, lost], 4.0)
        choice = best_rates(good + few + diverged, False)["a"]
        assert choice.rate == 1.0 and choice.curve[2] == (4.0, INF, 2)
        assert best_rates(few + diverged, False)["a"].rate == 2.0
    assert best_rates(diverged, True)["a"].curve == ((4.0, -INF, 2),)
    worse = cells("a", [1.0, INF, INF], 8.0)
    assert best_rates(worse + diverged, False)["a"].rate == 4.0  # more finished
    nothing = cells("a", [INF, INF], 2.0) + cells("a", [NAN, NAN], 1.0)
    assert best_rates(nothing, False)["a"].rate == 1.0


def at(start, rate, figures):
    """Return outcomes of the seeds that figures are given of."""
    return [Outcome(start, rate, seed, figure, figure) for seed, figure in figures.items()]


def test_rates_are_judged_by_the_seeds_that_all_of_them_have():
    # Seed 1 is a hard one: what lacks it only looks better.
    hard = at("a", 1.0, {0: 1.2, 1: 2.4, 2: 1.2}) + at("a", 2.0, {0: 1.0, 1: 2.0, 2: 1.0})
    assert best_rates(hard + at("a", 4.0, {0: 1.1, 2: 1.1}), False)["a"].rate == 2.0
    # A study cut off in its second seed: the middle rates, which are done first, gain nothing by it.
    first = [outcome for rate, loss in ((1.0, 1.4), (2.0, 1.0), (4.0, 1.1)) for outcome in at("a", rate, {0: loss})]
    choice = best_rates(first + at("a", 4.0, {1: 2.0}), False)["a"]
    assert choice.rate == 2.0 and {seeds for _, _, seeds in choice.curve} == {1}
    # Without a seed at all rates, those of the seed that the most have are judged.
    choice = best_rates(at("a", 1.0, {0: 0.1}) + at("a", 2.0, {1: 1.0}) + at("a", 4.0, {1: 2.0}), False)["a"]
    assert choice.rate == 2.0 and [rate for rate, _, _ in choice.curve] == [2.0, 4.0]


def test_starts_are_ranked_by_the_seeds_that_all_of_them_have():
    runs = at("lora", 1.0, {0: 1.0, 1: 3.0, 2: 1.0}) + at("pissa", 1.0, {0: 1.05, 2: 1.05})
    rows = compared(runs, "lora", False)
    assert [(row.start, row.mean, row.seeds) for row in rows] == [("lora", 1.0, 2), ("pissa", 1.05, 2)]
    # Pairs are of all seeds that two have, whatever a third lacks.
    rows = compared(runs + at("eva", 1.0, {0: 1.5, 1: 3.5, 2: 1.5}), "lora", False)
    assert {row.start: row.over_seeds.count for row in rows if row.over_seeds} == {"pissa": 2, "eva": 3}
    assert {row.seeds for row in rows} == {2}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_best_on_every_seed_is_chosen_whatever_is_missing(data):
    """Where one rate is the best of every seed, and seeds differ by more than rates, missing runs hide nothing."""
    rates = [2.0**place for place in range(data.draw(st.integers(2, 5)))]
    best = data.draw(st.sampled_from(rates))
    done = data.draw(st.sets(st.tuples(st.sampled_from(rates), st.integers(0, 3)), min_size=1))
    kept = sorted(done | {(best, seed) for _, seed in done})
    runs = [Outcome("a", rate, seed, *[10.0 * seed + abs(math.log2(rate / best))] * 2) for rate, seed in kept]
    assert best_rates(runs, False)["a"].rate == best


def test_a_run_that_is_there_twice_or_a_rate_of_zero_is_refused():
    with pytest.raises(DataError, match=r"'a' at rate 1\.0 with seed 0"):
        best_rates(cells("a", [1.0]) * 2, False)
    with pytest.raises(DataError, match="positive rate"):
        best_rates(cells("a", [1.0], rate=0.0), False)


# Corrections for many starts.


def test_holm_by_hand():
    # In order: 4 · 0.005, 3 · 0.01, 2 · 0.03, and 1 · 0.04, which is less than what stands before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.4]) == pytest.approx([0.8, 0.8]) and holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


@STEADY
@given(st.lists(st.floats(0, 1), max_size=12), st.randoms())
def test_holm_keeps_the_order_lowers_nothing_and_knows_no_places(p_values, shuffler):
    adjusted = holm(p_values)
    assert all(raw <= corrected <= 1 for raw, corrected in zip(p_values, adjusted, strict=True))
    by_raw = [corrected for _, corrected in sorted(zip(p_values, adjusted, strict=True))]
    assert by_raw == sorted(by_raw)
    assert not p_values or min(adjusted) == min(1, min(p_values) * len(p_values))
    places = list(range(len(p_values)))
    shuffler.shuffle(places)
    assert holm([p_values[place] for place in places]) == [adjusted[place] for place in places]


def test_false_alarms_are_told_in_words():
    text = false_alarms(12)
    assert "12 starts" in text and " 0.6 of these 12" in text and "Holm" in text
    assert text.endswith("at most 5 % of studies.")
    assert " 1.2 of these 12" in false_alarms(12, confidence=0.9) and "10 %" in false_alarms(12, confidence=0.9)
    assert false_alarms(1).startswith("One start is") and "5 %" in false_alarms(1) and "Holm" not in false_alarms(1)
    assert "3 starts" in false_alarms(3, 5) and "in 5 settings each" in false_alarms(3, 5)
    assert "0.75 of these 15" in false_alarms(3, 5)


def test_equal_starts_in_several_settings_seem_different_in_five_per_cent_of_studies_at_most():
    rng, studies, alarms, alone = np.random.default_rng(5), 300, 0, 0
    for _ in range(studies):
        settings_of = []
        for _ in range(5):
            runs = [run for start in "abcd" for run in cells(start, rng.normal(0, 1, 5))]
            settings_of.append(compared(runs, "a", False))
        alone += any(row.verdict in ("better", "worse") for rows in settings_of for row in rows)
        together = judged(settings_of, False)
        alarms += any(row.verdict in ("better", "worse") for rows in together for row in rows)
    bound = 0.05 * studies + 3 * math.sqrt(0.05 * 0.95 * studies)
    assert alarms <= bound < alone


# Robustness against the rate.


def test_span_and_area_by_hand():
    # In octaves around the best: a has -2 to 2, b has -1 to 3; both have -1 to 2.
    rows = robustness(curves(a=[4, 1, 0, 2, 6], b=[5, 1, 2, 3, 13]), 1.5, False)
    a, b = rows["a"], rows["b"]
    assert (a.rate, b.rate) == (4.0, 2.0)
    assert a.common == b.common == pytest.approx((0.5, 4.0))
    # a is at 1.5 a sixth of the way from 1 at rate 2 to 4 at rate 1, and three quarters from 0 at rate 4 to 2 at 8.
    assert a.span == pytest.approx((2 * 2 ** (-1 / 6), 4 * 2**0.75)) and not a.open_low and not a.open_high
    assert b.span == pytest.approx((2 * 2 ** (-1.5 / 4), 4 * 2**0.5))
    # Trapezoids an octave wide: of a (1+0)/2, (0+2)/2, (2+6)/2; of b's excess (4+0)/2, (0+1)/2, (1+2)/2.
    assert a.area == pytest.approx((0.5 + 1 + 4) / 3) and b.area == pytest.approx((2 + 0.5 + 1.5) / 3)
    assert a.area_to_best == pytest.approx(a.area) and b.area_to_best == pytest.approx(b.area + 1)


def test_common_ranges_end_between_rates_too():
    # Rates 1, 3, 9 around 3 and 1, 2, 4, 8 around 2: common are 1/2 to 3.
    outcomes = [Outcome("a", 3.0**power, 0, figure, figure) for power, figure in enumerate([6.0, 0.0, 3.0])]
    rows = robustness([*outcomes, *curves(b=[1, 0, 2, 8])], 0.5, False)
    assert rows["a"].common == pytest.approx((0.5, 3.0))
    octave, end = math.log(2), math.log(3)
    left = octave * (6 * octave / end) / 2
    assert rows["a"].area == pytest.approx((left + end * 3 / 2) / (octave + end))
    at_end = 2 + 6 * (end - octave) / octave
    area = octave * 1 / 2 + octave * 2 / 2 + (end - octave) * (2 + at_end) / 2
    assert rows["b"].area == pytest.approx(area / (octave + end))


def test_spans_are_open_at_the_grids_ends_and_end_before_what_diverged():
    rows = robustness(curves(open=[1, 0, 1], low=[0, 9], diverged=[INF, 1, 0, NAN], far=[0, 5, 0.5]), 1.0, False)
    ends = {start: (row.span, row.open_low, row.open_high) for start, row in rows.items()}
    assert ends["open"] == (pytest.approx((1, 4)), True, True)
    assert ends["low"] == (pytest.approx((1, 2 ** (1 / 9))), True, False)
    assert ends["diverged"] == (pytest.approx((2, 4)), False, False)
    assert ends["far"] == (pytest.approx((1, 2 ** (1 / 5))), True, False)  # what is good again beyond doesn't count


def test_an_area_is_had_where_there_is_a_common_range():
    rows = robustness(curves(a=[1, 0, 1], b=[1, 0, 3], one=[-1], alone=[INF, 1, INF], lost=[NAN, NAN]), 1.0, False)
    assert rows["a"].area == pytest.approx(0.5) and rows["b"].area == pytest.approx(1.0)  # the others narrow nothing
    assert rows["a"].area_to_best == pytest.approx(1.5)  # the best start has one rate
    for start in ("one", "alone", "lost"):
        assert rows[start].area is rows[start].area_to_best is rows[start].common is None
    assert rows["lost"].span is None and rows["alone"].span == pytest.approx((2, 2))
    apart = robustness(curves(a=[0, 1, 2], b=[2, 1, 0]), 1.0, False)
    assert apart["a"].area is apart["b"].area is None and apart["a"].span == pytest.approx((1, 2))
    narrowed = robustness(curves(a=[1, 0, 1, 9], b=[1, 0, 1, INF]), 1.0, False)
    assert narrowed["a"].common == pytest.approx((0.5, 2)) and narrowed["a"].area == pytest.approx(0.5)


def test_the_best_rate_of_a_span_is_that_chosen_on_validation_and_scores_are_turned():
    outcomes = [
        Outcome("a", r, 0, v, t) for r, v, t in ((1.0, 0.2, 0.8), (2.0, 0.9, 0.6), (4.0, 0.1, 0.5), (8.0, 0.1, 0.1))
    ]
    (row,) = robustness(outcomes, 0.2, True).values()
    assert row.rate == 2.0 and row.span == pytest.approx((1, 4 * 2**0.25)) and row.open_low
    octaves = [(-0.2 + 0) / 2, (0 + 0.1) / 2, (0.1 + 0.5) / 2]
    assert row.area == row.area_to_best == pytest.approx(sum(octaves) / 3)


def test_steps_and_seconds_to_reach_a_loss():
    series = [(2, 3.0), (4, 1.0), (6, 2.0), (8, 1.2), (10, 0.9)]
    assert to_reach(series, 1.0, 0.5, 10.0) == (4, 12.0)
    assert to_reach(series, 1.5, 0.5, 10.0, window=2) == (6, 13.0)  # the mean of 1 and 2
    assert to_reach(series, 1.41, 0.5, 0.0, window=3) == (8, 4.0)  # (1 + 2 + 1.2) / 3
    assert to_reach(series, 0.8, 0.5, 10.0) is None and to_reach(series, 9.0, 0.5, 0.0, window=6) is None
    assert to_reach([], 1.0, 1.0, 0.0) is None and to_reach([(1, NAN), (2, INF)], 1.0, 1.0, 0.0) is None
    # A value that is far off hides no later one from the mean.
    assert to_reach([(1, INF), (2, 1.0), (3, 1.0)], 1.0, 1.0, 0.0, window=2) == (3, 3.0)


# What any inputs have in common.

FIGURES = st.floats(-10, 10).map(lambda value: round(value, 2))
STUDIES = st.lists(
    st.lists(st.lists(st.one_of(FIGURES, st.just(NAN)), min_size=3, max_size=3), min_size=1, max_size=3),
    min_size=2,
    max_size=4,
).map(
    lambda study: [
        Outcome("abcd"[start], 2.0**power, seed, figure, figure + seed * 0.3 + start * 0.1)
        for start, curve in enumerate(study)
        for power, figures in enumerate(curve)
        for seed, figure in enumerate(figures)
    ]
)


@STEADY
@given(STUDIES, st.integers(0, 99), st.booleans())
def test_the_order_of_outcomes_says_nothing(outcomes, seed, higher):
    shuffled = outcomes.copy()
    random.Random(seed).shuffle(shuffled)
    assert best_rates(shuffled, higher) == best_rates(outcomes, higher)
    # As text, where one infinity is another.
    assert repr(compared(shuffled, "a", higher)) == repr(compared(outcomes, "a", higher))
    assert robustness(shuffled, 1.0, higher) == robustness(outcomes, 1.0, higher)


@STEADY
@given(STUDIES, st.sampled_from([2.0**-40, 0.25, 8.0, 2.0**30]))
def test_units_and_direction_change_no_verdict(outcomes, scale):
    def rescaled(factor):
        return [replace(run, validation=factor * run.validation, test=factor * run.test) for run in outcomes]

    rows, choices = compared(outcomes, "a", False), best_rates(outcomes, False)
    for factor, higher in ((scale, False), (-scale, True)):
        # Powers of two, so that even ties are the same.
        others = compared(rescaled(factor), "a", higher)
        assert [(row.start, row.rate, row.verdict) for row in others] == [(r.start, r.rate, r.verdict) for r in rows]
        for row, other in zip(rows, others, strict=True):
            assert other.p == pytest.approx(row.p) and other.mean == pytest.approx(factor * row.mean)
            if row.over_seeds is not None:
                assert other.over_seeds.value == pytest.approx(factor * row.over_seeds.value)
                if row.over_seeds.interval:
                    ends = sorted(factor * end for end in row.over_seeds.interval)
                    assert other.over_seeds.interval == pytest.approx(tuple(ends))
        assert {s: (c.rate, c.edge) for s, c in best_rates(rescaled(factor), higher).items()} == {
            s: (c.rate, c.edge) for s, c in choices.items()
        }
        areas = {start: row.area for start, row in robustness(outcomes, 1.0, False).items()}
        for start, row in robustness(rescaled(factor), abs(factor), higher).items():
            assert row.area == (None if areas[start] is None else pytest.approx(scale * areas[start]))


# How often it is right, where the truth is known.


def test_intervals_over_seeds_hold_the_truth_as_often_as_they_say():
    rng, studies = np.random.default_rng(2), 800
    mean = paired = 0
    for _ in range(studies):
        truth = {"a": {1.0: 2.0}, "b": {1.0: 1.7}}
        row = row_of(outcomes_of(truth, range(4), rng, seed_noise=1.0, test_noise=0.5))
        mean += row.interval[0] <= 1.7 <= row.interval[1]
        paired += row.over_seeds.interval[0] <= -0.3 <= row.over_seeds.interval[1]
    assert is_within_error(mean / studies, 0.95, studies) and is_within_error(paired / studies, 0.95, studies)


def test_intervals_over_items_hold_the_truth_as_often_as_they_say():
    rng, studies = np.random.default_rng(3), 250
    held = 0
    for _ in range(studies):
        weights = rng.integers(1, 40, 120).astype(float)
        # Nats a token differ by 0.2 on average, more so in long items: the ratio of sums has 0.2 + 0.01 E[w²]/E[w].
        theirs = weights * rng.gamma(4, 0.5, 120)
        ours = theirs - weights * (0.2 + 0.01 * weights + rng.normal(0, 0.5, 120))
        row = row_of(answered("b", ours, weights=weights) + answered("a", theirs, weights=weights))
        truth = -(0.2 + 0.01 * (39 * 40 * 79 / 6 / 39) / 20)
        held += row.over_items.interval[0] <= truth <= row.over_items.interval[1]
    assert is_within_error(held / studies, 0.95, studies)


def test_mcnemars_intervals_hold_the_truth_at_least_as_often_as_they_say():
    rng, studies = np.random.default_rng(4), 300
    held = 0
    for _ in range(studies):
        drawn = rng.choice(4, 250, p=[0.4, 0.35, 0.15, 0.1])  # both wrong, both right, ours alone, theirs alone
        ours, theirs = (drawn == 1) | (drawn == 2), (drawn == 1) | (drawn == 3)
        outcomes = answered("b", ours.astype(float)) + answered("a", theirs.astype(float))
        low, high = row_of(outcomes, higher_is_better=True).over_items.interval
        held += low <= 0.05 <= high
    # Exact intervals of counts hold it too often rather than too rarely.
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies) <= held / studies < 0.99


@pytest.mark.parametrize("shared", [False, True])
def test_equal_starts_seem_different_in_five_per_cent_of_studies_at_most(shared):
    rng, studies = np.random.default_rng(5), 400
    truth = {start: {1.0: 1.0, 2.0: 1.0, 4.0: 1.0} for start in "abcdefg"}
    # With as many rates each, noise that validation and test have in common favours none.
    noise = dict(run_noise=1.0) if shared else dict(validation_noise=1.0, test_noise=1.0)
    alarms = uncorrected = 0
    for _ in range(studies):
        rows = compared(outcomes_of(truth, range(4), rng, seed_noise=2.0, **noise), "a", False)
        alarms += any(row.verdict in ("better", "worse") for row in rows)
        uncorrected += any(row.over_seeds is not None and row.over_seeds.p <= 0.05 for row in rows)
    assert 0.005 < alarms / studies <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    assert uncorrected / studies > 0.12


def test_a_figure_that_chose_the_rate_flatters_and_another_does_not():
    rng, studies, seeds = np.random.default_rng(6), 600, 4
    truth = {"a": {2.0**power: 1.0 for power in range(5)}}
    unbiased, flattered = [], []
    for _ in range(studies):
        outcomes = outcomes_of(truth, range(seeds), rng, validation_noise=1.0, test_noise=1.0)
        unbiased.append(compared(outcomes, "a", False)[0].mean - 1)
        by_test = [replace(outcome, validation=outcome.test) for outcome in outcomes]
        flattered.append(compared(by_test, "a", False)[0].mean - 1)
    error = 1 / math.sqrt(seeds) / math.sqrt(studies)
    assert abs(np.mean(unbiased)) < 3 * error
    # The least of five normal numbers lies 1.163 standard deviations under their mean.
    assert np.mean(flattered) == pytest.approx(-1.163 / math.sqrt(seeds), abs=3 * error)


def test_more_rates_are_an_advantage_where_seeds_are_shared_and_none_on_other_seeds():
    rng, studies = np.random.default_rng(7), 400
    truth = {"a": {1.0: 1.0}, "b": {2.0**power: 1.0 for power in range(8)}}
    same, fresh = [], []
    for _ in range(studies):
        outcomes = outcomes_of(truth, range(8), rng, run_noise=1.0)
        chooses, reports = ([run for run in outcomes if run.seed % 2 == odd] for odd in (0, 1))
        same.append(row_of(reports).over_seeds.value)
        fresh.append(row_of(reports, choices=best_rates(chooses, False)).over_seeds.value)
    error = math.sqrt(2 / 4) / math.sqrt(studies)
    # The least of eight normal numbers lies 1.424 standard deviations under their mean.
    assert np.mean(same) == pytest.approx(-1.424 / 2, abs=3 * error)
    assert abs(np.mean(fresh)) < 3 * error


def test_a_true_difference_is_found_as_often_as_the_noncentral_t_predicts():
    rng, studies, seeds, difference = np.random.default_rng(8), 800, 5, 0.8
    found = wrong = 0
    for _ in range(studies):
        truth = {"a": {1.0: 2.0}, "b": {1.0: 2.0 - difference}}
        row = row_of(outcomes_of(truth, range(seeds), rng, seed_noise=3.0, test_noise=0.4))
        found += row.verdict == "better"
        wrong += row.verdict == "worse"
    shift = difference / (0.4 * math.sqrt(2)) * math.sqrt(seeds)
    power = float(stats.nct.sf(stats.t.ppf(0.975, seeds - 1), seeds - 1, shift))
    assert 0.5 < power < 0.9 and is_within_error(found / studies, power, studies) and wrong == 0


def test_pairs_of_seeds_find_what_two_groups_of_seeds_do_not():
    rng, studies = np.random.default_rng(9), 300
    paired = grouped = 0
    for _ in range(studies):
        truth = {"a": {1.0: 2.0}, "b": {1.0: 1.5}}
        outcomes = outcomes_of(truth, range(5), rng, seed_noise=1.0, test_noise=0.2)
        paired += row_of(outcomes).verdict == "better"
        ours, theirs = ([run.test for run in outcomes if run.start == start] for start in "ba")
        grouped += stats.ttest_ind(ours, theirs).pvalue <= 0.05
    assert paired / studies > 0.7 and grouped / studies < 0.2
