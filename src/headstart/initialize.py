"""The verb: find the layers, collect, factorise, install, report."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import psutil
import torch
from torch import nn

from headstart._version import __version__
from headstart.errors import DataError, HeadstartWarning, LayerError, MethodError, not_finite
from headstart.layers.find import TargetLayer, find_layers, resolve_adapter
from headstart.layers.install import Base, check_base, check_factors, install
from headstart.layers.weights import base_weight
from headstart.linalg.product import product_norm
from headstart.methods.base import Factors, LayerInputs, Method, Moments, Needs
from headstart.methods.registry import parse_method
from headstart.progress import Show, progress_bars, silent
from headstart.report import LayerReport, Report
from headstart.statistics.batches import Collator
from headstart.statistics.gradients import GradientStatistics, mean_gradients
from headstart.statistics.moments import kind_moments

# Weights of one shape are decomposed together, as many as fit in this many bytes of float32.
_BATCH_BYTES = 256 * 2**20


def initialize_(
    model: nn.Module,
    method: Method | str,
    *,
    data: Iterable[Any] | None = None,
    seed: int = 0,
    base: Base = "anchored",
    adapter: str | None = None,
    collator: Collator | None = None,
    batch_size: int = 8,
    offload: Literal["cpu"] | None = None,
    strict: bool = False,
    progress: Show | bool = True,
) -> Report:
    """Initialise the LoRA factors of a PEFT model in place.

    Rank, scaling, patterns and targets are read from the model. A failure half-way, Ctrl-C included, leaves the model
    as it was. In several processes, call it in each with the same data and seed: nothing is exchanged between them.

    Args:
        model: what ``peft.get_peft_model`` returned, fresh: its adapter neither trained nor initialised.
        method: such as ``hs.LoRAOne(samples=64)``, or its name with settings, ``"lora-one:samples=64"``.
        data: for methods that need a gradient: an iterable of batches that the model accepts as keyword arguments and
            returns a loss for, or a tokenised dataset together with ``collator``. Samples are counted, not batches.
        seed: the same seed gives the same factors.
        base: "anchored" leaves the frozen weights untouched (see :mod:`headstart.layers.anchored`); "residual"
            subtracts s B A from them, as the papers do. Only matters for methods that subtract.
        adapter: the adapter's name; the active one by default.
        collator, batch_size: how a dataset of single samples becomes batches.
        offload: "cpu" sums gradients in CPU memory, for models that leave no room beside them.
        strict: raise where a layer can't be started as asked for, instead of falling back with a warning.
        progress: True draws bars in a terminal or notebook once a second has gone by, False draws none; or a function
            that is called with (step, done, total).

    Returns:
        A :class:`headstart.Report`; print it.

    Raises:
        LayerError: see :func:`headstart.layers.find.find_layers`; also for NaN or infinity in weights or gradients.
        MethodError: an unknown method or setting.
        DataError: data that are missing, empty, or can't be learned from.
    """
    method = parse_method(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise MethodError(f"{method!r} is not a method: give one like hs.PiSSA(), or its name.")
    check_base(base)
    clock = _Clock()
    memory = _Memory(model)

    with clock("find"):
        layers = find_layers(model, resolve_adapter(model, adapter))
    with _shown(progress) as show:
        with clock("collect"):
            moments = _collect_moments(method, layers)
            statistics = _collect_gradients(model, method, layers, data, collator, batch_size, offload, show)
        with clock("factorise"):
            starts, seconds = _factorise(method, layers, seed, moments, statistics, show)
            sentences = _fallbacks(starts, strict) + statistics.notes
    with clock("report"):
        reports = [_layer_report(target, start, seconds[target.name]) for target, start in starts]
    with clock("install"):
        note: dict[str, object] = {"method": str(method), "seed": seed, "base": base, "version": __version__}
        install(model, starts, base, note)
    for sentence in sentences:
        warnings.warn(sentence, HeadstartWarning, stacklevel=2)
    return Report(
        method=str(method),
        base=base,
        adapter=layers[0].adapter,
        seed=seed,
        layers=reports,
        seconds=clock.total(),
        seconds_by_step=clock.seconds,
        peak_memory=memory.peak(),
        samples=statistics.samples,
        tokens=statistics.tokens,
        trainable=sum(layer.r * (layer.d_in + layer.d_out) for layer in layers),
        warnings=sentences,
    )


def _shown(progress: Show | bool) -> AbstractContextManager[Show]:
    if progress is True:
        return progress_bars()
    return nullcontext(progress or silent)


def _collect_moments(method: Method, layers: Sequence[TargetLayer]) -> dict[str, Moments]:
    if Needs.MOMENTS not in method.needs:
        return {}
    return kind_moments((layer.kind, _finite_weight(layer)) for layer in layers)


def _collect_gradients(
    model: nn.Module,
    method: Method,
    layers: Sequence[TargetLayer],
    data: Iterable[Any] | None,
    collator: Collator | None,
    batch_size: int,
    offload: Literal["cpu"] | None,
    show: Show,
) -> GradientStatistics:
    if Needs.GRADIENT not in method.needs:
        return GradientStatistics()
    if data is None:
        raise DataError(f"method {method.name!r} needs data: give batches with labels as data=.")
    return mean_gradients(
        model,
        {layer.name: layer.module for layer in layers},
        data,
        method.sample_count(),
        collator=collator,
        batch_size=batch_size,
        offload=offload,
        progress=partial(show, "reading data"),
    )


def _factorise(
    method: Method,
    layers: Sequence[TargetLayer],
    seed: int,
    moments: dict[str, Moments],
    statistics: GradientStatistics,
    show: Show,
) -> tuple[list[tuple[TargetLayer, Factors]], dict[str, float]]:
    made: dict[str, Factors] = {}
    seconds: dict[str, float] = {}
    for group in _groups(method, layers):
        began = time.perf_counter()
        inputs = [_inputs(method, layer, seed, moments, statistics) for layer in group]
        for layer, factors in zip(group, method.factors_batch(inputs, show), strict=True):
            check_factors(layer, factors)
            made[layer.name] = factors
            # Freed as soon as it is used: gradients are the largest thing held.
            statistics.gradients.pop(layer.name, None)
        for layer in group:
            seconds[layer.name] = (time.perf_counter() - began) / len(group)
        show("factorising", len(made), len(layers))
    return [(layer, made[layer.name]) for layer in layers], seconds


def _groups(method: Method, layers: Sequence[TargetLayer]) -> Iterator[list[TargetLayer]]:
    """Yield layers one by one, or, for batched methods, those of one shape and rank together, within a memory limit."""
    if not method.batched:
        yield from ([layer] for layer in layers)
        return
    alike: dict[tuple[int, int, int, torch.device], list[TargetLayer]] = defaultdict(list)
    for layer in layers:
        device = layer.module.get_base_layer().weight.device
        alike[layer.d_out, layer.d_in, layer.r, device].append(layer)
    for (d_out, d_in, _, _), group in alike.items():
        size = max(1, _BATCH_BYTES // (4 * d_out * d_in))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _inputs(
    method: Method,
    layer: TargetLayer,
    seed: int,
    moments: dict[str, Moments],
    statistics: GradientStatistics,
) -> LayerInputs:
    gradient = None
    if Needs.GRADIENT in method.needs:
        gradient = statistics.gradients.get(layer.name)
        if gradient is None:
            gradient = torch.zeros(layer.d_out, layer.d_in)
    return LayerInputs(
        name=layer.name,
        d_out=layer.d_out,
        d_in=layer.d_in,
        r=layer.r,
        scaling=layer.scaling,
        seed=seed,
        weight=_finite_weight(layer) if Needs.WEIGHT in method.needs else None,
        moments=moments.get(layer.kind),
        gradient=gradient,
    )


def _finite_weight(layer: TargetLayer) -> torch.Tensor:
    weight = base_weight(layer.module)
    # The extremes are NaN or infinite where any entry is, and need no memory of their own.
    if not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(weight)):
        raise not_finite(layer.name)
    return weight


def _fallbacks(starts: Sequence[tuple[TargetLayer, Factors]], strict: bool) -> list[str]:
    by_note: dict[str, list[str]] = defaultdict(list)
    for target, factors in starts:
        if factors.note:
            by_note[factors.note].append(target.name)
    sentences: list[str] = []
    for note, names in by_note.items():
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        sentences.append(f"{listed}: {note}")
    if strict and sentences:
        raise LayerError(sentences[0])
    return sentences


def _layer_report(target: TargetLayer, factors: Factors, seconds: float) -> LayerReport:
    weight = target.module.get_base_layer().weight
    norm_weight = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
    if not math.isfinite(norm_weight):
        raise not_finite(target.name)
    return LayerReport(
        name=target.name,
        d_out=target.d_out,
        d_in=target.d_in,
        r=target.r,
        norm_A=float(torch.linalg.matrix_norm(factors.A)),
        norm_B=float(torch.linalg.matrix_norm(factors.B)),
        norm_product=target.scaling * product_norm(factors.B, factors.A),
        norm_weight=norm_weight,
        seconds=seconds,
        info=dict(factors.info),
        note=factors.note,
    )


class _Clock:
    """Times the steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - began

    def total(self) -> float:
        return sum(self.seconds.values())


class _Memory:
    """Peak memory: of the accelerator the model is on, else the process's peak resident set."""

    def __init__(self, model: nn.Module) -> None:
        self._device = next(model.parameters()).device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if sys.platform == "win32":
            return int(psutil.Process().memory_info().peak_wset)
        import resource  # not on Windows

        # In KiB, except on macOS, where it is in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)
