"""Leaving: a plain LoRA adapter that any program can load on the untouched base model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from headstart.errors import BASE_PREFIX, CheckpointError
from headstart.files import check_free, whole_folder
from headstart.layers.adapter import AdapterLayer, PlainAdapter, make_plain, split
from headstart.layers.embeddings import SaveEmbeddings, needs_embeddings
from headstart.layers.experts import stacks_in
from headstart.layers.files import (
    ADAPTER_FOLDER,
    CONFIG,
    DIFFUSERS_FOLDER,
    DIFFUSERS_WEIGHTS,
    MODEL_FOLDER,
    WEIGHTS,
    write_tensors,
)
from headstart.layers.find import MERGED_TIED, base_of, check_untied, lora_layers, resolve_adapter
from headstart.layers.unwrap import looks_through, plain_name
from headstart.layers.weights import gathered, product, whole
from headstart.processes import Processes, is_sharded, together


@looks_through
def save_lora(
    model: nn.Module,
    path: str | Path,
    rank: int | None = None,
    *,
    adapter: str | None = None,
    force: bool = False,
    save_embedding_layers: SaveEmbeddings = "auto",
    uniform: bool = False,
    layout: Literal["peft", "diffusers"] = "peft",
    prefix: str | None = None,
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
        save_embedding_layers: write the embeddings and the output layer too, as an adapter needs them after
            ``resize_token_embeddings``; "auto" decides as PEFT does (:mod:`headstart.layers.embeddings`).
        uniform: one rank and one scaling for all layers, in place of ``rank_pattern`` and ``alpha_pattern``, which
            serving engines don't read.
        layout: "diffusers" writes one file, ``pytorch_lora_weights.safetensors``, as ``load_lora_adapter`` and the
            pipelines' ``load_lora_weights`` of diffusers read it: its header holds rank and alpha.
        prefix: of the names in that file: the model's place in a pipeline, which ``load_lora_adapter`` is to be given.
            By default "unet" for a U-Net, else "transformer", which is that function's own default.

    Returns:
        The relative error of the truncation over all layers (Frobenius norm of what is missing over that of the
        whole update); 0 where nothing is truncated.

    Raises:
        LayerError: the model has no such adapter.
        CheckpointError: the path exists, ``rank`` is not positive, or something is trained beside the layers that
            diffusers doesn't read.
    """
    if layout not in ("peft", "diffusers"):
        raise CheckpointError(f"layout={layout!r} is not one of 'peft', 'diffusers'.")
    adapter = resolve_adapter(model, adapter)
    config = portable_config(model, adapter)
    layers, other_tensors = split(
        adapter_tensors(model, adapter, save_embedding_layers), config, stacks_in(model, adapter)
    )
    _restore_bases(layers, other_tensors)
    plain = make_plain(layers, other_tensors, config, rank, uniform=uniform)
    with one_writes(model) as writes:
        if writes and layout == "diffusers":
            write_diffusers(plain, path, prefix, force=force)
        elif writes:
            write_plain(plain, path, force=force)
    return plain.relative_error


def write_plain(plain: PlainAdapter, path: str | Path, *, force: bool = False) -> None:
    """Write a plain adapter to a folder."""
    with whole_folder(path, ADAPTER_FOLDER, force=force) as folder:
        write_tensors(plain.tensors, folder / WEIGHTS)
        save_config(plain.config, folder)


def write_diffusers(plain: PlainAdapter, path: str | Path, prefix: str | None = None, *, force: bool = False) -> None:
    """Write a plain adapter as diffusers does; see :func:`save_lora`.

    Raises:
        CheckpointError: the path exists, or something is trained beside the layers.
    """
    if beside := next((name for name in plain.tensors if ".lora_" not in name), None):
        raise CheckpointError(
            f"{beside.removeprefix(BASE_PREFIX)!r} is trained beside the layers, and diffusers reads LoRA layers "
            "alone: leave it out of modules_to_save."
        )
    settings = {
        name: sorted(value) if isinstance(value, set) else value for name, value in plain.config.to_dict().items()
    }
    if prefix is None:
        base = (plain.config.auto_mapping or {}).get("base_model_class") or ""
        prefix = "unet" if "unet" in base.lower() else "transformer"
    tensors = {f"{prefix}.{name.removeprefix(BASE_PREFIX)}": tensor for name, tensor in plain.tensors.items()}
    about = json.dumps({f"{prefix}.{name}": value for name, value in settings.items()}, sort_keys=True)
    with whole_folder(path, DIFFUSERS_FOLDER, force=force) as folder:
        write_tensors(tensors, folder / DIFFUSERS_WEIGHTS, {"lora_adapter_metadata": about})


def write_merged(model: Any, tokenizer: Any, path: str | Path, *, force: bool = False) -> None:
    """Write the whole model with its adapter merged into the weights, and its tokenizer; ``model`` is used up.

    Raises:
        CheckpointError: see :func:`check_merged_place`.
        LayerError: a layer's weight is tied to another's.
    """
    check_merged_place(Path(path), force)
    for adapter in model.peft_config:
        check_untied(model, lora_layers(model, adapter), MERGED_TIED)
    merged = model.merge_and_unload()
    with whole_folder(path, MODEL_FOLDER, force=force) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_merged_place(path: Path, force: bool) -> None:
    """Raise CheckpointError where no merged model may be written: see ``check_free``; and never beside an adapter."""
    check_free(path, MODEL_FOLDER, force)
    if (path / CONFIG).exists():
        raise CheckpointError(
            f"{path} holds an adapter, which Transformers would add to the merged model once more: choose another path."
        )


def adapter_tensors(model: nn.Module, adapter: str, save_embedding_layers: SaveEmbeddings = False) -> dict[str, Tensor]:
    """Return an adapter's tensors by the names that PEFT gives them in files, anchors included; sharded ones whole."""
    if save_embedding_layers == "auto":
        save_embedding_layers = needs_embeddings(model, portable_config(model, adapter))
    written = [
        parameter
        for name, parameter in model.named_parameters()
        if save_embedding_layers or parameter.requires_grad or adapter in name.split(".")
    ]
    with gathered(written) as split:
        tensors: dict[str, Tensor] = get_peft_model_state_dict(
            model, adapter_name=adapter, save_embedding_layers=save_embedding_layers
        )
        if split:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    # In a model that holds adapters of its own, without PEFT's model around it, names lack what that would put before.
    return {f"{BASE_PREFIX}{name.removeprefix(BASE_PREFIX)}": whole(tensor) for name, tensor in tensors.items()}


def _restore_bases(layers: Mapping[str, AdapterLayer], other_tensors: dict[str, Tensor]) -> None:
    """Put the start back into base weights that leave with the adapter: what is written is for the untouched model."""
    for name, layer in layers.items():
        key = f"{BASE_PREFIX}{name}.base_layer.weight"
        if key in other_tensors and layer.kind == "residual" and layer.A0 is not None and layer.B0 is not None:
            start = layer.scaling * product(layer.B0.float(), layer.A0.float())
            start = start.T if layer.embedding else start
            weight = other_tensors[key]
            other_tensors[key] = (weight.float() + start.to(weight.device)).to(weight.dtype)


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
    config: Any = plainly_named(copy.deepcopy(model.peft_config[adapter]))
    base = base_of(model)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        config.auto_mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    return config


def plainly_named(config: LoraConfig) -> LoraConfig:
    """Take out of the names that PEFT resolved "all-linear" to what ``torch.compile`` had put into them."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(names := getattr(config, field, None), (set, list)):
            setattr(config, field, type(names)(map(plain_name, names)))
    return config


def save_config(config: LoraConfig, folder: Path) -> None:
    """Write ``adapter_config.json``, the same bytes for the same adapter: PEFT's sets have no order of their own."""
    config = copy.copy(config)
    for name, value in vars(config).copy().items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder), auto_mapping_dict=config.auto_mapping if config.task_type is None else None)
