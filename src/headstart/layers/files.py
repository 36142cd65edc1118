"""What adapters' and models' folders hold, and how it is read: with every damage named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.errors import CheckpointError
from headstart.files import Kind, sha256

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RECORD = "headstart.json"
# In the folder of a model whose weights lack a start that is in the adapter beside it.
RESIDUAL_MARK = "headstart_residual.json"


# No program reads an adapter without its config.
ADAPTER_FOLDER = Kind(lambda folder: (WEIGHTS, CONFIG, RECORD), key=CONFIG)

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_FOLDER = Kind(lambda folder: (DIFFUSERS_WEIGHTS,), key=DIFFUSERS_WEIGHTS)

# What Transformers writes of a model and its tokenizer; whatever else it writes is ours from then on.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
MODEL_FOLDER = Kind(
    lambda folder: {file.name for name in _MODEL_FILES for file in folder.glob(name)},
    key="config.json",
)


def downloaded(name: str, *files: str, revision: str | None = None) -> Path | None:
    """Return the folder that the hub's cache on this machine has of a model, where one of the files is in it."""
    for file in files:
        try:
            cached = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:  # no name of the hub, such as a path that is gone
            return None
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def write_tensors(tensors: dict[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> str:
    """Write tensors to a safetensors file, with ``about`` in its header; return the file's SHA-256."""
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt", **(about or {})})
    return sha256(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} holds no {path.name}: it is not an adapter, or was not written to the end."
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): restore it from a copy, or save the adapter again."
        ) from error
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}: it is not an adapter folder.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): restore it, or save the adapter again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, and holds a {type(content).__name__}.")
    return content
