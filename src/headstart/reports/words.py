"""Numbers as reports write them."""

from __future__ import annotations

import math

from headstart.study.differences import Difference, Interval

NOTHING = "-"


def number(value: float | None) -> str:
    """Return a figure: four decimals, or four digits of a large one."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "diverged"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return f"{'+' if value > 0 else ''}{number(value)}"


def rate_text(rate: float) -> str:
    """Return a rate as papers write it: 2e-4."""
    if rate >= 0.01:
        return f"{rate:.3g}"
    digits, _, exponent = f"{rate:.2e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def rates_text(span: Interval) -> str:
    """Return a span of rates."""
    return f"{rate_text(span[0])} to {rate_text(span[1])}"


def interval_text(interval: Interval | None) -> str:
    """Return an interval, or nothing where there is none."""
    return "" if interval is None else f"{number(interval[0])} to {number(interval[1])}"


def with_interval(value: float, interval: Interval | None, *, sign: bool = False) -> str:
    """Return a number with its interval: ± where that is symmetric, else both ends."""
    text = signed(value) if sign else number(value)
    if interval is None or not math.isfinite(value):
        return text
    low, high = interval
    if math.isclose(high - value, value - low, rel_tol=1e-3, abs_tol=1e-9):
        return f"{text} ± {number((high - low) / 2)}"
    return f"{text} ({signed(low)} to {signed(high)})" if sign else f"{text} ({number(low)} to {number(high)})"


def p_text(p: float | None) -> str:
    """Return a p-value."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def over_what(difference: Difference) -> str:
    """Return of what a difference is the mean, and by which test it is judged."""
    tests = {
        "t": "paired t over {} seeds",
        "sign": "equal signs of {} seeds",
        "McNemar": "McNemar's test over {} items",
        "bootstrap": "bootstrap over {} items",
    }
    return tests.get(difference.method, "one pair").format(f"{difference.count:,}")


def seconds_text(seconds: float | None) -> str:
    """Return seconds with as many digits as mean something."""
    if seconds is None:
        return NOTHING
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


def memory_text(size: float | None) -> str:
    """Return bytes as GiB or MiB."""
    if not size:
        return NOTHING
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def counted(count: int, one: str, several: str | None = None) -> str:
    """Return how many there are of something, in words."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def shortened(text: str, most: int = 60) -> str:
    """Return a text that fits where there is little room."""
    return text if len(text) <= most else text[: most - 1] + "…"


def listed(names: list[str], most: int = 4) -> str:
    """Return the first few names, and how many more there are."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most:,} more"
