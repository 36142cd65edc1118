"""The rate that a start allows, from the curvature along the step that the optimizer would make first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headstart.evaluation.answers import evaluating

# Where the first difference is taken, as a part of the factors' root mean square; then again at half the step that it
# finds, since what a step of training sees is the curvature over its length and not at a point.
_FIRST = 1e-3
_ROUNDS = 3


@dataclass(frozen=True)
class Probe:
    """What a start's first step would find.

    Attributes:
        slope: by how much the loss falls per unit of the rate, at the start.
        curvature: by how much that slope falls per unit of the rate, along the step.
        rate: at which the first step gains the most, slope / curvature: an upper bound of rates for training, whose
            ratio from start to start is what matters. Infinite where the loss falls ever faster along the step.
    """

    slope: float
    curvature: float
    rate: float


def probe(model: Any, batches: Sequence[dict[str, Any]], optimizer: Literal["adamw", "sgd"] = "adamw") -> Probe:
    """Probe a model whose factors have their start; it is left as it was.

    The step's direction is AdamW's first one, the gradient's signs (SGD's: the gradient). The curvature along it is a
    difference of two gradients, as an anchored layer has no second derivative.

    Args:
        model: returns a loss for a batch; what trains, requires gradients.
        batches: with labels, on the model's device; the loss is their mean.
        optimizer: whose step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        gradients = _gradients(model, parameters, batches)
        direction = [gradient.sign() if optimizer == "adamw" else gradient for gradient in gradients]
        slope = _dot(gradients, direction)
        if not slope > 0:
            return Probe(slope, 0.0, math.nan)
        size = math.sqrt(_dot(parameters, parameters) / sum(parameter.numel() for parameter in parameters))
        reach = _FIRST * max(size, 1e-6) / math.sqrt(_dot(direction, direction) / sum(map(Tensor.numel, direction)))
        curvature = 0.0
        for _ in range(_ROUNDS):
            with _moved(parameters, direction, reach):
                further = _dot(_gradients(model, parameters, batches), direction)
            curvature = (slope - further) / reach
            # Where the loss falls ever faster it has to be looked at further on.
            reach = slope / curvature / 2 if curvature > 0 else 8 * reach
        return Probe(slope, curvature, slope / curvature if curvature > 0 else math.inf)


def _gradients(model: Any, parameters: Sequence[Tensor], batches: Sequence[dict[str, Any]]) -> list[Tensor]:
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for batch in batches:
        loss = model(**batch).loss / len(batches)
        for total, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                total += gradient.float()
    return sums


@torch.no_grad()
def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return math.fsum(float((one.double() * other.double()).sum()) for one, other in zip(left, right, strict=True))


@contextmanager
def _moved(parameters: Sequence[Tensor], direction: Sequence[Tensor], reach: float) -> Iterator[None]:
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, step in zip(parameters, direction, strict=True):
                parameter -= (reach * step).to(parameter.dtype)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)
