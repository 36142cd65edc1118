"""What a chart is: a Plotly figure in plain types, the rows behind it, and words."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headstart.reports.colours import INK, LINE, MUTED, Look
from headstart.reports.words import rate_text, shortened

Row = tuple[str | float | int | None, ...]
Figure = dict[str, Any]
Trace = dict[str, Any]

# A legend, and labels at the rim, hold no more of a name.
_LABEL = 48


@dataclass(frozen=True)
class Chart:
    """A chart of a study.

    Attributes:
        name: of its own in a report: letters, digits and hyphens; its file's and its element's.
        topic: which part of the report it belongs to.
        title: a few words.
        caption: what is drawn, and how to read it.
        figure: Plotly's, as its JSON has it, in the colours of light pages.
        heads, rows: the data behind it.
        setting: of the study, in words, where it shows one of several.
    """

    name: str
    topic: str
    title: str
    caption: str
    figure: Figure
    heads: tuple[str, ...]
    rows: Sequence[Row]
    setting: str = ""

    @property
    def alternative(self) -> str:
        """What a screen reader says in place of the drawing."""
        return f"Chart: {self.title}. {self.caption} Its data follow as a table."


def label(text: str) -> str:
    """Return text of the study's as Plotly draws it: nothing in it is markup."""
    return html.escape(shortened(text, _LABEL), quote=False)


def layout(across: str, up: str, height: int = 420, **more: Any) -> dict[str, Any]:
    """Return the layout that all charts share, with what the axes are called."""
    shared = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 62, "r": 16, "t": 16, "b": 48},
        "height": height,
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": -0.18, "yanchor": "top"},
        "xaxis": axis(across),
        "yaxis": axis(up),
    }
    return shared | more


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis."""
    shared = {
        "title": {"text": label(title), "font": {"color": MUTED}, "standoff": 8},
        "gridcolor": LINE,
        "linecolor": MUTED,
        "zeroline": False,
        "automargin": True,
        "ticks": "outside",
        "tickcolor": MUTED,
    }
    return shared | more


def rate_axis(rates: Sequence[float], title: str = "learning rate", **more: Any) -> dict[str, Any]:
    """Return a logarithmic axis with a tick at each rate, where these are few."""
    shown = sorted(set(rates))
    if 0 < len(shown) <= 9:
        more = {"tickvals": shown, "ticktext": [rate_text(rate) for rate in shown], **more}
    return axis(title, type="log", **more)


def curve(name: str, x: Sequence[Any], y: Sequence[float | None], look: Look, **more: Any) -> Trace:
    """Return a curve with a marker at each point."""
    shared = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label(name),
        "legendgroup": label(name),
        "x": list(x),
        "y": list(y),
        "line": {"color": look.colour, "width": 2, "dash": look.dash},
        "marker": {"color": look.colour, "size": 7, "symbol": look.marker},
        "hovertemplate": "%{fullData.name}<br>%{x}: %{y}<extra></extra>",
    }
    return shared | more


def band(name: str, x: Sequence[Any], low: Sequence[float], high: Sequence[float], look: Look, **more: Any) -> Trace:
    """Return the area between two curves, which belongs to the curve of that name."""
    shared = {
        "type": "scatter",
        "mode": "lines",
        "x": [*x, *reversed(x)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "fillcolor": look.band,
        "line": {"width": 0, "color": look.band},
        "legendgroup": label(name),
        "showlegend": False,
        "hoverinfo": "skip",
    }
    return shared | more


def finite(value: float | None) -> float | None:
    """Return a number that can be drawn, else None."""
    return value if value is not None and math.isfinite(value) else None


def slug(*words: str) -> str:
    """Return a name of letters, digits and hyphens."""
    text = "-".join(words).lower()
    return "-".join(filter(None, "".join(c if c.isascii() and c.isalnum() else " " for c in text).split()))
