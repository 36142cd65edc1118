"""What an experiment other than a study came to: an answer, charts and tables, as one page, Markdown and pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headstart.files import write_whole
from headstart.reports.charts.chart import Chart
from headstart.reports.document import document
from headstart.reports.markup import chart_html, sheet_html
from headstart.reports.pictures import write_pictures
from headstart.reports.sheets import Sheet
from headstart.reports.tables import escaped, table_lines


@dataclass(frozen=True)
class Findings:
    """A report.

    Attributes:
        title, subject: of what.
        answer: what it says, in a few sentences.
        sections: heading, charts and tables of each.
        conditions: what it depends on, as names and words.
        notes: what a reader must know, a sentence each.
    """

    title: str
    subject: str
    answer: str
    sections: Sequence[tuple[str, Sequence[Chart], Sequence[Sheet]]]
    conditions: Sequence[tuple[str, str]]
    notes: Sequence[str] = field(default=())


def write_findings(folder: Path, findings: Findings, *, pictures: bool = True) -> str | None:
    """Write ``report.html``, ``report.md`` and ``pictures`` into a folder; return why no pictures are drawn, if so.

    Raises:
        HeadstartError: Plotly is not installed.
        OSError: a file can't be written.
    """
    write_whole(folder / "report.html", as_page(findings))
    write_whole(folder / "report.md", as_markdown(findings))
    if not pictures:
        return None
    return write_pictures(folder / "pictures", [chart for _, charts, _ in findings.sections for chart in charts])


def as_page(findings: Findings) -> str:
    """Return the report as one HTML file."""
    sections = []
    for place, (heading, charts, sheets) in enumerate(findings.sections):
        content = "".join(map(chart_html, charts)) + "".join(sheet_html(sheet, heading) for sheet in sheets)
        sections.append((f"section-{place}", heading, content))
    notes = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings.notes)
    known = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in findings.conditions)
    sections.append(("notes", "Notes", (f"<ul>{notes}</ul>" if notes else "") + f"<dl>{known}</dl>"))
    return document(findings.title, findings.subject, findings.answer, sections)


def as_markdown(findings: Findings) -> str:
    """Return the report as Markdown; charts are named with their pictures."""
    lines = [f"# {findings.title}", "", escaped(findings.subject), "", escaped(findings.answer), ""]
    lines += [f"- **{name}**: {escaped(value)}" for name, value in findings.conditions]
    for heading, charts, sheets in findings.sections:
        lines += ["", f"## {heading}"]
        for chart in charts:
            lines += ["", f"![{escaped(chart.title)}](pictures/{chart.name}.png)", "", escaped(chart.caption)]
        for sheet in sheets:
            lines += ["", *table_lines(sheet)]
    if findings.notes:
        lines += ["", "## Notes", "", *(f"- {escaped(sentence)}" for sentence in findings.notes)]
    return "\n".join(lines) + "\n"
