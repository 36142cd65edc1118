"""Tables and charts as HTML; nothing of a study's text is taken for markup or script."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from headstart.reports.charts import Chart
from headstart.reports.charts.chart import Row
from headstart.reports.sheets import Sheet
from headstart.reports.words import NOTHING

# Rows that a page shows of the data behind a chart, and of any table; files have all.
MOST_DATA, MOST_ROWS = 200, 1000
# Words that are longer may break.
_LONG = 40


def sheet_html(sheet: Sheet, name: str) -> str:
    """Return a table that scrolls by itself, by keyboard too.

    Args:
        sheet: the table.
        name: what a screen reader calls the place.
    """
    rows = sheet.rows[:MOST_ROWS]
    caption = sheet.caption
    if len(sheet.rows) > MOST_ROWS:
        caption += f" The first {MOST_ROWS:,} of {len(sheet.rows):,} rows."
    return _table(caption, sheet.heads, rows, sheet.words, name)


def folded(summary: str, content: str, *, printed: bool = False) -> str:
    """Return content that is a click away; ``printed`` opens it in print."""
    mark = " data-print" if printed else ""
    return f"<details{mark}><summary>{html.escape(summary)}</summary>{content}</details>"


def chart_html(chart: Chart) -> str:
    """Return a chart with its caption and its data."""
    name = chart.name
    rows = [tuple(map(_text, row)) for row in chart.rows[:MOST_DATA]]
    words = {
        place
        for place in range(len(chart.heads))
        if place == 0 or any(isinstance(row[place], str) and row[place] for row in chart.rows)
    }
    more = "" if len(chart.rows) <= MOST_DATA else f" The first {MOST_DATA:,} of {len(chart.rows):,} rows."
    table = _table(f"{chart.title}.{more}", chart.heads, rows, words, f"Data: {chart.title}", tall=True)
    link = download(f"{name}.csv", chart.heads, chart.rows, f"Download {chart.title} as CSV")
    height = int(chart.figure["layout"]["height"])
    return (
        f'<figure><h3 id="title-{name}">{html.escape(chart.title)}</h3>'
        f'<div class="chart" id="chart-{name}" role="img" aria-label="{html.escape(chart.alternative)}" '
        f'data-figure="figure-{name}" style="min-height:{height}px"></div>'
        f"<figcaption>{html.escape(chart.caption)}</figcaption>"
        f"{folded(f'Data of this chart: {chart.title}', link + table)}"
        f"{data_block(f'figure-{name}', chart.figure)}</figure>"
    )


def data_block(name: str, content: Any) -> str:
    """Return JSON for the page's script, in which nothing ends the element that holds it."""
    text = json.dumps(_compact(content), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


def download(file: str, heads: Sequence[str], rows: Iterable[Row], words: str) -> str:
    """Return a link to rows as CSV, which the page itself holds."""
    content = base64.b64encode(csv_text(heads, rows).encode()).decode()
    return (
        f'<p class="download"><a download="{html.escape(file)}" href="data:text/csv;charset=utf-8;base64,{content}">'
        f"{html.escape(words)}</a></p>"
    )


def csv_text(heads: Sequence[str], rows: Iterable[Row]) -> str:
    """Return rows as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([_safe(value) for value in row] for row in rows)
    return file.getvalue()


def _table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: Iterable[int],
    name: str,
    *,
    tall: bool = False,
) -> str:
    flush = set(words)
    marks = [' class="word"' if place in flush else "" for place in range(len(heads))]
    head = "".join(f'<th scope="col"{mark}>{html.escape(title)}</th>' for title, mark in zip(heads, marks, strict=True))
    lines = []
    for row in rows:
        cells = []
        for place, cell in enumerate(row):
            mark = ' class="word long"' if place in flush and len(cell) > _LONG else marks[place]
            tag = "th" if place == 0 else "td"
            scope = ' scope="row"' if place == 0 else ""
            cells.append(f"<{tag}{scope}{mark}>{html.escape(cell)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll{" tall" if tall else ""}" tabindex="0" role="group" aria-label="{html.escape(name)}">'
        f"<table><caption><span>{html.escape(caption)}</span></caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _text(value: str | float | int | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _safe(value: str | float | int | None) -> str | float | int | None:
    """Return text that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"} else value


def _compact(value: Any) -> Any:
    """Return JSON's types, with as many digits as can be seen, and null for what isn't a number."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _compact(part) for key, part in value.items()}
    return [_compact(part) for part in value] if isinstance(value, list | tuple) else value
