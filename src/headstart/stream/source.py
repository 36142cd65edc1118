"""A checkpoint on disk: which tensor lies in which shard, and what tells it from every other checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headstart.errors import CheckpointError, ModelError
from headstart.layers.files import RESIDUAL_MARK
from headstart.stream.tensors import Entry, TensorFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """A model's folder with its safetensors shards.

    Attributes:
        folder: as given.
        shards: by file name, each with its checked header.
        places: the file name by tensor name.
    """

    folder: Path
    shards: dict[str, TensorFile]
    places: dict[str, str]

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Read index and headers; no tensor is read.

        Raises:
            ModelError: the folder holds no safetensors checkpoint.
            CheckpointError: the index or a shard is missing, damaged, or not what the other says.
        """
        check_model_folder(folder)
        if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
            places = _read_index(folder / INDEX)
        elif (folder / SINGLE).is_file():
            places = dict.fromkeys(TensorFile.open(folder / SINGLE).entries, SINGLE)
        else:
            raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}; save the model again with save_pretrained.")
        shards = {}
        for name in sorted(set(places.values())):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} lacks the shard {name!r} that its index names: download it again.")
            shards[name] = TensorFile.open(folder / name)
        for tensor, name in places.items():
            if tensor not in shards[name].entries:
                raise CheckpointError(
                    f"{folder / name} has no tensor {tensor!r}, which {INDEX} says it has: download both again."
                )
        return cls(folder, shards, places)

    def entry(self, tensor: str) -> Entry:
        """Return what the header says of a tensor."""
        return self.shards[self.places[tensor]].entries[tensor]

    def path(self, tensor: str) -> Path:
        """Return the file that a tensor lies in."""
        return self.shards[self.places[tensor]].path

    def read(self, tensor: str, place: int | None = None) -> Tensor:
        """Read a tensor into memory of its own, as it is stored; or of its first dimension one place, (1, ...)."""
        return self.shards[self.places[tensor]].read(tensor, place)

    def identity(self) -> list[list[Any]]:
        """Return what changes with the checkpoint: names, sizes, times of change and headers of its files."""
        config = (self.folder / "config.json").read_bytes()
        facts: list[list[Any]] = [["config.json", hashlib.sha256(config).hexdigest()]]
        for name, shard in self.shards.items():
            facts.append([name, shard.size, shard.changed, hashlib.sha256(shard.header).hexdigest()])
        return facts

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Raise CheckpointError where a shard, or a tensor's own, was changed since its header was read."""
        for shard in self.shards.values() if tensor is None else [self.shards[self.places[tensor]]]:
            with shard.path.open("rb") as file:
                shard.check_unchanged(file)


def check_model_folder(folder: Path) -> None:
    """Raise ModelError unless a folder looks like that of a whole model."""
    if not folder.is_dir():
        raise ModelError(f"There is no model folder {str(folder)!r}; streaming reads a folder of safetensors files.")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds an adapter, not a whole model; give the base model that it was made for.")
    if (folder / RESIDUAL_MARK).is_file():
        raise ModelError(
            f"{folder} is the residual model of an adapter, whose weights lack that adapter's start: give the model "
            "that it was made from."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is no model checkpoint.")


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        named = {tensor: Path(name).name == name for tensor, name in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or no index of safetensors files: download it again.") from error
    if not places or not all(named.values()):
        raise CheckpointError(f"{path} names files outside its own folder or none at all: download it again.")
    return dict(places)
