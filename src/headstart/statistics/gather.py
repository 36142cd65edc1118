"""Adding up the sums of all processes where each layer is solved, and turning them into means."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headstart.errors import LayerError
from headstart.layers.original import Original
from headstart.methods.base import Half, Kronecker, Moments
from headstart.processes import Processes, owners, together
from headstart.statistics.sums import InputSum, Sums, symmetric


@dataclass
class Statistics:
    """What one planned pass found, for the layers that this process is to solve.

    Attributes:
        layers: the layers of this pass, whoever solves them.
        owners: by layer, the process that has its sums.
        gradients: by layer, G (d_out, d_in) in float32: the mean over samples of each sample's own loss gradient.
            A layer that no gradient reached is missing, here and below.
        halves: by layer, the mean gradient of every second sample, where those were asked for and there are two.
        kronecker: by layer, the factors of its Fisher information.
        preserved: by layer, the inputs' moment over data whose ability is to stay.
        groups: by layer, the number of the group of layers that read the same input.
        samples: how many samples were read, in all processes together.
        tokens: how many tokens they held, padding not counted (0 where the data are no tokens).
        notes: sentences for the report, where something was not as asked for.
        plan: of the passes, in words.
        moments: by kind, of the layers' weights.
        original: where the unquantised weights lie, where those were asked for.
    """

    layers: tuple[str, ...] = ()
    owners: dict[str, int] = field(default_factory=dict)
    gradients: MutableMapping[str, Tensor] = field(default_factory=dict)
    halves: MutableMapping[str, Half] = field(default_factory=dict)
    kronecker: MutableMapping[str, Kronecker] = field(default_factory=dict)
    preserved: MutableMapping[str, Kronecker] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    notes: list[str] = field(default_factory=list)
    plan: str = ""
    moments: dict[str, Moments] = field(default_factory=dict)
    original: Original | None = None

    def drop(self, name: str) -> None:
        """Free what is held of a layer."""
        by_layer: tuple[MutableMapping[str, Any], ...] = (self.gradients, self.halves, self.kronecker, self.preserved)
        for held_of in by_layer:
            if name in held_of:  # to pop it would read what lies in a file
                del held_of[name]


def finest(partitions: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return the groups of layers that are together in every process."""
    numbers: dict[tuple[int, ...], int] = {}
    return {
        name: numbers.setdefault(tuple(partition[name] for partition in partitions), len(numbers))
        for name in partitions[0]
    }


def anywhere(processes: Processes, names: set[str]) -> set[str]:
    """Return the names that any process has."""
    return set().union(*processes.gather(names))


def gathered(sums: Sums, processes: Processes, samples: int, tokens: int) -> Statistics:
    """Return the statistics of one planned pass; ``sums`` is used up.

    Args:
        sums: of this process.
        processes: all that summed.
        samples, tokens: read by all of them together.

    Raises:
        LayerError: a sum is not finite; names the layer. All processes raise it.
    """
    sums.regroup(finest(processes.gather(sums.groups)))
    names = list(sums.shapes)
    reached = anywhere(processes, {name for name in names if sums.layers[name].reached})
    by_group = owners(_costs(sums), processes.count)
    result = Statistics(
        layers=tuple(names),
        owners={name: by_group[sums.groups[name]] for name in names},
        groups={name: sums.groups[name] for name in names if name in reached},
        samples=samples,
        tokens=tokens,
    )
    counts = _Counts(processes, sums)
    first_half = sum(processes.gather(sums.samples[0])) if sums.by_half else 0
    inputs: dict[int, InputSum] = {}
    failures: list[LayerError] = []
    for name in names:
        if name not in reached:
            continue
        owner, layer, wanted = result.owners[name], sums.layers[name], sums.shapes[name].wanted
        owns = owner == processes.rank
        if wanted.gradient:
            total = sums.gradient(name)
            processes.sum_to(total, owner)
            if wanted.halves:
                first, total = total, sums.gradient(name, 1)
                processes.sum_to(total, owner)
                if owns:
                    # What no sample of a half has reached is on the CPU, wherever the other half's sum is.
                    total = total.to(first.device).add_(first)
                    if 0 < first_half < samples:
                        result.halves[name] = Half(first.div_(first_half), first_half / samples)
            layer.gradients.clear()
            if owns:
                result.gradients[name] = total.div_(samples)
                _check(total, name, "gradient", failures)
        if not wanted.input_moments:
            continue
        group = sums.groups[name]
        if group not in inputs:
            inputs[group] = _input_mean(sums, name, processes, owner, counts)
            if owns:
                _check(inputs[group].gram, name, "input", failures)
        if wanted.outputs is None:
            if owns:
                mean = inputs[group]
                result.kronecker[name] = Kronecker(mean.gram, None, mean.total, None, mean.tokens)
            continue
        gram, total = sums.outputs(name)
        for tensor in (gram, total):
            processes.sum_to(tensor, owner)
        layer.gram = layer.total = None
        if owns:
            _check(gram, name, "output gradient", failures)
            count = counts.of_layer(name)
            result.kronecker[name] = Kronecker(
                inputs=inputs[group].gram,
                outputs=(symmetric(gram) if gram.dim() == 2 else gram).div_(count),
                mean_input=inputs[group].total,
                mean_output=total.div_(count),
                tokens=count,
            )
    # Only now, so that no process waits for a sum that another one won't send.
    with together(processes):
        if failures:
            raise failures[0]
    return result


class _Counts:
    """Tokens that were summed over, in all processes."""

    def __init__(self, processes: Processes, sums: Sums) -> None:
        layers = {name: layer.tokens for name, layer in sums.layers.items()}
        inputs = {group: input_sum.tokens for group, input_sum in sums.inputs.items()}
        self._counts = processes.gather((layers, inputs))

    def of_layer(self, name: str) -> int:
        """Return those of a layer, at least 1 to divide by."""
        return max(1, sum(layers[name] for layers, _ in self._counts))

    def of_input(self, group: int) -> int:
        """Return those of an input, at least 1 to divide by."""
        return max(1, sum(inputs.get(group, 0) for _, inputs in self._counts))


def _input_mean(sums: Sums, name: str, processes: Processes, owner: int, counts: _Counts) -> InputSum:
    input_sum, group = sums.input(name), sums.groups[name]
    del sums.inputs[group]
    for tensor in (input_sum.gram, input_sum.total):
        processes.sum_to(tensor, owner)
    if owner != processes.rank:
        # An empty stand-in: what was summed here is no longer needed.
        return InputSum(input_sum.gram.new_empty(0), input_sum.total.new_empty(0))
    count = counts.of_input(group)
    return InputSum(symmetric(input_sum.gram).div_(count), input_sum.total.div_(count), count)


def _costs(sums: Sums) -> dict[int, float]:
    """Return what solving each group of layers costs, in multiplications."""
    costs: dict[int, float] = defaultdict(float)
    for name, shape in sums.shapes.items():
        if shape.wanted.input_moments:
            cost = float(shape.d_in) ** 2 * (shape.d_in + shape.d_out)
        else:
            cost = float(shape.d_in) * shape.d_out * min(shape.d_in, shape.d_out)
        costs[sums.groups[name]] += cost
    return costs


def _check(value: Tensor, name: str, what: str, failures: list[LayerError]) -> None:
    if not math.isfinite(float(value.abs().max())):
        failures.append(
            LayerError(f"layer {name!r}: its {what} has NaN or infinity; check the loss and the precision.")
        )
