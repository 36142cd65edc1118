"""The verb: find the layers, collect, factorise, install, report."""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from headstart.cache import open_store
from headstart.errors import DataError, HeadstartWarning, LayerError, MethodError, not_finite
from headstart.factorise import Facts, finite_weight, known_length, starts_of
from headstart.layers.find import TargetLayer, find_layers, resolve_adapter
from headstart.layers.handed import peft_starts
from headstart.layers.install import Base, check_base, install, start_note
from headstart.layers.vera import VeraTarget, find_vera_layers, install_dictionary, vera_adapter
from headstart.layers.weights import dense
from headstart.linalg.norms import squared_norm
from headstart.linalg.product import product_norm
from headstart.linalg.sketch import GradientSketch
from headstart.meters import Clock, Memory
from headstart.methods.base import Factors, Method, Moments, Needs, Wanted
from headstart.methods.handed import HandedOver
from headstart.methods.registry import parse_method
from headstart.progress import Show, progress_bars, silent
from headstart.report import LayerReport, Report
from headstart.statistics.batches import Collator
from headstart.statistics.collect import Collector
from headstart.statistics.moments import kind_moments
from headstart.statistics.plan import parse_bytes
from headstart.statistics.processes import Processes, is_sharded


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
    memory_budget: int | str | None = None,
    offload: Literal["cpu"] | None = None,
    population: int | None = None,
    first_lr: float | None = None,
    cache: bool | str | os.PathLike[str] = True,
    strict: bool = False,
    progress: Show | bool = True,
) -> Report:
    """Initialise the LoRA factors of a PEFT model in place.

    Rank, scaling, patterns and targets are read from the model. A failure half-way, Ctrl-C included, leaves the model
    as it was (but for ranks that EVA has moved).

    Under ``torchrun`` or ``accelerate launch`` call it in every process with the same seed. Methods that read data
    share the work: each process reads its part of the samples (of the same data, or of data that are already divided)
    and solves its part of the layers, and all end with the factors that one process would find, to rounding. Those of
    PEFT's own that read data are refused there.

    Args:
        model: what ``peft.get_peft_model`` returned, fresh: its adapter neither trained nor initialised. It may be
            inside DistributedDataParallel, or its parameters sharded by FSDP2. DoRA layers take methods that keep their
            start, and get the magnitude that goes with it; the layers of a VeRA adapter get a common dictionary from
            what the method finds in each (:mod:`headstart.layers.vera`). Methods that train a core (lora-xs, lora-sb)
            have to come before DDP or FSDP2.
        method: such as ``hs.LoRAOne(samples=64)``, or its name with settings, ``"lora-one:samples=64"``.
        data: for methods that need a gradient: an iterable of batches that the model accepts as keyword arguments and
            returns a loss for, or a tokenised dataset together with ``collator``. Samples are counted, not batches.
        seed: the same seed gives the same factors.
        base: "anchored" leaves the frozen weights untouched (see :mod:`headstart.layers.anchored`); "residual"
            subtracts s B A from them, as the papers do. Only matters for methods that subtract.
        adapter: the adapter's name; the active one by default.
        collator, batch_size: how a dataset of single samples becomes batches.
        memory_budget: bytes for what a pass over the data sums, or a string such as "6GiB"; by default half of what is
            free. Where not everything fits, the data are read in several passes; the report says how many. Without
            data, it bounds the weights that are decomposed together (by default 256 MiB, and on a CPU one for each
            thread at least).
        offload: "cpu" keeps these sums in CPU memory, for models that leave no room beside them.
        population: N, how many samples the training set holds, for methods that ask; by default the length of ``data``
            where it has one.
        first_lr: the rate of the first optimizer step to come, for methods that ask (lora-sb).
        cache: where to look factors up that depend on weights alone (inilora, pissa, milora, olora, lora-xs), and to
            keep them: True for the user's own folder (``HEADSTART_CACHE``), a folder, or False to compute them anew.
        strict: raise where a layer can't be started as asked for, instead of falling back with a warning.
        progress: True draws bars in a terminal or notebook once a second has gone by, False draws none; or a function
            that is called with (step, done, total).

    Returns:
        A :class:`headstart.Report`; print it.

    Raises:
        LayerError: see :func:`headstart.layers.find.find_layers` and ``find_vera_layers``; also for NaN or infinity in
            weights or gradients.
        MethodError: an unknown method or setting.
        DataError: data that are missing, empty, or can't be learned from.
    """
    method = parse_method(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise MethodError(f"{method!r} is not a method: give one like hs.PiSSA(), or its name.")
    check_base(base)
    model = _unwrapped(model, method)
    _check_numbers(offload, batch_size, population, first_lr)
    if lacking := method.missing(first_lr):
        raise MethodError(lacking)
    clock = Clock()
    memory = Memory(next(model.parameters()).device)

    with clock("find"):
        vera = vera_adapter(model, adapter)
        layers = find_vera_layers(model, vera) if vera else find_layers(model, resolve_adapter(model, adapter))
        if vera and isinstance(method, HandedOver):
            raise MethodError(f"method {method.name!r} is PEFT's own, which knows no VeRA; use one of headstart's.")
    processes = Processes.joined() if method.needs & (Needs.GRADIENT | Needs.FISHER) else Processes()
    shown = progress if processes.rank == 0 or progress is not True else False
    with _shown(shown) as show:
        with clock("collect"):
            moments = _collect_moments(method, layers)
            collect = partial(
                Collector,
                model,
                {layer.name: layer.module for layer in layers},
                collator=collator,
                batch_size=batch_size,
                memory_budget=memory_budget,
                offload=offload,
                seed=seed,
                processes=processes,
                adapter=layers[0].adapter,
            )
            size = population or known_length(data, collator, processes)
            collector = _collector(method, layers, data, size, collect)
        # Approximations hold a weight twice: as it is, and divided by the scaling.
        batch_bytes = None if memory_budget is None else parse_bytes(memory_budget, torch.device("cpu")) // 2
        facts = Facts(seed, moments, size, first_lr, batch_bytes)
        notes: list[str] = []
        store = open_store(cache, notes.append)
        if isinstance(method, HandedOver):
            with clock("factorise"):
                read = {"collator": collator, "batch_size": batch_size}
                starts = peft_starts(method, model, layers, data, seed, show, **read)
        else:
            starts, read_notes = starts_of(method, layers, facts, collector, processes, clock, show, store)
            notes += read_notes
        sentences = _fallbacks(starts, strict) + notes
    with clock("report"):
        reports = [layer_report(target, start, facts.seconds.get(target.name, 0.0)) for target, start in starts]
    with clock("install"):
        if vera:
            install_dictionary(starts)
        else:
            install(model, starts, base, start_note(method, seed, base))
    for sentence in sentences:
        warnings.warn(sentence, HeadstartWarning, stacklevel=2)
    return Report(
        method=str(method),
        base="shared dictionary" if vera else base,
        adapter=layers[0].adapter,
        seed=seed,
        layers=reports,
        seconds=clock.total(),
        seconds_by_step=clock.seconds,
        peak_memory=memory.peak(),
        samples=collector.samples if collector else 0,
        tokens=collector.tokens if collector else 0,
        plan=str(collector.plan) if collector else "",
        cached=store.served if store else 0,
        trainable=sum(layer.trainable for layer, _ in starts),
        warnings=sentences,
    )


def _unwrapped(model: nn.Module, method: Method) -> nn.Module:
    """Return the PEFT model inside DistributedDataParallel.

    Raises:
        LayerError: it is wrapped in a way in which its layers can't be read, or a core would come too late.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    ):
        raise LayerError(
            "the model is sharded by FSDP1 or DeepSpeed, whose parts can't be read layer by layer: initialise it "
            "before that, or use FSDP2."
        )
    inside = model.module if isinstance(model, DistributedDataParallel) else model
    if method.trains_core and (inside is not model or is_sharded(inside)):
        raise LayerError(
            f"method {method.name!r} adds a parameter to each layer, which DistributedDataParallel and FSDP2 would not "
            "know of: initialise the model before it is wrapped."
        )
    return inside


def _check_numbers(offload: str | None, batch_size: int, population: int | None, first_lr: float | None) -> None:
    if offload not in (None, "cpu"):
        raise MethodError(f"offload={offload!r} is not one of None, 'cpu'.")
    for name, value in (("batch_size", batch_size), ("population", population), ("first_lr", first_lr)):
        if value is not None and not value > 0:
            raise MethodError(f"{name}={value!r} must be positive.")


def _check_sketch(layer: TargetLayer, wanted: Wanted | None) -> None:
    """Raise LayerError where a sketch would be too narrow, before any data are read."""
    if wanted is None or wanted.gradient != "sketch":
        return
    try:
        limit = GradientSketch(layer.d_out, layer.d_in, wanted.width, wanted.passes).rank_limit
    except ValueError as error:
        raise LayerError(f"layer {layer.name!r}: {error}; raise width.") from error
    if limit < wanted.vectors:
        raise LayerError(
            f"layer {layer.name!r}: a sketch of width {wanted.width} gives {limit} singular vectors at most, and "
            f"{wanted.vectors} are needed; raise width."
        )


def _shown(progress: Show | bool) -> AbstractContextManager[Show]:
    if progress is True:
        return progress_bars()
    return nullcontext(progress or silent)


def _collect_moments(method: Method, layers: Sequence[TargetLayer]) -> dict[str, Moments]:
    if Needs.MOMENTS not in method.needs:
        return {}
    return kind_moments((layer.kind, finite_weight(layer)) for layer in layers)


def _collector(
    method: Method,
    layers: Sequence[TargetLayer],
    data: Iterable[Any] | None,
    population: int | None,
    collect: Callable[..., Collector],
) -> Collector | None:
    wanted = {layer.name: method.wanted(layer.name, layer.r) for layer in layers}
    asked = {name: each for name, each in wanted.items() if each is not None}
    if Needs.GRADIENT in method.needs and data is None:
        raise DataError(f"method {method.name!r} needs data: give batches with labels as data=.")
    for layer in layers:
        _check_sketch(layer, asked.get(layer.name))
    if Needs.GRADIENT in method.needs and not asked:
        raise MethodError(f"method '{method}' leaves out every layer that the adapter has; change its setting layers.")
    return collect(asked, data, method.sample_count(population)) if asked else None


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


def _norm_of_product(target: TargetLayer, factors: Factors) -> float:
    if isinstance(target, VeraTarget):
        return 0.0
    B = factors.B if factors.core is None else factors.B @ factors.core
    return target.scaling * product_norm(B, factors.A)


def layer_report(target: TargetLayer, factors: Factors, seconds: float) -> LayerReport:
    """Return a layer's line in the report: the norms of its start and of its weight, before that is installed."""
    norm_weight = math.sqrt(squared_norm(dense(target.module.get_base_layer())))
    if not math.isfinite(norm_weight):
        raise not_finite(target.name)
    return LayerReport(
        name=target.name,
        d_out=target.d_out,
        d_in=target.d_in,
        r=target.r,
        norm_A=float(torch.linalg.matrix_norm(factors.A)),
        norm_B=float(torch.linalg.matrix_norm(factors.B)),
        norm_product=_norm_of_product(target, factors),
        norm_weight=norm_weight,
        seconds=seconds,
        info=dict(factors.info),
        note=factors.note,
        repair=factors.repair,
        form="core" if factors.core is not None else "kept" if factors.offset == "keep" else "subtracted",
        history=[list(point) for point in factors.history],
    )
