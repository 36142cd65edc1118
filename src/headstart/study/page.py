"""One self-contained HTML file for a comparison: conditions, table, loss curves."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.errors import HeadstartError
from headstart.files import write_whole
from headstart.runs.result import Result
from headstart.study.tables import LOSS, method_of, rows, titles

_COLOURS = (
    "#4269d0",
    "#ff725c",
    "#3ca951",
    "#a463f2",
    "#efb118",
    "#6cc5b0",
    "#9c6b4e",
    "#ff8ab7",
    "#97bbf5",
    "#9498a0",
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1e23; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
p.conditions { color: #555b66; margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #e3e6ea; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: #555b66; font-weight: 600; }
td.best { font-weight: 700; }
p.note { color: #555b66; font-size: .9rem; }
.wide { overflow-x: auto; }
"""


def write_page(path: Path, title: str, conditions: str, results: Sequence[Result]) -> None:
    """Write the page, whole or not at all.

    Raises:
        HeadstartError: Plotly is not installed.
    """
    body = "\n".join(
        [
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="conditions">{html.escape(conditions)}</p>',
            f'<div class="wide">{_table(results)}</div>',
            '<p class="note">Losses are of held-out examples, before and after training, of text in nats a '
            "completion token. The interval is that of the score beside it, over items (Wilson&#8217;s of a share, "
            "else the bootstrap&#8217;s); where two overlap, this comparison does not tell them apart. One seed: "
            "another one moves every number.</p>",
            "<h2>Training loss</h2>",
            _curves(results),
            '<p class="note">All methods see the same batches in the same order. Thin: each step. Thick: mean of the '
            "last five.</p>",
            *(_warnings(results)),
        ]
    )
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    write_whole(path, text)


def _table(results: Sequence[Result]) -> str:
    losses = {
        index: result.metrics["loss/end"].value
        for index, result in enumerate(results)
        if result.status == "done" and "loss/end" in result.metrics
    }
    best = min(losses, key=lambda index: losses[index], default=None)
    heads = titles(results)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in heads)
    lines = []
    for index, row in enumerate(rows(results)):
        cells = "".join(
            f'<td class="best">{html.escape(cell)}</td>'
            if index == best and title == LOSS
            else f"<td>{html.escape(cell)}</td>"
            for title, cell in zip(heads, row, strict=True)
        )
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _curves(results: Sequence[Result]) -> str:
    go = _plotly()
    figure = go.Figure()
    for index, result in enumerate(results):
        colour = _COLOURS[index % len(_COLOURS)]
        method, series = method_of(result), result.series.get("loss", [])
        losses = [loss for _, loss in series]
        shared: dict[str, Any] = {"x": [step for step, _ in series], "mode": "lines", "legendgroup": method}
        figure.add_scatter(
            y=losses,
            line={"color": colour, "width": 1},
            opacity=0.3,
            showlegend=False,
            hoverinfo="skip",
            **shared,
        )
        figure.add_scatter(y=_smoothed(losses), line={"color": colour, "width": 2.5}, name=method, **shared)
    figure.update_layout(
        template="plotly_white",
        height=440,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        xaxis_title="step",
        yaxis_title="training loss",
        hovermode="x unified",
        legend={"orientation": "h", "y": 1.08},
    )
    return str(figure.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False}))


def _smoothed(losses: Sequence[float], window: int = 5) -> list[float]:
    return [
        sum(losses[max(0, end - window) : end]) / len(losses[max(0, end - window) : end])
        for end in range(1, len(losses) + 1)
    ]


def _warnings(results: Sequence[Result]) -> list[str]:
    items = [
        f"<li>{html.escape(method_of(result))}: {html.escape(warning)}</li>"
        for result in results
        for warning in ([f"{result.status}: {result.reason}"] if result.reason else []) + result.warnings
    ]
    return ["<h2>Warnings</h2>", f"<ul>{''.join(items)}</ul>"] if items else []


def check_plotly() -> None:
    """Raise HeadstartError where Plotly is not installed."""
    _plotly()


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise HeadstartError('the page needs Plotly: pip install "headstart[study]".') from None
    return go
