"""One entry of a store as a file: safetensors, with its key and a checksum of everything inside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

SUFFIX = ".safetensors"

_FORMAT = "headstart entry 1"
# Of an entry, some thousand bytes and its facts; of a foreign file it could be anything.
_MOST_HEADER_BYTES = 2**24


class DamagedEntryError(Exception):
    """A file that is not, to the last bit, what was written under its key; the text says why."""


@dataclass(frozen=True)
class Entry:
    """What is kept under a key: tensors by name, on the CPU, and facts that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def encode(key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Return the content of a key's file.

    Raises:
        TypeError, ValueError: ``facts`` hold something that JSON doesn't have.
    """
    # Views share memory, which the format refuses.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    words = {"format": _FORMAT, "key": key, "facts": json.dumps(dict(facts))}
    return save(own, metadata=words | {"checksum": _checksum(words, own)})


def decode(key: str, content: bytes) -> Entry:
    """Return what a key's file holds, bit for bit as it was written; sequences in the facts are lists.

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
    return Entry(tensors, json.loads(words["facts"]))


def facts_of(path: Path) -> dict[str, Any]:
    """Return the facts in an entry's file, without reading or checking its tensors.

    Raises:
        DamagedEntryError: there are none that can be read.
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        content = file.read(8)
        content += file.read(min(int.from_bytes(content, "little"), _MOST_HEADER_BYTES + 1))
    try:
        facts = json.loads(_words(content)["facts"])
    except (KeyError, ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise DamagedEntryError("it does not say what it holds")
    return facts


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
