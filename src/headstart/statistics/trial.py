"""Reading a sample on trial: what its loss and gradients are, told apart from chance and rounding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.linalg.precision import float32_switches
from headstart.statistics.batches import IGNORED, Batch
from headstart.statistics.quiet import drawn_from
from headstart.statistics.stacks import Stack, parameters_tapped, squared_norm
from headstart.statistics.tap import LossScale, Sink, tapped

# Tokens of the sample on which the loss is found out.
_WINDOW = 32


@dataclass(frozen=True)
class Run:
    """A forward pass that was made, and what is left to do.

    Attributes:
        tensor: of the graph; backward starts there.
        at: returns at a scale the loss, unscaled, and the gradient that backward starts with.
    """

    tensor: Tensor
    at: Callable[[float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Seen:
    """What a reading on trial showed: the loss, and by layer the squared norm of all its output gradients."""

    loss: float
    slopes: dict[str, float]

    @property
    def flat(self) -> bool:
        """Whether no layer has a gradient."""
        return not any(self.slopes.values())

    def is_like(self, other: Seen, tolerance: float) -> bool:
        """Return whether loss and gradients are the same up to a relative tolerance."""
        names = self.slopes.keys() | other.slopes.keys()
        pairs = [(math.sqrt(self.slopes.get(name, 0.0)), math.sqrt(other.slopes.get(name, 0.0))) for name in names]
        apart = math.hypot(*(first - second for first, second in pairs))
        size = math.hypot(*(first for first, _ in pairs))
        return abs(self.loss - other.loss) <= tolerance * max(abs(self.loss), 1e-6) and apart <= tolerance * size


def tried(
    run: Callable[[], Run],
    modules: Mapping[str, nn.Module],
    scale: LossScale,
    seed: int,
    device: torch.device,
    agreed: Callable[[float], float],
    stacks: Sequence[Stack] = (),
) -> Seen:
    """Run forward and backward once, with chance drawn from a seed, without anything being summed.

    Args:
        run: the forward pass.
        modules: the layers whose output gradients are looked at.
        scale, agreed: see :class:`headstart.statistics.tap.LossScale`.
        seed: of whatever is drawn at random.
        device: of the model.
        stacks: parameters whose gradients are looked at likewise.
    """
    squares: dict[str, list[Tensor]] = {}
    loss = torch.zeros((), dtype=torch.float32, device="cpu")

    def watch(name: str, inputs: Tensor) -> Sink:
        def sink(x: Tensor, g: Tensor) -> None:
            squares.setdefault(name, []).append(g.float().square().sum())

        return sink

    def notice(stack: Stack, gradient: Tensor) -> None:
        squares.setdefault(stack.names[0], []).append(squared_norm(gradient))

    with contextlib.ExitStack() as taps:
        taps.enter_context(drawn_from(seed, device))
        taps.enter_context(tapped(modules, watch, scale))
        if stacks:
            taps.enter_context(parameters_tapped(stacks, notice, scale))
        forward = run()

        def gradient_at(factor: float) -> Tensor:
            nonlocal loss
            loss, gradient = forward.at(factor)
            return gradient

        scale.backward(forward.tensor, gradient_at, agreed)
    return Seen(float(loss), {name: float(torch.stack(parts).sum()) for name, parts in squares.items()})


def rounding(model: nn.Module, device: torch.device) -> float:
    """Return the unit roundoff of the coarsest arithmetic that a model computes in on a device."""
    units = {torch.finfo(torch.float32).eps}
    for parameter in model.parameters():
        # Quantised weights are computed with in half precision.
        wide = parameter.is_floating_point() and parameter.dtype.itemsize > 1
        units.add(torch.finfo(parameter.dtype if wide else torch.bfloat16).eps)
    if torch.is_autocast_enabled(device.type):
        units.add(torch.finfo(torch.get_autocast_dtype(device.type)).eps)
    for switch in float32_switches()[slice(0, 1) if device.type == "cuda" else slice(-1, None)]:
        units.add({"tf32": 2.0**-10, "bf16": 2.0**-8}.get(str(switch.fp32_precision), 0.0))
    return max(units)


def cut_to_window(sample: Batch) -> Batch:
    """Return one sample cut to a window of tokens that ends with its last label; as it is where it has more to it."""
    return _cut(sample, _last_label(sample) - _WINDOW, _last_label(sample))


def cut_at_padding(sample: Batch, most: int) -> Batch:
    """Return one sample cut to at most so many tokens, where its padding begins or ends; as :func:`cut_to_window` does.

    Where it has no padding, or no label beside it, the window ends with its last label.
    """
    labels, mask = sample["labels"], sample.get("attention_mask")
    if labels.shape[1] <= most:
        return sample
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        edges = (mask[0] != 0).diff().nonzero().flatten()
        low = max(0, min(int(edges[0]) + 1 - most // 2, labels.shape[1] - most)) if len(edges) else 0
        if len(edges) and bool((labels[0, low + 1 : low + most] != IGNORED).any()):
            return _cut(sample, low, low + most)
    return _cut(sample, _last_label(sample) - most, _last_label(sample))


def _last_label(sample: Batch) -> int:
    """Return where a sample's last label ends; 0 where it has none."""
    places = (sample["labels"][0] != IGNORED).nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def _cut(sample: Batch, low: int, high: int) -> Batch:
    labels, values = sample["labels"], sample.values()
    if any(isinstance(value, Tensor) and value.shape != labels.shape for value in values):
        return sample
    if not all(isinstance(value, Tensor | bool | int | float | str | None) for value in values):
        return sample
    low = max(0, low)
    return {key: value[:, low:high] if isinstance(value, Tensor) else value for key, value in sample.items()}
