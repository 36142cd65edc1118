"""Losses and gradient norms over the steps, at each start's best rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean

from headstart.reports.charts.chart import Chart, axis, band, curve, layout
from headstart.reports.colours import look
from headstart.reports.measured import drawn_starts, left_out
from headstart.study.summary import Part, Summary

# Points of a curve that a page holds; a smoothed point is the mean of this share of the steps.
MOST_POINTS = 200
_SMOOTHED = 50

# By series of a result, what it is called.
_SERIES = {
    "loss": "training loss",
    "held-out loss": "loss measured during training",
    "gradient norm": "gradient norm",
}
_Point = tuple[int, float, float, float]


def training_curves(summary: Summary, part: Part) -> list[Chart]:
    """Return a chart for each series that the results have."""
    return [chart for series in _SERIES if (chart := over_steps(summary, part, series)) is not None]


def over_steps(summary: Summary, part: Part, series: str) -> Chart | None:
    """Return the chart of one series; None where no result has it."""
    title = _SERIES.get(series, series)
    traces, rows, shown, window, thinned = [], [], 0, 1, False
    for start in drawn_starts(summary):
        of_seeds = [
            result.series[series] for _, result in part.at_best(start) if len(result.series.get(series, ())) > 1
        ]
        if not of_seeds:
            continue
        points, window = averaged(of_seeds, smooth=series != "held-out loss")
        steps, style = [point[0] for point in points], look(summary.grid.starts.index(start))
        if len(of_seeds) > 1:
            traces.append(band(start, steps, [point[2] for point in points], [point[3] for point in points], style))
        mode = "lines" if len(points) > 20 else "lines+markers"
        traces.append(curve(start, steps, [point[1] for point in points], style, mode=mode))
        rows += [(start, *point, len(of_seeds)) for point in points]
        shown, thinned = shown + 1, thinned or len(points) < len(of_seeds[0])
    if not traces:
        return None
    band_of = ", mean over seeds with a band from the least to the greatest" if summary.seeds > 1 else ""
    said = [f"Each start at its best rate{band_of}."]
    said += [f"Each point is the mean of the last {window} steps."] if window > 1 else []
    said += [f"{MOST_POINTS} points of each curve are kept."] if thinned else []
    drawn = layout("step", title)
    if series != "gradient norm" and (shown_range := _range(rows)):
        drawn["yaxis"] = axis(title, range=shown_range)
        said.append("The axis is made for what comes after the first tenth of the steps; two double clicks show all.")
    if series == "gradient norm" and all(isinstance(row[3], float) and row[3] > 0 for row in rows):
        drawn["yaxis"] = axis(title, type="log")
    name = f"{title[:1].upper()}{title[1:]}" + (f", {part.name}" if part.name else "")
    caption = " ".join(filter(None, [*said, left_out(summary, shown)]))
    heads = ("start", "step", "mean", "least", "greatest", "seeds")
    return Chart(series.replace(" ", "-"), "training", name, caption, {"data": traces, "layout": drawn}, heads, rows)


def _range(rows: Sequence[tuple[str, int, float, float, float, int]]) -> list[float]:
    """Return a range for losses, whose first fall would flatten all that follows; empty where it is short."""
    steps = [row[1] for row in rows]
    later = [row for row in rows if row[1] >= min(steps) + (max(steps) - min(steps)) / 10]
    low, high = min(row[3] for row in rows), max(row[4] for row in later)
    most = max(row[4] for row in rows)
    return [low - (high - low) / 20, high + (high - low) / 20] if most - low > 1.5 * (high - low) else []


def averaged(of_seeds: Sequence[Sequence[tuple[int, float]]], smooth: bool = True) -> tuple[list[_Point], int]:
    """Return (step, mean, least, greatest) over seeds at the steps that all have, and the steps that were averaged.

    Each seed is smoothed by itself, so that the band is of what is drawn.
    """
    by_seed = [{step: value for step, value in rows if math.isfinite(value)} for rows in of_seeds]
    steps = sorted(set.intersection(*(set(rows) for rows in by_seed)))
    window = max(1, len(steps) // _SMOOTHED) if smooth else 1
    smoothed = [_smoothed([rows[step] for step in steps], window) for rows in by_seed]
    places = range(len(steps))
    if len(steps) > MOST_POINTS:
        places = [round(place * (len(steps) - 1) / (MOST_POINTS - 1)) for place in range(MOST_POINTS)]  # type: ignore[assignment]
    points = []
    for place in places:
        values = [rows[place] for rows in smoothed]
        points.append((steps[place], fmean(values), min(values), max(values)))
    return points, window


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    sums = [0.0, *accumulate(values)]
    return [(sums[end] - sums[max(0, end - window)]) / min(end, window) for end in range(1, len(values) + 1)]
