"""What watched layers did while they trained (:class:`headstart.Monitor`), at each start's best rate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from headstart.reports.charts.chart import Chart, axis, band, curve, layout
from headstart.reports.colours import look
from headstart.reports.measured import drawn_starts, left_out
from headstart.reports.sheets import Sheet
from headstart.reports.words import NOTHING, number
from headstart.study.summary import Part, Summary

Row = Mapping[str, Any]
# Of the two linear parts of an update, how many times the other one may be for both to count.
BOTH_LEARN = 10


@dataclass(frozen=True)
class Measure:
    """One number of a record.

    Attributes:
        name: of its chart.
        title: what it is.
        meaning: how to read it.
        value: of a record; None where it has none.
        logarithmic: whether it is a ratio or a size, drawn on a logarithmic axis and averaged so.
    """

    name: str
    title: str
    meaning: str
    value: Callable[[Row], float | None]
    logarithmic: bool = True


def _ratio(one: str, other: str) -> Callable[[Row], float | None]:
    return lambda row: row[one] / row[other] if row[one] > 0 and row[other] > 0 else None


MEASURES = (
    Measure(
        "delta-ratio",
        "delta1 over delta2: what training A adds to the output over what training B adds",
        "Near 1 both factors learn, as theory asks of an efficient run; far above it A alone, far below it B alone.",
        _ratio("delta1", "delta2"),
    ),
    Measure(
        "b-over-a",
        "Norm of B over norm of A",
        "Where B starts at zero, this is how far it has caught up.",
        _ratio("norm_b", "norm_a"),
    ),
    Measure(
        "start-overlap",
        "How much of A's row space is still that of its start",
        "1 where they are one, r over the layer's inputs by chance; while it is high, the start still matters.",
        lambda row: row["start_overlap"],
        logarithmic=False,
    ),
    Measure(
        "gradient-overlap",
        "How much of A's row space is that of the batch's leading gradient",
        "Mean squared cosine with the leading right singular vectors of the gradient for the weight.",
        lambda row: row["gradient_overlap"],
        logarithmic=False,
    ),
    Measure(
        "effective-rank",
        "Effective rank of the update",
        "The exponential of the entropy of the singular values of B A - B0 A0.",
        lambda row: row["effective_rank"] or None,
        logarithmic=False,
    ),
    Measure(
        "update-norm", "Norm of the update", "Frobenius norm of s (B A - B0 A0).", lambda row: row["update"] or None
    ),
)


def dynamics_charts(summary: Summary, part: Part) -> list[Chart]:
    """Return a chart for each measure that the results have."""
    return [chart for measure in MEASURES if (chart := _chart(summary, part, measure)) is not None]


def dynamics_sheet(summary: Summary, part: Part) -> Sheet | None:
    """Return where the watched layers were at the last record; None where no result has any."""
    rows = []
    for start in summary.grid.starts:
        by_measure = {measure.name: _by_step(part, start, measure) for measure in MEASURES}
        if not any(by_measure.values()):
            continue
        last = {name: points[max(points)][0] if points else None for name, points in by_measure.items()}
        ratio = last["delta-ratio"]
        learns = NOTHING
        if ratio is not None:
            learns = "both" if 1 / BOTH_LEARN <= ratio <= BOTH_LEARN else "A alone" if ratio > 1 else "B alone"
        caught = [step for step, point in sorted(by_measure["b-over-a"].items()) if point[0] >= 1]
        rows.append(
            (
                start,
                learns,
                number(ratio),
                number(last["b-over-a"]),
                f"step {caught[0]}" if caught else "not",
                *(number(last[name]) for name in ("start-overlap", "gradient-overlap", "effective-rank")),
            )
        )
    if not rows:
        return None
    heads = ("start", "learns", "delta1 / delta2", "B / A", "B reached A", "of the start", "of the gradient", "rank")
    caption = (
        "Watched layers at the last record, each start at its best rate, on average over layers and seeds: which "
        f"factor learns (both, where neither part of the update is {BOTH_LEARN} times the other), the norms' ratio and "
        "when it reached 1, how much of A's row space is that of its start and of the batch's leading gradient, and "
        "the effective rank of the update."
    )
    return Sheet(caption, heads, rows, frozenset({0, 1, 4}))


def _chart(summary: Summary, part: Part, measure: Measure) -> Chart | None:
    traces, rows = [], []
    starts = drawn_starts(summary)
    for start in starts:
        points = sorted(_by_step(part, start, measure).items())
        if not points:
            continue
        steps, style = [step for step, _ in points], look(summary.grid.starts.index(start))
        traces.append(band(start, steps, [point[1] for _, point in points], [point[2] for _, point in points], style))
        traces.append(curve(start, steps, [point[0] for _, point in points], style))
        rows += [(start, step, *point) for step, point in points]
    if not traces:
        return None
    drawn = layout("step", measure.title)
    drawn["yaxis"] = axis("", type="log") if measure.logarithmic else axis("")
    title = measure.title + (f", {part.name}" if part.name else "")
    mean = "geometric mean" if measure.logarithmic else "mean"
    caption = f"{measure.meaning} The {mean} over watched layers and seeds, with a band from the least to the greatest."
    caption = " ".join(filter(None, [caption, left_out(summary, len(starts))]))
    heads = ("start", "step", mean, "least", "greatest")
    return Chart(measure.name, "dynamics", title, caption, {"data": traces, "layout": drawn}, heads, rows)


def _by_step(part: Part, start: str, measure: Measure) -> dict[int, tuple[float, float, float]]:
    """Return by step the mean over layers and seeds, the least and the greatest."""
    values: dict[int, list[float]] = defaultdict(list)
    for _, result in part.at_best(start):
        for row in result.monitor:
            value = measure.value(row)
            if value is not None and math.isfinite(value):
                values[row["step"]].append(value)
    return {step: (_mean(of_step, measure), min(of_step), max(of_step)) for step, of_step in values.items()}


def _mean(values: Sequence[float], measure: Measure) -> float:
    return math.exp(fmean(map(math.log, values))) if measure.logarithmic else fmean(values)
