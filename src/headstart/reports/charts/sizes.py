"""The best figure against the numbers that a study varies: rank, data, standard deviation, samples, and their like."""

from __future__ import annotations

import math
from collections.abc import Mapping

from headstart.reports.charts.chart import Chart, Row, Trace, axis, band, curve, layout, slug
from headstart.reports.colours import look
from headstart.reports.measured import (
    Spread,
    axis_value,
    drawn_starts,
    families,
    figures,
    left_out,
    method_name,
    other_axes,
    spread,
)
from headstart.study.summary import Part, Summary

# Charts of a report that differ in what is held alone.
MOST_HELD = 4
# A number that grows this many times is drawn by its logarithm.
_MANY_TIMES = 8
_Curves = dict[str, dict[float, Spread]]


def against_axes(summary: Summary) -> list[Chart]:
    """Return a chart for each axis of numbers beside the rate: one curve a start, for each value of the other axes."""
    starts, charts = drawn_starts(summary), []
    for axis_name in other_axes(summary):
        by_others: dict[str, _Curves] = {}
        for part in summary.parts:
            cell, result = next((pair for pair in part.cells if pair[1]), part.cells[0])
            value = axis_value(cell, result, axis_name)
            others = ", ".join(f"{key.rpartition('.')[2]} {words}" for key, words in part.setting if key != axis_name)
            for start in part.choices if value is not None else ():
                point = spread(figures(part.at_best(start), summary.first))
                if point is not None and math.isfinite(point.mean):
                    by_others.setdefault(others, {}).setdefault(start, {})[value or 0.0] = point
        for others, curves in list(by_others.items())[:MOST_HELD]:
            chart = _chart(summary, axis_name.rpartition(".")[2], others, curves, starts, "start")
            charts += [chart] if chart is not None else []
    return charts


def against_settings(summary: Summary, part: Part) -> list[Chart]:
    """Return a chart for each number of methods that varies, in one setting: one curve a method."""
    by_setting: dict[str, _Curves] = {}
    for family in families(part):
        for value, start in family.members:
            point = spread(figures(part.at_best(start), summary.first))
            if point is not None and math.isfinite(point.mean):
                by_setting.setdefault(family.setting, {}).setdefault(family.method, {})[value] = point
    drawn = [_chart(summary, name, part.name, curves, list(curves), "method") for name, curves in by_setting.items()]
    return [chart for chart in drawn if chart is not None]


def against_error(summary: Summary, part: Part) -> Chart | None:
    """Return the figure against how far each start's product is from its weights; None where reports don't say."""
    curves: _Curves = {}
    for start in part.choices:
        pairs = part.at_best(start)
        errors = [error for _, result in pairs if (error := result.start.get("relative_error")) is not None]
        point = spread(figures(pairs, summary.first))
        if errors and point is not None and math.isfinite(point.mean):
            curves.setdefault(method_name(pairs[0][0]), {})[sum(errors) / len(errors)] = point
    return _chart(summary, "approximation error", part.name, curves, list(curves), "method", least=1)


def _chart(
    summary: Summary, across: str, others: str, curves: _Curves, drawn: list[str], kind: str, least: int = 2
) -> Chart | None:
    if len({value for points in curves.values() for value in points}) < 2:
        return None
    if not any(len(points) >= least for points in curves.values()):
        return None
    figure, traces, rows = summary.first, [], []
    names = list(summary.grid.starts) if kind == "start" else list(curves)
    shown = [name for name in drawn if name in curves]
    for name in shown:
        traces += _traces(name, dict(sorted(curves[name].items())), names.index(name))
    for name, points in curves.items():
        rows += [(name, *_row(value, point)) for value, point in sorted(points.items())]
    values = [value for points in curves.values() for value in points]
    logarithmic = min(values) > 0 and max(values) >= _MANY_TIMES * min(values)
    places = sorted(set(values))
    ticks = {"tickvals": places, "ticktext": [f"{value:.3g}" for value in places]} if len(places) <= 9 else {}
    shape = layout(across, f"held-out {figure}")
    shape["xaxis"] = axis(across, type="log" if logarithmic else "linear", **ticks)
    caption = f"The held-out {figure} of each {kind} at its best rate"
    caption += ", mean over seeds with a band from the least to the greatest." if summary.seeds > 1 else "."
    if kind == "start" and len(shown) < len(curves):
        caption += f" {left_out(summary, len(shown))}"
    title = f"{figure[:1].upper()}{figure[1:]} against {across}" + (f", {others}" if others else "")
    heads = (kind, across, f"held-out {figure}", "least", "greatest", "seeds")
    return Chart(slug("against", across), "settings", title, caption, {"data": traces, "layout": shape}, heads, rows)


def _traces(name: str, points: Mapping[float, Spread], place: int) -> list[Trace]:
    values, style = list(points), look(place)
    traces = []
    if any(point.count > 1 for point in points.values()) and len(points) > 1:
        lows, highs = [point.low for point in points.values()], [point.high for point in points.values()]
        traces.append(band(name, values, lows, highs, style))
    return [*traces, curve(name, values, [point.mean for point in points.values()], style)]


def _row(value: float, point: Spread) -> Row:
    return (value, point.mean, point.low, point.high, point.count)
