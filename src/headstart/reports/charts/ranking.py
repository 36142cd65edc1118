"""The starts at their best rates, with their intervals."""

from __future__ import annotations

import math

from headstart.reports.charts.chart import Chart, Row, axis, label, layout
from headstart.reports.colours import INK, MUTED, SERIES
from headstart.reports.measured import own_interval, standings
from headstart.reports.words import counted
from headstart.study.differences import Interval
from headstart.study.statistics import Comparison
from headstart.study.summary import Part, Summary

# Rows that a chart has room for, and the pixels of one.
MOST = 30
_ROW = 42

_LOOKS = {
    "better": (SERIES[2], "circle"),
    "worse": (SERIES[1], "square"),
    "not told apart": (MUTED, "circle-open"),
    "not compared": (MUTED, "diamond-open"),
    "reference": (INK, "diamond"),
}
_Point = tuple[Comparison, float, Interval | None]


def ranking(summary: Summary, part: Part) -> Chart | None:
    """Return the chart of the means; None without figures."""
    figure = summary.first
    rows = [row for row in standings(summary, part) if math.isfinite(row.mean)]
    points = [(row, row.mean, own_interval(summary, part, row, figure)) for row in rows]
    if not points:
        return None
    over = "over seeds" if summary.seeds > 1 else "over items"
    how = "more" if summary.better[figure] else "less"
    return _drawn(
        "ranking",
        f"Held-out {figure} at each start's best rate",
        f"The mean of each start, the best on top ({how} is better), with its 95 % interval {over}. Whether two starts "
        "differ is told by their difference, not by whether these intervals overlap.",
        f"held-out {figure}",
        points,
        part,
        next((row.mean for row in rows if row.verdict == "reference"), None),
    )


def differences(summary: Summary, part: Part) -> Chart | None:
    """Return the chart of the differences to the reference; None where nothing is compared."""
    figure, reference = summary.first, summary.grid.reference
    points: list[_Point] = []
    for row in standings(summary, part):
        shown = row.decisive or row.over_seeds
        if shown is not None and math.isfinite(shown.value):
            points.append((row, shown.value, shown.interval))
    if not points:
        return None
    return _drawn(
        "differences",
        f"Difference to {reference}",
        f"Held-out {figure} of each start minus that of {reference}, each at its own best rate, paired, with the 95 % "
        "interval. Filled: told apart from it after Holm's correction. An interval that is not corrected may leave out "
        "0 where the corrected p does not tell the two apart.",
        f"difference in {figure}",
        points,
        part,
        0.0,
    )


def _drawn(
    kind: str, title: str, caption: str, across: str, points: list[_Point], part: Part, line: float | None
) -> Chart:
    rows: list[Row] = [
        (row.start, row.rate, row.seeds, value, *(interval or (None, None)), row.p, row.verdict)
        for row, value, interval in points
    ]
    if len(points) > MOST:
        caption += f" The {MOST} best of {counted(len(points), 'start')} are drawn; the table has all."
    shown = points[:MOST]
    traces = []
    for verdict, (colour, symbol) in _LOOKS.items():
        of_kind = [(place, *point) for place, point in enumerate(shown) if point[0].verdict == verdict]
        if not of_kind:
            continue
        ends = [interval or (value, value) for _, _, value, interval in of_kind]
        values = [value for _, _, value, _ in of_kind]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": verdict,
                "x": values,
                "y": [-place for place, *_ in of_kind],
                "text": [label(row.start) for _, row, _, _ in of_kind],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [end[1] - value for end, value in zip(ends, values, strict=True)],
                    "arrayminus": [value - end[0] for end, value in zip(ends, values, strict=True)],
                    "color": colour,
                    "thickness": 2,
                    "width": 5,
                },
                "marker": {"color": colour, "size": 11, "symbol": symbol, "line": {"width": 2, "color": colour}},
                "hovertemplate": "%{text}: %{x}<extra></extra>",
            }
        )
    figure = {
        "data": traces,
        "layout": layout(
            across,
            "",
            _ROW * len(shown) + 80,
            margin={"l": 12, "r": 16, "t": 8, "b": 48},
            yaxis=axis("", showticklabels=False, showgrid=False, ticks="", range=[-len(shown) + 0.45, 0.75]),
            # Names stand above their rows, where they have room at any width.
            annotations=[
                {
                    "text": label(row.start),
                    "x": 0,
                    "xref": "paper",
                    "xanchor": "left",
                    "xshift": 4,
                    "y": 0.38 - place,
                    "yanchor": "middle",
                    "showarrow": False,
                    "font": {"size": 13, "color": INK},
                }
                for place, (row, _, _) in enumerate(shown)
            ],
            shapes=[]
            if line is None
            else [
                {
                    "type": "line",
                    "x0": line,
                    "x1": line,
                    "yref": "paper",
                    "y0": 0,
                    "y1": 1,
                    "line": {"color": MUTED, "width": 1, "dash": "dash"},
                }
            ],
        ),
    }
    heads = ("start", "rate", "seeds", across, "low", "high", "p", "verdict")
    return Chart(kind, "ranking", title + (f", {part.name}" if part.name else ""), caption, figure, heads, rows)
