"""Grids of learning rates: given as numbers, or as multiples of the rate of the run that a study varies."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from headstart.errors import RunError

_RELATIVE = re.compile(r"^(?P<start>.+?)\s*[×*]\s*(?P<factors>\{.*\}|\S+)$", re.DOTALL)
_GAP = {"…", "..."}
# Rates that differ by less are one: 1/3 of 3e-4 is 1e-4.
_DIGITS = 6


def rates_of(value: object, base: float, reference: str) -> tuple[float, ...]:
    """Return a grid in ascending order.

    Args:
        value: a rate; several; or, as text, multiples of ``base``: ``lora × 1/4``, ``lora × {1/16 … 2}`` (doubling
            from one to the next) or ``lora × {1/9, 1/3 … 3}`` (by the step that is shown).
        base: the rate of the study's base run, which is its reference's.
        reference: the start that relative rates name.

    Raises:
        RunError: it is none of these; a rate is no positive number.
    """
    parts = value if isinstance(value, list | tuple) else [value]
    rates = {_rounded(rate) for part in parts for rate in _rates(part, base, reference)}
    if not rates:
        raise RunError("the study has no rates: write some, as in optimizer.lr: [1e-4, 3e-4].")
    return tuple(sorted(rates))


def beyond(rates: Sequence[float], edge: str) -> float:
    """Return the rate that goes on with a grid where its best lies at an edge, "low" or "high", by the grid's step."""
    step = rates[1] / rates[0] if edge == "low" else rates[-1] / rates[-2]
    return _rounded(rates[0] / step if edge == "low" else rates[-1] * step)


def _rates(part: object, base: float, reference: str) -> list[float]:
    if isinstance(part, str) and (relative := _RELATIVE.match(part.strip())):
        if relative["start"] != reference:
            raise RunError(f"{part!r}: rates are relative to the reference, {reference!r}: write {reference} × ….")
        return [base * factor for factor in _factors(relative["factors"].strip("{} "), part)]
    try:
        rate = float(part)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        rate = math.nan
    if isinstance(part, bool) or not (math.isfinite(rate) and rate > 0):
        raise RunError(f"{part!r} is no rate: write a positive number, or, as in {reference} × {{1/4 … 2}}, multiples.")
    return [rate]


def _factors(text: str, part: str) -> list[float]:
    words = [word for word in re.split(r"[,\s]+", re.sub(r"…|\.\.\.", " … ", text)) if word]
    factors: list[float] = []
    for place, word in enumerate(words):
        if word not in _GAP:
            factors.append(_number(word, part))
            continue
        if not factors or place + 1 == len(words):
            raise RunError(f"{part!r}: … stands between two numbers.")
        last = _number(words[place + 1], part)
        step = factors[-1] / factors[-2] if len(factors) > 1 else math.copysign(2.0, 1)
        if (step > 1) != (last > factors[-1]):
            step = 1 / step
        count = math.log(last / factors[-1]) / math.log(step) if step != 1 else math.inf
        if not math.isclose(count, round(count), abs_tol=1e-6):
            raise RunError(f"{part!r}: from {factors[-1]:g} no steps of × {step:g} lead to {last:g}.")
        factors += [factors[-1] * step ** (number + 1) for number in range(round(count) - 1)]
    return factors


def _number(word: str, part: str) -> float:
    try:
        number = float(Fraction(word))
    except (ValueError, ZeroDivisionError):
        number = 0.0
    if not (math.isfinite(number) and number > 0):
        raise RunError(f"{part!r}: {word!r} is no positive number or fraction.")
    return number


def _rounded(rate: float) -> float:
    return float(f"{rate:.{_DIGITS}g}")
