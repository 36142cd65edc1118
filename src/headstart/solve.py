"""From what is known of the layers to their factors: grouped, looked up where they are kept, shared among processes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from headstart.cache import FactorCache, cacheable, description, layer_key
from headstart.context import Context
from headstart.errors import LayerError
from headstart.layers.find import TargetLayer
from headstart.layers.formats import check_readable
from headstart.layers.weights import full_precision
from headstart.methods.alive import revived
from headstart.methods.base import Factors, Form, Kronecker, Layer, Method, Training
from headstart.processes import together
from headstart.statistics.gather import Statistics

# Weights of one shape are decomposed together, as many as fit in this many bytes of float32.
_BATCH_BYTES = 256 * 2**20
# On a CPU each takes one thread, so that more than a few for each bring nothing, and a kill would lose them all.
_EACH_THREAD = 16


def solve(
    method: Method,
    layers: Sequence[TargetLayer],
    statistics: Statistics,
    context: Context,
    training: Training,
    cache: FactorCache | None = None,
) -> dict[str, Factors]:
    """Return the factors of the layers that the statistics are of, by name.

    What depends on weights alone is asked of ``cache`` first, which keeps what it did not have. Where statistics have
    owners, each process solves its own layers and all get all of them.

    Args:
        method: whose factors.
        layers: all layers of the adapter.
        statistics: of some of them; used up.
        context: of the start.
        training: what is known of the fine-tuning to come.
        cache: where factors are kept.

    Raises:
        LayerError: a layer's weight or factors are not finite; names the layer.
    """
    concerned = [layer for layer in layers if layer.name in statistics.layers]
    solver = _Solver(method, statistics, context, training)
    if not statistics.owners:
        return (
            solver.looked_up(concerned, cache)
            if cache and _kept(method, concerned, cache)
            else solver.computed(concerned)
        )
    processes = context.processes
    with together(processes):
        starts = solver.computed(concerned)
    if not processes.several:
        return starts
    sent = {name: _on_cpu(factors) for name, factors in starts.items()}
    for others, seconds in processes.gather((sent, context.layer_seconds)):
        starts |= others
        context.layer_seconds |= seconds
    return starts


def settled(method: Method, layers: Sequence[TargetLayer], starts: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the starts to install, now that those of all layers are known: the method may share their ranks out anew.

    Raises:
        LayerError: a layer's factors don't fit a rank that it can have; names the layer.
    """
    final = method.settle(starts, {layer.name: layer.r for layer in layers})
    for layer in layers:
        factors = final[layer.name] = layer.without_padding(final[layer.name])
        rank = len(factors.A) if method.shares_ranks else layer.r
        check_factors(layer, factors, method.form, rank)
        if rank > min(layer.d_out, layer.d_in):
            raise LayerError(f"layer {layer.name!r}: the method gave it rank {rank}, more than its smaller side.")
    if not any(len(factors.A) for factors in final.values()):
        raise LayerError(f"method {method.name!r} left no layer with a rank above 0.")
    return final


def _kept(method: Method, layers: Sequence[TargetLayer], cache: FactorCache) -> bool:
    return cacheable(method) and (method.keep or cache.everything) and not any(layer.sharded for layer in layers)


class _Solver:
    """Solves layers of one pass, group by group."""

    def __init__(self, method: Method, statistics: Statistics, context: Context, training: Training) -> None:
        self._method = method
        self._statistics = statistics
        self._context = context
        self._training = training
        self._solved = 0

    def computed(self, layers: Sequence[TargetLayer]) -> dict[str, Factors]:
        """Return the factors of those layers that this process is to solve, computed."""
        starts: dict[str, Factors] = {}
        rank = self._context.processes.rank
        groups = list(self._groups(layers))
        for place, group in enumerate(groups):
            began = time.perf_counter()
            on_device: dict[int, Tensor] = {}
            own: list[TargetLayer] = []
            inputs: list[Layer] = []
            for layer in group:
                if self._statistics.owners.get(layer.name, rank) == rank:
                    own.append(layer)
                    inputs.append(self._inputs(layer, on_device))
                elif self._gathers(layer):
                    layer.weight()  # a sharded weight is gathered by all processes, whoever needs it
            if not own:
                continue
            try:
                # A program's autocast is for its model: here it would round what is solved, and what the cache keeps.
                with full_precision(layer.module for layer in own):
                    factors_of_group = self._method.factors_batch(inputs, self._context.show)
                for layer, factors in zip(own, factors_of_group, strict=True):
                    check_factors(layer, factors, self._method.form)
                factors_of_group = [
                    revived(self._method, layer, factors)
                    for layer, factors in zip(inputs, factors_of_group, strict=True)
                ]
            except Exception:
                # Other processes go on gathering sharded weights, and wait for this one's parts.
                for layer in filter(self._gathers, chain.from_iterable(groups[place + 1 :])):
                    layer.weight()
                raise
            for layer, factors in zip(own, factors_of_group, strict=True):
                starts[layer.name] = factors
                # Freed as soon as they are used: they are the largest thing held.
                self._statistics.drop(layer.name)
                self._context.layer_seconds[layer.name] = (time.perf_counter() - began) / len(own)
            self._solved += len(own)
            self._context.show("factorising", self._solved, max(self._solved, len(layers)))
        return starts

    def looked_up(self, layers: Sequence[TargetLayer], cache: FactorCache) -> dict[str, Factors]:
        """Return the factors that the cache has, and computed those that it lacks."""
        inputs = [self._inputs(layer, {}, weight=False) for layer in layers]
        keys = []
        for layer, facts in zip(layers, inputs, strict=True):
            keys.append(
                layer_key(self._method, facts, layer.digest(), device=layer.device, transposed=layer.transposed)
            )
            self._context.show("hashing", len(keys), len(layers))

        def compute(positions: Sequence[int]) -> list[Factors]:
            fresh = self.computed([layers[position] for position in positions])
            return [fresh[layers[position].name] for position in positions]

        places = {layer.name: position for position, layer in enumerate(layers)}
        starts = cache.fetch(
            keys,
            compute,
            groups=[[places[layer.name] for layer in group] for group in self._groups(layers)],
            describe=lambda position: description(self._method, inputs[position]),
            show=self._context.show,
        )
        for layer, factors in zip(layers, starts, strict=True):
            check_factors(layer, factors, self._method.form)
        return {layer.name: factors for layer, factors in zip(layers, starts, strict=True)}

    def _gathers(self, layer: TargetLayer) -> bool:
        return layer.sharded and self._method.wants(layer.facts()).weight

    def _groups(self, layers: Sequence[TargetLayer]) -> Iterator[list[TargetLayer]]:
        """Yield what the method solves together: layers of one shape and rank, within a limit, or of one input."""
        if type(self._method).factors_batch is Method.factors_batch:
            yield from ([layer] for layer in layers)
            return
        by_input = any(self._reads_inputs(layer) for layer in layers)
        alike: dict[Any, list[TargetLayer]] = defaultdict(list)
        for layer in layers:
            if by_input:
                alike[self._statistics.groups.get(layer.name, layer.name)].append(layer)
            else:
                alike[layer.d_out, layer.d_in, layer.r, layer.device].append(layer)
        for group in alike.values():
            size = len(group) if by_input else self._fitting(group[0])
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _reads_inputs(self, layer: TargetLayer) -> bool:
        return self._method.wants(layer.facts()).input_moments

    def _fitting(self, layer: TargetLayer) -> int:
        """Return how many layers of this one's shape are solved together."""
        limit = self._context.batch_bytes
        fitting = max(1, (_BATCH_BYTES if limit is None else limit) // (4 * layer.d_out * layer.d_in))
        if layer.device.type != "cpu":
            return fitting
        threads = torch.get_num_threads()
        fitting = min(fitting, _EACH_THREAD * threads)
        return max(fitting, threads) if limit is None else fitting

    def _inputs(self, layer: TargetLayer, on_device: dict[int, Tensor], *, weight: bool = True) -> Layer:
        """Return what is known of a layer, on the layer's device; ``on_device`` holds what several of them share."""
        facts = replace(layer.facts(), seed=self._context.seed, training=self._training)
        wants = self._method.wants(facts)
        statistics, device = self._statistics, layer.device
        gradient = statistics.gradients.get(layer.name)
        half = statistics.halves.get(layer.name)
        kronecker = statistics.kronecker.get(layer.name)
        if kronecker is not None:
            outputs = None if kronecker.outputs is None else kronecker.outputs.to(device)
            kronecker = replace(_inputs_on(kronecker, device, on_device), outputs=outputs)
        preserved = statistics.preserved.get(layer.name)
        if wants.task and layer.name not in statistics.groups:
            # Nothing reached the layer: to the method that is a gradient of zero.
            gradient = torch.zeros(layer.d_out, layer.d_in, dtype=torch.float32, device="cpu")
        return replace(
            facts,
            weight=layer.weight() if weight and wants.weight else None,
            original=statistics.original.weight(layer) if wants.original and statistics.original else None,
            moments=statistics.moments.get(layer.kind) if wants.moments else None,
            gradient=None if gradient is None else gradient.to(device),
            half=None if half is None else replace(half, gradient=half.gradient.to(device)),
            kronecker=kronecker,
            preserved=None if preserved is None else _inputs_on(preserved, device, on_device),
            samples=statistics.samples or None,
        )


def check(method: Method, layers: Sequence[TargetLayer], training: Training) -> None:
    """Let the method refuse what it can't start, before any data are read.

    Raises:
        LayerError, MethodError: see :meth:`headstart.methods.base.Method.check`.
    """
    for layer in layers:
        method.check(replace(layer.facts(), training=training))


def check_weights(method: Method, layers: Sequence[TargetLayer], form: str) -> None:
    """Refuse layers whose weight is needed and can't be read, and those that the method refuses for their weight.

    Raises:
        LayerError: see :func:`headstart.layers.formats.check_readable`, and what the method says.
    """
    check_readable(
        (layer.name, layer.module.get_base_layer())
        for layer in layers
        if form == "residual" or layer.facts().dora or method.wants(layer.facts()).reads_weight
    )
    for layer in layers:
        if method.checks_weight(layer.facts()):
            method.check(replace(layer.facts(), weight=layer.weight()))


def check_factors(target: TargetLayer, factors: Factors, form: Form, rank: int | None = None) -> None:
    """Raise LayerError, naming the layer, where factors have the wrong shape, are not finite, or not of the form.

    ``rank`` is the one that they must have, by default the layer's own.
    """
    rank = target.r if rank is None else rank
    shapes = {"A": (rank, target.d_in), "B": (target.d_out, rank)}
    matrices = {"A": factors.A, "B": factors.B}
    if form == "core" and factors.core is not None:
        matrices["core"], shapes["core"] = factors.core, (rank, rank)
    elif form == "core" or factors.core is not None:
        raise LayerError(f"layer {target.name!r}: the method's form is {form!r}, which its factors are not.")
    for name, matrix in matrices.items():
        if tuple(matrix.shape) != shapes[name]:
            raise LayerError(f"layer {target.name!r}: {name} has shape {tuple(matrix.shape)}, not {shapes[name]}.")
        if not bool(torch.isfinite(matrix).all()):
            raise LayerError(f"layer {target.name!r}: the method gave NaN or infinity in {name}.")


def _inputs_on(moments: Kronecker, device: torch.device, on_device: dict[int, Tensor]) -> Kronecker:
    """Return moments with Z on a device, where layers that read the same input share it."""
    return replace(moments, inputs=on_device.setdefault(id(moments.inputs), moments.inputs.to(device)))


def _on_cpu(factors: Factors) -> Factors:
    """Return factors that another process can receive, whichever devices it sees."""
    core = None if factors.core is None else factors.core.cpu()
    spare = None if factors.spare is None else factors.spare.cpu()
    spare_B = None if factors.spare_B is None else factors.spare_B.cpu()
    return replace(factors, A=factors.A.cpu(), B=factors.B.cpu(), core=core, spare=spare, spare_B=spare_B)
