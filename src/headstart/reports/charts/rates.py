"""The figure against the rate, one curve a start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from headstart.reports.charts.chart import Chart, Row, Trace, axis, band, curve, finite, layout, rate_axis
from headstart.reports.colours import INK, Look, look
from headstart.reports.measured import Spread, drawn_starts, ended, figures, left_out, spread
from headstart.runs.measure import VALIDATION
from headstart.study.summary import Part, Summary

# Past this many times the distance from the best to the middle one, a figure is left to the rim of its axis.
_FAR = 6
# By number of panels, where each stands.
_DOMAINS = {1: [[0.0, 1.0]], 2: [[0.54, 1.0], [0.0, 0.46]]}
_Curve = dict[float, Spread | None]


def against_rate(summary: Summary, part: Part) -> Chart | None:
    """Return the chart; None of studies with one rate."""
    figure, by_start = summary.first, ended(part)
    if not any(len(by_rate) > 1 for by_rate in by_start.values()):
        return None
    panels = [(f"held-out {figure}", figure, "end")]
    if summary.validated:
        panels.append((f"validation {summary.chosen_by}", summary.chosen_by, VALIDATION))
    starts = [start for start in drawn_starts(summary) if start in by_start]
    traces, rows, axes, lost = [], [], {}, False
    for place, (title, name, when) in enumerate(panels):
        curves: dict[str, _Curve] = {
            start: {rate: spread(figures(pairs, name, when)) for rate, pairs in by_rate.items()}
            for start, by_rate in by_start.items()
        }
        suffix = "" if place == 0 else str(place + 1)
        for start in starts:
            best = part.choices[start].rate if start in part.choices else None
            traces += _traces(start, curves[start], look(summary.grid.starts.index(start)), best, suffix)
        for start, points in curves.items():
            for rate, point in points.items():
                lost = lost or (point is not None and math.isinf(point.mean))
                best = start in part.choices and part.choices[start].rate == rate
                rows.append(_row(start, rate, title, point, best))
        values = [point.mean for start in starts for point in curves[start].values() if point is not None]
        axes[f"yaxis{suffix}"] = axis(
            title, domain=_DOMAINS[len(panels)][place], **_range(values, summary.better.get(name, False))
        )
    rates = [rate for start in starts for rate in by_start[start]]
    titled = f"{figure[:1].upper()}{figure[1:]} against the learning rate"
    shown = layout("", "", 340 * len(panels) + 60, **axes, xaxis=rate_axis(rates, anchor="y2" if panels[1:] else "y"))
    return Chart(
        "rates",
        "rates",
        titled + (f", {part.name}" if part.name else ""),
        _caption(summary, len(starts), lost),
        {"data": traces, "layout": shown},
        ("start", "rate", "measured", "mean", "least", "greatest", "seeds", "best of its start"),
        rows,
    )


def _caption(summary: Summary, shown: int, lost: bool) -> str:
    said = ["Mean over seeds, with a band from the least to the greatest." if summary.seeds > 1 else "One seed."]
    said.append("A ring marks each start's best rate, chosen below, on validation data." if summary.validated else "")
    said.append("" if summary.validated else "A ring marks each start's best rate.")
    said.append("Rates at which a seed diverged have no point." if lost else "")
    return " ".join(filter(None, [*said, left_out(summary, shown)]))


def _row(start: str, rate: float, title: str, point: Spread | None, best: bool) -> Row:
    state: str | float | None = None if point is None else "diverged" if math.isinf(point.mean) else point.mean
    ends = (None, None) if point is None else (finite(point.low), finite(point.high))
    return (start, rate, title, state, *ends, 0 if point is None else point.count, "best" if best else "")


def _traces(start: str, points: _Curve, look: Look, best: float | None, suffix: str) -> list[Trace]:
    on = {"xaxis": "x", "yaxis": f"y{suffix}"}
    drawn = {rate: point for rate, point in points.items() if point is not None and math.isfinite(point.mean)}
    traces = []
    if any(point.count > 1 for point in drawn.values()):
        lows, highs = [point.low for point in drawn.values()], [point.high for point in drawn.values()]
        traces.append(band(start, list(drawn), lows, highs, look, **on))
    # A gap where a rate between two others has no figure.
    heights = [drawn[rate].mean if rate in drawn else None for rate in points]
    traces.append(curve(start, list(points), heights, look, showlegend=not suffix, **on))
    if best in drawn:
        ring = {"color": "rgba(0,0,0,0)", "size": 15, "symbol": "circle", "line": {"color": INK, "width": 2}}
        traces.append(
            curve(start, [best], [drawn[best].mean], look, mode="markers", marker=ring, showlegend=False, **on)
            | {"hoverinfo": "skip", "hovertemplate": None}
        )
    return traces


def _range(values: Sequence[float], higher_is_better: bool) -> dict[str, list[float]]:
    """Return a range of an axis that leaves out figures far worse than the rest, which would flatten all others."""
    known = [-value if higher_is_better else value for value in values if math.isfinite(value)]
    if len(known) < 3:
        return {}
    best, middle = min(known), median(known)
    if max(known) - best <= _FAR * (middle - best) or middle == best:
        return {}
    reach = _FAR / 2 * (middle - best)
    ends = (best - reach / 12, best + reach)
    return {"range": [-ends[1], -ends[0]] if higher_is_better else list(ends)}
