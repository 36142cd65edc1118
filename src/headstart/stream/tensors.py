"""Safetensors files by plain reads and writes, a tensor at a time.

The safetensors library maps files into memory, and every page that was looked at counts as resident. Here a tensor is
read where the header says, into memory of its own, and gone when it is dropped. Files are written in the order and with
the header that the library gives them, so that the same tensors make the same file, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from headstart.errors import CheckpointError

CHUNK = 16 * 2**20
_LONGEST_HEADER = 100_000_000  # the limit of the format

# By descending alignment, the order in which the library writes.
_NAMES: dict[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_PLACE = {dtype: place for place, dtype in enumerate(_NAMES)}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type by the format's name, its shape, and its bytes' place in the file."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The type as torch has it; None for one that torch has not."""
        return _DTYPES.get(self.dtype_name)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was read and checked.

    Attributes:
        path: where it is.
        entries: the tensors by name, in the order of their bytes.
        metadata: the header's own strings.
        header: the bytes before the first tensor's, length included.
        size, changed: the file's size in bytes and time of change in nanoseconds when the header was read.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    header: bytes
    size: int
    changed: int

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read a file's header.

        Raises:
            CheckpointError: the file is missing, truncated, or no safetensors file.
        """
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                header = file.read(8)
                length = int.from_bytes(header, "little")
                if len(header) < 8 or length > min(_LONGEST_HEADER, status.st_size - 8):
                    raise _damaged(path, "its header is longer than the file")
                header += file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path} can't be read ({error.strerror or error}).") from error
        entries, metadata = _parse(path, header[8:], status.st_size - len(header), len(header))
        return cls(path, entries, metadata, header, status.st_size, status.st_mtime_ns)

    def check_unchanged(self, file: BinaryIO) -> None:
        """Raise CheckpointError where the file is not the one any more whose header was read."""
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.size, self.changed):
            raise CheckpointError(f"{self.path} was changed while it was read: start again once it is whole.")

    def read(self, name: str, place: int | None = None) -> Tensor:
        """Read one tensor into memory of its own, or of its first dimension one place, (1, ...).

        Raises:
            CheckpointError: the file was changed or cut since its header was read, or torch lacks the tensor's type.
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {entry.dtype_name}, which can't be read: whole "
                "checkpoints can, quantised ones can't."
            )
        shape = entry.shape if place is None else (1, *entry.shape[1:])
        tensor = torch.empty(shape, dtype=entry.dtype, device="cpu")
        bytes_of: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        flat = memoryview(bytes_of)
        try:
            with self.path.open("rb", buffering=0) as file:
                self.check_unchanged(file)
                file.seek(entry.begin + (place or 0) * len(flat))
                done = 0
                while done < len(flat):
                    count = file.readinto(flat[done : done + CHUNK])
                    if not count:
                        raise _damaged(self.path, f"it ends within tensor {name!r}")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be read ({error.strerror or error}).") from error
        return tensor

    def chunks(self, begin: int, end: int) -> Iterator[bytes]:
        """Yield the file's bytes from ``begin`` to ``end``, a bounded piece at a time."""
        try:
            with self.path.open("rb", buffering=0) as file:
                self.check_unchanged(file)
                file.seek(begin)
                while begin < end:
                    piece = file.read(min(CHUNK, end - begin))
                    if not piece:
                        raise _damaged(self.path, "it ends early")
                    begin += len(piece)
                    yield piece
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be read ({error.strerror or error}).") from error


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or no safetensors file ({what}): copy or download it again.")


def _parse(path: Path, header: bytes, data: int, offset: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return a header's entries and metadata; every byte after it must belong to one tensor."""
    try:
        content = json.loads(header)
        metadata = dict(content.pop("__metadata__", None) or {})
        if not all(isinstance(part, str) for pair in metadata.items() for part in pair):
            raise TypeError
        entries = [_entry(name, facts, offset) for name, facts in content.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, "its header can't be read") from error
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    at = offset
    for entry in entries:
        size = entry.dtype.itemsize * math.prod(entry.shape) if entry.dtype else entry.end - entry.begin
        if entry.begin != at or entry.end - entry.begin != size:
            raise _damaged(path, f"the place of tensor {entry.name!r} doesn't fit")
        at = entry.end
    if at != offset + data:
        what = "it is truncated" if at > offset + data else "it goes on after the last tensor"
        raise _damaged(path, what)
    return {entry.name: entry for entry in entries}, metadata


def _entry(name: str, facts: Mapping[str, Any], offset: int) -> Entry:
    shape, (begin, end) = tuple(facts["shape"]), facts["data_offsets"]
    whole = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
    if not whole or end < begin or not isinstance(facts["dtype"], str):
        raise ValueError(name)
    return Entry(name, facts["dtype"], shape, offset + begin, offset + end)


@dataclass(frozen=True)
class Planned:
    """A tensor to write: type, shape, and a function that yields its bytes when its turn has come."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Callable[[], Iterator[bytes]]

    @classmethod
    def of(cls, tensor: Tensor) -> Planned:
        """Plan a tensor that is there."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: iter([tensor_bytes(tensor)]))


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's bytes in row order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_file(path: Path, planned: Mapping[str, Planned], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file as the library does, holding one tensor at a time; return its SHA-256.

    The file is not written aside and renamed: that is the caller's, who may write other files with it.
    """
    order = sorted(planned, key=lambda name: (_PLACE[planned[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        tensor = planned[name]
        size = tensor.dtype.itemsize * math.prod(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return write_chunks(path, _all_chunks(len(text).to_bytes(8, "little") + text, [planned[name] for name in order]))


def _all_chunks(header: bytes, planned: list[Planned]) -> Iterator[bytes]:
    yield header
    for tensor in planned:
        yield from tensor.data()


def write_chunks(path: Path, chunks: Iterator[bytes]) -> str:
    """Write pieces to a file; return its SHA-256.

    Raises:
        OSError: they can't be written, as on a full disk.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()
