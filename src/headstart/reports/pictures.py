"""The charts of a report as PNG pictures, through Plotly's kaleido and a Chrome, where both are there."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from headstart.files import work_folder
from headstart.reports.charts.chart import Chart
from headstart.reports.colours import GROUND

# Pixels of a picture's width, before the scale; twice as many for print.
_WIDTH, _SCALE = 900, 2
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_pictures(folder: Path, drawn: list[Chart]) -> str | None:
    """Write a PNG of each chart, each whole or not at all; return a sentence where they can't be drawn, else None."""
    missing = [name for name in ("plotly", "kaleido") if find_spec(name) is None]
    if missing:
        return f'No pictures are drawn: they need {" and ".join(missing)}: pip install "headstart[pictures]".'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with work_folder(folder, "pictures") as work:
            _draw(drawn, work)
            for chart in drawn:
                picture = work / f"{chart.name}.png"
                if not picture.read_bytes().startswith(_SIGNATURE):
                    raise OSError(f"{picture.name} is no picture")
                os.replace(picture, folder / picture.name)  # noqa: PTH105 - as in headstart.files
            for picture in folder.glob("*.png"):
                if picture.stem not in {chart.name for chart in drawn}:
                    picture.unlink()  # of a chart that the study no longer has
    except Exception as error:  # whatever a browser that is missing, or fails, makes kaleido raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return (
            f"Pictures could not be drawn ({reason}): they need a Chrome or Chromium, as plotly_get_chrome installs it."
        )
    return None


def _draw(drawn: list[Chart], folder: Path) -> None:
    import plotly.io

    figures = []
    for chart in drawn:
        # A page has its own ground, and names its charts beside them.
        title = {"text": chart.title, "x": 0.01, "xanchor": "left"}
        margin = {**chart.figure["layout"]["margin"], "t": 56}
        layout = {**chart.figure["layout"], "paper_bgcolor": GROUND, "title": title, "margin": margin}
        figures.append({"data": chart.figure["data"], "layout": layout})
    plotly.io.write_images(
        fig=figures,
        file=[str(folder / f"{chart.name}.png") for chart in drawn],
        width=_WIDTH,
        height=[int(chart.figure["layout"]["height"]) + 56 for chart in drawn],
        scale=_SCALE,
        validate=False,
    )
