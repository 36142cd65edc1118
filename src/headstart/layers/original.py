"""A quantised model's weights as they were before, read from its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headstart.errors import CheckpointError, LayerError, ModelError, not_finite
from headstart.layers.files import downloaded
from headstart.layers.find import TargetLayer

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Original:
    """Where the unquantised weights of some layers lie.

    Attributes:
        source: what was asked for, for errors.
        places: by layer, the file and the tensor's name in it.
    """

    source: str
    places: Mapping[str, tuple[Path, str]]

    @classmethod
    def open(cls, model: Any, layers: Sequence[TargetLayer], model_path: str | None) -> Original:
        """Find the weights of ``layers``; headers are read, tensors are not.

        Args:
            model: the PEFT model, whose config says where it came from.
            layers: whose weights.
            model_path: a folder, a safetensors file, or a name on the hub that was downloaded before; None for where
                the model came from.

        Raises:
            ModelError: there are no safetensors files.
            CheckpointError: a file is missing or damaged.
            LayerError: a layer's weight is not in them, or not as it was before it was quantised; names the layer.
        """
        source, files = _files(model, model_path)
        places = {}
        for layer in layers:
            tensor = _tensor_of(layer.name, files)
            if tensor is None:
                raise LayerError(
                    f"layer {layer.name!r}: {source} has no tensor {layer.name + '.weight'!r} to read its unquantised "
                    "weight from; set model_path to the files of the unquantised model."
                )
            places[layer.name] = files[tensor], tensor
        original = cls(source, places)
        for layer in layers:
            original._check(layer)
        return original

    def weight(self, layer: TargetLayer) -> Tensor:
        """Read a layer's weight: W (d_out, d_in) in float32, on the layer's device.

        Raises:
            LayerError: it holds NaN or infinity.
        """
        file, tensor = self.places[layer.name]
        with _opened(file) as handle:
            stored: Tensor = handle.get_tensor(tensor).to(layer.device).float()
        if not bool(torch.isfinite(stored).all()):
            raise not_finite(layer.name)
        return stored.T if _stored_transposed(layer) else stored

    def _check(self, layer: TargetLayer) -> None:
        file, tensor = self.places[layer.name]
        with _opened(file) as handle:
            stored = handle.get_slice(tensor)
            shape, kind = tuple(stored.get_shape()), stored.get_dtype()
        shape = shape[::-1] if _stored_transposed(layer) else shape
        if kind not in _FLOATS or shape != (layer.d_out, layer.d_in):
            raise LayerError(
                f"layer {layer.name!r}: {tensor!r} in {file} is no unquantised weight of {layer.d_out} x {layer.d_in} "
                f"(it is {kind}, {' x '.join(map(str, shape))}); set model_path to the files of the unquantised model."
            )


def _files(model: Any, model_path: str | None) -> tuple[str, dict[str, Path]]:
    """Return the source's name, and the file of each tensor in it."""
    config = getattr(model, "config", None)
    source = str(model_path or getattr(config, "_name_or_path", None) or "")
    if not source:
        raise ModelError("the model does not say where it came from: set model_path to the files of its weights.")
    path = Path(source)
    if path.is_file():
        return source, _names_in(path)
    commit = None if model_path else getattr(config, "_commit_hash", None)
    folder = path if path.is_dir() else downloaded(source, _SINGLE, _INDEX, revision=commit)
    if folder is None:
        raise ModelError(
            f"There is no folder {source!r} of safetensors files, and no downloaded model of that name: set model_path "
            "to the files of the unquantised weights."
        )
    if (folder / _SINGLE).is_file():
        return source, _names_in(folder / _SINGLE)
    if not (folder / _INDEX).is_file():
        raise ModelError(f"{source} has neither {_SINGLE} nor {_INDEX}; set model_path to the files of the weights.")
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return source, {tensor: folder / Path(file).name for tensor, file in index.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / _INDEX} is damaged: download it again.") from error


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged ({error}): download it again.") from error


def _names_in(file: Path) -> dict[str, Path]:
    with _opened(file) as handle:
        return dict.fromkeys(handle.keys(), file)


def _tensor_of(layer: str, files: Mapping[str, Path]) -> str | None:
    """Return the name of a layer's weight among tensors, which may lie further inside or outside than in the model."""
    parts = f"{layer}.weight".split(".")
    for start in range(len(parts)):
        if any(part.isdigit() for part in parts[:start]):
            break  # beyond the number of a block, another block's would do
        ending = ".".join(parts[start:])
        if ending in files:
            return ending
        fitting = [name for name in files if name.endswith(f".{ending}")]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def _stored_transposed(layer: TargetLayer) -> bool:
    """Return whether the unquantised layer stored its weight as (d_in, d_out); Transformers notes what it replaced."""
    base: nn.Module = layer.module.get_base_layer()
    return issubclass(getattr(base, "source_cls", None) or type(base), Conv1D)
