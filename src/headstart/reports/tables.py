"""The report of a study for the terminal and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from headstart.reports.answer import answer
from headstart.reports.charts.dynamics import dynamics_sheet
from headstart.reports.sheets import (
    Sheet,
    conditions,
    cost_sheet,
    ranking_sheet,
    rates_sheet,
    robustness_sheet,
    unfinished_sheet,
    warnings_sheet,
)
from headstart.study.summary import Summary

# Of a terminal; the page and Markdown have all.
_MOST_SETTINGS, _MOST_ROWS = 8, 30
# An underscore within a word is none of Markdown's.
_MARKS = re.compile(r"([\\`*\[\]<>|~$&]|^#|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def ranking_table(summary: Summary) -> list[RenderableType]:
    """Return what a terminal shows of a study: for each setting the ranking and what the starts cost; then notes."""
    shown: list[RenderableType] = []
    for part in summary.parts[:_MOST_SETTINGS]:
        if part.name:
            shown.append(Text(f"\n{part.name}", style="bold"))
        ranking = ranking_sheet(summary, part)
        shown += [rich_table(ranking), Text(ranking.caption, style="dim"), "", rich_table(cost_sheet(summary, part))]
    if len(summary.parts) > _MOST_SETTINGS:
        shown.append(Text(f"\n{len(summary.parts) - _MOST_SETTINGS} more settings are in the report."))
    if (lost := unfinished_sheet(summary)) is not None:
        shown += ["", rich_table(lost)]
    shown += [Text(sentence) for sentence in summary.sentences()]
    return shown


def markdown(summary: Summary) -> str:
    """Return the whole report as Markdown."""
    lines = ["# Starts compared", "", escaped(answer(summary)), ""]
    lines += [f"- **{name}**: {escaped(value)}" for name, value in conditions(summary)]
    lines += ["", "## Ranking"]
    for part in summary.parts:
        lines += ["", f"### {escaped(part.name)}"] if part.name else []
        for sheet in (ranking_sheet(summary, part), cost_sheet(summary, part)):
            lines += ["", *table_lines(sheet)]
    lines += ["", "## Notes", "", *(f"- {escaped(sentence)}" for sentence in summary.sentences())]
    lines += ["", "## Every rate", "", *table_lines(rates_sheet(summary))]
    robust = [(part, kept) for part in summary.parts if (kept := robustness_sheet(summary, part)) is not None]
    if robust:
        lines += ["", "## Beside the best rate"]
        for part, sheet in robust:
            lines += ["", f"### {escaped(part.name)}"] if part.name else []
            lines += ["", *table_lines(sheet)]
    for part in summary.parts:
        if (watched := dynamics_sheet(summary, part)) is not None:
            lines += ["", f"## What layers did {escaped(part.name)}".rstrip(), "", *table_lines(watched)]
    last = {"Cells without a figure": unfinished_sheet(summary), "Warnings": warnings_sheet(summary)}
    for title, further in last.items():
        lines += ["", f"## {title}", "", *table_lines(further)] if further is not None else []
    return "\n".join(lines) + "\n"


def rich_table(sheet: Sheet) -> Table:
    """Return a table for the terminal, of its first rows."""
    table = Table(box=None, pad_edge=False)
    for place, head in enumerate(sheet.heads):
        word = place in sheet.words
        table.add_column(Text(head), justify="left" if word else "right", no_wrap=place == 0, overflow="fold")
    for row in sheet.rows[:_MOST_ROWS]:
        table.add_row(*map(Text, row))
    if len(sheet.rows) > _MOST_ROWS:
        table.add_row(Text(f"… {len(sheet.rows) - _MOST_ROWS:,} more in the report"))
    return table


def table_lines(sheet: Sheet) -> Iterable[str]:
    """Return a table's caption and rows as lines of Markdown."""
    yield escaped(sheet.caption)
    yield ""
    yield _line(sheet.heads)
    yield "|" + "".join("---|" if place in sheet.words else "---:|" for place in range(len(sheet.heads)))
    yield from map(_line, sheet.rows)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(escaped(cell) for cell in cells)} |"


def escaped(text: str) -> str:
    """Return text in which nothing is taken for Markdown or HTML, on one line."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))
