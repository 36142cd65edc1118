"""``headstart cache list|verify|clear``: what is kept between runs."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from headstart.cache import FactorCache, factors_folder, size_limit
from headstart.cache.eviction import CachedFile, evict
from headstart.cli.app import app
from headstart.cli.console import output
from headstart.errors import HeadstartError
from headstart.methods import method_class
from headstart.progress import progress_bars
from headstart.store.entries import DamagedEntryError, facts_of

cache = typer.Typer(
    name="cache",
    help="The factors kept between runs: list, verify, clear.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache)

Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="The cache's folder; by default HEADSTART_CACHE, or the platform's own place."),
]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_DAMAGED = "(damaged)"


@cache.command("list")
def list_(
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every entry.")] = False,
) -> None:
    """Show what is kept, with sizes and ages, the last used first."""
    kept = _cache(folder)
    entries = [(entry, _about(entry)) for entry in reversed(kept.entries())]
    total = sum(entry.bytes for entry, _ in entries)
    if as_json:
        listed = [
            {"key": entry.key, "bytes": entry.bytes, "used": entry.used, **(about or {"method": _DAMAGED})}
            for entry, about in entries
        ]
        content = {"folder": str(kept.folder), "bytes": total, "limit": kept.limit_bytes, "entries": listed}
        output.print_json(json.dumps(content))
        return
    if entries:
        output.print(_table(entries))
    output.print(
        f"{_count(len(entries))}, {human_bytes(total)} of at most {human_bytes(kept.limit_bytes)}, in {kept.folder}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@cache.command()
def verify(
    folder: Folder = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the damaged ones.")] = False,
) -> None:
    """Read every entry and check it; exit code 1 where a damaged one is left.

    A damaged entry does no harm: it is found out when it is asked for, and computed again.
    """
    kept = _cache(folder)
    entries = kept.entries()
    damaged: list[tuple[CachedFile, str]] = []
    with progress_bars() as show:
        for done, (entry, wrong) in enumerate(kept.verify(), start=1):
            show("verifying", done, max(done, len(entries)))
            if wrong:
                damaged.append((entry, wrong))
    for entry, wrong in damaged:
        output.print(f"{entry.path}: {wrong}", markup=False, highlight=False, soft_wrap=True)
    left = [entry for entry, _ in damaged if not (remove and entry.remove())]
    gone = f", {len(damaged) - len(left)} removed" if remove else ""
    state = f"{len(damaged)} damaged{gone}" if damaged else "all sound"
    size = human_bytes(sum(entry.bytes for entry in entries))
    output.print(f"{_count(len(entries))}, {size}: {state}", markup=False, highlight=False)
    if left:
        output.print("Each is computed again when it is asked for; --remove removes them.", markup=False)
        raise typer.Exit(1)


@cache.command()
def clear(
    folder: Folder = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Only this method's, whatever its settings.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", help="Only what was not used for this long, such as 30d or 12h.")
    ] = None,
) -> None:
    """Remove what is kept, all of it or some; what is needed again is computed again."""
    age = None if older_than is None else parse_age(older_than)
    if method is not None:
        method_class(method)
    kept = _cache(folder)
    chosen = [
        entry
        for entry in kept.entries()
        if (age is None or time.time() - entry.used > age)
        and (method is None or (_about(entry) or {}).get("name") == method)
    ]
    removed = [entry for entry in chosen if entry.remove()]
    # What killed processes left goes too, and nothing that was not asked for.
    remaining = evict(kept.folder, sys.maxsize)
    output.print(
        f"removed {_count(len(removed))}, {human_bytes(sum(entry.bytes for entry in removed))}; "
        f"{human_bytes(remaining)} left in {kept.folder}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if len(removed) < len(chosen):
        message = f"{_count(len(chosen) - len(removed))} could not be removed, or were in use."
        output.print(message, markup=False, highlight=False)
        raise typer.Exit(1)


def parse_age(text: str) -> float:
    """Return the seconds in an age such as "30d", "12h" or "2w".

    Raises:
        typer.BadParameter: it is none.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not an age: write 30d, 12h or 2w.", param_hint="--older-than")
    return float(match[1]) * _UNITS[match[2]]


def human_bytes(count: float) -> str:
    """Return a size in the largest binary unit of which there is at least one."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def human_age(seconds: float) -> str:
    """Return how long ago something was, in the largest unit of which there are at least two."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def _cache(folder: Path | None) -> FactorCache:
    place = factors_folder(folder)
    if any(path.is_file() for path in (place, place.parent)):
        raise HeadstartError(f"The cache's folder {place.parent} is a file: name another (HEADSTART_CACHE, --folder).")
    return FactorCache(place, size_limit())


def _about(entry: CachedFile) -> dict[str, Any] | None:
    """Return what an entry says of itself; None where it is damaged, or gone."""
    try:
        return dict(facts_of(entry.path)["about"])
    except (DamagedEntryError, OSError, KeyError, TypeError, ValueError):
        return None


def _table(entries: list[tuple[CachedFile, dict[str, Any] | None]]) -> Table:
    """Return a table with a row for all entries of one method, shape and rank, in the order of ``entries``."""
    rows: dict[tuple[str, ...], list[tuple[CachedFile, float]]] = defaultdict(list)
    for entry, about in entries:
        about = about or {"method": _DAMAGED}
        shape = f"{about['d_out']}x{about['d_in']}" if "d_out" in about and "d_in" in about else ""
        created = about.get("created")
        born = float(created) if isinstance(created, int | float) else entry.used
        rows[str(about.get("method", "")), shape, str(about.get("r", ""))].append((entry, born))
    table = Table(box=None, pad_edge=False)
    for title in ("method", "weight", "r", "layers", "size", "made", "last used"):
        table.add_column(title, justify="left" if title == "method" else "right")
    now = time.time()
    for (method, shape, r), group in rows.items():
        size = human_bytes(sum(entry.bytes for entry, _ in group))
        made = human_age(now - min(born for _, born in group))
        used = human_age(now - max(entry.used for entry, _ in group))
        table.add_row(method, shape, r, str(len(group)), size, made, used)
    return table


def _count(entries: int) -> str:
    return f"{entries} entr" + ("y" if entries == 1 else "ies")
