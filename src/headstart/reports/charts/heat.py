"""Heat maps: the figure over the rate and a number of the start, plain and against a base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from headstart.reports.charts.chart import Chart, Row, axis, label, layout
from headstart.reports.colours import DIVERGING, MUTED, SEQUENTIAL
from headstart.reports.measured import (
    axis_value,
    drawn_starts,
    ended,
    families,
    figures,
    left_out,
    other_axes,
    spread,
)
from headstart.reports.words import number, rate_text
from headstart.study.summary import Part, Summary

# Methods of one setting, and starts, that have maps.
MOST_MAPS = 4
# Cells that have room for their number.
_MOST_NUMBERS = 10

_Values = dict[float, float]


def heat_maps(summary: Summary, part: Part) -> list[Chart]:
    """Return two charts for each method with a number that varies, in one setting."""
    heights, made = _heights(summary, part), []
    for family in families(part)[:MOST_MAPS]:
        rows = {value: heights[start] for value, start in family.members if start in heights}
        what = family.method + (f", {part.name}" if part.name else "")
        base = heights.get(summary.against or summary.grid.reference, {})
        made += _maps(summary, what, family.setting, rows, dict.fromkeys(rows, base) if base else {})
    return made


def heat_maps_over_axes(summary: Summary) -> list[Chart]:
    """Return two charts for each start and axis of numbers, all other axes being held."""
    by_axis: dict[tuple[str, str, str], dict[float, _Values]] = {}
    bases: dict[tuple[str, str, str], dict[float, _Values]] = {}
    starts = drawn_starts(summary, MOST_MAPS)
    for part in summary.parts:
        heights = _heights(summary, part)
        cell, result = next((pair for pair in part.cells if pair[1]), part.cells[0])
        for axis_name in other_axes(summary):
            value = axis_value(cell, result, axis_name)
            others = ", ".join(words for key, words in part.setting if key != axis_name)
            for start in starts if value is not None else ():
                if start in heights:
                    by_axis.setdefault((axis_name, start, others), {})[value or 0.0] = heights[start]
                    if summary.against in heights and start != summary.against:
                        base = heights[summary.against]
                        bases.setdefault((axis_name, start, others), {})[value or 0.0] = base
    made = []
    for (axis_name, start, others), rows in list(by_axis.items())[: 2 * MOST_MAPS]:
        what = start + (f", {others}" if others else "")
        own_bases = bases.get((axis_name, start, others), {})
        made += _maps(summary, what, axis_name.rpartition(".")[2], rows, own_bases, left_out(summary, len(starts)))
    return made


def _maps(
    summary: Summary,
    what: str,
    across: str,
    rows: Mapping[float, _Values],
    bases: Mapping[float, _Values],
    note: str = "",
) -> list[Chart]:
    """Return a plain map, and one of differences to ``bases``, by row; without any, to the smallest row."""
    rates = sorted({rate for row in rows.values() for rate in row})
    if len(rows) < 2 or len(rates) < 2:
        return []
    figure = summary.first
    title = f"Held-out {figure} of {what} over {across} and rate"
    plain = heat_map("heat", title, figure, across, rows, SEQUENTIAL, note)
    of_base = summary.against or f"the reference {summary.grid.reference}" if bases else f"the smallest {across}"
    bases = bases or dict.fromkeys(rows, rows[min(rows)])
    changes = {value: _less(row, bases.get(value, {})) for value, row in rows.items()}
    if not any(changes.values()):
        return [plain]
    title = f"{what} against {of_base} at the same rate"
    return [plain, heat_map("heat-base", title, f"difference in {figure}", across, changes, DIVERGING, note)]


def _less(row: _Values, base: _Values) -> _Values:
    return {rate: height - base[rate] for rate, height in row.items() if math.isfinite(base.get(rate, math.nan))}


def heat_map(
    name: str,
    title: str,
    figure: str,
    across: str,
    rows: Mapping[float, _Values],
    scale: tuple[str, ...],
    note: str,
) -> Chart:
    """Return one map.

    Args:
        name, title: of the chart.
        figure: what the colours mean.
        across: what differs from row to row.
        rows: by that number, and by rate, the figure.
        scale: :data:`SEQUENTIAL`, or :data:`DIVERGING` around zero.
        note: ends the caption.
    """
    sizes, rates = sorted(rows), sorted({rate for row in rows.values() for rate in row})
    heights = [[_drawn(rows[size].get(rate)) for rate in rates] for size in sizes]
    shown = [height for row in heights for height in row if height is not None]
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": [rate_text(rate) for rate in rates],
        "y": [f"{size:g}" for size in sizes],
        "z": heights,
        "colorscale": [[place / (len(scale) - 1), colour] for place, colour in enumerate(scale)],
        "colorbar": {"thickness": 12, "outlinewidth": 0, "tickcolor": MUTED},
        "xgap": 2,
        "ygap": 2,
        "hoverongaps": False,
        "hovertemplate": f"rate %{{x}}, {label(across)} %{{y}}: %{{z}}<extra></extra>",
    }
    if scale is DIVERGING and shown:
        most = max(map(abs, shown)) or 1.0
        trace |= {"zmin": -most, "zmax": most, "zmid": 0}
    if len(rates) <= _MOST_NUMBERS:
        trace |= {
            "text": [["" if height is None else number(height) for height in row] for row in heights],
            "texttemplate": "%{text}",
        }
    drawn = layout(
        "learning rate",
        across,
        max(260, 40 * len(sizes) + 120),
        xaxis=axis("learning rate", type="category", showgrid=False),
        yaxis=axis(across, type="category", showgrid=False),
    )
    caption = f"Mean {figure} over seeds; a gap where a seed diverged or nothing has finished. {note}".strip()
    data: list[Row] = [
        (size, rate, "diverged" if math.isinf(height) else height)
        for size in sizes
        for rate, height in sorted(rows[size].items())
    ]
    return Chart(name, "rates", title, caption, {"data": [trace], "layout": drawn}, (across, "rate", figure), data)


def _heights(summary: Summary, part: Part) -> dict[str, _Values]:
    figure, heights = summary.first, {}
    for start, by_rate in ended(part).items():
        made = {rate: spread(figures(pairs, figure)) for rate, pairs in by_rate.items()}
        heights[start] = {rate: point.mean for rate, point in made.items() if point is not None}
    return heights


def _drawn(height: float | None) -> float | None:
    return height if height is not None and math.isfinite(height) else None
