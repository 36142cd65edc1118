"""``headstart methods``: what there is, what each needs and costs, and where it comes from."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Annotated

import typer
from rich.table import Table

from headstart.cli.app import app
from headstart.cli.console import output
from headstart.methods import ANY_LAYER, method_class, method_names


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full: formula, source, settings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods, or show one."""
    if name is not None:
        cls = method_class(name)
        row = describe(name)
        facts = [("needs", row["needs"]), ("cost", row["cost"]), ("settings", row["settings"] or "none")]
        listed = "\n".join(f"{title}: {text}" for title, text in facts)
        text = f"{name}\n\n{inspect.getdoc(cls)}\n\n{listed}"
        output.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    if as_json:
        output.print_json(json.dumps([describe(each) for each in method_names()]))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("method", "needs", "cost", "source"):
        table.add_column(title, no_wrap=title == "method")
    for each in method_names():
        row = describe(each)
        table.add_row(each, row["needs"], row["cost"], row["source"])
    output.print(table, markup=False)
    output.print("headstart methods NAME shows one in full, with its formula and settings.", markup=False)


def markdown_table() -> str:
    """Return the table of methods as the README holds it."""
    lines = ["| name | class | needs | cost | settings | source |", "|---|---|---|---|---|---|"]
    for name in method_names():
        row = describe(name)
        settings = f"`{row['settings']}`" if row["settings"] else "none"
        cells = (f"`{name}`", f"`hs.{row['class']}`", row["needs"], row["cost"], settings, row["source"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def describe(name: str) -> dict[str, str]:
    """Return a method's line in the table: needs, cost, source, settings with their defaults, first sentence."""
    cls = method_class(name)
    settings = ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(cls))
    doc = inspect.getdoc(cls) or ""
    return {
        "name": name,
        "class": cls.__name__,
        "needs": str(cls().wants(ANY_LAYER)),
        "cost": cls.cost,
        "source": cls.source,
        "settings": settings,
        "summary": " ".join(doc.split("\n\n")[0].split()),
    }
