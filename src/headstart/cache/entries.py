"""One layer's factors as a file: safetensors, with the key and a checksum of everything inside."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from headstart.methods.base import Factors

SUFFIX = ".safetensors"
KEY = re.compile(r"[0-9a-f]{64}")

_FORMAT = "headstart factors 1"
# Of an entry, some hundred bytes and a description; of a foreign file it could be anything.
_MOST_HEADER_BYTES = 2**20


class DamagedEntryError(Exception):
    """A file that is not, to the last bit, what was written under its key; the text says why."""


def entry_path(folder: Path, key: str) -> Path:
    """Return where the entry of a key lies: in one of 256 folders, which keeps each small."""
    return folder / key[:2] / (key + SUFFIX)


def encode(key: str, factors: Factors, about: Mapping[str, Any]) -> bytes:
    """Return the content of a key's file.

    Raises:
        TypeError, ValueError: ``factors.info`` or ``about`` holds something that JSON doesn't have.
    """
    values = {field.name: getattr(factors, field.name) for field in dataclasses.fields(factors)}
    tensors = {
        name: value.detach().cpu().contiguous().clone() for name, value in values.items() if isinstance(value, Tensor)
    }
    rest = {name: value for name, value in values.items() if name not in tensors} | {"info": dict(factors.info)}
    words = {"format": _FORMAT, "key": key, "factors": json.dumps(rest), "about": json.dumps(dict(about))}
    return save(tensors, metadata=words | {"checksum": _checksum(words, tensors)})


def decode(key: str, content: bytes) -> Factors:
    """Return the factors in a key's file, on the CPU, bit for bit as they were written; sequences become tuples.

    Raises:
        DamagedEntryError: the content is anything else than was written under this key.
    """
    words = _words(content)
    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise DamagedEntryError(f"it is not a whole safetensors file: {error}") from None
    if words.get("key") != key:
        raise DamagedEntryError("it was written under another key")
    if words.pop("checksum", None) != _checksum(words, tensors):
        raise DamagedEntryError("its checksum does not fit its content")
    fields: dict[str, Any] = {name: _as_tuples(value) for name, value in json.loads(words["factors"]).items()}
    try:
        return Factors(**fields, **tensors)  # type: ignore[arg-type]
    except TypeError as error:
        raise DamagedEntryError(f"another release of headstart wrote it: {error}") from None


def describe_file(path: Path) -> dict[str, Any]:
    """Return what an entry's file says of itself, without reading or checking its tensors.

    Raises:
        DamagedEntryError: it says nothing that can be read.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        content = file.read(8)
        content += file.read(min(int.from_bytes(content, "little"), _MOST_HEADER_BYTES + 1))
    try:
        about = json.loads(_words(content)["about"])
    except (KeyError, ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise DamagedEntryError("it does not say what it holds")
    return about


def _as_tuples(value: Any) -> Any:
    """Return a field as it was before JSON, which has no tuples."""
    return tuple(_as_tuples(each) for each in value) if isinstance(value, list) else value


def _words(content: bytes) -> dict[str, str]:
    """Return the text fields in a safetensors file's header."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > _MOST_HEADER_BYTES or len(content) < 8 + length:
        raise DamagedEntryError("it is truncated, or no safetensors file")
    try:
        words = json.loads(content[8 : 8 + length])["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedEntryError("its header can't be read") from None
    if not isinstance(words, dict) or words.get("format") != _FORMAT:
        raise DamagedEntryError("headstart did not write it, or another release did")
    return words


def _checksum(words: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of all fields and tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    heads = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    digest.update(json.dumps([dict(words), heads], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
