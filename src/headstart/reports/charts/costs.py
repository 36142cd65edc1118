"""What starts cost: seconds before training, trainable parameters, memory."""

from __future__ import annotations

import math
from collections.abc import Callable

from headstart.reports.charts.chart import Chart, Row, axis, curve, label, layout
from headstart.reports.charts.ranking import MOST
from headstart.reports.colours import INK, MUTED, SERIES, look
from headstart.reports.measured import Cost, cost, drawn_starts, left_out, standings
from headstart.reports.words import counted
from headstart.study.statistics import Comparison
from headstart.study.summary import Part, Summary

_STAGES = (("start", SERIES[1], "/"), ("training", SERIES[0], ""), ("measurement", SERIES[9], "x"))
_ROW = 46


def startup(summary: Summary, part: Part) -> Chart | None:
    """Return how long start, training and measurement take at each start's best rate; None where nothing tells."""
    known = [(row.start, cost(part.at_best(row.start))) for row in standings(summary, part)]
    known = [(start, own) for start, own in known if own.start is not None and own.training is not None]
    if not known:
        return None
    shown = known[:MOST]
    seconds = [(own.start or 0.0, own.training or 0.0, own.measurement or 0.0) for _, own in shown]
    places = [-place for place in range(len(shown))]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": [stages[place] for stages in seconds],
            "y": places,
            "width": 0.42,
            "marker": {"color": colour, "pattern": {"shape": shape, "size": 6}},
            "hovertemplate": f"{name}: %{{x}} s<extra></extra>",
        }
        for place, (name, colour, shape) in enumerate(_STAGES)
    ]
    notes = [
        {
            "text": label(f"{start}: start {100 * (own.share or 0):.2g} %"),
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "xshift": 4,
            "y": 0.42 - place,
            "yanchor": "middle",
            "showarrow": False,
            "font": {"size": 13, "color": INK},
        }
        for place, (start, own) in enumerate(shown)
    ]
    shape = layout(
        "seconds",
        "",
        _ROW * len(shown) + 80,
        barmode="stack",
        margin={"l": 12, "r": 16, "t": 8, "b": 48},
        yaxis=axis("", showticklabels=False, showgrid=False, ticks="", range=[-len(shown) + 0.55, 0.75]),
        annotations=notes,
    )
    rows: list[Row] = [(start, own.start, own.training, own.measurement, own.share) for start, own in known]
    caption = "Seconds of the start, of training and of measurement at each start's best rate, mean over seeds; "
    caption += "the share is of start and training."
    if len(known) > MOST:
        caption += f" The {MOST} best of {counted(len(known), 'start')} are drawn; the table has all."
    heads = ("start", "start s", "training s", "measurement s", "start of start and training")
    title = "Start-up as a share of the time" + (f", {part.name}" if part.name else "")
    return Chart("startup", "costs", title, caption, {"data": traces, "layout": shape}, heads, rows)


def against_trainable(summary: Summary, part: Part) -> Chart | None:
    """Return the figure against the number of trainable parameters; None where all starts have as many."""
    points = _points(summary, part, lambda own: own.trainable)
    if len({size for _, size in points}) < 2:
        return None
    caption = "Each start at its best rate; the mean over seeds."
    return _scatter(summary, part, "trainable", "trainable parameters", caption, points, [])


def against_memory(summary: Summary, part: Part) -> Chart | None:
    """Return the figure against peak memory, with the front of those that no other beats in both."""
    points = _points(summary, part, lambda own: own.memory and own.memory / 2**20)
    if len(points) < 2:
        return None
    higher = summary.better[summary.first]
    caption = (
        "Each start at its best rate; the mean over seeds. The line is the front: the starts that no other beats in "
        "both figure and memory. Of a run on the CPU, memory is the process's peak, which holds more than training."
    )
    return _scatter(summary, part, "memory", "peak memory, MiB", caption, points, front(points, higher))


def front(points: list[tuple[Comparison, float]], higher_is_better: bool) -> list[tuple[Comparison, float]]:
    """Return the points that none beats in both size and figure, by size."""
    best, kept = math.inf, []
    for row, size in sorted(
        points, key=lambda point: (point[1], -point[0].mean if higher_is_better else point[0].mean)
    ):
        height = -row.mean if higher_is_better else row.mean
        if height < best:
            best = height
            kept.append((row, size))
    return kept


def _points(summary: Summary, part: Part, size: Callable[[Cost], float | None]) -> list[tuple[Comparison, float]]:
    rows = [row for row in standings(summary, part) if math.isfinite(row.mean)]
    sized = [(row, size(cost(part.at_best(row.start)))) for row in rows]
    return [(row, float(known)) for row, known in sized if known]


def _scatter(
    summary: Summary,
    part: Part,
    kind: str,
    across: str,
    caption: str,
    points: list[tuple[Comparison, float]],
    line: list[tuple[Comparison, float]],
) -> Chart:
    figure, starts, traces = summary.first, drawn_starts(summary), []
    if len(line) > 1:
        ends = {"type": "scatter", "mode": "lines", "name": "front", "hoverinfo": "skip"}
        heights = [row.mean for row, _ in line]
        path = {"color": MUTED, "width": 1.5, "dash": "dash", "shape": "hv"}
        traces.append(ends | {"x": [size for _, size in line], "y": heights, "line": path})
    for row, size in points:
        if row.start in starts:
            style = look(summary.grid.starts.index(row.start))
            marker = {"color": style.colour, "size": 12, "symbol": style.marker}
            traces.append(curve(row.start, [size], [row.mean], style, mode="markers", marker=marker))
    sizes = [size for _, size in points]
    shape = layout(across, f"held-out {figure}")
    if max(sizes) > 8 * min(sizes):
        shape["xaxis"] = axis(across, type="log")
    members = {row.start for row, _ in line}
    rows: list[Row] = [(row.start, size, row.mean, "front" if row.start in members else "") for row, size in points]
    caption = f"{caption} {left_out(summary, len(starts))}".strip()
    title = f"{figure[:1].upper()}{figure[1:]} against {across}" + (f", {part.name}" if part.name else "")
    heads = ("start", across, f"held-out {figure}", "on the front")
    return Chart(kind, "costs", title, caption, {"data": traces, "layout": shape}, heads, rows)
