"""Preparing to read: samples counted and shared, two of them run for what their layers see, passes planned."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from headstart.errors import LayerError
from headstart.layers.factors import is_embedding
from headstart.layers.lookups import lookup_of
from headstart.layers.weights import model_device
from headstart.methods.base import Wants
from headstart.processes import Processes, digest, is_sharded, together
from headstart.statistics.batches import Batch, Collator, Samples, iterate_samples, size_of
from headstart.statistics.collector import Collector
from headstart.statistics.gather import finest
from headstart.statistics.lengths import by_length
from headstart.statistics.losses import check_labels
from headstart.statistics.masks import Layout, Tokens, layout_of
from headstart.statistics.plan import Need, make_plan, parse_bytes
from headstart.statistics.probe import InputsSeen, inputs_seen
from headstart.statistics.quiet import active_beside, drawn_from, quiet
from headstart.statistics.reader import Reader
from headstart.statistics.routed import Experts
from headstart.statistics.runs import Loss
from headstart.statistics.stacks import Stack
from headstart.statistics.sums import Shape
from headstart.statistics.watched import Watched

logger = logging.getLogger(__name__)

# A backward pass through frozen weights costs as much as the forward pass, and the sums about as much again.
_BACKWARD = 3.0


def prepare(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    wanted: Mapping[str, Wants],
    data: Iterable[Any],
    samples: int,
    *,
    collator: Collator | None = None,
    batch_size: int = 8,
    memory_budget: int | str | None = None,
    offload: Literal["cpu"] | None = None,
    seed: int = 0,
    processes: Processes | None = None,
    adapter: str | None = None,
    loss: Loss | None = None,
    single: bool = False,
    stacks: Sequence[Stack] = (),
    experts: Experts | None = None,
) -> Collector:
    """Read the data into memory, run two samples forward, and plan the passes.

    Where PyTorch's process group is set up, every process calls this and reads its share: of the same data every
    ``count``-th batch, of data that are already divided (their first batches differ) all of its own, up to its share of
    ``samples``. Parameters sharded by FSDP2 need all processes to run the model in step, so that samples are read one
    at a time.

    Args:
        model: the PEFT model; called with each batch as keyword arguments, it must return a loss where a backward pass
            is wanted.
        layers: the LoRA layers by name; all adapters of the model are off while it is run.
        wanted: by layer, what to collect; layers that are not in it are left alone.
        data: see :func:`headstart.statistics.batches.iterate_samples`; read once, and held.
        samples: how many samples to read.
        collator, batch_size: for data of single samples.
        memory_budget: bytes for all that a pass sums, or a string such as "6GiB"; None for half of what is free.
        offload: "cpu" keeps the sums there.
        seed: of what data, collator and loss draw at random: the same in every process.
        processes: those that share the work.
        adapter: the one that is started; others that are active, and so switched off, are named in a note.
        loss: see :class:`headstart.statistics.reader.Reader`.
        single: each batch is one sample, and read as a whole.
        stacks: parameters whose matrices are layers.
        experts: of these, the layers whose inputs are wanted, see :func:`headstart.statistics.routed.routed_layers`.

    Raises:
        LayerError: the model is sharded, and a layer is an expert's, a router's or a convolution.
        DataError: the data are empty, a sample has no label, the model gives no loss, or the loss is not finite.
    """
    processes = processes or Processes()
    lockstep = processes.several and is_sharded(model)
    if lockstep and stacks:
        raise LayerError(
            f"layer {stacks[0].names[0]!r}: the model is sharded over processes, and the gradient of such a parameter "
            "is read whole: initialise before fully_shard, or use a method without gradients."
        )
    device = model_device(model)
    sizes = {name: (int(layer.out_features), int(layer.in_features)) for name, layer in layers.items()}
    stacked = {name: stack.size for stack in stacks for name in stack.names}
    modules = {name: layers[name].get_base_layer() for name in wanted if name in layers}
    tokens: Tokens = next((wants.tokens for wants in wanted.values()), "attention")
    backward = any(wants.backward for wants in wanted.values())
    in_step_with = processes if lockstep else None
    watched = Watched(modules, stacks, experts or {})
    reader = Reader(model, watched, tokens, in_step_with=in_step_with, loss=loss, whole=single, seed=seed)
    lookups = {name: lookup_of(layer) for name, layer in layers.items() if is_embedding(layer)}
    shapes = {name: Shape(*(sizes | stacked)[name], wants, lookups.get(name)) for name, wants in wanted.items()}
    # One plan for all, though each has its own idea of what is free.
    budget = min(processes.gather(parse_bytes(memory_budget, torch.device("cpu") if offload == "cpu" else device)))
    with together(processes), drawn_from(seed, device):
        chunks = list(iterate_samples(data, samples, collator=collator, batch_size=batch_size, single=single))
        for chunk in chunks if loss is None and (backward or tokens == "labels") else []:
            check_labels(chunk)
    own_chunks, spare = _share(chunks, samples, reader, processes, lockstep, single)
    groups, layouts, seconds = _probe(model, modules, own_chunks or [spare], reader, processes, lockstep)
    # What reads a matrix of a stack is the stack's own business.
    groups |= {name: len(modules) + place for place, name in enumerate(shapes) if name in stacked}
    plan = make_plan(_needs(shapes, groups), budget, seconds=seconds)
    logger.info("data: %s", plan)
    return Collector(
        model=model,
        reader=reader,
        modules=modules,
        token_choice=tokens,
        backward=backward,
        shapes=shapes,
        groups=groups,
        layouts=layouts,
        chunks=own_chunks,
        spare=spare,
        plan=plan,
        processes=processes,
        lockstep=lockstep,
        offload=offload == "cpu",
        asked=samples,
        samples=sum(processes.gather(sum(chunk.size for chunk in own_chunks))),
        tokens=sum(processes.gather(sum(_tokens(chunk.batch) for chunk in own_chunks))),
        beside=[] if adapter is None else active_beside(model, adapter),
    )


def _share(
    chunks: list[Samples], samples: int, reader: Reader, processes: Processes, lockstep: bool, single: bool
) -> tuple[list[Samples], Samples]:
    """Return the batches that this process reads, and one to keep in step with when there are no more."""
    divided = len(set(processes.gather(digest(chunks[0].batch)))) > 1
    if divided:
        share = len(range(processes.rank, samples, processes.count))
        chunks = list(iterate_samples([chunk.batch for chunk in chunks], max(share, 1), single=single))
    # Where labels lie along a decoder, a sample has two lengths.
    chunks = chunks if reader.keeps_batches else by_length(chunks)
    if lockstep:
        chunks = [sample for chunk in chunks for sample in reader.each_alone(chunk)]
    return (chunks if divided else processes.share(chunks)), chunks[0]


def _probe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    chunks: Sequence[Samples],
    reader: Reader,
    processes: Processes,
    lockstep: bool,
) -> tuple[dict[str, int], dict[str, Layout], float]:
    """Run two samples forward, each alone: which layers read the same input, how their rows lie, how long it takes.

    The longest sample shows most; a second one of another length, what holds for all lengths.
    """
    rows = [(chunk, row) for chunk in chunks for row in _rows(chunk, whole=reader.probes_batches)]
    lengths = [
        _tokens({key: value if row is None else value[row : row + 1] for key, value in _masks(chunk)})
        for chunk, row in rows
    ]
    longest = max(range(len(rows)), key=lambda place: lengths[place])
    second = next((place for place, length in enumerate(lengths) if length != lengths[longest]), longest)
    partitions, layouts = [], []
    for place in (second, longest):
        chunk, row = rows[place]
        batch = chunk.batch if row is None else reader.alone(chunk.batch, row)
        began = time.perf_counter()
        with together(processes), inputs_seen(modules) as seen, quiet(model):
            reader.run_layers(batch)
        seconds = time.perf_counter() - began
        size = 1 if row is not None else max(1, size_of(batch))
        layouts.append({name: layout_of(seen.shapes.get(name), _tokens(batch) // size) for name in modules})
        # Were a group found not to be one, a process would have to run a batch again, out of step.
        partitions.append((InputsSeen() if lockstep else seen).groups(list(modules)))
    agreed: dict[str, Layout] = {
        name: layout if layout == layouts[1][name] else "other" for name, layout in layouts[0].items()
    }
    seconds *= _BACKWARD * sum(_tokens(chunk.batch) or chunk.size for chunk in chunks) / (_tokens(batch) or 1)
    groups = finest([partition for gathered in processes.gather(partitions) for partition in gathered])
    return groups, agreed, seconds


def _needs(shapes: Mapping[str, Shape], groups: Mapping[str, int]) -> list[Need]:
    members: dict[int, list[str]] = defaultdict(list)
    for name, group in groups.items():
        members[group].append(name)
    needs = []
    for names in members.values():
        first = shapes[names[0]]
        if not first.wanted.input_moments:
            needs += [Need((name,), 4 * _floats(shapes[name])) for name in names]
            continue
        size = first.d_in**2 + first.d_in + sum(_floats(shapes[name]) for name in names)
        needs.append(Need(tuple(names), 4 * size))
    return needs


def _floats(shape: Shape) -> int:
    gradient = shape.d_out * shape.d_in * (2 if shape.wanted.halves else 1) if shape.wanted.gradient else 0
    outputs = {None: 0, "diagonal": 2 * shape.d_out, "full": shape.d_out**2 + shape.d_out}
    return gradient + outputs[shape.wanted.outputs]


def _rows(chunk: Samples, *, whole: bool) -> Sequence[int | None]:
    """Return the rows of a batch's samples, None for a batch that can't, or mustn't, be cut."""
    return range(chunk.size) if chunk.cut and not whole else (None,)


def _masks(chunk: Samples) -> list[tuple[str, Tensor]]:
    candidates = [(name, chunk.batch.get(name)) for name in ("attention_mask", "input_ids")]
    return [(name, value) for name, value in candidates if isinstance(value, Tensor)]


def _tokens(batch: Batch) -> int:
    for name in ("attention_mask", "input_ids"):
        value = batch.get(name)
        if isinstance(value, Tensor):
            return int(value.sum()) if name == "attention_mask" else value.numel()
    return 0
