"""Measured exponents beside predicted ones, and which of the paper's claims hold, decided by their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from headstart.dynamics.theory import BOTH, LARGE, NOTHING, ZERO_A, ZERO_B, Exponents, Scheme, predicted
from headstart.dynamics.widths import Measured, Settings, Slope
from headstart.reports.charts.chart import Chart, axis, curve, layout
from headstart.reports.colours import look
from headstart.reports.findings import Findings
from headstart.reports.sheets import Sheet
from headstart.reports.words import NOTHING as NO_NUMBER
from headstart.reports.words import counted

NAMES = {"z_a": "Z_A", "z_b": "Z_B", "delta1": "delta1", "delta2": "delta2", "delta3": "delta3", "loss": "loss change"}
# How far from a claimed exponent a measured one may lie at finite widths, where lower powers still count.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Claim:
    """What the paper says of a start at a rate.

    Attributes:
        words: the claim, with its place.
        start, optimizer, rate: of which scheme; the rate is A's exponent.
        exponents: by quantity, as the paper has them.
        holds: whether it says that they are so, or that they are not all so.
    """

    words: str
    start: str
    optimizer: str
    rate: float
    exponents: dict[str, float]
    holds: bool = True


CLAIMS = (
    Claim("Init[A] is stable (Table 1)", ZERO_B, "adam", -0.5, {"z_b": 0.0}),
    Claim("Init[A] is efficient (Table 1)", ZERO_B, "adam", -0.5, {"delta1": 0.0, "delta2": 0.0}),
    Claim("Init[B] is stable at a rate of n^-1 (note 7)", ZERO_A, "adam", -1.0, {"z_b": 0.0}),
    Claim("Init[B] is not efficient there (Table 1)", ZERO_A, "adam", -1.0, {"delta1": 0.0, "delta2": 0.0}, False),
    Claim("Init[B] is not stable at a rate of n^(-1/2) (note 7)", ZERO_A, "adam", -0.5, {"z_b": 0.0}, False),
    Claim("Init[AB] is stable (Table 1)", BOTH, "adam", -0.5, {"z_b": 0.0}),
    Claim("Init[AB] is efficient (Table 1)", BOTH, "adam", -0.5, {"delta1": 0.0, "delta2": 0.0}),
    Claim("Init[A] falls twice as fast as the rate in delta1 (3.3)", ZERO_B, "adam", -0.75, {"delta1": -0.5}),
    *(
        claim
        for start, said in ((BOTH, ""), (LARGE, ", A as large as aligned sums take it for"))
        for claim in (
            Claim(f"Init[AB] is robust in delta1 (Theorem 1){said}", start, "adam", -0.75, {"delta1": -0.25}),
            Claim(f"Init[AB] is robust in delta2 (Theorem 1){said}", start, "adam", -0.75, {"delta2": -0.25}),
            Claim(f"Init[AB] is robust in Z_B (Theorem 1){said}", start, "adam", -0.75, {"z_b": 0.0}),
        )
    ),
    Claim("LoRA+ makes Init[B] stable (B.2)", ZERO_A, "lora+", -1.0, {"z_b": 0.0}),
    Claim("LoRA+ makes Init[B] efficient (B.2)", ZERO_A, "lora+", -1.0, {"delta1": 0.0, "delta2": 0.0}),
    Claim(
        "With SGD, Init[A] is not efficient (appendix C)", ZERO_B, "sgd", -0.5, {"delta1": 0.0, "delta2": 0.0}, False
    ),
    Claim(
        "With SGD, a of n^(-3/4) and b of n^(-1/4) are robust (equation 31)",
        "a, b of equation 30",
        "sgd",
        -0.75,
        {"delta1": -0.25, "delta2": -0.25, "z_b": 0.0},
    ),
    Claim(
        "The same, a drawn as large as aligned sums take it for",
        "a drawn as large as equation 30 means",
        "sgd",
        -0.75,
        {"delta1": -0.25, "delta2": -0.25, "z_b": 0.0},
    ),
)


def findings(made: Sequence[Measured], settings: Settings) -> Findings:
    """Return the report of these schemes."""
    claims = claims_sheet(made)
    sections: list[tuple[str, Sequence[Chart], Sequence[Sheet]]] = [("Claims", (), (claims,))] if claims.rows else []
    sections.append(("Measured beside predicted", (), (exponents_sheet(made, settings),)))
    sections.append(("Over widths", charts(made, settings), ()))
    subject = ", ".join(dict.fromkeys(one.scheme.name for one in made))
    title = "Exponents of low-rank training over widths"
    return Findings(title, subject, answer(made, settings), sections, _conditions(made, settings), _NOTES)


def answer(made: Sequence[Measured], settings: Settings) -> str:
    """Return what the tables say, in three sentences."""
    verdicts = [verdict for one in made for _, _, _, _, verdict in _compared(one, settings)]
    random, aligned, both = (verdicts.count(word) for word in ("drawn", "aligned", "either"))
    said = (
        f"Of {len(verdicts)} measured exponents {random + both} lie within {TOLERANCE} of what theory gives where sums "
        f"of drawn numbers cancel, and {aligned + both} of what it gives where all sums are bounded as if aligned, as "
        f"the paper has it; {verdicts.count('neither')} lie at neither."
    )
    rows = claims_sheet(made).rows
    if not rows:
        return said
    holding = sum(row[-1] == "holds" for row in rows)
    failing = [row[0] for row in rows if row[-1] == "fails"]
    said += f" Of {len(rows)} claims {holding} hold"
    return said + (f"; these fail: {'; '.join(failing)}." if failing else ".")


def claims_sheet(made: Sequence[Measured]) -> Sheet:
    """Return each claim with the exponents that decide it."""
    by_scheme = {(one.scheme.name, one.scheme.optimizer, one.scheme.rate_a): one for one in made}
    rows = []
    for claim in CLAIMS:
        one = by_scheme.get((claim.start, claim.optimizer, claim.rate))
        if one is None:
            continue
        slopes = {name: one.slopes[name] for name in claim.exponents}
        said = ", ".join(f"{NAMES[name]} {_power(exponent)}" for name, exponent in claim.exponents.items())
        shown = ", ".join(f"{NAMES[name]} {_slope_text(slope)}" for name, slope in slopes.items())
        said = said if claim.holds else f"not: {said}"
        rows.append((claim.words, said, shown, verdict(slopes, claim)))
    caption = (
        f"Exponents are the claimed ones where every interval lies within {TOLERANCE} of them, are not where one lies "
        "wholly outside, and are undecided else."
    )
    return Sheet(caption, ("claim", "claimed", "measured", "verdict"), rows, frozenset({0, 1, 2, 3}))


def verdict(slopes: dict[str, Slope | None], claim: Claim) -> str:
    """Return what measured exponents say of a claim: "holds", "fails" or "undecided"."""
    undecided = False
    for name, exponent in claim.exponents.items():
        slope = slopes[name]
        if slope is None or slope.low > exponent + TOLERANCE or slope.high < exponent - TOLERANCE:
            return "fails" if claim.holds else "holds"
        undecided |= slope.low < exponent - TOLERANCE or slope.high > exponent + TOLERANCE
    if undecided:
        return "undecided"
    return "holds" if claim.holds else "fails"


def exponents_sheet(made: Sequence[Measured], settings: Settings) -> Sheet:
    """Return every measured exponent with both predictions."""
    rows = []
    for one in made:
        for name, paper, drawn, slope, near in _compared(one, settings):
            scheme = _own(one)
            rows.append(
                (
                    scheme.name,
                    scheme.optimizer,
                    _power(scheme.rate_a)
                    if scheme.rate_a == scheme.rate_b
                    else f"{_power(scheme.rate_a)}, {_power(scheme.rate_b)}",
                    NAMES[name],
                    _power(paper),
                    _power(drawn),
                    _slope_text(slope),
                    near,
                )
            )
    caption = (
        "Exponents of n, with 95 % t intervals over seeds. Predicted by the paper's rules, which bound every sum over "
        "n as if its terms were aligned, and with sums of drawn numbers growing by 1/2 less; the last column says at "
        f"which the measured one lies, within {TOLERANCE}."
    )
    heads = ("start", "optimizer", "rate", "quantity", "aligned", "drawn sums cancel", "measured", "lies at")
    return Sheet(caption, heads, rows, frozenset({0, 1, 2, 3, 7}))


def charts(made: Sequence[Measured], settings: Settings) -> list[Chart]:
    """Return a chart for each quantity: its size over widths, relative to the smallest, at the middle rate."""
    optimizer = made[0].scheme.optimizer
    rates = sorted({one.scheme.rate_a for one in made if one.scheme.optimizer == optimizer})
    rate = rates[len(rates) // 2]
    shown = [one for one in made if (one.scheme.optimizer, one.scheme.rate_a) == (optimizer, rate)]
    drawn = []
    for name in ("z_b", "delta1", "delta2", "loss"):
        traces, rows = [], []
        for place, one in enumerate(shown):
            slope = one.slopes[name]
            if slope is None:
                continue
            sizes = [point / slope.points[0] for point in slope.points]
            traces.append(curve(one.scheme.name, settings.widths, sizes, look(place)))
            rows += [(one.scheme.name, n, size) for n, size in zip(settings.widths, sizes, strict=True)]
        if not traces:
            continue
        shape = layout("width", f"{NAMES[name]} relative to the smallest width", xaxis=axis("width", type="log"))
        shape["yaxis"] = axis(f"{NAMES[name]}, relative", type="log")
        caption = f"With {optimizer}, at rates of n^{rate:g} for A; geometric means over seeds."
        caption += " A level line is an exponent of 0."
        heads = ("start", "width", "relative size")
        title = f"{NAMES[name]} over widths"
        drawn.append(Chart(f"over-{name}", "widths", title, caption, {"data": traces, "layout": shape}, heads, rows))
    return drawn


def as_plain(made: Sequence[Measured], settings: Settings) -> list[dict[str, Any]]:
    """Return everything as plain types."""
    return [
        {
            "start": one.scheme.name,
            "optimizer": one.scheme.optimizer,
            "rate_a": one.scheme.rate_a,
            "rate_b": one.scheme.rate_b,
            "quantity": name,
            "aligned": None if paper == NOTHING else paper,
            "drawn": None if drawn == NOTHING else drawn,
            "measured": None if slope is None else slope.value,
            "interval": None if slope is None else [slope.low, slope.high],
            "sizes": None if slope is None else list(slope.points),
        }
        for one in made
        for name, paper, drawn, slope, _ in _compared(one, settings)
    ]


def _compared(one: Measured, settings: Settings) -> list[tuple[str, float, float, Slope | None, str]]:
    """Return by quantity both predictions, what was measured, and at which prediction it lies."""
    scheme = _own(one)
    paper, drawn = (predicted(scheme, settings.steps, aligned=aligned) for aligned in (True, False))
    rows = []
    for field in fields(Exponents):
        slope, both = one.slopes[field.name], (getattr(drawn, field.name), getattr(paper, field.name))
        near = [slope is not None and abs(slope.value - exponent) <= TOLERANCE for exponent in both]
        words = {(True, True): "either", (True, False): "drawn", (False, True): "aligned", (False, False): "neither"}
        lies = "no power" if slope is None else words[near[0], near[1]]
        rows.append((field.name, both[1], both[0], slope, lies))
    return rows


def _own(one: Measured) -> Scheme:
    """Return the scheme, of a start that the verb made with the sizes that its entries were measured to have."""
    if not math.isnan(one.scheme.a):
        return one.scheme
    sizes = [NOTHING if slope is None else slope.value for slope in one.start]
    return replace(one.scheme, a=sizes[0], b=sizes[1])


def _power(exponent: float) -> str:
    return "0 at all widths" if exponent == NOTHING else f"{exponent:.2f}"


def _slope_text(slope: Slope | None) -> str:
    return NO_NUMBER if slope is None else f"{slope.value:.2f} ± {(slope.high - slope.low) / 2:.2f}"


def _conditions(made: Sequence[Measured], settings: Settings) -> list[tuple[str, str]]:
    by_verb = any(math.isnan(one.scheme.a) for one in made)
    frozen = "W_0 z, W_0 of entries of n^(-1/2)" if by_verb else "drawn with entries of order 1, as W_0 z has"
    return [
        ("model", f"mean(w relu(u_0 + B A z)) on one data point, u_0 {frozen}; of one output b'A x (appendix C)"),
        ("widths", ", ".join(f"{width:,}" for width in settings.widths)),
        ("rank, step", f"{settings.rank}; measured at step {settings.steps}"),
        ("constants", f"rates {settings.rate:g}, sizes {settings.size:g} times their powers of n"),
        ("seeds", counted(settings.seeds, "seed")),
    ]


_NOTES = (
    "The theory bounds a sum over n terms by n times their size, as if all had one sign (lemma 2). A trained A is so: "
    "its gradient points along z. A drawn A0 is not: A0 z grows by 1/2 less. So Kaiming's A, of entries n^(-1/2), acts "
    "like an aligned one of n^-1, which is the number that the paper itself gives it.",
    "A drawn B0 sends a gradient back to A that has next to nothing to do with the loss at any one output: what it "
    "adds to the output moves the loss by 1/2 less than its size.",
    "Finite widths mix powers: where two of them lie close, the fitted exponent lies between or a little beyond.",
)
