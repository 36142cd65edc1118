"""The charts of studies whose results are made up: what they draw, what they leave out, and that it can be seen."""

from __future__ import annotations

import math
from statistics import fmean

import pytest

from fake_study import BASE, fake_study
from headstart.errors import RunError
from headstart.evaluation.figures import Figure
from headstart.reports import colours
from headstart.reports.charts import charts
from headstart.reports.charts.costs import front
from headstart.reports.charts.dynamics import dynamics_sheet
from headstart.reports.charts.training import MOST_POINTS, averaged
from headstart.reports.measured import MOST_STARTS, standings
from headstart.reports.page import page
from headstart.reports.tables import markdown
from headstart.study.statistics import Comparison
from headstart.study.summary import summarised

RATES = [1e-4, 3e-4, 1e-3]
# The best loss of each start, and the rate where it is.
TRUTH = {"lora": (2.0, 1e-3), "pissa": (1.5, 1e-4), "init-ab:beta=1": (1.9, 3e-4), "init-ab:beta=4": (2.2, 3e-4)}


def loss(cell):
    best, rate = TRUTH[cell.start]
    # What a seed does to all starts alike, and a little to each by itself.
    noise = 0.1 * cell.seed + 0.001 * len(cell.start) * cell.seed**2
    return best + math.log10(cell.rate / rate) ** 2 + noise


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    axes = {"start": list(TRUTH), "optimizer.lr": RATES}
    return fake_study(tmp_path_factory.mktemp("study"), loss, axes, seeds=3)


def by_name(summary):
    return {chart.name: chart for chart in charts(summary)}


def test_ranking_has_means_and_intervals(study):
    drawn = by_name(study)
    rows = {row[0]: row for row in drawn["ranking"].rows}
    assert [row[0] for row in drawn["ranking"].rows] == ["pissa", "init-ab:beta=1", "lora", "init-ab:beta=4"]
    start, rate, seeds, mean, low, high, _, verdict = rows["pissa"]
    assert (start, rate, seeds) == ("pissa", 1e-4, 3)
    assert mean == pytest.approx(fmean(1.5 + 0.1 * seed + 0.005 * seed**2 for seed in range(3)))
    assert low < mean < high
    assert verdict == "better"
    assert rows["lora"][7] == "reference"
    differences = {row[0]: row for row in drawn["differences"].rows}
    assert differences["init-ab:beta=4"][3] == pytest.approx(0.2 + 0.001 * 10 * 5 / 3)
    assert "lora" not in differences


def test_rates_have_a_curve_with_its_best_for_each_start(study):
    chart = by_name(study)["rates"]
    of_pissa = [row for row in chart.rows if row[0] == "pissa" and row[2] == "held-out loss"]
    assert [row[1] for row in of_pissa] == RATES
    assert [row[7] for row in of_pissa] == ["best", "", ""]
    validation = [row for row in chart.rows if row[0] == "pissa" and row[2] == "validation loss"]
    assert [row[3] - 0.25 for row in validation] == pytest.approx([row[3] for row in of_pissa])
    lines = [trace for trace in chart.figure["data"] if trace["mode"] == "lines+markers"]
    assert len(lines) == 2 * len(TRUTH)
    assert chart.figure["layout"]["xaxis"]["type"] == "log"
    band = next(trace for trace in chart.figure["data"] if trace.get("fill") == "toself")
    assert band["y"][0] == pytest.approx(2.0 + 1 + 0.2 + 0.016)


def test_what_diverged_has_no_point(tmp_path):
    def truth(cell):
        return {"status": "diverged", "reason": "no number"} if cell.rate == 1e-3 and cell.seed == 1 else loss(cell)

    study = fake_study(tmp_path, truth, {"start": ["lora", "pissa"], "optimizer.lr": RATES}, seeds=2)
    chart = by_name(study)["rates"]
    assert [row[3] for row in chart.rows if row[1] == 1e-3] == ["diverged"] * 4
    line = next(trace for trace in chart.figure["data"] if trace["mode"] == "lines+markers")
    assert line["y"][2] is None
    assert "diverged" in chart.caption


def test_heat_maps_of_a_number_of_the_method(study):
    drawn = by_name(study)
    assert drawn["heat"].heads == ("beta", "rate", "loss")
    assert drawn["heat"].figure["data"][0]["y"] == ["1", "4"]
    assert len(drawn["heat"].rows) == 6
    changes = {(row[0], row[1]): row[2] for row in drawn["heat-base"].rows}
    plain = {(row[0], row[1]): row[2] for row in drawn["heat"].rows}
    of_lora = {row[1]: row[3] for row in drawn["rates"].rows if row[0] == "lora" and row[2] == "held-out loss"}
    assert changes == pytest.approx({key: value - of_lora[key[1]] for key, value in plain.items()})
    assert drawn["against-beta"].rows[0][:2] == ("init-ab", 1.0)


def test_a_report_goes_by_another_figure_and_against_another_start(tmp_path):
    def truth(cell):
        value = loss(cell)
        return {"end": value, "metrics": {"accuracy/end": Figure(1 - value / 10, count=4, higher_is_better=True)}}

    axes = {"start": ["lora", "pissa", "init-ab:beta=1", "init-ab:beta=4"], "optimizer.lr": RATES}
    study = fake_study(tmp_path, truth, axes, chosen_by="loss")
    assert study.first == "loss"
    other = summarised(study.grid, tmp_path, first="accuracy", against="pissa")
    drawn = by_name(other)
    assert drawn["heat"].heads == ("beta", "rate", "accuracy")
    plain = {(row[0], row[1]): row[2] for row in drawn["heat"].rows}
    of_pissa = {row[1]: row[3] for row in drawn["rates"].rows if row[0] == "pissa" and row[2] == "held-out accuracy"}
    changes = {(row[0], row[1]): row[2] for row in drawn["heat-base"].rows}
    assert changes == pytest.approx({key: value - of_pissa[key[1]] for key, value in plain.items()})
    assert "against pissa" in drawn["heat-base"].title
    with pytest.raises(RunError, match=r"reports no figure 'acuracy'.*Did you mean 'accuracy'"):
        summarised(study.grid, tmp_path, first="acuracy")
    with pytest.raises(RunError, match=r"has no start 'pisa'.*Did you mean 'pissa'"):
        summarised(study.grid, tmp_path, against="pisa")


def test_forgetting_is_the_difference_and_one_column(tmp_path):
    def truth(cell):
        losses = {"forgetting/start": 2.8, "forgetting/end": 2.9, "forgetting": 0.1}
        return {"metrics": {name: Figure(value, count=4, higher_is_better=False) for name, value in losses.items()}}

    study = fake_study(tmp_path, truth, {"start": ["lora", "pissa"], "optimizer.lr": RATES})
    assert study.reported == ("loss", "forgetting")
    assert [row.mean for row in standings(study, study.parts[0], "forgetting")] == pytest.approx([0.1, 0.1])


def test_maps_over_an_axis_are_against_the_start_that_is_named(tmp_path):
    def truth(cell):
        return loss(cell) + 1 / cell.run.adapter.r

    axes = {"start": ["lora", "pissa"], "optimizer.lr": RATES, "adapter.r": [4, 16]}
    study = fake_study(tmp_path, truth, axes)
    made = charts(summarised(study.grid, tmp_path, against="lora"))
    chart = next(chart for chart in made if chart.name.startswith("heat-base") and "pissa" in chart.title)
    changes = {(row[0], row[1]): row[2] for row in chart.rows}
    assert len(changes) == 2 * len(RATES)
    for (_, rate), change in changes.items():  # the rank's part is the same for both
        apart = [best + math.log10(rate / own) ** 2 for best, own in (TRUTH["pissa"], TRUTH["lora"])]
        assert change == pytest.approx(apart[0] - apart[1])


def test_axes_of_numbers_have_curves_and_maps(tmp_path):
    def truth(cell):
        return {"end": loss(cell) + 1 / cell.run.adapter.r, "trainable": cell.run.adapter.r}

    axes = {"start": ["lora", "pissa"], "optimizer.lr": RATES, "adapter.r": [4, 16], "data.train_examples": [None, 8]}
    study = fake_study(tmp_path, truth, axes)
    made = charts(study)
    against = next(chart for chart in made if chart.name == "against-r")
    assert [row[1] for row in against.rows if row[0] == "pissa"] == [4.0, 16.0]
    assert [row[2] for row in against.rows if row[0] == "pissa"] == pytest.approx([1.75, 1.5625])
    maps = [chart for chart in made if chart.name.startswith("heat") and chart.heads[0] == "r"]
    assert maps
    assert len(study.parts) == 4
    assert {chart.setting for chart in made if chart.topic == "ranking"} == {part.name for part in study.parts}


def test_curves_are_averaged_over_seeds_and_thinned():
    points, window = averaged([[(1, 1.0), (2, 3.0), (3, math.nan)], [(1, 2.0), (2, 5.0), (3, 4.0)]])
    assert (points, window) == ([(1, 1.5, 1.0, 2.0), (2, 4.0, 3.0, 5.0)], 1)
    points, window = averaged([[(step, float(step)) for step in range(1, 1001)]])
    assert window == 20
    assert len(points) == MOST_POINTS
    assert points[-1] == (1000, pytest.approx(990.5), pytest.approx(990.5), pytest.approx(990.5))


def test_costs(tmp_path):
    def truth(cell):
        slow = cell.start == "pissa"
        start = {"seconds": 10.0 if slow else 0.1}
        memory = {"resident": 2**30, "device": (3 if slow else 2) * 2**20}
        return {"end": loss(cell), "start": start, "memory": memory, "trainable": 50 if slow else 100}

    study = fake_study(tmp_path, truth, {"start": ["lora", "pissa"]}, {**BASE, "optimizer": {"lr": 1e-3}})
    drawn = by_name(study)
    shares = {row[0]: row[4] for row in drawn["startup"].rows}
    assert shares == pytest.approx({"pissa": 10 / 19.5, "lora": 0.1 / 9.6})
    assert {row[0]: row[1] for row in drawn["trainable"].rows} == {"lora": 100.0, "pissa": 50.0}
    assert {row[0]: row[1] for row in drawn["memory"].rows} == {"lora": 2.0, "pissa": 3.0}


def test_front_has_what_nothing_beats():
    points = [(Comparison(name, 1.0, mean, 1), size) for name, mean, size in [("a", 3, 1), ("b", 2, 2), ("c", 4, 3)]]
    assert [row.start for row, _ in front(points, False)] == ["a", "b"]
    assert [row.start for row, _ in front(points, True)] == ["a", "c"]


def test_one_rate_and_one_seed_leave_out_what_they_can_not_show(tmp_path):
    study = fake_study(tmp_path, lambda cell: {"end": 1.0, "series": {}}, {"start": ["lora", "pissa"]})
    assert set(by_name(study)) == {"ranking", "differences", "startup", "memory"}


def test_nothing_finished_has_no_charts(tmp_path):
    assert charts(fake_study(tmp_path, lambda cell: None, {"start": ["lora", "pissa"]})) == []


def test_many_starts_are_said_to_be_left_out(tmp_path):
    starts = [f"init-ab:beta={beta}" for beta in range(1, 15)]
    study = fake_study(tmp_path, lambda cell: len(cell.start) + cell.rate, {"start": starts, "optimizer.lr": RATES})
    chart = by_name(study)["rates"]
    assert len({trace["legendgroup"] for trace in chart.figure["data"]}) == MOST_STARTS
    assert starts[0] in {trace["name"] for trace in chart.figure["data"] if "name" in trace}
    assert f"Of 14 starts the {MOST_STARTS} best are drawn" in chart.caption
    assert len({row[0] for row in chart.rows}) == 14


def test_every_colour_of_a_chart_can_be_seen_by_day_and_by_night(study):
    dark = colours.dark()
    used = {text for chart in charts(study) for text in strings(chart.figure) if text.startswith(("#", "rgba("))}
    assert used - {"rgba(0,0,0,0)"} <= set(dark)
    for ground, scheme in ((colours.GROUND, {name: name for name in dark}), (dark[colours.GROUND], dark)):
        for text in (colours.INK, colours.MUTED, colours.ACCENT):
            assert colours.contrast(scheme[text], ground) >= 4.5
            assert colours.contrast(scheme[text], scheme[colours.PANEL]) >= 4.5
        assert min(colours.contrast(scheme[drawn], ground) for drawn in colours.SERIES) >= 3
    looks = [colours.look(place) for place in range(MOST_STARTS)]
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == MOST_STARTS


def test_names_are_no_markup_of_plotly(tmp_path):
    axes = {"start": ["lora", {"start": "pissa", "label": "<b>bold</b> & co"}]}
    study = fake_study(tmp_path, lambda cell: 1.0, axes)
    shown = {text for chart in charts(study) for text in strings(chart.figure)}
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; co" in shown
    assert not any("<b>" in text for text in shown if "<extra>" not in text)


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def test_watched_layers(tmp_path):
    def truth(cell):
        rows = []
        for step in (1, 4):
            for layer, size in (("q", 1.0), ("v", 4.0)):
                row = dict.fromkeys(("z_a", "z_b", "delta3", "update"), 1.0) | {"step": step, "layer": layer}
                row |= {"delta1": size if cell.start == "pissa" else 0.0, "delta2": 1.0, "norm_a": 2.0}
                row |= {"norm_b": size * step / 2, "start_overlap": size / 8, "start_angle": 9.0}
                rows.append(row | {"effective_rank": 2.0, "gradient_overlap": None, "gradient_angle": None})
        return {"end": loss(cell), "monitor": rows}

    study = fake_study(tmp_path, truth, {"start": ["lora", "pissa"]}, {**BASE, "optimizer": {"lr": 1e-3}})
    drawn = by_name(study)
    assert [row for row in drawn["delta-ratio"].rows if row[1] == 4] == [("pissa", 4, pytest.approx(2.0), 1.0, 4.0)]
    means = {(row[0], row[1]): row[2] for row in drawn["b-over-a"].rows}
    assert means == pytest.approx({("lora", 1): 0.5, ("lora", 4): 2, ("pissa", 1): 0.5, ("pissa", 4): 2})
    assert {row[2] for row in drawn["start-overlap"].rows} == {0.3125}
    assert "gradient-overlap" not in drawn
    rows = {row[0]: row[1:] for row in dynamics_sheet(study, study.parts[0]).rows}
    assert rows["pissa"] == ("both", "2.0000", "2.0000", "step 4", "0.3125", "-", "2.0000")
    assert rows["lora"][:2] == ("-", "-")
    assert "What layers did" in page(study)
    assert "## What layers did" in markdown(study)


def test_nothing_watched_is_nothing_drawn(tmp_path):
    study = fake_study(tmp_path, loss, {"start": ["lora", "pissa"]}, {**BASE, "optimizer": {"lr": 1e-3}})
    assert dynamics_sheet(study, study.parts[0]) is None
    assert not any(chart.topic == "dynamics" for chart in charts(study))
    assert "What layers did" not in page(study)
