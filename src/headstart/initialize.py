"""The verb: find the layers, check, collect, solve, install, report."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from headstart.cache import FactorCache, open_cache
from headstart.context import Context, Memory, shown
from headstart.errors import DataError, HeadstartWarning, LayerError, MethodError
from headstart.layers.adapters import find
from headstart.layers.experts import lower_ranks
from headstart.layers.find import check_untied
from headstart.layers.install import Subtracting, check_form
from headstart.layers.parts import Part, by_layer, check_stacks, divide
from headstart.layers.reach import left_out
from headstart.layers.unwrap import looked_through, looks_through
from headstart.layers.weights import model_device
from headstart.methods.base import Factors, Method
from headstart.methods.registry import parse_method
from headstart.processes import Processes, is_sharded, split_by_deepspeed
from headstart.progress import Show
from headstart.report import Report, Searched
from headstart.reporting import fallbacks, layer_reports
from headstart.solve import check, check_weights, settled, solve
from headstart.statistics.batches import Collator
from headstart.statistics.collect import Reading, collect
from headstart.statistics.gather import Statistics
from headstart.statistics.plan import parse_bytes
from headstart.statistics.runs import Loss
from headstart.statistics.search import samples_for, scaled, search_scale
from headstart.statistics.training import TrainingData

if TYPE_CHECKING:
    from transformers import Trainer


_SUBTRACTED_TIED = (
    'residual weights would change both; use form="anchored", which leaves the weight alone, or leave the layer out of '
    "target_modules."
)


@looks_through
def initialize_(
    model: nn.Module,
    method: Method | str,
    *,
    data: Iterable[Any] | Trainer | TrainingData | None = None,
    preserve: Iterable[Any] | TrainingData | None = None,
    seed: int = 0,
    form: Subtracting = "anchored",
    adapter: str | None = None,
    loss: Loss | None = None,
    collator: Collator | None = None,
    batch_size: int = 8,
    memory_budget: int | str | None = None,
    offload: Literal["cpu"] | None = None,
    cache: bool | str | os.PathLike[str] = True,
    strict: bool = False,
    progress: Show | bool = True,
    base: Subtracting | None = None,
) -> Report:
    """Initialise the LoRA factors of a PEFT model in place.

    Rank, scaling, patterns and targets are read from the model; methods that share ranks out among layers (eva, gora)
    write them anew. A failure half-way, Ctrl-C included, leaves the model as it was.

    Under ``torchrun`` or ``accelerate launch`` call it in every process with the same seed. Methods that read data
    share the work: each process reads its part of the samples (of the same data, or of data that are already divided)
    and solves its part of the layers, and all end with the factors that one process would find, to rounding.

    Args:
        model: what ``peft.get_peft_model`` returned, fresh: its adapter neither trained nor initialised. It may be
            inside DistributedDataParallel, DataParallel or torch.compile, or its parameters sharded by FSDP2. DoRA
            layers take methods that keep their start, and get the magnitude that goes with it; the layers of a VeRA
            adapter get a common dictionary from what the method finds in each (:mod:`headstart.layers.vera`). Methods
            that train a core (lora-xs, lora-sb) or share ranks out (eva, gora) have to come before DDP, FSDP2 and the
            optimizer.
        method: such as ``hs.LoRAOne(samples=64)``, or its name with settings, ``"lora-one:samples=64"``; of different
            layers different ones, ``hs.PerLayer({"q_proj|v_proj": hs.PiSSA(), "*": hs.LoRA()})``.
        data: for methods that read data: a trainer of Transformers or TRL, whose own data, collator, loss and schedule
            are used (:func:`headstart.statistics.trainer.from_trainer`); or an iterable of batches that the model
            accepts as keyword arguments and returns a loss for; or a tokenised dataset together with ``collator``.
            Samples are counted, not batches.
        preserve: for methods that protect an ability (sc-lora, lora-null): data of it, as ``data`` but for trainers;
            read forward only, without labels.
        seed: the same seed gives the same factors.
        form: of methods whose start must not change the model: "anchored" leaves the frozen weights untouched (see
            :mod:`headstart.layers.anchored`); "residual" subtracts s B A from them, as the papers do.
        adapter: the adapter's name; the active one by default.
        loss: a callable (model, batch) -> scalar loss in place of the model's own, as for diffusion or distillation.
        collator, batch_size: how a dataset of single samples becomes batches; a trainer has its own.
        memory_budget: bytes for what a pass over the data sums, or a string such as "6GiB"; by default half of what is
            free. Where not everything fits, the data are read in several passes; the report says how many. Without
            data, it bounds the weights that are decomposed together (by default 256 MiB, and on a CPU one for each
            thread at least).
        offload: "cpu" keeps these sums in CPU memory, for models that leave no room beside them.
        cache: where to look up, and keep, factors that depend on weights alone. True: those that cost more than their
            looking up (inilora), in the user's own folder (``HEADSTART_CACHE``); a folder: of all such methods, there;
            False: none.
        strict: raise where a layer can't be started as asked for, instead of falling back with a warning.
        progress: True draws bars in a terminal or notebook once a second has gone by, False draws none; or a function
            that is called with (step, done, total).
        base: the former name of ``form``.

    Returns:
        A :class:`headstart.Report`; print it.

    Raises:
        LayerError: see :func:`headstart.layers.adapters.find`; also for NaN or infinity in weights or gradients, and
            where ``strict`` forbids a fallback.
        MethodError: an unknown method or setting.
        DataError: data that are missing, empty, or can't be learned from.
    """
    if base is not None:
        warnings.warn("base= is now called form=, and goes in the next version.", FutureWarning, stacklevel=3)
        form = base
    method = parse_method(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise MethodError(f"{method!r} is not a method: give one like hs.PiSSA(), or its name.")
    check_form(form)
    reading = Reading(memory_budget, offload)
    check_unsharded(model)
    context = Context(seed=seed, processes=Processes.joined())
    # Approximations hold a weight twice: as it is, and divided by the scaling.
    context.batch_bytes = None if memory_budget is None else parse_bytes(memory_budget, torch.device("cpu")) // 2
    with shown(progress, context.processes) as context.show:
        with context.clock("find"):
            target = find(model, adapter)
            parts = divide(method, target.layers)
            check_early(model, parts)
            check_stacks(parts, form)
            subtracted = [layer for part in parts if part.form(form) == "residual" for layer in part.layers]
            check_untied(model, subtracted, _SUBTRACTED_TIED)
            memory = Memory(model_device(model))
            source = source_of(data, parts, collator, batch_size, loss, context)
            searches = any(part.method.searches_scale for part in parts)
            source, to_search = source.twice() if searches else (source, source)
            for part in parts:
                check(part.method, part.layers, source.training)
                check_weights(part.method, part.layers, form)
            to_preserve = TrainingData.of(preserve, collator, batch_size, None, context.processes)
            kept = open_cache(cache, context.notes.append)
        starts, read = solved(model, parts, source, to_preserve, reading, context, kept)
        searched: dict[str, Searched] = {}
        with context.clock("search"):
            for part in parts:
                if part.method.searches_scale:
                    searched[str(part.method)] = _searched(model, part, starts, to_search, context)
    notes = [*fallbacks(starts, strict), *context.notes]
    part_of = by_layer(parts)
    pairs = [(layer, starts[layer.name]) for layer in target.layers]
    with context.clock("report"):
        methods = [(part_of[layer.name].method, part_of[layer.name].form(form)) for layer, _ in pairs]
        reports = layer_reports(pairs, methods, context)
    with context.clock("install"):
        target.install(pairs, parts, form, seed)
    for sentence in notes:
        warnings.warn(sentence, HeadstartWarning, stacklevel=3)  # over looks_through
    return Report(
        method=str(method),
        form=target.form or " and ".join(dict.fromkeys(layer.form for layer in reports)),
        adapter=target.name,
        seed=seed,
        layers=reports,
        seconds=context.clock.total(),
        seconds_by_step=context.clock.seconds,
        peak_memory=memory.peak(),
        samples=max((statistics.samples for statistics in read.values()), default=0),
        tokens=max((statistics.tokens for statistics in read.values()), default=0),
        plan="; ".join(f"{name}: {own.plan}" if len(read) > 1 else own.plan for name, own in read.items()),
        cached=kept.served if kept else 0,
        trainable=sum(layer.trainable for layer in target.layers),
        left_out=left_out(model, target.layers),
        lower_ranks=lower_ranks(target.layers),
        searched=searched,
        warnings=notes,
    )


def solved(
    model: nn.Module,
    parts: Sequence[Part],
    data: TrainingData,
    preserve: TrainingData,
    reading: Reading,
    context: Context,
    cache: FactorCache | None = None,
) -> tuple[dict[str, Factors], dict[str, Statistics]]:
    """Collect what the parts want and solve it; return the start of each layer, and of each method what was read."""
    starts: dict[str, Factors] = {}
    read: dict[str, Statistics] = {}
    for part, statistics in context.timed("collect", collect(model, parts, data, preserve, reading, context)):
        with context.clock("solve"):
            starts |= solve(part.method, part.layers, statistics, context, data.training, cache)
        read |= {str(part.method): statistics} if statistics.plan else {}
    with context.clock("solve"):
        for part in parts:
            starts |= settled(part.method, part.layers, {layer.name: starts[layer.name] for layer in part.layers})
    return starts, read


def source_of(
    data: object,
    parts: Sequence[Part],
    collator: Collator | None,
    batch_size: int,
    loss: Loss | None,
    context: Context,
) -> TrainingData:
    """Return what was given as data, a trainer's included."""
    if isinstance(data, TrainingData) and (collator is not None or loss is not None):
        raise DataError("TrainingData holds its own collator and loss: give them to it, not to the verb.")
    # Nobody has a trainer who hasn't imported it, which takes a second.
    module = sys.modules.get("transformers.trainer")
    if module is None or not isinstance(data, module.Trainer):
        return TrainingData.of(data, collator, batch_size, loss, context.processes)
    from headstart.statistics.trainer import from_trainer, known_training

    if collator is not None or loss is not None:
        raise DataError("a trainer given as data brings its own collator and loss: leave collator= and loss= out.")
    if data.optimizer is not None and (does := _new_parameters(parts)):
        raise LayerError(
            f"{does}, which the trainer's optimizer would not know of: initialise the model before the optimizer is "
            "made."
        )
    reading = [part.method for part in parts if _reads(part)]
    population = known_training(data, rate=False).population
    counts = [(method.sample_count(population), method.searches_scale) for method in reading]
    samples = max((count + (samples_for(count) if searches else 0) for count, searches in counts), default=0)
    return from_trainer(data, samples, context.seed, rate=any(part.method.reads_rate for part in parts))


def _searched(
    model: nn.Module, part: Part, starts: dict[str, Factors], data: TrainingData, context: Context
) -> Searched:
    """Search the scale of a part's starts, and give it to them."""
    own = {layer.name: starts[layer.name] for layer in part.layers}
    layers = {layer.name: layer for layer in part.layers}
    count = part.method.sample_count(data.training.population)
    result = search_scale(model, own, layers, data, count, context)
    starts |= {name: scaled(factors, result.multiple) for name, factors in own.items()}
    return result


def _reads(part: Part) -> bool:
    """Return whether a part's method reads the data to learn, in general or for one of its layers."""
    return part.method.reads_task or any(part.method.wants(layer.facts()).task for layer in part.layers)


def check_unsharded(model: nn.Module) -> None:
    """Raise LayerError where layers can't be read."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        map(split_by_deepspeed, model.parameters())
    ):
        raise LayerError(
            "the model is sharded by FSDP1 or DeepSpeed, whose parts can't be read layer by layer: initialise it "
            "before that, load what headstart init wrote, or use FSDP2."
        )


def check_early(model: nn.Module, parts: Sequence[Part]) -> None:
    """Raise LayerError where new parameters would come too late."""
    distributed = any(isinstance(wrapper, DistributedDataParallel) for wrapper in looked_through())
    if (distributed or is_sharded(model)) and (does := _new_parameters(parts)):
        raise LayerError(
            f"{does}, which DistributedDataParallel and FSDP2 would not know of: initialise the model before it is "
            "wrapped."
        )


def _new_parameters(parts: Sequence[Part]) -> str:
    """Return in words how a method makes parameters that weren't there before; empty where none does."""
    for method in (part.method for part in parts):
        if method.form == "core":
            return f"method {method.name!r} adds a parameter to each layer"
        if method.shares_ranks:
            return f"method {method.name!r} gives layers parameters of other ranks"
    return ""
