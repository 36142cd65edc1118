"""Putting the pieces together: the folder that ``save_checkpoint`` would have written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from headstart.errors import BASE_PREFIX, CheckpointError
from headstart.files import put_in_place
from headstart.layers.checkpoint import write_record
from headstart.layers.experts import ExpertLayer
from headstart.layers.export import adapter_tensors, portable_config, save_config
from headstart.layers.files import WEIGHTS
from headstart.layers.install import mark_config
from headstart.stream.experts import Saved, planned_stack, saved_stack, targets_of
from headstart.stream.pieces import Finished, Maker
from headstart.stream.residual import FOLDER, STREAMED_FOLDER, move_model
from headstart.stream.skeleton import ADAPTER, check_entry
from headstart.stream.tensors import Planned, TensorFile, tensor_bytes, write_file
from headstart.stream.work import Work, writing


def saved_layers(maker: Maker, finished: Finished) -> dict[str, Saved]:
    """Return how PEFT's layers are to be saved, by name, in the model's order.

    Raises:
        LayerError: the matrices of one parameter differ in which of their factors train.
    """
    layers, pieces = maker.skeleton.layers, list(finished.layers)
    saved = {}
    for name, places in targets_of(layers).items():
        own = [layer for place in places if isinstance(layer := layers[place], ExpertLayer)]
        facts = {pieces[place]: finished.layers[pieces[place]] for place in places}
        if own:
            saved[name] = saved_stack(own, facts, maker.context.seed)
        else:
            ((piece, known),) = facts.items()
            saved[name] = Saved([piece], known["record"], known["trainable"])
    return saved


def assemble(
    maker: Maker, work: Work, out: Path, saved: Mapping[str, Saved], shards: Mapping[str, str], force: bool
) -> None:
    """Write the adapter's folder whole, and remove the pieces.

    Args:
        maker, work, out: of the start.
        saved: see :func:`saved_layers`.
        shards: the SHA-256 of each shard of the residual model, by name.
        force: replace what an earlier start wrote.

    Raises:
        CheckpointError: ``out`` has come into being meanwhile, a piece was lost, or the disk is full.
    """
    planned: dict[str, Planned] = {}
    for layer in saved.values():
        if "stack" in layer.record:
            planned |= planned_stack(layer.pieces, lambda piece: work.need(piece).tensors)
        else:
            planned |= _from_piece(work, layer.pieces[0])
    planned |= _beside_layers(maker, set(planned))

    staged = work.folder / "out"
    shutil.rmtree(staged, ignore_errors=True)
    with writing(out):
        staged.mkdir()
        digest = write_file(staged / WEIGHTS, planned, {"format": "pt"})
        model = maker.skeleton.model
        with ExitStack() as undo:
            if set(maker.forms.values()) != {"kept"}:
                # A kept layer is a plain one.
                plain = {name: None if form == "kept" else form for name, form in maker.target_forms.items()}
                mark_config(model, ADAPTER, undo, plain)
            save_config(portable_config(model, ADAPTER), staged)
        write_record(staged, digest, {name: layer.record for name, layer in saved.items()})
        if maker.residual:
            base = staged / FOLDER
            base.mkdir()
            move_model(work, maker.source.folder, shards, base)
        put_in_place(staged, out, STREAMED_FOLDER, force=force)
    work.clear()


def _from_piece(work: Work, name: str) -> dict[str, Planned]:
    """Plan the tensors of a finished layer, which are read when their turn has come."""
    tensors = work.need(name).tensors
    file = TensorFile.open(work.path(name))

    def data(key: str) -> Callable[[], Iterator[bytes]]:
        entry = file.entries[key]
        return lambda: file.chunks(entry.begin, entry.end)

    return {key: Planned(tensor.dtype, tuple(tensor.shape), data(key)) for key, tensor in tensors.items()}


def _beside_layers(maker: Maker, names: set[str]) -> dict[str, Planned]:
    """Plan what PEFT saves beside the layers: heads that train whole (modules_to_save), as the checkpoint has them.

    Raises:
        CheckpointError: the checkpoint has no such tensor, so that the model's would be random.
    """
    planned: dict[str, Planned] = {}
    layers = tuple(f"{BASE_PREFIX}{target.name}.lora_" for target in maker.skeleton.targets)
    for name, tensor in adapter_tensors(maker.skeleton.model, ADAPTER).items():
        if name in names or name.startswith(layers):
            continue
        key = maker.skeleton.keys.get(name.removeprefix(BASE_PREFIX))
        if key is None:
            raise CheckpointError(
                f"{name.removeprefix(BASE_PREFIX)!r} is to be trained beside the layers, and {maker.source.folder} "
                "has no such tensor, so that it would be drawn at random: initialise in memory."
            )
        check_entry(maker.source, key, tuple(tensor.shape), name.removeprefix(BASE_PREFIX))
        planned[name] = _from_source(maker, key, tensor)
    return planned


def _from_source(maker: Maker, key: str, like: Tensor) -> Planned:
    dtype = like.dtype
    return Planned(dtype, tuple(like.shape), lambda: iter([tensor_bytes(maker.source.read(key).to(dtype))]))
