"""The step in the middle of the verb: from what is known of the layers to their factors, pass by pass."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from headstart.cache import Store, cacheable, description, layer_key, weight_digest
from headstart.errors import not_finite
from headstart.layers.find import TargetLayer
from headstart.layers.install import check_factors
from headstart.layers.weights import base_weight, dense, full_precision, is_transposed, place
from headstart.meters import Clock
from headstart.methods.base import Factors, LayerInputs, Method, Moments, Needs
from headstart.progress import Show
from headstart.statistics.batches import size_of
from headstart.statistics.collect import Collector
from headstart.statistics.gather import Statistics
from headstart.statistics.processes import Processes, digest, is_sharded, together

# Weights of one shape are decomposed together, as many as fit in this many bytes of float32.
_BATCH_BYTES = 256 * 2**20
# On a CPU each takes one thread, so that more than a few for each bring nothing, and a kill would lose them all.
_EACH_THREAD = 4


@dataclass
class Facts:
    """What holds for all layers, and the seconds that each start took.

    Attributes:
        batch_bytes: how many bytes of weights may be decomposed together, in float32; by default 256 MiB, and on a CPU
            one weight for each thread at least.
    """

    seed: int
    moments: dict[str, Moments]
    population: int | None
    first_lr: float | None = None
    batch_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def starts_of(
    method: Method,
    layers: Sequence[TargetLayer],
    facts: Facts,
    collector: Collector | None,
    processes: Processes,
    clock: Clock,
    show: Show,
    store: Store | None = None,
) -> tuple[list[tuple[TargetLayer, Factors]], list[str]]:
    """Make the factors of all layers: of those that no data are needed for, and pass by pass of the others.

    ``store`` is asked first for what depends on weights alone, and keeps what it did not have.
    """
    asked = set(collector.layers) if collector else set()
    made: dict[str, Factors] = {}
    notes: list[str] = []
    with clock("factorise"):
        rest = [layer for layer in layers if layer.name not in asked]
        made |= from_weights(method, rest, facts, store, show)
    if collector is None:
        return [(layer, made[layer.name]) for layer in layers], notes
    passes = collector.passes(show)
    while True:
        with clock("collect"):
            statistics = next(passes, None)
        if statistics is None:
            break
        with clock("factorise"), together(processes):
            mine = [layer for layer in layers if statistics.owners.get(layer.name) == processes.rank]
            factorise(method, mine, facts, statistics, made, show)
        notes += statistics.notes
    with clock("factorise"):
        sent = {name: _on_cpu(factors) for name, factors in made.items() if name in asked} if processes.several else {}
        for theirs, seconds in processes.gather((sent, facts.seconds)) if processes.several else ():
            made |= theirs
            facts.seconds |= seconds
    return [(layer, made[layer.name]) for layer in layers], notes


def from_weights(
    method: Method,
    layers: Sequence[TargetLayer],
    facts: Facts,
    store: Store | None,
    show: Show,
    digest_of: Callable[[TargetLayer], str] | None = None,
) -> dict[str, Factors]:
    """Return the factors that need no data: those that the store has, and computed those that it lacks.

    ``digest_of`` gives the digest of a layer's weight where that may be known already.
    """
    if store is None or not cacheable(method) or any(is_sharded(layer.module) for layer in layers):
        made: dict[str, Factors] = {}
        factorise(method, layers, facts, Statistics(), made, show)
        return made
    known = [_inputs(method, layer, facts, Statistics(), {}, weight=False) for layer in layers]
    keys = []
    for layer, inputs in zip(layers, known, strict=True):
        base = layer.module.get_base_layer()
        digest = digest_of(layer) if digest_of else weight_digest(dense(base))
        turned = is_transposed(layer.module)
        keys.append(layer_key(method, inputs, digest, device=place(layer.module), transposed=turned))
        show("hashing", len(keys), len(layers))

    def compute(positions: Sequence[int]) -> list[Factors]:
        fresh: dict[str, Factors] = {}
        factorise(method, [layers[position] for position in positions], facts, Statistics(), fresh, show)
        return [fresh[layers[position].name] for position in positions]

    places = {layer.name: position for position, layer in enumerate(layers)}
    groups = [
        [places[layer.name] for layer in group] for group in _groups(method, layers, Statistics(), facts.batch_bytes)
    ]
    found = store.fetch(
        keys, compute, groups=groups, describe=lambda position: description(method, known[position]), show=show
    )
    for layer, factors in zip(layers, found, strict=True):
        check_factors(layer, factors)
    return {layer.name: factors for layer, factors in zip(layers, found, strict=True)}


def _on_cpu(factors: Factors) -> Factors:
    """Return factors that another process can receive, whichever devices it sees."""
    core = None if factors.core is None else factors.core.cpu()
    return replace(factors, A=factors.A.cpu(), B=factors.B.cpu(), core=core)


def factorise(
    method: Method,
    layers: Sequence[TargetLayer],
    facts: Facts,
    statistics: Statistics,
    made: dict[str, Factors],
    show: Show,
) -> None:
    """Add the factors of ``layers`` to ``made``."""
    for group in _groups(method, layers, statistics, facts.batch_bytes):
        began = time.perf_counter()
        held: dict[int, torch.Tensor] = {}
        inputs = [_inputs(method, layer, facts, statistics, held) for layer in group]
        # A program's autocast is for its model: here it would round what is solved, and what the cache keeps.
        with full_precision(layer.module for layer in group):
            found_factors = method.factors_batch(inputs, show)
        for layer, factors in zip(group, found_factors, strict=True):
            check_factors(layer, factors)
            made[layer.name] = factors
            # Freed as soon as they are used: they are the largest thing held.
            for found in (statistics.gradients, statistics.sketches, statistics.kronecker):
                found.pop(layer.name, None)
        for layer in group:
            facts.seconds[layer.name] = (time.perf_counter() - began) / len(group)
        show("factorising", len(made), max(len(layers), len(made)))


def _groups(
    method: Method, layers: Sequence[TargetLayer], statistics: Statistics, batch_bytes: int | None
) -> Iterator[list[TargetLayer]]:
    """Yield what the method wants together: layers of one shape and rank, within a memory limit, or of one input."""
    if method.together == "none":
        yield from ([layer] for layer in layers)
        return
    alike: dict[Any, list[TargetLayer]] = defaultdict(list)
    for layer in layers:
        device = place(layer.module)
        shape = (layer.d_out, layer.d_in, layer.r, device)
        alike[shape if method.together == "shape" else statistics.groups.get(layer.name, layer.name)].append(layer)
    for group in alike.values():
        limit = _BATCH_BYTES if batch_bytes is None else batch_bytes
        fitting = max(1, limit // (4 * group[0].d_out * group[0].d_in))
        if place(group[0].module).type == "cpu":
            threads = torch.get_num_threads()
            fitting = min(fitting, _EACH_THREAD * threads)
            if batch_bytes is None:
                fitting = max(fitting, threads)
        size = fitting if method.together == "shape" else len(group)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _inputs(
    method: Method,
    layer: TargetLayer,
    facts: Facts,
    statistics: Statistics,
    held: dict[int, torch.Tensor],
    *,
    weight: bool = True,
) -> LayerInputs:
    """Return what is known of a layer, on the layer's device; ``held`` keeps what several of them share."""
    device = place(layer.module)
    gradient, sketch = statistics.gradients.get(layer.name), statistics.sketches.get(layer.name)
    gradient = None if gradient is None else gradient.to(device)
    kronecker = statistics.kronecker.get(layer.name)
    if kronecker is not None:
        shared = held.setdefault(id(kronecker.inputs), kronecker.inputs.to(device))
        kronecker = replace(kronecker, inputs=shared, outputs=kronecker.outputs.to(device))
    wanted = method.wanted(layer.name, layer.r)
    if wanted is not None and layer.name not in statistics.groups:
        # Nothing reached the layer: to the method that is a gradient of zero.
        gradient = torch.zeros(layer.d_out, layer.d_in, dtype=torch.float32, device=device)
    return LayerInputs(
        name=layer.name,
        d_out=layer.d_out,
        d_in=layer.d_in,
        r=layer.r,
        scaling=layer.scaling,
        seed=facts.seed,
        weight=finite_weight(layer) if weight and Needs.WEIGHT in method.needs else None,
        moments=facts.moments.get(layer.kind),
        gradient=gradient,
        sketch=sketch,
        kronecker=kronecker,
        population=facts.population,
        samples=statistics.samples or None,
        first_lr=facts.first_lr,
    )


def finite_weight(layer: TargetLayer) -> torch.Tensor:
    """Return W (d_out, d_in) in float32.

    Raises:
        LayerError: it holds NaN or infinity; names the layer.
    """
    weight = base_weight(layer.module)
    # The extremes are NaN or infinite where any entry is, and need no memory of their own.
    if not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(weight)):
        raise not_finite(layer.name)
    return weight


def known_length(data: Iterable[Any] | None, collator: object, processes: Processes) -> int | None:
    """Return how many samples the data hold, where that can be known without reading them."""
    if collator is None and isinstance(data, list | tuple):
        # The lists of several processes may be the same one, or parts of it.
        first = digest(dict(data[0])) if processes.several and data and isinstance(data[0], Mapping) else ""
        sizes = processes.gather((sum(size_of(batch) for batch in data), first))
        same = len({each for _, each in sizes}) == 1
        return sizes[0][0] if same else sum(size for size, _ in sizes)
    # The length of a loader itself is a number of batches; the data set of one that is divided is whole.
    counted = data if collator is not None else getattr(data, "dataset", None)
    return len(counted) if isinstance(counted, Sized) else None
