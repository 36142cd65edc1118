"""What a streamed start has finished so far, in a folder beside the one to write.

Each finished piece is one file that appears whole. It holds the digest of all that is in it, and the key of the
settings and the checkpoint that it was made from. What doesn't match is not believed, and made again. Several processes
share the pieces through locks on files, which the system takes from a process that dies.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout
from torch import Tensor

from headstart.cache.locks import take_lock
from headstart.errors import CheckpointError
from headstart.stream.tensors import Planned, TensorFile, write_file, writing

_DIGEST = "digest"
_CONTENT = "content"


@dataclass(frozen=True)
class Part:
    """One finished piece, as read from its file: its place and the facts that were written with it."""

    file: TensorFile
    facts: dict[str, Any]

    def read(self, name: str) -> Tensor:
        """Read one of its tensors."""
        return self.file.read(name)


class Work:
    """The folder of one start's finished pieces; another start into the same ``out`` has a folder of its own."""

    def __init__(self, out: Path, key: Mapping[str, Any]) -> None:
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._prefix = f".{out.name}.stream-"
        self.folder = out.parent / f"{self._prefix}{self.key[:16]}"

    def create(self) -> None:
        """Make the folder, or go on with the one that is there."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Part | None:
        """Return a finished piece; None where there is none that can be believed."""
        path = self.folder / f"{name}.safetensors"
        try:
            file = TensorFile.open(path)
            facts = json.loads(file.metadata[_CONTENT])
            chunks = {each: file.chunks(entry.begin, entry.end) for each, entry in file.entries.items()}
            believed = file.metadata[_DIGEST] == _digest(file.metadata[_CONTENT], chunks)
        except (CheckpointError, KeyError, ValueError, OSError):
            return None
        if not believed or not isinstance(facts, dict):
            return None
        made_for = (facts.pop("key", None), facts.pop("name", None))
        return Part(file, facts) if made_for == (self.key, name) else None

    def put(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a finished piece, whole or not at all."""
        content = json.dumps({"key": self.key, "name": name, **facts})
        planned = {each: Planned.of(tensor) for each, tensor in tensors.items()}
        digest = _digest(content, {each: plan.data() for each, plan in planned.items()})
        with self.partial(f"{name}.safetensors") as path:
            write_file(path, planned, {_DIGEST: digest, _CONTENT: content})

    @contextlib.contextmanager
    def partial(self, name: str) -> Iterator[Path]:
        """Yield a path to write to, which takes its name in the folder when the block ends well."""
        target, path = self.folder / name, self.folder / f"{name}.partial"
        # Always the same name, so that what a killed process left is written over.
        yield path
        with writing(target):
            path.replace(target)

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Yield whether this process may work on a piece: whether no other that is alive does."""
        try:
            lock = take_lock(self.folder / f"{name}.lock")
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            if lock is not None:
                lock.release()

    def clear(self) -> None:
        """Remove the folder, and those that other starts into the same place have left, once nothing needs them."""
        for folder in self.folder.parent.glob(f"{glob.escape(self._prefix)}*"):
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def _digest(content: str, tensors: Mapping[str, Iterable[bytes]]) -> str:
    """Return the SHA-256 of a piece's facts and of its tensors' names and bytes, whichever way those are cut up."""
    found = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        for chunk in tensors[name]:
            found.update(chunk)
    return found.hexdigest()
