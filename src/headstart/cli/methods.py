"""``headstart methods``: what there is, what each needs and costs, and where it comes from."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from typing import Annotated

import typer
from rich.table import Table

from headstart.cli.app import app
from headstart.cli.console import output
from headstart.methods import ANY_LAYER, PerLayer, method_class, method_names

_HEAD = """\
# The methods

<!-- Generated from the registry by `make docs`; a test compares. -->

What each is given of a layer (`needs`), whether it reads fine-tuning data for that (`data`), what it costs, its
settings with their defaults, and where it comes from. `headstart methods NAME` shows one in full, with its formula. A
setting that differs from its default goes in brackets in Python, `hs.InitAB(beta=4)`, and after a colon in text,
`init-ab:beta=4`. Different layers may take [different methods](choosing.md#different-layers). [How to
choose](choosing.md).

| name | class | needs | data | cost | settings | source |
|---|---|---|---|---|---|---|"""


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full: formula, source, settings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page that docs/methods.md is.")] = False,
) -> None:
    """List the methods, or show one."""
    if name == PerLayer.name:
        output.print(f"{name}\n\n{inspect.getdoc(PerLayer)}", markup=False, highlight=False, soft_wrap=True)
        return
    if name is not None:
        cls = method_class(name)
        row = describe(name)
        titles = ("needs", "data", "cost", "settings")
        facts = [(title, row[title] or "none") for title in titles]
        listed = "\n".join(f"{title}: {text}" for title, text in facts)
        text = f"{name}\n\n{inspect.getdoc(cls)}\n\n{listed}"
        output.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    if as_json:
        output.print_json(json.dumps([describe(method) for method in method_names()]))
        return
    if markdown:
        sys.stdout.write(markdown_page())
        return
    table = Table(box=None, pad_edge=False)
    for title in ("method", "needs", "data", "cost", "source"):
        table.add_column(title, no_wrap=title == "method")
    for method in method_names():
        row = describe(method)
        table.add_row(method, row["needs"], row["data"], row["cost"], row["source"])
    output.print(table, markup=False)
    output.print("headstart methods NAME shows one in full, with its formula and settings.", markup=False)


def markdown_page() -> str:
    """Return docs/methods.md: the table of all methods, as the registry has them."""
    lines = [_HEAD]
    for name in method_names():
        row = describe(name)
        settings = f"`{row['settings']}`" if row["settings"] else "none"
        cells = (f"`{name}`", f"`hs.{row['class']}`", row["needs"], row["data"], row["cost"], settings, row["source"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def describe(name: str) -> dict[str, str]:
    """Return a method's line in the table: needs, data, cost, source, settings with their defaults, first sentence."""
    cls = method_class(name)
    wants = cls().wants(ANY_LAYER)
    settings = ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(cls))
    doc = inspect.getdoc(cls) or ""
    return {
        "name": name,
        "class": cls.__name__,
        "needs": str(wants),
        "data": "yes" if cls().reads_data else "no",
        "cost": cls.cost,
        "source": cls.source,
        "settings": settings,
        "summary": " ".join(doc.split("\n\n")[0].split()),
    }
