"""The answer of a study in two sentences: which start, by how much, and what it costs."""

from __future__ import annotations

import math
from collections import Counter

from headstart.reports.measured import Cost, cost, standings
from headstart.reports.words import counted, interval_text, number, over_what, p_text, rate_text, seconds_text
from headstart.study.statistics import Comparison
from headstart.study.summary import Part, Summary


def answer(summary: Summary) -> str:
    """Return two sentences: the best start against the reference; then what it costs, and what is still to come."""
    ranked = [(part, rows) for part in summary.parts if (rows := standings(summary, part))]
    if not any(math.isfinite(rows[0].mean) for _, rows in ranked):
        state = "No cell has finished yet" if not ranked else "Every start diverged at each of its rates"
        return f"{state}, so there is no answer.{_sentence(_open(summary))}"
    if len(summary.parts) > 1:
        return _over_settings(summary, ranked)
    part, rows = ranked[0]
    best = rows[0]
    clauses = [_costs(part, best.start, summary.grid.reference), _edge(part, best.start), _open(summary)]
    return _against_reference(summary, rows) + _sentence("; ".join(filter(None, clauses)))


def _against_reference(summary: Summary, rows: list[Comparison]) -> str:
    figure, reference, best = summary.first, summary.grid.reference, rows[0]
    leads = f"has the {_most(summary)}, {number(best.mean)}"
    of_reference = next((row for row in rows if row.start == reference), None)
    if len(summary.grid.starts) == 1:
        return f"The study has one start: {_at(summary, best)} has a held-out {figure} of {number(best.mean)}."
    if of_reference is None or not math.isfinite(of_reference.mean):
        state = "has no result yet" if of_reference is None else "diverged at every rate"
        return f"{_at(summary, best)} {leads}, but the reference {reference} {state}, so nothing is compared with it."
    if best.start == reference:
        others = [row for row in rows if row.over_seeds is not None]
        text = f"No start is better than the reference: {_at(summary, best)} {leads}"
        next_one = (
            f"; next is {_at(summary, others[0])}, {_gap(others[0], reference)}, {_told(others[0])}" if others else ""
        )
        return f"{text}{next_one}."
    if best.verdict == "better":
        return f"{_at(summary, best)} {leads}: {_gap(best, reference)}, {_told(best)}."
    told = next((row for row in rows if row.verdict == "better"), None)
    if told is not None:
        return (
            f"{_at(summary, best)} {leads}, but is not told apart from the reference: {_gap(best, reference)}; "
            f"{_at(summary, told)} is: {_gap(told, reference)}."
        )
    return (
        f"No start is shown to be better than the reference {reference}: {_at(summary, best)} {leads}, "
        f"{_gap(best, reference)}, {_told(best)}."
    )


def _most(summary: Summary) -> str:
    figure = summary.first
    return f"{'highest' if summary.better[figure] else 'lowest'} held-out {figure}"


def _gap(row: Comparison, reference: str) -> str:
    """Return how far a start is from the reference, with the interval and p that its verdict goes by."""
    shown = row.decisive or row.over_seeds
    if shown is None:
        return f"without a seed in common with {reference}"
    direction = "above" if shown.value > 0 else "below"
    said = []
    if shown.interval is not None:
        low, high = shown.interval
        if low > 0 or high < 0:
            low, high = sorted((abs(low), abs(high)))
            said.append(f"95 % interval {interval_text((low, high))} {direction}")
        else:
            said.append(f"95 % interval of the difference {interval_text((low, high))}")
    said += [over_what(shown)] if shown.method else []
    said += [f"p {p_text(row.p)} after Holm's correction"] if row.p is not None else []
    judged = f" ({', '.join(said)})" if said else ""
    return f"{number(abs(shown.value))} {direction} {reference}{judged}"


def _told(row: Comparison) -> str:
    if row.verdict in ("better", "worse"):
        return "and is told apart from it"
    return (
        "and is not told apart from it" if row.verdict == "not told apart" else "which one seed can't tell from chance"
    )


def _over_settings(summary: Summary, ranked: list[tuple[Part, list[Comparison]]]) -> str:
    reference = summary.grid.reference
    firsts = Counter(rows[0].start for _, rows in ranked if math.isfinite(rows[0].mean))
    start, wins = firsts.most_common(1)[0]
    better = [(part, row) for part, rows in ranked for row in rows if row.start == start and row.verdict == "better"]
    total = len(summary.parts)
    text = f"{start} has the {_most(summary)}, each start at its own best rate, in {wins} of {total} settings"
    if start != reference:
        text += f", and is told apart from the reference {reference} as better in {len(better) or 'none'}"
        if better:
            part, row = max(better, key=lambda pair: abs(pair[1].decisive.value) if pair[1].decisive else 0.0)
            text += f", most with {part.name}: {_gap(row, reference)}"
    else:
        alike = sum(not any(row.verdict == "better" for row in rows) for _, rows in ranked)
        text += f"; in {alike} of them no start is told apart from this reference as better"
    part = next(part for part, rows in ranked if rows[0].start == start)
    return f"{text}." + _sentence("; ".join(filter(None, [_costs(part, start, reference), _open(summary)])))


def _at(summary: Summary, row: Comparison) -> str:
    return f"{row.start} at {'its best rate ' if summary.rates > 1 else 'the rate '}{rate_text(row.rate)}"


def _costs(part: Part, start: str, reference: str) -> str:
    own, other = cost(part.at_best(start)), cost(part.at_best(reference))
    said = (
        [f"the start of {start} takes {_seconds(own, ' of the time of start and training')}"]
        if own.start is not None
        else []
    )
    if said and start != reference and other.start is not None:
        said.append(f"that of {reference} {_seconds(other)}")
    if own.trainable and other.trainable and own.trainable != other.trainable:
        said.append(f"{start} trains {own.trainable:,} parameters and {reference} {other.trainable:,}")
    return ", ".join(said)


def _seconds(own: Cost, of_what: str = "") -> str:
    share = "" if own.share is None else f" ({100 * own.share:.2g} %{of_what})"
    return f"{seconds_text(own.start)} s{share}"


def _edge(part: Part, start: str) -> str:
    edge = part.choices[start].edge
    return f"the best rate of {start} is the {edge}est that was tried, so a better one may lie beyond" if edge else ""


def _open(summary: Summary) -> str:
    counts = summary.counted()
    said = []
    for status, verb in (("missing", "unfinished"), ("failed", "marked failed")):
        if count := counts.get(status, 0):
            said.append(f"{count:,} {'is' if count == 1 else 'are'} {verb}")
    return f"of {counted(len(summary.cells), 'cell')} {' and '.join(said)}, so this may change" if said else ""


def _sentence(text: str) -> str:
    return f" {text[0].upper()}{text[1:]}." if text else ""
