"""One self-contained HTML file for a study: the answer, the ranking, the charts with their data, and the notes."""

from __future__ import annotations

import html
from pathlib import Path

from headstart.files import write_whole
from headstart.reports.answer import answer
from headstart.reports.charts import MOST_SETTINGS, TOPICS, Chart, charts
from headstart.reports.charts.dynamics import dynamics_sheet
from headstart.reports.document import Section, check_plotly, document
from headstart.reports.markup import chart_html, download, folded, sheet_html
from headstart.reports.sheets import (
    Sheet,
    cell_rows,
    conditions,
    cost_sheet,
    ranking_sheet,
    rates_sheet,
    robustness_sheet,
    unfinished_sheet,
    warnings_sheet,
)
from headstart.study.summary import Part, Summary

# By topic of charts, the heading of their section.
_HEADINGS = ("Ranking", "Learning rates", "Training", "What layers did", "Other settings", "Costs")
_TOPICS = dict(zip(TOPICS, _HEADINGS, strict=True))
# Settings whose tables a page shows, and rows of a table that it shows without a click.
_MOST_TABLES, _FOLDED = 12, 40


def write_page(path: Path, summary: Summary) -> None:
    """Write the page, whole or not at all.

    Raises:
        HeadstartError: Plotly is not installed.
        OSError: the file can't be written.
    """
    write_whole(path, page(summary))


def page(summary: Summary) -> str:
    """Return the page.

    Raises:
        HeadstartError: Plotly is not installed.
    """
    check_plotly()
    subject = f"{summary.grid.base.model.name} on {summary.grid.base.data.task}"
    return document("Starts compared", subject, answer(summary), _sections(summary, charts(summary)))


def _sections(summary: Summary, drawn: list[Chart]) -> list[Section]:
    notes = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in summary.sentences())
    known = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in conditions(summary))
    by_topic = {topic: _topic(summary, topic, [chart for chart in drawn if chart.topic == topic]) for topic in TOPICS}
    sections = [(topic, title, by_topic[topic]) for topic, title in _TOPICS.items() if by_topic[topic]]
    sections.append(("every-rate", "Every rate", _every_rate(summary)))
    sections.append(("notes", "Notes", (f"<ul>{notes}</ul>" if notes else "") + f"<dl>{known}</dl>"))
    for name, title, further in (
        ("unfinished", "Cells without a figure", unfinished_sheet),
        ("warnings", "Warnings", warnings_sheet),
    ):
        if (sheet := further(summary)) is not None:
            sections.append((name, title, sheet_html(sheet, title)))
    return sections


def _topic(summary: Summary, topic: str, drawn: list[Chart]) -> str:
    """Return a section's tables and charts; those of all settings but the first one are a click away."""
    first = summary.parts[0].name if summary.parts else ""
    content = _rankings(summary) if topic == "ranking" else ""
    content += "".join(chart_html(chart) for chart in drawn if chart.setting in ("", first))
    for place, part in enumerate(summary.parts[:_MOST_TABLES]):
        within = "".join(chart_html(chart) for chart in drawn if place and chart.setting == part.name)
        sheet = _SHEETS.get(topic, _no_sheet)(summary, part)
        if sheet is not None:
            within += sheet_html(sheet, f"{_TOPICS[topic]} {part.name}".strip())
        content += folded(f"{_TOPICS[topic]} with {part.name}", within) if place and within else within
    return content


def _no_sheet(summary: Summary, part: Part) -> Sheet | None:
    return None


# By topic, the table of one setting.
_SHEETS = {"rates": robustness_sheet, "dynamics": dynamics_sheet, "costs": cost_sheet}


def _rankings(summary: Summary) -> str:
    made = []
    for part in summary.parts[:_MOST_TABLES]:
        heading = f"<h3>{html.escape(part.name)}</h3>" if part.name else ""
        made.append(heading + sheet_html(ranking_sheet(summary, part), f"Ranking {part.name}".strip()))
    if len(summary.parts) > _MOST_TABLES:
        made.append(
            f'<p class="note">The first {_MOST_TABLES} of {len(summary.parts)} settings; report.md has all.</p>'
        )
    if len(summary.parts) > MOST_SETTINGS:
        made.append(f'<p class="note">Charts are drawn of the first {MOST_SETTINGS} settings.</p>')
    return "".join(made)


def _every_rate(summary: Summary) -> str:
    sheet = rates_sheet(summary)
    heads, rows = cell_rows(summary)
    link = download("cells.csv", heads, rows, f"Download all {len(rows):,} cells as CSV")
    table = sheet_html(sheet, "Every rate")
    if len(sheet.rows) <= _FOLDED:
        return link + table
    return link + folded(f"All {len(sheet.rows):,} pairs of start and rate", table, printed=True)
