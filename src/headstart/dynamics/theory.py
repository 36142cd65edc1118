"""What "Beyond Zero Initialization" predicts of a low-rank layer of growing width, as exponents.

gamma[v] is the exponent of v's growth with the width n. Products over n are bounded as if their terms were aligned:
gamma[A z] = gamma[A] + 1 (lemma 2). That is what a trained matrix does, whose gradient points along z; the sum of a
freshly drawn one grows by 1/2 less, as its terms cancel. Both predictions are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from headstart.errors import RunError

NOTHING = -math.inf


@dataclass(frozen=True)
class Scheme:
    """How a start and its rates scale with the width.

    Attributes:
        name: of the start.
        a, b: exponents of the entries of A0 and B0; minus infinity for zero.
        rate_a, rate_b: exponents of the rates of A and B.
        optimizer: "adam", whose steps are of order 1 whatever the gradient; "lora+", the same with two rates; or "sgd".
        outputs: how many the layer has: n, or one as in appendix C's model of SGD.
    """

    name: str
    a: float
    b: float
    rate_a: float
    rate_b: float
    optimizer: str = "adam"
    outputs: Literal["n", "one"] = "n"


@dataclass(frozen=True)
class Exponents:
    """Of the quantities of :class:`headstart.monitor.Quantities` at one step, and of the loss's change by then."""

    z_a: float
    z_b: float
    delta1: float
    delta2: float
    delta3: float
    loss: float


def predicted(scheme: Scheme, steps: int, *, aligned: bool) -> Exponents:
    """Return the exponents at step ``steps``, 2 or more.

    With Adam these are equation 4's: max(gamma[B0], gamma[eta_B]) + gamma[eta_A] + 1 for delta1, and so on. With SGD,
    appendix C's for f = b a'x, in which a step of a is b x and one of b is a'x (equations 23 to 26); of n outputs whose
    mean is the model's, a gradient sent back to each is smaller by n.

    Args:
        scheme: start and rates.
        steps: the step at which they are, with what was trained in those before it.
        aligned: whether products of what was drawn grow as if their terms were aligned, as the paper has it.
    """
    fresh = 1.0 if aligned else 0.5
    trained_a = trained_b = NOTHING
    z_a = z_b = delta1 = delta2 = delta3 = NOTHING
    moved = NOTHING
    # A drawn B0 is at right angles to the gradient that n outputs send back, but for a part of n^(-1/2).
    astray = 0.0 if aligned or scheme.outputs == "one" else 0.5
    for _ in range(steps):
        B = max(scheme.b, trained_b)
        z_a = max(scheme.a + fresh, trained_a + 1)
        z_b = B + z_a
        step_a, step_b = _steps(scheme, max(scheme.b - astray, trained_b), z_a)
        delta1, delta2, delta3 = B + step_a + 1, step_b + z_a, step_a + 1 + step_b
        moved = max(moved, scheme.b + step_a + 1 - astray, trained_b + step_a + 1, delta2, delta3)
        trained_a, trained_b = max(trained_a, step_a), max(trained_b, step_b)
    return Exponents(z_a, z_b, delta1, delta2, delta3, moved)


def _steps(scheme: Scheme, sent: float, z_a: float) -> tuple[float, float]:
    """Return the exponents of a step of A, to which B sends so much back, and of one of B; nothing makes no step."""
    if scheme.optimizer == "sgd":
        return scheme.rate_a + sent, scheme.rate_b + z_a - (0 if scheme.outputs == "one" else 1)
    return (scheme.rate_a if sent > NOTHING else NOTHING), (scheme.rate_b if z_a > NOTHING else NOTHING)


def init(name: str, a: float, b: float, rate: float, optimizer: str = "adam") -> Scheme:
    """Return a scheme of one rate for both factors; with SGD, of appendix C's model."""
    return Scheme(name, a, b, rate, rate, optimizer, "one" if optimizer == "sgd" else "n")


def parsed(text: str, optimizer: str) -> Scheme:
    """Return the scheme of a text: the exponents of A0, B0 (or "zero") and the rate, and of B's own rate where given.

    Raises:
        RunError: it is none.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        a, b = (NOTHING if part == "zero" else float(part) for part in parts[:2])
        rate_a, rate_b = float(parts[2]), float(parts[-1])
    except (ValueError, IndexError):
        a = b = rate_a = rate_b = math.nan
    if not 3 <= len(parts) <= 4 or any(math.isnan(part) for part in (a, b, rate_a, rate_b)) or a == b == NOTHING:
        raise RunError(
            f"{text!r} is no scheme: give the exponents of A0, B0 (or zero, for one of them) and the rate, and B's own "
            "rate where it has one, such as -0.5,zero,-0.75."
        )
    words = [
        f"{name} = 0" if part == "zero" else f"{name} of n^{part}" for name, part in zip("AB", parts, strict=False)
    ]
    return Scheme(", ".join(words), a, b, rate_a, rate_b, optimizer, "one" if optimizer == "sgd" else "n")


def of_start(name: str, rate: float, optimizer: str) -> Scheme:
    """Return the scheme of a start whose sizes its own entries will tell, at A's rate; LoRA+'s of B is n times that."""
    return Scheme(name, math.nan, math.nan, rate, rate + (1 if optimizer == "lora+" else 0), optimizer)


# By the paper's sizes: Kaiming's A has entries of order n^(-1/2), and its B, whose inputs are r, of order 1.
ZERO_B, ZERO_A, BOTH, LARGE = "Init[A]", "Init[B]", "Init[AB]", "Init[AB], A of order 1"
STARTS = {ZERO_B: (-0.5, NOTHING), ZERO_A: (NOTHING, 0.0), BOTH: (-0.5, -0.5), LARGE: (0.0, -0.5)}
# The efficient rate of equation 6, and two below it, for section 3.3.
RATES = (-0.5, -0.75, -1.0)


def schemes() -> list[Scheme]:
    """Return what the table has: Table 1's starts with Adam at three rates, LoRA+'s rates, and appendix C's SGD."""
    made = [init(name, a, b, rate) for name, (a, b) in STARTS.items() for rate in RATES]
    made += [Scheme(name, *STARTS[name], -1.0, 0.0, "lora+") for name in (ZERO_B, ZERO_A)]
    made.append(Scheme("A of order n^(-1/2), B of order 1", -0.5, 0.0, -1.0, 0.0, "lora+"))
    # Of b a'x, a drawn a has to be of order n^(-1/4) for a'x to be what an aligned one of n^(-3/4) makes it.
    sgd = {ZERO_B: (-0.5, NOTHING), ZERO_A: (NOTHING, 0.0), "a, b of equation 30": (-0.75, -0.25)}
    sgd["a drawn as large as equation 30 means"] = (-0.25, -0.25)
    made += [init(name, a, b, rate, "sgd") for name, (a, b) in sgd.items() for rate in (-0.5, -0.75)]
    return made
