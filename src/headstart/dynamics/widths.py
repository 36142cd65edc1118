"""Low-rank layers of many widths, trained for a few steps; the exponents of what they do, fitted over the widths.

The layer has inputs z with entries of order 1 and an output u = u_0 + B A z, whose frozen part u_0 = W_0 z is drawn
with entries of order 1 itself: no matrix of n by n is ever made, so that n may be a million. With Adam the loss is that
of f = mean(w relu(u)) on one data point, as in the paper's section 3.1; with SGD the model is appendix C's f = b'A x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Protocol

import torch
from torch import Tensor

from headstart.dynamics.theory import NOTHING, Exponents, Scheme
from headstart.errors import RunError
from headstart.evaluation.intervals import CONFIDENCE
from headstart.linalg.precision import full_precision, one_thread_each
from headstart.monitor.quantities import quantities
from headstart.progress import Show, silent

# Of a scheme, a width and a generator: the layer, A0 and B0.
Maker = Callable[[Scheme, int, torch.Generator], tuple["Layer", Tensor, Tensor]]
# Adam's: far below any gradient here, so that steps are of order 1 at all widths.
_EPSILON = 1e-30


@dataclass(frozen=True)
class Settings:
    """What the table depends on.

    Attributes:
        widths: n, ascending, three or more.
        rank: r of the layer, also of appendix C's model, which has 1 in the paper.
        steps: the step that is measured; 2 or more, as the paper's definitions have t > 1.
        rate, size: the constants before the powers of n, of rates and of starts.
        seeds: repetitions.
    """

    widths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    rank: int = 8
    steps: int = 4
    rate: float = 0.1
    size: float = 1.0
    seeds: int = 20

    def __post_init__(self) -> None:
        if len(set(self.widths)) < 3 or min(self.widths) < max(2, self.rank):
            raise RunError(f"widths must be three or more numbers of at least the rank {self.rank}.")
        if self.rank < 1 or self.seeds < 2:
            raise RunError("rank must be at least 1, and seeds 2, or slopes have no interval.")
        if self.steps < 2:
            raise RunError("steps must be at least 2: at the first one a B of zero has taught A nothing.")
        if not (0 < self.rate < math.inf and 0 < self.size < math.inf):
            raise RunError("rate and size must be positive.")


@dataclass(frozen=True)
class Slope:
    """A fitted exponent.

    Attributes:
        value: the mean over seeds of the least-squares slope of the logarithms.
        low, high: its 95 % t interval over seeds.
        points: the geometric mean over seeds at each width.
    """

    value: float
    low: float
    high: float
    points: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """A scheme's exponents.

    Attributes:
        scheme: what was trained.
        slopes: by the names of :class:`headstart.dynamics.theory.Exponents`; None where the quantity is zero, or
            diverged at some width.
        start: of the entries of A0 and B0, root mean square.
    """

    scheme: Scheme
    slopes: dict[str, Slope | None]
    start: tuple[Slope | None, Slope | None]


def measure_all(
    schemes: Sequence[Scheme], settings: Settings, maker: Maker | None = None, show: Show = silent
) -> list[Measured]:
    """Return each scheme's exponents; ``maker`` makes layers and starts in the place of the schemes' own."""
    made = []
    with full_precision():
        for done, scheme in enumerate(schemes, 1):
            made.append(measured(scheme, settings, maker))
            show("schemes", done, len(schemes))
    return made


def measured(scheme: Scheme, settings: Settings, maker: Maker | None = None) -> Measured:
    """Return a scheme's exponents, fitted over the widths."""
    make = gaussian(settings) if maker is None else maker
    seeds: list[list[Trained]] = []
    for seed in range(settings.seeds):
        # One after the other: the verb, which may make them, changes what is set for the whole process.
        made = [(width, *make(scheme, width, _generator(width, seed))) for width in settings.widths]
        seeds.append(one_thread_each(lambda one: trained(scheme, settings, *one), made))

    def slope(value: Callable[[Trained], float]) -> Slope | None:
        return fitted(settings.widths, [[value(cell) for cell in cells] for cells in seeds])

    names = [field.name for field in fields(Exponents)]
    slopes = {name: slope(lambda cell, name=name: float(getattr(cell.sizes, name))) for name in names}  # type: ignore[misc]
    return Measured(scheme, slopes, (slope(lambda cell: cell.size_a), slope(lambda cell: cell.size_b)))


@dataclass(frozen=True)
class Trained:
    """One layer after its steps.

    Attributes:
        sizes: of its quantities at the last step; ``loss`` is how far the loss has moved by then.
        size_a, size_b: root mean squares of the entries of A0 and B0.
    """

    sizes: Exponents
    size_a: float
    size_b: float


def trained(scheme: Scheme, settings: Settings, width: int, layer: Layer, A: Tensor, B: Tensor) -> Trained:
    """Return what a scheme's layer of one width did; A and B are trained in place."""
    start = A.clone(), B.clone()
    # Of b'A x the r parts of a gradient step add up.
    constant = settings.rate / (settings.rank if scheme.outputs == "one" else 1)
    rates = constant * width**scheme.rate_a, constant * width**scheme.rate_b
    optimizer = _Sgd(rates) if scheme.optimizer == "sgd" else _Adam(rates)
    first = layer.loss(A, B)
    for _ in range(settings.steps - 1):
        optimizer.step_((A, B), layer.gradients(A, B))
    before = A.clone(), B.clone()
    optimizer.step_((A, B), layer.gradients(A, B))
    last = quantities(layer.z[None], start, before, (A, B), 1.0)
    moved = abs(layer.loss(A, B) - first)
    sizes = Exponents(last.z_a, last.z_b, last.delta1, last.delta2, last.delta3, moved)
    return Trained(sizes, *(float(part.square().mean().sqrt()) for part in start))


def _generator(width: int, seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(1_000_003 * seed + width)


def fitted(widths: Sequence[int], curves: Sequence[Sequence[float]]) -> Slope | None:
    """Return the exponent of curves over widths, one a seed; None where a value is zero or not finite."""
    if any(not 0 < value < math.inf for curve in curves for value in curve):
        return None
    across = [math.log(width) for width in widths]
    middle = fmean(across)
    spread = sum((x - middle) ** 2 for x in across)
    slopes = [
        sum((x - middle) * math.log(value) for x, value in zip(across, curve, strict=True)) / spread for curve in curves
    ]
    half = 0.0
    if len(slopes) > 1:
        from scipy.stats import t

        half = float(t.ppf((1 + CONFIDENCE) / 2, len(slopes) - 1)) * stdev(slopes) / math.sqrt(len(slopes))
    value = fmean(slopes)
    points = tuple(math.exp(fmean(math.log(curve[place]) for curve in curves)) for place in range(len(widths)))
    return Slope(value, value - half, value + half, points)


def gaussian(settings: Settings) -> Maker:
    """Return what makes layers with drawn starts: entries normal, of the scheme's sizes."""

    def make(scheme: Scheme, width: int, generator: torch.Generator) -> tuple[Layer, Tensor, Tensor]:
        def part(exponent: float, *shape: int) -> Tensor:
            normal = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            return normal * (settings.size * width**exponent if exponent > NOTHING else 0.0)

        z, base, out = torch.randn(3, width, generator=generator, dtype=torch.float64, device="cpu")
        layer: Layer = Scalar(z) if scheme.outputs == "one" else Wide(z, base, out)
        d_out = 1 if scheme.outputs == "one" else width
        return layer, part(scheme.a, settings.rank, width), part(scheme.b, d_out, settings.rank)

    return make


class Layer(Protocol):
    """A low-rank layer within a model of one data point.

    Attributes:
        z: its inputs (n,).
    """

    z: Tensor

    def loss(self, A: Tensor, B: Tensor) -> float:
        """Return the model's loss."""
        ...

    def gradients(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss's gradients for A and B."""
        ...


class Wide:
    """f = mean(w relu(u_0 + B A z)), with half the squared error to y = 1.

    Args:
        z: (n,) inputs.
        base: (n,) u_0.
        out: (n,) w.
    """

    def __init__(self, z: Tensor, base: Tensor, out: Tensor) -> None:
        self.z, self._base, self._out = z, base, out

    def loss(self, A: Tensor, B: Tensor) -> float:
        """Return the loss."""
        return float(self._error(self._hidden(A, B)) ** 2 / 2)

    def gradients(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients for A and B."""
        hidden = self._hidden(A, B)
        back = self._error(hidden) * self._out * (hidden > 0) / len(self._out)
        return torch.outer(B.mT @ back, self.z), torch.outer(back, A @ self.z)

    def _hidden(self, A: Tensor, B: Tensor) -> Tensor:
        return self._base + B @ (A @ self.z)

    def _error(self, hidden: Tensor) -> Tensor:
        return (self._out * hidden.relu()).mean() - 1


class Scalar:
    """f = b'A x (appendix C, equation 22), with half the squared error to y = 1.

    Args:
        z: (n,) x.
    """

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def loss(self, A: Tensor, B: Tensor) -> float:
        """Return the loss."""
        return float((B @ (A @ self.z) - 1) ** 2 / 2)

    def gradients(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients for A and B (equation 23)."""
        error = B @ (A @ self.z) - 1
        return torch.outer(B.mT @ error, self.z), torch.outer(error, A @ self.z)


class _Sgd:
    def __init__(self, rates: tuple[float, float]) -> None:
        self._rates = rates

    def step_(self, factors: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]) -> None:
        for factor, gradient, rate in zip(factors, gradients, self._rates, strict=True):
            factor -= rate * gradient


class _Adam:
    """torch's Adam with a rate for each factor, of which gradients of zero make no step."""

    def __init__(self, rates: tuple[float, float]) -> None:
        self._rates = rates
        self._optimizer: torch.optim.Adam | None = None

    def step_(self, factors: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]) -> None:
        if self._optimizer is None:
            groups = [{"params": [part], "lr": rate} for part, rate in zip(factors, self._rates, strict=True)]
            self._optimizer = torch.optim.Adam(groups, eps=_EPSILON)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient
        self._optimizer.step()
