"""One self-contained HTML file of sections with their charts: nothing from the network, Plotly in it once."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from importlib.resources import files

from headstart.errors import HeadstartError
from headstart.reports import colours
from headstart.reports.markup import data_block

# The name of a section's place, its heading, and its content as HTML.
Section = tuple[str, str, str]


def document(title: str, subject: str, answer: str, sections: Sequence[Section]) -> str:
    """Return the page.

    Args:
        title: its heading.
        subject: of what, below it.
        answer: what comes first, in a few sentences.
        sections: what follows.

    Raises:
        HeadstartError: Plotly is not installed.
    """
    plotly, script = _plotly_js(), _resource("page.js")
    links = "".join(f'<li><a href="#{name}">{html.escape(heading)}</a></li>' for name, heading, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{html.escape(heading)}</h2>{content}</section>\n'
        for name, heading, content in sections
    )
    # Nothing from the network, and no script but these two.
    allowed = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {_hash(plotly)} {_hash(script)}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{html.escape(f"{title}: {subject}")}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_variables()}{_resource('page.css')}</style></head>\n<body>\n"
        '<a class="skip" href="#content">To the content</a>\n'
        f'<header><h1>{html.escape(title)}</h1><p class="subject">{html.escape(subject)}</p>\n'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav></header>\n<main id="content">\n'
        f'<section class="answer" aria-labelledby="answer"><h2 id="answer">Answer</h2>'
        f"<p>{html.escape(answer)}</p></section>\n"
        "<noscript><p>The charts are drawn by a script; their data are in the tables without it.</p></noscript>\n"
        f"{body}</main>\n{data_block('colours', colours.dark())}\n"
        f"<script>{plotly}</script>\n<script>{script}</script>\n</body></html>\n"
    )


def check_plotly() -> None:
    """Raise HeadstartError where Plotly is not installed."""
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise HeadstartError('the page needs Plotly: pip install "headstart[study]".') from None


def _variables() -> str:
    """Return the page's colours as CSS has them, by scheme; what is printed is light."""
    names = {
        "ground": colours.GROUND,
        "ink": colours.INK,
        "muted": colours.MUTED,
        "line": colours.LINE,
        "panel": colours.PANEL,
        "accent": colours.ACCENT,
    }
    dark = colours.dark()
    light = "".join(f"--{name}:{colour};" for name, colour in names.items())
    night = "".join(f"--{name}:{dark[colour]};" for name, colour in names.items())
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{night}}}}}\n"


def _plotly_js() -> str:
    check_plotly()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _resource(name: str) -> str:
    return files("headstart.reports").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
