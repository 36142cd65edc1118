"""The residual form on disk: the base model's shards with s B A taken out, and how they come back with the adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig

from headstart.errors import CheckpointError
from headstart.layers.adapter import AdapterLayer
from headstart.layers.anchored import set_anchors
from headstart.layers.checkpoint import load_checkpoint, read_adapter
from headstart.layers.files import sha256
from headstart.layers.find import TargetLayer, lora_layers, set_record, set_residual_owner
from headstart.layers.install import mark_config, subtract_product
from headstart.stream.parts import Work
from headstart.stream.pieces import Maker
from headstart.stream.skeleton import ADAPTER, model_class
from headstart.stream.tensors import tensor_bytes, write_chunks

FOLDER = "base"
_MARK = "headstart_residual.json"
# Weights in other formats, which would be the untouched model's.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"}


def finished_shard(work: Work, shard: str) -> bool:
    """Return whether a residual shard is there and what it was when it was finished."""
    path = work.folder / shard
    try:
        note = json.loads((work.folder / f"{shard}.json").read_text(encoding="utf-8"))
        return bool(note == {"key": work.key, "sha256": sha256(path)})
    except (OSError, ValueError):
        return False


def make_shard(maker: Maker, work: Work, shard: str) -> None:
    """Write one shard like the checkpoint's own, with W - s B A in place of the weights of the layers that subtract."""
    names = {maker.skeleton.keys[f"{layer.name}.weight"]: layer for layer in maker.skeleton.layers}
    places = {layer.name: place for place, layer in enumerate(maker.skeleton.layers)}
    file = maker.source.shards[shard]

    def chunks() -> Iterator[bytes]:
        yield file.header
        for name, entry in file.entries.items():
            if name in names and maker.source.places.get(name) == shard:
                yield tensor_bytes(_residual(maker, work, names[name], places[names[name].name]))
            else:
                yield from file.chunks(entry.begin, entry.end)

    with work.partial(shard) as path:
        digest = write_chunks(path, chunks())
    with work.partial(f"{shard}.json") as path:
        path.write_text(json.dumps({"key": work.key, "sha256": digest}), encoding="utf-8")


def _residual(maker: Maker, work: Work, layer: TargetLayer, place: int) -> Tensor:
    """Return a layer's weight as residual layers hold it, from the factors that were kept."""
    target = maker.filled(layer)
    module: Any = target.module
    part = work.get(f"layer-{place:05d}")
    if part is None:
        raise CheckpointError(f"{work.folder} lost what was finished of layer {layer.name!r}: run the command again.")
    if part.facts["record"]["offset"] == "subtract":
        for held, which in ((module.lora_A, "lora_A"), (module.lora_B, "lora_B")):
            held[ADAPTER].weight.data.copy_(part.read(f"base_model.model.{layer.name}.{which}.weight"))
        with ExitStack() as undo:
            subtract_product(target, undo)
            undo.pop_all()
    return module.get_base_layer().weight.detach()


def copy_rest(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights: index, configs, tokenizer; and say what the weights are."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _OTHER_WEIGHTS and not file.name.endswith(".bin.index.json"):
            (target / file.name).write_bytes(file.read_bytes())
    note = {"residual": "the weights of the layers of the adapter in the folder above are W - s B0 A0"}
    (target / _MARK).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def load_residual(path: str | Path, *, adapter: str = ADAPTER, trainable: bool = True, **options: Any) -> Any:
    """Load what a streamed start with ``base="residual"`` wrote: the residual model and, on it, its adapter.

    The model is then what ``initialize_(model, method, base="residual")`` leaves in memory.

    Args:
        path: the folder that was written; the residual model lies in ``base`` in it.
        adapter: the adapter's name.
        trainable: False freezes the adapter.
        options: for ``from_pretrained``, such as ``dtype``; by default the shards' own type.

    Raises:
        CheckpointError: the folder is damaged, or holds no residual start.
    """
    folder = Path(path)
    if not (folder / FOLDER / _MARK).is_file():
        raise CheckpointError(f"{folder} holds no residual model: it is made with --stream --base residual.")
    read = read_adapter(folder)
    config = AutoConfig.from_pretrained(str(folder / FOLDER), local_files_only=True)
    cls = model_class(folder / FOLDER, config)
    base = cls.from_pretrained(str(folder / FOLDER), local_files_only=True, **{"dtype": "auto", **options})
    base.name_or_path = read.config.base_model_name_or_path or base.name_or_path
    model = get_peft_model(base, read.config, adapter_name=adapter)
    with torch.no_grad():
        for target in lora_layers(model, adapter):
            _restore(target, read.layers.get(target.name), read.record.get("layers", {}).get(target.name), folder)
    with ExitStack() as undo:
        mark_config(model, adapter, undo)
        undo.pop_all()
    return load_checkpoint(model, folder, adapter=adapter, trainable=trainable)


def _restore(target: TargetLayer, layer: AdapterLayer | None, found: dict[str, Any] | None, folder: Path) -> None:
    """Give a layer the anchors of its residual weight."""
    if layer is None or found is None:
        raise CheckpointError(f"{folder} has no layer {target.name!r}: it is damaged or incomplete.")
    if layer.kind != "residual" or layer.A0 is None or layer.B0 is None:
        return
    module: Any = target.module
    set_anchors(module, target.adapter, layer.A0, layer.B0, "residual")
    set_residual_owner(module, target.adapter)
    set_record(target, found)
