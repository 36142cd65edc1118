"""Sharing an adapter's ranks out among its layers before any start, by what a method finds these worth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headstart.context import Context, shown
from headstart.errors import HeadstartWarning, LayerError, MethodError
from headstart.initialize import check_early, check_unsharded, solved, source_of
from headstart.layers.adapters import find
from headstart.layers.checkpoint import read_adapter
from headstart.layers.find import lora_layers
from headstart.layers.parts import Part, divide
from headstart.layers.ranks import set_ranks
from headstart.layers.unwrap import looks_through
from headstart.methods.base import Factors, Method
from headstart.methods.registry import parse_method
from headstart.methods.sc_lora import Astra
from headstart.methods.zero import LoRA
from headstart.processes import Processes
from headstart.progress import Show
from headstart.reporting import fallbacks
from headstart.solve import check, check_weights
from headstart.statistics.batches import Collator
from headstart.statistics.collect import Reading
from headstart.statistics.runs import Loss
from headstart.statistics.training import TrainingData

if TYPE_CHECKING:
    from transformers import Trainer


@looks_through
def allocate_ranks_(
    model: nn.Module,
    method: Method | str,
    *,
    data: Iterable[Any] | Trainer | TrainingData | None = None,
    seed: int = 0,
    adapter: str | None = None,
    loss: Loss | None = None,
    collator: Collator | None = None,
    batch_size: int = 8,
    memory_budget: int | str | None = None,
    progress: Show | bool = True,
) -> dict[str, int]:
    """Give the layers of a fresh LoRA adapter the ranks that a method shares out, and LoRA's own start; in place.

    The sum of the ranks stays what it was (of ``gora``, about that of the parameters). They are written to the
    adapter's config (``rank_pattern`` and ``alpha_pattern``; layers of rank 0 lose their adapter), so that saving,
    loading and exporting know them, and any start may follow: ``allocate_ranks_(model, "eva", data=...)``, then
    ``initialize_(model, "pissa")``. A method that shares ranks out does the same by itself in ``initialize_``.

    Args:
        model, data, seed, adapter, loss, collator, batch_size, memory_budget, progress: as
            :func:`headstart.initialize_` takes them.
        method: one that shares ranks out among layers, such as ``hs.EVA()``, ``"gora"`` or ``"astra"``.

    Returns:
        The rank of each layer, by name; 0 where it has lost its adapter.

    Raises:
        MethodError: the method shares no ranks out.
        LayerError, DataError: see :func:`headstart.initialize_`.
    """
    method = parse_method(method) if isinstance(method, str) else method
    if isinstance(method, Astra):
        # Its ranks are given ones by default, as published; here they are what is asked for.
        method = replace(method, ranks="chosen")
    if not method.shares_ranks:
        raise MethodError(f"method '{method}' shares no ranks out among layers; eva does, gora, and astra.")
    check_unsharded(model)
    context = Context(seed=seed, processes=Processes.joined())
    with shown(progress, context.processes) as context.show:
        target = find(model, adapter)
        if target.form is not None:
            raise LayerError("the layers of a VeRA adapter share one rank, which can't be shared out.")
        parts = divide(method, target.layers)
        check_early(model, parts)
        source = source_of(data, parts, collator, batch_size, loss, context)
        for part in parts:
            check(part.method, part.layers, source.training)
            check_weights(part.method, part.layers, "kept")
        nothing = TrainingData.of(None, None, batch_size, None, context.processes)
        starts, _ = solved(model, parts, source, nothing, Reading(memory_budget), context)
    notes = [*fallbacks(starts, strict=False), *context.notes]
    _install(model, target.name, parts, starts, seed)
    for sentence in notes:
        warnings.warn(sentence, HeadstartWarning, stacklevel=3)  # over looks_through
    return {layer.name: len(starts[layer.name].A) for layer in target.layers}


@torch.no_grad()
def _install(model: Any, adapter: str, parts: Iterable[Part], starts: dict[str, Factors], seed: int) -> None:
    """Give the layers their ranks, and the start that LoRA has at these: all of them, or none."""
    pairs = [(layer, starts[layer.name]) for part in parts for layer in part.layers]
    with ExitStack() as undo:
        for layer, _ in set_ranks(model, adapter, pairs, undo):
            start = LoRA().factors(replace(layer.facts(), seed=seed))
            layer.module.lora_A[adapter].weight.copy_(start.A)
            layer.module.lora_B[adapter].weight.zero_()
        undo.pop_all()


def take_ranks(model: Any, path: str | Path, adapter: str = "default") -> None:
    """Give an adapter's layers the ranks that they have in a checkpoint, which is then to be loaded.

    For models that are made anew as they were before a method shared their ranks out. A layer that the checkpoint
    lacks loses its adapter.

    Args:
        model: the PEFT model.
        path: the checkpoint's folder.
        adapter: the adapter's name.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
    """
    saved = read_adapter(Path(path)).layers
    starts = []
    for layer in lora_layers(model, adapter):
        there = saved.get(layer.name)
        same = there is not None and math.isclose(there.scaling, layer.scaling, rel_tol=1e-6)
        A = torch.empty(there.r if there else 0, layer.d_in, dtype=torch.float32, device="meta")
        B = torch.empty(layer.d_out, len(A), dtype=torch.float32, device="meta")
        starts.append((layer, Factors(A, B, keeps="scaling" if same else "alpha")))
    with ExitStack() as undo:
        set_ranks(model, adapter, starts, undo)
        undo.pop_all()
