"""The cells of a study: which there are, in which order, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_study import fake_study
from headstart.errors import HeadstartError, RunError
from headstart.runs.read import recipes
from headstart.study.cells import Grid
from headstart.study.rates import beyond, rates_of
from headstart.study.results import Results, chosen_by
from headstart.study.study import run_study
from headstart.study.summary import summarised
from headstart.study.tree import read_study, validated_study


def grid(**settings):
    return Grid(validated_study(settings, "study.yaml"))


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        (3e-4, [3e-4]),
        ([3e-4, "1e-4", 3e-4], [1e-4, 3e-4]),
        ("lora × 1/4", [5e-5]),
        ("lora * {1/4 … 2}", [5e-5, 1e-4, 2e-4, 4e-4]),
        ("lora × {2 ... 1/4}", [5e-5, 1e-4, 2e-4, 4e-4]),
        ("lora × {1/9, 1/3 … 3}", [2e-4 / 9, 2e-4 / 3, 2e-4, 6e-4]),
        (["lora × {1, 2}", 1e-3], [2e-4, 4e-4, 1e-3]),
    ],
)
def test_rates_are_numbers_or_multiples_of_the_reference_rate(given, rates):
    assert rates_of(given, 2e-4, "lora") == pytest.approx(rates, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("pissa × 2", "relative to the reference, 'lora'"),
        ("lora × {1/3 … 2}", "no steps of × 2 lead to 2"),
        ("lora × {… 2}", "stands between two numbers"),
        ("lora × {1, x}", "'x' is no positive number"),
        ("lora × {1/0}", "'1/0' is no positive number"),
        (-1e-4, "no rate"),
        ([True], "no rate"),
        (math.inf, "no rate"),
        ("fast", "no rate"),
        ([], "has no rates"),
    ],
)
def test_what_is_no_rate_is_refused(given, sentence):
    with pytest.raises(RunError, match=sentence.replace("(", r"\(")):
        rates_of(given, 2e-4, "lora")


@settings(deadline=None, max_examples=50)
@given(st.integers(-5, 5), st.integers(0, 6), st.integers(2, 4))
def test_a_gap_is_filled_by_equal_steps(first, count, step):
    last = first + count
    low = f"1/{step**-first}" if first < 0 else str(step**first)
    second = f"1/{step ** -(first + 1)}" if first + 1 < 0 else str(step ** (first + 1))
    high = f"1/{step**-last}" if last < 0 else str(step**last)
    if count > 1:
        made = rates_of(f"lora × {{{low}, {second} … {high}}}", 1.0, "lora")
        assert made == pytest.approx([float(step) ** (first + place) for place in range(count + 1)], rel=1e-5)


def test_a_grid_goes_on_by_its_own_step():
    assert beyond((1e-4, 3e-4, 9e-4), "high") == pytest.approx(2.7e-3)
    assert beyond((1e-4, 3e-4, 9e-4), "low") == pytest.approx(1e-4 / 3, rel=1e-5)


def test_every_value_of_every_axis_meets_every_other_and_every_seed():
    cells = grid(
        base={"optimizer": {"lr": 1e-3}},
        axes={
            "start": ["lora", "pissa", {"start": "lora-sb:lr=1", "adapter.r": 64, "adapter.rslora": False}],
            "optimizer.lr": {"pissa": [1e-5], "*": "lora × {1/2, 1}"},
            "data.train_examples": [100, 1000],
            "variant": [{"label": "plain", "optimizer.lora_plus": None}, {"label": "plus", "optimizer.lora_plus": 16}],
        },
        seeds=[3, 5],
    ).cells()
    assert len(cells) == len({cell.run.key for cell in cells}) == (2 + 1 + 2) * 2 * 2 * 2
    one = next(cell for cell in cells if cell.start.startswith("lora-sb") and cell.seed == 5 and cell.rate == 5e-4)
    assert one.start == "lora-sb:lr=1 r=64 rslora=False"
    assert (one.run.adapter.r, one.run.start.method, one.run.seed, one.run.optimizer.lr) == (
        64,
        "lora-sb:lr=1",
        5,
        5e-4,
    )
    assert {cell.setting for cell in cells} == {
        (("data.train_examples", size), ("variant", plus)) for size in ("100", "1000") for plus in ("plain", "plus")
    }
    for cell in cells:
        assert (cell.run.optimizer.lora_plus == 16) == (dict(cell.setting)["variant"] == "plus")
        # What is made without validation is what validation makes.
        assert type(cell.run).model_validate(cell.run.model_dump()) == cell.run


def test_without_an_axis_of_rates_a_start_may_have_its_own():
    own = {"start": "pissa", "optimizer.lr": [1e-4, "lora × 1/2"]}
    cells = grid(base={"optimizer": {"lr": 1e-3}}, axes={"start": ["lora", own]}).cells()
    assert {(cell.start, cell.rate, cell.run.optimizer.lr) for cell in cells} == {
        ("lora", 1e-3, 1e-3),
        ("pissa", 1e-4, 1e-4),
        ("pissa", 5e-4, 5e-4),
    }


def test_settings_are_judged_together_and_uneven_seeds_are_said(tmp_path):
    """Each setting alone would tell pissa apart (p 0.03); of two settings' four comparisons it isn't (p 0.1)."""
    losses = {"lora": (1.0, 1.1, 1.2), "pissa": (0.9, 0.97, 1.12), "olora": (1.0, 1.11, 1.19)}

    def truth(cell):
        return losses[cell.start][cell.seed] if (cell.start, cell.seed) not in missing else None

    missing = set()
    axes = {"start": list(losses), "adapter.r": [4, 8]}
    summary = fake_study(tmp_path / "whole", truth, axes, seeds=3)
    rows = [row for part in summary.parts for row in part.compared["loss"] if row.start == "pissa"]
    raw = [row.decisive.p for row in rows]
    assert max(raw) < 0.05 and [row.p for row in rows] == pytest.approx([4 * raw[0]] * 2)
    assert "in 2 settings each" in summary.sentences()[0]
    assert not any("every seed" in said for said in summary.sentences())
    missing = {("olora", 2)}
    assert any("every seed" in said for said in fake_study(tmp_path / "part", truth, axes, seeds=3).sentences())


def test_starts_by_layers_are_one_value():
    cells = grid(axes={"start": ["lora", {"q_proj": "pissa", "*": "lora"}]}).cells()
    assert [cell.run.start.method for cell in cells] == ["lora", 'per-layer:{"q_proj": "pissa", "*": "lora"}']


def test_the_picture_fills_evenly():
    cells = grid(axes={"start": ["lora", "pissa"], "optimizer.lr": "lora × {1/16 … 16}"}, seeds=2).cells()
    # A seed is done before the next begins; each start has as many rates as the other, give or take one.
    assert [cell.seed for cell in cells] == [0] * 18 + [1] * 18
    for done in range(1, 18):
        counts = [sum(cell.start == start for cell in cells[:done]) for start in ("lora", "pissa")]
        assert abs(counts[0] - counts[1]) <= 1
    order = [round(math.log2(cell.rate / 1e-3)) for cell in cells[:18] if cell.start == "lora"]
    assert order[:3] == [0, -4, 4] and sorted(order) == list(range(-4, 5))
    # After every piece no gap is more than twice as wide as another, once halving has begun.
    assert sorted(order[:5]) == [-4, -2, 0, 2, 4]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"base": {"optimiser": {}}}, "no setting 'optimiser'. Did you mean 'optimizer'"),
        ({"axis": {}}, "no setting 'axis'. Did you mean 'axes'"),
        ({"axes": {"start": ["lora"], "adapter.rr": [1]}}, "axes.adapter.rr: there is no setting 'rr'"),
        ({"axes": {"adapter.r": ["x"]}}, "axes.adapter.r: adapter.r='x'"),
        ({"axes": {"start": ["loraa"]}}, "unknown method 'loraa'"),
        ({"axes": {"start": ["lora", "lora"]}}, "'lora' is there twice"),
        ({"axes": {"start": []}}, "axes.start has no values"),
        ({"axes": {"seed": [1, 2]}}, "seeds have a setting of their own"),
        ({"axes": {"start": {"a": "lora"}}}, "must be a list"),
        ({"axes": {"variant": [{"adapter.r": 4}]}}, "axes.variant: there is no setting 'variant'"),
        ({"axes": {"optimizer.lr": {"pissa": [1e-4]}}}, "no start 'pissa' in the study"),
        ({"axes": {"start": ["lora", "pissa"], "optimizer.lr": {"pissa": [1e-4]}}}, "start 'lora' has no rates"),
        (
            {"axes": {"start": ["lora", {"start": "pissa", "optimizer.lr": 1e-5}], "optimizer.lr": [1e-4]}},
            "axes.start: 'pissa' sets optimizer.lr, which axes.optimizer.lr sets too",
        ),
        (
            {"axes": {"start": [{"start": "pissa", "adapter.r": 4}], "adapter.r": [8, 16]}},
            "axes.adapter.r: '8' sets adapter.r, which axes.start sets too",
        ),
        (
            {"axes": {"one": [{"label": "a", "adapter": {"r": 4}}], "adapter.r": [8]}},
            "axes.adapter.r: '8' sets adapter.r, which axes.one sets too",
        ),
        (
            {"axes": {"start": [{"start": "pissa", "seed": 4}]}},
            "axes.start: 'pissa seed=4' sets seed, which seeds sets",
        ),
        ({"axes": {"one": [{"label": "a", "start": "pissa"}]}}, "axes.one: 'a' sets start, which axes.start sets too"),
        (
            {"axes": {"one": [{"label": "a", "optimizer": {"lr": 1.0}}]}},
            "rates are each start's own, in axes.optimizer.lr",
        ),
        ({"reference": "pisa", "axes": {"start": ["lora", "pissa"]}}, "Did you mean 'pissa'"),
        ({"seeds": 0}, "neither how many seeds nor which"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"base": "no/such-recipe"}, "no recipe of that name"),
    ],
)
def test_bad_studies_are_one_sentence(settings, sentence):
    with pytest.raises(HeadstartError) as caught:
        grid(**settings).cells()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_values_that_only_go_together_are_taken_together():
    best = {"label": "best", "evaluation.keep": "best", "evaluation.every": 2}
    cells = grid(axes={"kept": [{"label": "last", "evaluation.keep": "last"}, best]}).cells()
    assert [cell.run.evaluation.keep for cell in cells] == ["last", "best"]


@pytest.mark.parametrize(
    ("settings", "figure"),
    [
        ({}, "loss"),
        ({"base": {"data": {"task": "cola"}}}, "matthews"),
        ({"base": {"data": {"task": "cola"}}, "chosen_by": "loss"}, "loss"),
        ({"base": {"evaluation": {"graded_examples": 4}}, "chosen_by": "exact_match"}, "exact_match"),
    ],
)
def test_rates_are_chosen_by_a_figure_that_runs_have(settings, figure):
    assert chosen_by(grid(**settings)) == figure


@pytest.mark.parametrize(
    "settings",
    [
        {"chosen_by": "exact_match"},  # nothing is graded
        {
            "base": {"data": {"validation_examples": 4}, "evaluation": {"graded_examples": 4}},
            "chosen_by": "exact_match",
        },
        {"base": {"data": {"task": "cola"}}, "chosen_by": "mathews"},
    ],
)
def test_a_figure_that_no_run_has_is_refused(settings, tmp_path):
    with pytest.raises(RunError, match="chosen_by="):
        run_study(validated_study(settings, "study"), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_study_is_read_from_its_file(tmp_path):
    path = tmp_path / "study.yaml"
    name = next(name for name, _ in recipes())
    path.write_text(f"base: {name}\naxes: {{optimizer.lr: [1e-4, 3e-4]}}\nseeds: 2\n")
    assert len(Grid(read_study(path)).cells()) == 4
    path.write_text("axes: {start: [lora]}\naxes: {}\n")
    with pytest.raises(RunError, match="given twice"):
        read_study(path)


@pytest.mark.parametrize("read_before", range(7))
def test_a_summary_is_of_one_moment_though_results_come_in_while_it_is_made(tmp_path, monkeypatch, read_before):
    axes = {"start": ["lora", "pissa", "olora"], "optimizer.lr": [1e-4, 1e-3]}
    grid = fake_study(tmp_path, lambda cell: 1.0 + cell.rate, axes).grid

    there, reads = Results.of, []

    def coming(results, cell):
        """Of every start but the first nothing is there until so much was read."""
        reads.append(cell)
        return there(results, cell) if cell.start == "lora" or len(reads) > read_before else None

    monkeypatch.setattr(Results, "of", coming)
    summary = summarised(grid, tmp_path)
    (part,) = summary.parts
    shown = {cell.start for cell, result in part.cells if result is not None}
    assert set(part.choices) == shown
    assert {row.start for row in part.compared["loss"]} == shown
