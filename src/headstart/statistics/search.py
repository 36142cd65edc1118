"""One multiple for a start that keeps its product, by a line search on samples that the start did not read.

A start such as LoRA-One's or LoRA-DA's says in which directions to go; how far is a constant of its paper, right for
the paper's models. Here it is the multiple of s B A, the same for all layers, with the least loss on a few samples:
found by forward passes alone, over powers of four first and between them then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headstart.context import Context
from headstart.errors import DataError
from headstart.layers.find import TargetLayer
from headstart.layers.weights import model_device
from headstart.methods.base import Factors
from headstart.processes import together
from headstart.report import Searched
from headstart.statistics.batches import Samples, iterate_samples, moved, take
from headstart.statistics.quiet import drawn_from, quiet
from headstart.statistics.runs import Runs
from headstart.statistics.training import TrainingData

# Multiples go up or down by this factor, at most so many times; between neighbours two more are tried.
_FACTOR, _MOST, _REFINED = 4.0, 6, 2
# A multiple as near as this, relatively, to one that was tried says nothing new.
_NEAR = 0.02
# A forward pass over these samples costs a small share of a gradient pass over all that a start reads.
_SHARE, _FEWEST, _MOST_SAMPLES = 24, 8, 32


def samples_for(read: int) -> int:
    """Return how many samples a search is measured on, beside those that the start itself reads."""
    return min(_MOST_SAMPLES, max(_FEWEST, read // _SHARE))


def search_scale(
    model: nn.Module,
    starts: Mapping[str, Factors],
    layers: Mapping[str, TargetLayer],
    data: TrainingData,
    read: int,
    context: Context,
) -> Searched:
    """Return the multiple of the starts' products with the least loss on the samples after the first ``read``.

    Where the data end before, the search is measured on their last samples, which the start has read as well, and a
    note says so.

    Args:
        model: the PEFT model, whose adapters are off in the search.
        starts: by layer.
        layers: the layers, by name.
        data: of the task: those that the start has read, from their beginning (:meth:`TrainingData.twice`).
        read: how many samples the start has read.
        context: of the start.

    Raises:
        DataError: a loss is not finite, or the model gives none.
    """
    device = model_device(model)
    # Drawn as the start's own were: what comes first is what it has read.
    with together(context.processes), drawn_from(context.seed, device):
        chunks, count = _chunks(data, read, context)
    runs = Runs(model, {}, loss=data.loss, in_step=True)
    # In step: processes may share the model's parameters.
    rounds = min(context.processes.gather(len(chunks)))
    evaluations = 0

    def loss_at(multiple: float) -> float:
        nonlocal evaluations
        total, size = 0.0, 0
        with torch.no_grad(), drawn_from(context.seed, device), _added(starts, layers, multiple):
            for chunk in chunks[:rounds]:
                total += float(runs.whole(moved(chunk.batch, device), 1).tensor) * chunk.size
                size += chunk.size
        evaluations += 1
        context.show("searching the scale", evaluations, _MOST + _REFINED + 2)
        parts = context.processes.gather((total, size))
        return sum(part for part, _ in parts) / max(1, sum(part for _, part in parts))

    with quiet(model):
        before = loss_at(0.0)
        if not math.isfinite(before):
            raise DataError("the loss of the base model is not finite on the samples that the scale is searched on.")
        losses = {0.0: before} | least(loss_at, before)
    best = min(losses, key=lambda multiple: losses[multiple])
    if best == 0:
        context.notes.append(
            "no multiple of the start lowers the loss of samples that it did not read: it keeps its published scale"
        )
        return Searched(1.0, before, losses[1.0], losses, count)
    return Searched(best, before, losses[best], losses, count)


def least(loss_at: Callable[[float], float], before: float) -> dict[float, float]:
    """Return losses by multiple, tried so that the least of them is near the least there is; NaN counts as infinite."""
    losses: dict[float, float] = {}

    def tried(multiple: float) -> float:
        if multiple not in losses:
            loss = loss_at(multiple)
            losses[multiple] = loss if math.isfinite(loss) else math.inf
        return losses[multiple]

    # Up while it helps; else down, until it does or was seen to fall again.
    up = tried(1.0) < before and tried(_FACTOR) < tried(1.0)
    step, place = (_FACTOR if up else 1 / _FACTOR), (_FACTOR if up else 1.0)
    for _ in range(_MOST - 1):
        following = tried(place * step)
        if following >= losses[place] and (up or losses[place] < before):
            break
        place *= step
    best = min(losses, key=lambda multiple: losses[multiple])
    if losses[best] >= before:
        return losses
    for _ in range(_REFINED):
        below = max((multiple for multiple in losses if multiple < best), default=best / _FACTOR)
        above = min((multiple for multiple in losses if multiple > best), default=best * _FACTOR)
        tried(_between(before, (best, tried(best)), (above, tried(above)), below))
        best = min(losses, key=lambda multiple: losses[multiple])
    return losses


def _between(before: float, best: tuple[float, float], above: tuple[float, float], below: float) -> float:
    """Return a multiple between the neighbours of the best one: where the parabola from the base model has its least.

    Along a line the loss is nearly quadratic where it is near its least; where it isn't, the wider half in the
    logarithm is divided.
    """
    (m, loss), (n, further) = best, above
    middle = math.sqrt(m * n) if n / m >= m / below else math.sqrt(m * below)
    slope_m, slope_n = (loss - before) / m, (further - before) / n
    curvature = (slope_n - slope_m) / (n - m)
    if not (math.isfinite(curvature) and curvature > 0):
        return middle
    least_at = (curvature * m - slope_m) / (2 * curvature)
    if not below < least_at < n or abs(least_at - m) < _NEAR * m:
        return middle
    return least_at


def scaled(factors: Factors, multiple: float) -> Factors:
    """Return a start whose product is a positive multiple of what it was, shared evenly by A and B, or in its core.

    A start without a product, of a layer that starts as 'lora' does, stays what it is.
    """
    if factors.core is not None:
        return replace(factors, core=factors.core * multiple)
    if not bool(factors.B.count_nonzero()):
        return factors
    root = math.sqrt(multiple)
    return replace(factors, A=factors.A * root, B=factors.B * root)


def _chunks(data: TrainingData, read: int, context: Context) -> tuple[list[Samples], int]:
    """Return this process's batches of the samples to search on, and how many samples they are in all."""
    wanted = samples_for(read)
    if data.batches is None:
        raise DataError("the scale of a start is searched on data: give batches with labels as data=.")
    every = list(
        iterate_samples(
            data.batches, read + wanted, collator=data.collator, batch_size=data.batch_size, single=data.single
        )
    )
    total = sum(chunk.size for chunk in every)
    first = max(0, min(read, total - wanted))
    if total < read + wanted:
        context.notes.append(
            f"the scale was searched on the last {total - first} of the data's {total} samples, which the start has "
            "read, too: the data hold no more"
        )
    chosen: list[Samples] = []
    for chunk in every:
        # A batch that can't be cut is searched on whole, where any of its samples is.
        left = [place for place, index in enumerate(chunk.indices) if index >= first]
        if left and chunk.cut:
            kept = tuple(chunk.indices[place] for place in left)
            chosen.append(Samples(take(chunk.batch, left), kept))
        elif left:
            chosen.append(chunk)
    return chosen, sum(chunk.size for chunk in chosen)


@contextmanager
def _added(starts: Mapping[str, Factors], layers: Mapping[str, TargetLayer], multiple: float) -> Iterator[None]:
    """Add a multiple of each layer's s B A to its base layer's output within the block."""
    with ExitStack() as hooks:
        for name, factors in starts.items() if multiple else ():
            B = factors.B if factors.core is None else factors.B @ factors.core
            product = _Product(factors.A, B, multiple * layers[name].scaling)
            handle = layers[name].module.get_base_layer().register_forward_hook(product)
            hooks.callback(handle.remove)
        yield


class _Product:
    """A forward hook that adds s B A x."""

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self._A, self._B, self._scaling = A, B, scaling

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        A, B = (part.to(x.device, x.dtype) for part in (self._A, self._B))
        return output + self._scaling * ((x @ A.mT) @ B.mT).to(output.dtype)
