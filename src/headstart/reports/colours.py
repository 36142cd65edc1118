"""The colours, dashes and markers of charts and pages, on white and on black.

Charts are made in the colours of light pages. The page's script puts the dark ones in their place by name, so each of
them stands for one thing. Text has a contrast of at least 4.5 to its ground, and what is drawn of at least 3.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUND, INK, MUTED, LINE, PANEL = "#ffffff", "#1b1e23", "#545b66", "#dde1e6", "#f5f6f8"
ACCENT = "#0a5ea8"

# By colour of light pages, that of dark ones. Okabe's and Ito's hues, which most colour-blind people tell apart.
_SERIES = {
    "#0072b2": "#5ab4f5",
    "#c8500a": "#ff8f57",
    "#00835f": "#3ccf9f",
    "#b0418a": "#f08cc8",
    "#8a6200": "#e8b93c",
    "#6a4bb5": "#b7a0ff",
    "#2b2f37": "#d8dce3",
    "#80462b": "#cf9a7c",
    "#007a94": "#5fd3ea",
    "#5a6e00": "#b5cc52",
}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_MARKERS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "cross",
    "x",
    "triangle-down",
    "star",
    "hexagon",
    "pentagon",
)
SERIES = tuple(_SERIES)
BAND = 0.16

# From the least to the greatest, of one hue, and from below to above nothing, of two.
SEQUENTIAL = ("#fdf3d8", "#f6c667", "#d98435", "#9a4d1c", "#4f230b")
DIVERGING = ("#1a5fa3", "#8dbde6", "#f1f2f3", "#f3b089", "#a94406")


@dataclass(frozen=True)
class Look:
    """How a start is drawn: by colour, dash and marker, so that colour alone need not tell it."""

    colour: str
    dash: str
    marker: str

    @property
    def band(self) -> str:
        """The colour of the band around its curve."""
        return with_alpha(self.colour, BAND)


def look(place: int) -> Look:
    """Return how the so-many-th start is drawn."""
    return Look(SERIES[place % len(SERIES)], _DASHES[place % len(_DASHES)], _MARKERS[place % len(_MARKERS)])


def with_alpha(colour: str, alpha: float) -> str:
    """Return a colour that lets others through."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def dark() -> dict[str, str]:
    """Return by colour of light pages that of dark ones."""
    plain = {
        GROUND: "#14161a",
        INK: "#e7eaef",
        MUTED: "#aab1bd",
        LINE: "#343a44",
        PANEL: "#1d2026",
        ACCENT: "#7cbcf5",
        **_SERIES,
        # Low values stay near the ground, and nothing stays dull.
        **dict(zip(SEQUENTIAL, ("#2b2115", "#6b4014", "#b06a24", "#e9a848", "#fdeec2"), strict=True)),
        **dict(zip(DIVERGING, ("#6fb5f2", "#2f6ea8", "#2a2e35", "#a8562a", "#f2a06a"), strict=True)),
    }
    return plain | {with_alpha(light, BAND): with_alpha(of_dark, BAND) for light, of_dark in _SERIES.items()}


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG has it, from 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
