"""The charts of a study: pure functions from its summary to Plotly's figures, the rows behind them, and captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from headstart.reports.charts.chart import Chart, slug
from headstart.reports.charts.costs import against_memory, against_trainable, startup
from headstart.reports.charts.dynamics import dynamics_charts
from headstart.reports.charts.heat import heat_maps, heat_maps_over_axes
from headstart.reports.charts.ranking import differences, ranking
from headstart.reports.charts.rates import against_rate
from headstart.reports.charts.sizes import against_axes, against_error, against_settings
from headstart.reports.charts.training import training_curves
from headstart.study.summary import Part, Summary

__all__ = ["MOST_SETTINGS", "TOPICS", "Chart", "charts"]

# Charts of one setting; None where it has nothing for them.
_OF_ONE: tuple[Callable[[Summary, Part], Chart | None], ...] = (
    ranking,
    differences,
    against_rate,
    against_error,
    startup,
    against_trainable,
    against_memory,
)
TOPICS = ("ranking", "rates", "training", "dynamics", "settings", "costs")

# Settings that have charts of their own; tables have all.
MOST_SETTINGS = 4


def charts(summary: Summary) -> list[Chart]:
    """Return all charts that a study has something for, by topic: see :data:`TOPICS`."""
    made: list[Chart] = []
    for part in summary.parts[:MOST_SETTINGS]:
        single = [draw(summary, part) for draw in _OF_ONE]
        of_part = [chart for chart in single if chart is not None]
        of_part += [*heat_maps(summary, part), *training_curves(summary, part), *dynamics_charts(summary, part)]
        of_part += against_settings(summary, part)
        made += [replace(chart, setting=part.name) for chart in of_part]
        if part is summary.parts[0]:
            made += [*heat_maps_over_axes(summary), *against_axes(summary)]
    return _named(sorted(made, key=lambda chart: TOPICS.index(chart.topic)))


def _named(made: list[Chart]) -> list[Chart]:
    """Return the charts with names of their own."""
    seen: Counter[str] = Counter()
    named = []
    for chart in made:
        name = slug(chart.name)
        seen[name] += 1
        named.append(replace(chart, name=name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return named
