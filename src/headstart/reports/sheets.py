"""The tables of a report, free of any format: what each is called, its columns, its rows of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from headstart.reports.measured import (
    cost,
    ended,
    figures,
    other_axes,
    own_interval,
    spread,
    standings,
)
from headstart.reports.words import (
    NOTHING,
    listed,
    memory_text,
    number,
    over_what,
    p_text,
    rate_text,
    rates_text,
    seconds_text,
    with_interval,
)
from headstart.runs.measure import VALIDATION
from headstart.study.statistics import Comparison
from headstart.study.summary import WITHIN, WITHIN_LOSS, Part, Summary

_JUDGED = "judged by"


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        caption: one sentence.
        heads: the columns' titles; the first column names the rows.
        rows: of text.
        words: the places of columns of words, which are set flush left.
    """

    caption: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: frozenset[int] = field(default=frozenset({0}))


def ranking_sheet(summary: Summary, part: Part) -> Sheet:
    """Return the starts at their best rates, the best first, against the reference."""
    figure, reference = summary.first, summary.grid.reference
    columns: dict[str, list[str]] = {name: [] for name in _ranking_heads(summary)}
    rows, once = standings(summary, part), summary.rates == 1 and summary.seeds == 1
    further = {
        name: {
            other.start: with_interval(other.mean, own_interval(summary, part, other, name) if once else None)
            for other in standings(summary, part, name)
        }
        for name in summary.reported[1:]
    }
    for row in rows:
        before = spread(figures(part.at_best(row.start), "loss", "start"))
        edge = part.choices[row.start].edge
        values = {
            "start": row.start,
            "best rate": rate_text(row.rate) + (f" ({edge} edge)" if edge else ""),
            "rate": rate_text(row.rate),
            "seeds": str(row.seeds),
            "start loss": number(before.mean) if before else NOTHING,
            figure: with_interval(row.mean, own_interval(summary, part, row, figure)),
            f"difference to {reference}": _difference(row),
            _JUDGED: over_what(row.decisive) if row.decisive and row.decisive.method else NOTHING,
            "Holm p": p_text(row.p),
            "verdict": row.verdict,
            **{name: of_start.get(row.start, NOTHING) for name, of_start in further.items()},
        }
        for name, column in columns.items():
            column.append(values[name])
    for start in summary.grid.starts:
        if not any(row.start == start for row in rows):
            for name, column in columns.items():
                column.append({"start": start, "verdict": "no result yet"}.get(name, NOTHING))
    judged = {text for text in columns.get(_JUDGED, ()) if text != NOTHING}
    if len(judged) < 2:
        columns.pop(_JUDGED, None)
    direction = "more is better" if summary.better[figure] else "less is better"
    own = "" if summary.rates == 1 else ", each at its own best rate"
    caption = f"Starts by held-out {figure}{own}; {direction}; ± and brackets are 95 % intervals, not corrected; p is."
    caption += f" Differences are judged by: {judged.pop()}." if len(judged) == 1 else ""
    heads = tuple(columns)
    words = {place for place, name in enumerate(heads) if name in ("start", _JUDGED, "verdict")}
    return Sheet(caption, heads, list(zip(*columns.values(), strict=True)), frozenset(words))


def _ranking_heads(summary: Summary) -> list[str]:
    several = len(summary.grid.starts) > 1
    once = summary.rates == 1 and summary.seeds == 1
    heads = ["start", "best rate" if summary.rates > 1 else "rate"]
    heads += ["seeds"] if summary.seeds > 1 else []
    heads += ["start loss"] if once else []
    heads += [summary.first]
    if several:
        heads += [f"difference to {summary.grid.reference}", "Holm p", "verdict"]
    return heads + list(summary.reported[1:]) + ([_JUDGED] if several else [])


def _difference(row: Comparison) -> str:
    shown = row.decisive or row.over_seeds
    if shown is None:
        return row.verdict if row.verdict == "reference" else NOTHING
    return with_interval(shown.value, shown.interval, sign=True)


def cost_sheet(summary: Summary, part: Part) -> Sheet:
    """Return what each start costs at its best rate."""
    rows, together = [], False
    for row in standings(summary, part):
        own = cost(part.at_best(row.start))
        together |= own.read_together
        marks = (" (cache)" if own.cached else "") + (" (read together)" if own.read_together else "")
        rows.append(
            (
                row.start,
                f"{own.trainable:,}" if own.trainable else NOTHING,
                seconds_text(own.start) + marks,
                seconds_text(own.training),
                seconds_text(own.measurement),
                NOTHING if own.share is None else f"{100 * own.share:.2g} %",
                memory_text(own.memory),
                _reached(part, row.start, summary.grid.reference),
            )
        )
    reached = f"to {summary.grid.reference}'s loss"
    heads = (
        "start",
        "trainable",
        "start-up s",
        "training s",
        "measurement s",
        "start-up share",
        "peak memory",
        reached,
    )
    caption = (
        "What each start costs at its best rate, on average over seeds; the share is of start-up and training. Last, "
        "when it reaches the training loss that the reference ends with, start-up included."
    )
    if together:
        caption += (
            " Data that were read together were read once for all that any of these starts wants; each is charged with "
            "the whole of it, so that alone it takes no longer."
        )
    return Sheet(caption, heads, rows)


def _reached(part: Part, start: str, reference: str) -> str:
    """Return after how many steps and seconds a start has the reference's last training loss."""
    reached = part.to_reach(start, reference)
    return NOTHING if reached is None else f"{reached[0]:.0f} steps, {seconds_text(reached[1])} s"


def rates_sheet(summary: Summary) -> Sheet:
    """Return every start at every rate in every setting."""
    figure = summary.first
    validated, several = summary.validated, len(summary.parts) > 1
    rows = []
    for part in summary.parts:
        for start, by_rate in ended(part).items():
            for rate, pairs in by_rate.items():
                made = [spread(figures(pairs, name)) for name in summary.reported or (figure,)]
                chosen = spread(figures(pairs, summary.chosen_by, VALIDATION)) if validated else None
                best = start in part.choices and part.choices[start].rate == rate
                states = [result.status for _, result in pairs]
                lost = ", ".join(f"{states.count(kind)} {kind}" for kind in ("diverged", "pruned") if kind in states)
                row = (start, *((part.name,) if several else ()), rate_text(rate), "best" if best else "")
                row += (str(states.count("done")), lost)
                row += (number(chosen.mean) if chosen else NOTHING,) if validated else ()
                row += tuple(NOTHING if one is None else number(one.mean) for one in made)
                spans = made[0] is not None and made[0].count > 1
                row += (f"{number(made[0].low)} to {number(made[0].high)}" if made[0] and spans else NOTHING,)
                rows.append(row)
    heads = ("start", *(("setting",) if several else ()), "rate", "", "seeds", "lost")
    heads += (f"validation {summary.chosen_by}",) if validated else ()
    heads += (*(summary.reported or (figure,)), f"{figure}, least to greatest")
    heads = tuple("best of its start" if head == "" else head for head in heads)
    words = {place for place, head in enumerate(heads) if head in ("start", "setting", "best of its start", "lost")}
    caption = (
        "Every start at every rate: held-out figures are means over seeds; lost are those that diverged or were pruned."
    )
    return Sheet(caption, heads, rows, frozenset(words))


def robustness_sheet(summary: Summary, part: Part) -> Sheet | None:
    """Return how much each start loses beside its best rate; None of studies with one rate."""
    rows = []
    by_area = sorted(part.robustness.items(), key=lambda item: math.inf if item[1].area is None else item[1].area)
    for start, row in by_area:
        span = NOTHING if row.span is None else rates_text(row.span)
        ends = [name for name, is_open in (("below", row.open_low), ("above", row.open_high)) if is_open]
        rows.append(
            (
                start,
                rate_text(row.rate),
                span + (f" (open {' and '.join(ends)})" if ends and row.span else ""),
                NOTHING if row.span is None or row.span[0] <= 0 else f"{row.span[1] / row.span[0]:.1f}",
                number(row.area),
                number(row.area_to_best),
            )
        )
    if not rows or summary.rates == 1:
        return None
    figure = summary.first
    within = WITHIN_LOSS if figure.endswith("loss") else WITHIN
    common = next((row.common for row in part.robustness.values() if row.common), None)
    over = "" if common is None else f" Areas are over {common[0]:.3g} to {common[1]:.3g} times the best rate."
    caption = (
        f"What a start loses beside its best rate: the rates whose {figure} is within {within:g} of its best, and the "
        f"mean excess, over the logarithm of the rate, over its own best and over the best start's.{over}"
    )
    heads = (
        "start",
        "best rate",
        f"rates within {within:g}",
        "highest / lowest",
        "mean excess",
        "mean excess over the best start",
    )
    return Sheet(caption, heads, rows)


def unfinished_sheet(summary: Summary) -> Sheet | None:
    """Return the cells that failed, diverged or were given up, with why; None where there are none."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell, result in summary.cells:
        if result is not None and result.status != "done":
            reasons.setdefault((result.status, result.reason or "no reason is noted"), []).append(cell.name)
    rows = [
        (status, reason, str(len(names)), listed(names))
        for (status, reason), names in sorted(reasons.items(), key=lambda item: (item[0][0] != "failed", item[0]))
    ]
    if not rows:
        return None
    caption = "Cells that came to no figure, and why. Failed ones are tried again by the same command."
    return Sheet(caption, ("status", "reason", "cells", "which"), rows, frozenset({0, 1, 3}))


def warnings_sheet(summary: Summary) -> Sheet | None:
    """Return what cells warned of; None where nothing did."""
    said: dict[str, list[str]] = {}
    for cell, result in summary.cells:
        for warning in dict.fromkeys(result.warnings if result else ()):
            said.setdefault(warning, []).append(cell.name)
    if not said:
        return None
    rows = [(warning, str(len(names)), listed(names)) for warning, names in said.items()]
    return Sheet("What runs warned of.", ("warning", "cells", "which"), rows, frozenset({0, 2}))


def conditions(summary: Summary) -> list[tuple[str, str]]:
    """Return under which conditions the cells ran, by name."""
    base, study = summary.grid.base, summary.grid.study
    first = next((result for _, result in summary.cells if result is not None and result.environment), None)
    length = f"{base.schedule.steps:,} steps" if base.schedule.steps else f"{base.schedule.epochs or 1:g} epochs"
    # What was measured may be less than what was asked for.
    done = next((result.data for _, result in summary.cells if result is not None and result.data), {})
    counts = {
        "held out": done.get("held_out", {}).get("examples", base.data.held_out_examples),
        "for validation": done.get("validation", {}).get("examples", base.data.validation_examples),
    }
    measured = "".join(f", {count:,} {words}" for words, count in counts.items() if count)
    targets = base.adapter.targets if isinstance(base.adapter.targets, str) else ", ".join(base.adapter.targets)
    known = [
        (
            "model",
            f"{base.model.name}, {base.model.dtype}" + (f", {base.model.bits} bits" if base.model.bits < 16 else ""),
        ),
        ("task", base.data.task + (f" ({base.data.train})" if base.data.train else "") + measured),
        ("adapter", f"{base.adapter.kind}, r {base.adapter.r}, alpha {base.adapter.alpha:g}, {targets}"),
        (
            "training",
            f"{base.optimizer.name}, {base.schedule.kind}, {length}, batches of {base.batch.size}"
            + (f" × {base.batch.accumulation}" if base.batch.accumulation > 1 else "")
            + f", {base.precision}",
        ),
        ("seeds", ", ".join(map(str, study.seeds))),
        ("reference", summary.grid.reference),
        ("rates chosen by", summary.chosen_by + (" on validation data" if summary.validated else " on held-out data")),
    ]
    if varied := [axis for axis in study.axes if axis != "start"]:
        known.append(
            ("varied, beside the start", ", ".join("rate" if axis.endswith(".lr") else axis for axis in varied))
        )
    if first is not None:
        versions = first.environment.get("versions", {})
        shown = [
            f"{name} {versions[name]}" for name in ("headstart", "torch", "transformers", "peft") if name in versions
        ]
        known.append(("ran on", ", ".join([str(first.environment.get("device", "")), *shown]).strip(", ")))
    counts = summary.counted()
    order = ("done", "diverged", "pruned", "failed", "begun", "missing")
    known.append(("cells", ", ".join(f"{counts[state]:,} {state}" for state in order if state in counts)))
    return known


def cell_rows(summary: Summary) -> tuple[tuple[str, ...], list[tuple[str | float | int | None, ...]]]:
    """Return the titles and the numbers of every cell, for a file."""
    axes = other_axes(summary)
    names = tuple(dict.fromkeys(name for _, result in summary.cells if result for name in result.metrics))
    heads = ("start", *axes, "rate", "seed", "status", *names, "trainable", "start s", "training s")
    rows = []
    for cell, result in summary.cells:
        setting = dict(cell.setting)
        known = result.metrics if result else {}
        rows.append(
            (
                cell.start,
                *(setting.get(axis) for axis in axes),
                cell.rate,
                cell.seed,
                result.status if result else "missing",
                *(known[name].value if name in known else None for name in names),
                result.trainable if result else None,
                result.start.get("seconds") if result else None,
                result.seconds.get("training") if result else None,
            )
        )
    return heads, rows
