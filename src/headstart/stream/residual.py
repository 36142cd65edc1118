"""The residual form on disk: the base model's shards with s B A taken out, and how they come back with the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig

from headstart.errors import BASE_PREFIX, CheckpointError, ModelError
from headstart.files import Kind, sha256, write_json
from headstart.layers.adapter import AdapterLayer
from headstart.layers.anchored import set_anchors
from headstart.layers.checkpoint import load_checkpoint, read_adapter
from headstart.layers.experts import ExpertLayer
from headstart.layers.files import ADAPTER_FOLDER, CONFIG, RESIDUAL_MARK, read_json
from headstart.layers.find import TargetLayer, lora_layers, set_residual_owner
from headstart.layers.install import subtract_product
from headstart.layers.weights import adapted_parameter
from headstart.stream.experts import targets_of
from headstart.stream.pieces import Maker, layer_name
from headstart.stream.skeleton import ADAPTER, model_class, parameter_of
from headstart.stream.tensors import tensor_bytes
from headstart.stream.work import Work

FOLDER = "base"
# Weights in other formats, which would be the untouched model's.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".ot"}


def _owned(folder: Path) -> set[str]:
    """Return what a streamed start writes: an adapter, and the files of the residual model as its mark lists them."""
    owned = set(ADAPTER_FOLDER.owned(folder))
    if (folder / FOLDER / RESIDUAL_MARK).is_file():
        with suppress(CheckpointError):
            mark = read_json(folder / FOLDER / RESIDUAL_MARK)
            owned |= {f"{FOLDER}/{name}" for name in (RESIDUAL_MARK, *mark.get("sha256", ()), *mark.get("files", ()))}
    return owned


STREAMED_FOLDER = Kind(_owned, key=CONFIG)


def check_place(out: Path) -> None:
    """Raise CheckpointError where the residual model's place in a folder holds something else."""
    place = out / FOLDER
    if place.exists() and not (place / RESIDUAL_MARK).is_file():
        raise CheckpointError(
            f"{place} exists and holds no residual model, so nothing is written there: choose another path."
        )


def check_writable(maker: Maker) -> None:
    """Refuse parameters that are to be residual and can't be written back as the checkpoint stores them.

    Raises:
        CheckpointError: names one.
    """
    layouts: set[tuple[object, ...]] = set()
    for target in maker.skeleton.targets:
        stack = maker.skeleton.stacks.get(parameter_of(target))
        if stack is None or maker.target_forms[target.name] != "residual" or stack.layout in layouts:
            continue
        stack.check_writable()
        layouts.add(stack.layout)


def make_shard(maker: Maker, work: Work, shard: str) -> str:
    """Write one shard like the checkpoint's own, with W - s B A in place of the weights of the layers that subtract.

    Returns:
        Its SHA-256.
    """
    subtracted = _subtracted(maker)
    file = maker.source.shards[shard]

    def chunks() -> Iterator[bytes]:
        yield file.header
        for name, entry in file.entries.items():
            if name in subtracted and maker.source.places.get(name) == shard:
                pattern, places = subtracted[name]
                for place in places:
                    yield tensor_bytes(_residual(maker, work, place)[pattern])
            else:
                yield from file.chunks(entry.begin, entry.end)

    return work.put_file(shard, chunks())


def _subtracted(maker: Maker) -> dict[str, tuple[str, list[int]]]:
    """Return by tensor what of it is subtracted from: which part of a matrix it holds, and of which layers, in order.

    A part is named by its pattern in Transformers' mapping, empty where the tensor is the matrix.
    """
    subtracted: dict[str, tuple[str, list[int]]] = {}
    for target, places in zip(maker.skeleton.targets, targets_of(maker.skeleton.layers).values(), strict=True):
        if maker.target_forms[target.name] != "residual":
            continue
        stack = maker.skeleton.stacks.get(parameter_of(target))
        if stack is None:
            subtracted[maker.skeleton.keys[parameter_of(target)]] = "", places
            continue
        for pattern, names in stack.group.tensors.items():
            if stack.separate:
                subtracted |= {name: (pattern, [place]) for name, place in zip(names, places, strict=True)}
            else:
                subtracted[names[0]] = pattern, places
    return subtracted


def _residual(maker: Maker, work: Work, place: int) -> dict[str, Tensor]:
    """Return a layer's weight as residual layers hold it, from the factors that were kept, by part; see _subtracted."""
    layer = maker.skeleton.layers[place]
    target = maker.filled(layer)
    owner = target.stack if isinstance(target, ExpertLayer) else target
    module: Any = owner.module
    factors = work.need(layer_name(place)).tensors
    for factor, which in ((module.lora_A, "lora_A"), (module.lora_B, "lora_B")):
        factor[ADAPTER].weight.data.copy_(factors[f"{BASE_PREFIX}{owner.name}.{which}.weight"])
    subtract_product(owner, ExitStack())
    weight = getattr(module.get_base_layer(), adapted_parameter(module)).detach()
    stack = maker.skeleton.stacks.get(parameter_of(owner))
    return {"": weight} if stack is None else stack.apart(weight)


def move_model(work: Work, source: Path, digests: Mapping[str, str], target: Path) -> None:
    """Put a residual model together: the finished shards, and what belongs to a model beside its weights.

    Args:
        work: where the shards were finished.
        source: the model's folder.
        digests: by shard, its SHA-256.
        target: the folder to fill.

    Raises:
        CheckpointError: a shard was lost since it was finished, or the model's folder can't be read.
    """
    for shard in digests:
        if not work.file(shard).is_file():
            raise work.lost(shard)
        work.file(shard).rename(target / shard)
    try:
        beside = [file for file in sorted(source.iterdir()) if file.is_file() and _beside_weights(file)]
        contents = {file.name: file.read_bytes() for file in beside}
    except OSError as error:
        raise CheckpointError(f"{source} can't be read ({error.strerror or error}).") from error
    for name, content in contents.items():
        (target / name).write_bytes(content)
    note = "the weights of the layers of the adapter in the folder above are W - s B0 A0"
    write_json({"residual": note, "sha256": dict(digests), "files": sorted(contents)}, target / RESIDUAL_MARK)


def _beside_weights(file: Path) -> bool:
    return file.suffix not in _OTHER_WEIGHTS and not file.name.endswith(".bin.index.json")


def load_residual(path: str | Path, *, adapter: str = ADAPTER, trainable: bool = True, **options: Any) -> Any:
    """Load what a streamed start with ``form="residual"`` wrote: the residual model and, on it, its adapter.

    The model is then what ``initialize_(model, method, form="residual")`` leaves in memory.

    Args:
        path: the folder that was written; the residual model lies in ``base`` in it.
        adapter: the adapter's name.
        trainable: False freezes the adapter.
        options: for ``from_pretrained``, such as ``dtype``; by default the shards' own type.

    Raises:
        CheckpointError: the folder is damaged, or holds no residual start.
        ModelError: Transformers can't load the model.
    """
    folder = Path(path)
    if not (folder / FOLDER / RESIDUAL_MARK).is_file():
        raise CheckpointError(f"{folder} holds no residual model: it is made with --stream --form residual.")
    for shard, digest in read_json(folder / FOLDER / RESIDUAL_MARK).get("sha256", {}).items():
        file = folder / FOLDER / shard
        # Another model's shard of the same shapes would load, the untouched one's above all.
        if not file.is_file() or sha256(file) != digest:
            raise CheckpointError(
                f"{file} is missing or not the residual shard that was written: restore it, or start again."
            )
    read = read_adapter(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder / FOLDER), local_files_only=True)
        cls = model_class(folder / FOLDER, config)
        base = cls.from_pretrained(str(folder / FOLDER), local_files_only=True, **{"dtype": "auto", **options})
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ModelError(f"The model in {folder / FOLDER} can't be loaded ({reason}).") from error
    base.name_or_path = read.config.base_model_name_or_path or base.name_or_path
    model = get_peft_model(base, read.config, adapter_name=adapter)
    with torch.no_grad():
        for target in lora_layers(model, adapter):
            if target.name not in read.layers or target.name not in read.record.get("layers", {}):
                raise CheckpointError(f"{folder} has no layer {target.name!r}: it is damaged or incomplete.")
            _restore(target, read.layers[target.name])
    return load_checkpoint(model, folder, adapter=adapter, trainable=trainable)


def _restore(target: TargetLayer, layer: AdapterLayer) -> None:
    """Give a layer the anchors of its residual weight."""
    if layer.kind != "residual" or layer.A0 is None or layer.B0 is None:
        return
    module: Any = target.module
    set_anchors(module, target.adapter, layer.A0, layer.B0, "residual")
    set_residual_owner(module, target.adapter)
