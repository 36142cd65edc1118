"""Leaving: a plain LoRA adapter that any program can load on the untouched base model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from headstart.files import whole_folder
from headstart.layers.adapter import PlainAdapter, make_plain, split
from headstart.layers.files import ADAPTER_FOLDER, MODEL_FOLDER, WEIGHTS, write_tensors
from headstart.layers.find import resolve_adapter
from headstart.layers.unwrap import looks_through
from headstart.layers.weights import whole
from headstart.statistics.processes import Processes, is_sharded, together


@looks_through
def save_lora(
    model: nn.Module,
    path: str | Path,
    rank: int | None = None,
    *,
    adapter: str | None = None,
    force: bool = False,
    save_embedding_layers: bool = False,
    uniform: bool = False,
) -> float:
    """Write a plain LoRA adapter: ``adapter_model.safetensors`` and ``adapter_config.json``.

    On the untouched base model it computes what the model computes here. An anchored (or residual) layer of rank r
    becomes one of rank 2 r, exactly; ``rank`` truncates every layer's update to at most that rank by SVD, without
    forming it.

    Args:
        model: the PEFT model. Of one that FSDP2 has sharded, every process must call this, and the first one writes.
        path: the folder to write, whole or not at all.
        rank: None for the exact adapter.
        adapter: the adapter's name; the active one by default.
        force: replace an adapter's files in a folder that exists; what else is in it stays.
        save_embedding_layers: write the embeddings too, as they must be after ``resize_token_embeddings``.
        uniform: one rank and one scaling for all layers, in place of ``rank_pattern`` and ``alpha_pattern``, which
            serving engines don't read.

    Returns:
        The relative error of the truncation over all layers (Frobenius norm of what is missing over that of the
        whole update); 0 where nothing is truncated.

    Raises:
        LayerError: the model has no such adapter.
        CheckpointError: the path exists, or ``rank`` is not positive.
    """
    adapter = resolve_adapter(model, adapter)
    config = portable_config(model, adapter)
    layers, rest = split(adapter_tensors(model, adapter, save_embedding_layers), config)
    plain = make_plain(layers, rest, config, rank, uniform=uniform)
    with one_writes(model) as mine:
        if mine:
            write_plain(plain, path, force=force)
    return plain.relative_error


def write_plain(plain: PlainAdapter, path: str | Path, *, force: bool = False) -> None:
    """Write a plain adapter to a folder."""
    with whole_folder(path, ADAPTER_FOLDER, force=force) as folder:
        write_tensors(plain.tensors, folder / WEIGHTS)
        save_config(plain.config, folder)


def write_merged(model: Any, tokenizer: Any, path: str | Path, *, force: bool = False) -> None:
    """Write the whole model with its adapter merged into the weights, and its tokenizer; ``model`` is used up."""
    merged = model.merge_and_unload()
    with whole_folder(path, MODEL_FOLDER, force=force) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def adapter_tensors(model: nn.Module, adapter: str, save_embedding_layers: bool = False) -> dict[str, Tensor]:
    """Return an adapter's tensors by the names that PEFT gives them in files, anchors included; sharded ones whole."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=save_embedding_layers
    )
    return {name: whole(tensor) for name, tensor in tensors.items()}


@contextmanager
def one_writes(model: nn.Module) -> Iterator[bool]:
    """Yield whether this process is to write what it holds: of a model that FSDP2 has sharded, only the first is.

    The others wait for it, so that what it wrote is there for all of them, and fail where it failed.
    """
    processes = Processes.joined() if is_sharded(model) else Processes()
    with together(processes):
        yield processes.rank == 0


def portable_config(model: Any, adapter: str) -> LoraConfig:
    """Return a copy of an adapter's config that names the base model's class, as PEFT's own saving does."""
    config: Any = copy.deepcopy(model.peft_config[adapter])
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        config.auto_mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    return config


def save_config(config: LoraConfig, folder: Path) -> None:
    """Write ``adapter_config.json``, the same bytes for the same adapter: PEFT's sets have no order of their own."""
    config = copy.copy(config)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(found := getattr(config, name, None), set):
            setattr(config, name, sorted(found))
    config.save_pretrained(str(folder), auto_mapping_dict=config.auto_mapping if config.task_type is None else None)
