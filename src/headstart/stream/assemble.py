"""Putting the pieces together: the folder that ``save_checkpoint`` would have written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from headstart.errors import BASE_PREFIX, CheckpointError, LayerError
from headstart.layers.checkpoint import write_record
from headstart.layers.export import adapter_tensors, portable_config, save_config
from headstart.layers.files import WEIGHTS, check_free, put_in_place
from headstart.layers.install import mark_config
from headstart.stream.parts import Part, Work
from headstart.stream.pieces import Maker
from headstart.stream.residual import FOLDER, copy_rest
from headstart.stream.skeleton import ADAPTER
from headstart.stream.tensors import Planned, tensor_bytes, write_file, writing


def assemble(maker: Maker, work: Work, out: Path, force: bool, strict: bool) -> list[dict[str, Any]]:
    """Write the adapter's folder whole, remove the pieces, and return the facts of each layer.

    Raises:
        LayerError: a layer fell back, and ``strict`` is set.
        CheckpointError: ``out`` has come into being meanwhile, a piece was lost, or the disk is full.
    """
    check_free(out, force)
    parts = _parts(maker, work)
    for part in parts:
        if strict and (note := part.facts["report"]["note"]):
            raise LayerError(f"{part.facts['report']['name']}: {note}")
    planned: dict[str, Planned] = {}
    for part in parts:
        for name, entry in part.file.entries.items():
            planned[name] = _from_part(part, name, entry.dtype, entry.shape)
    planned |= _rest(maker, set(planned))

    made = work.folder / "out"
    shutil.rmtree(made, ignore_errors=True)
    with writing(out):
        made.mkdir()
        digest = write_file(made / WEIGHTS, planned, {"format": "pt"})
        model = maker.skeleton.model
        with ExitStack() as undo:
            if any(part.facts["marked"] for part in parts):
                mark_config(model, ADAPTER, undo)
            save_config(portable_config(model, ADAPTER), made)
        names = [layer.name for layer in maker.skeleton.layers]
        write_record(made, digest, {name: part.facts["record"] for name, part in zip(names, parts, strict=True)})
        if maker.base == "residual":
            base = made / FOLDER
            base.mkdir()
            copy_rest(maker.source.folder, base)
            for shard in maker.source.shards:
                (work.folder / shard).rename(base / shard)
        put_in_place(made, out)
    work.clear()
    return [part.facts for part in parts]


def _parts(maker: Maker, work: Work) -> list[Part]:
    parts = []
    for place, layer in enumerate(maker.skeleton.layers):
        part = work.get(f"layer-{place:05d}")
        if part is None:
            raise CheckpointError(
                f"{work.folder} lost what was finished of layer {layer.name!r}: run the command again."
            )
        parts.append(part)
    return parts


def _from_part(part: Part, name: str, dtype: Any, shape: tuple[int, ...]) -> Planned:
    def data() -> Iterator[bytes]:
        entry = part.file.entries[name]
        yield from part.file.chunks(entry.begin, entry.end)

    return Planned(dtype, shape, data)


def _rest(maker: Maker, known: set[str]) -> dict[str, Planned]:
    """Plan what PEFT saves beside the layers: heads that train whole (modules_to_save), as the checkpoint has them.

    Raises:
        CheckpointError: the checkpoint has no such tensor, so that the model's would be random.
    """
    found: dict[str, Planned] = {}
    layers = tuple(f"{BASE_PREFIX}{layer.name}.lora_" for layer in maker.skeleton.layers)
    for name, tensor in adapter_tensors(maker.skeleton.model, ADAPTER).items():
        if name in known or name.startswith(layers):
            continue
        key = maker.skeleton.keys.get(name.removeprefix(BASE_PREFIX))
        if key is None:
            raise CheckpointError(
                f"{name.removeprefix(BASE_PREFIX)!r} is to be trained beside the layers, and {maker.source.folder} "
                "has no such tensor, so that it would be drawn at random: initialise in memory."
            )
        found[name] = _from_source(maker, key, tensor.dtype, tuple(tensor.shape))
    return found


def _from_source(maker: Maker, key: str, dtype: Any, shape: tuple[int, ...]) -> Planned:
    return Planned(dtype, shape, lambda: iter([tensor_bytes(maker.source.read(key).to(dtype))]))
