"""What a streamed start has finished so far, in a folder beside the one to write.

Each finished piece is one file that appears whole. It holds the digest of all that is in it, and the key of the
settings and the checkpoint that it was made from; a file of another program's making, such as a shard, has that beside
it. What doesn't match is not believed, and made again. Several processes share the pieces through locks on files, which
the system takes from a process that dies.
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

from headstart.cache.locks import duration, owner, take_lock
from headstart.errors import CheckpointError
from headstart.files import sha256, whole_file
from headstart.stream.tensors import Planned, TensorFile, write_chunks, write_file, writing

_DIGEST = "digest"
_CONTENT = "content"
_FILES = "files"


@dataclass(frozen=True)
class Part:
    """One finished piece, as read from its file: its place and the facts that were written with it."""

    file: TensorFile
    facts: dict[str, Any]

    def read(self, name: str) -> Tensor:
        """Read one of its tensors."""
        return self.file.read(name)


class Work:
    """The folder of one start's finished pieces; another start into the same ``out`` has a folder of its own.

    Args:
        out: the folder that the start will write.
        key: all that the pieces depend on.
    """

    def __init__(self, out: Path, key: Mapping[str, Any]) -> None:
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._prefix = f".{out.name}.stream-"
        self._disregarded: set[str] = set()
        self.folder = out.parent / f"{self._prefix}{self.key[:16]}"

    def create(self) -> None:
        """Make the folder, or go on with the one that is there."""
        with writing(self.folder):
            (self.folder / _FILES).mkdir(parents=True, exist_ok=True)

    def is_open(self) -> bool:
        """Return whether the folder is there: made, and not cleared away."""
        return (self.folder / _FILES).is_dir()

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

    def need(self, name: str) -> Part:
        """Return a piece that was finished before.

        Raises:
            CheckpointError: it is gone.
        """
        part = self.get(name)
        if part is None:
            raise CheckpointError(f"{self.folder} lost what was finished as {name!r}: run the command again.")
        return part

    def put(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a finished piece, whole or not at all."""
        content = json.dumps({"key": self.key, "name": name, **facts})
        planned = {each: Planned.of(tensor) for each, tensor in tensors.items()}
        digest = _digest(content, {each: plan.data() for each, plan in planned.items()})
        with self._partial(self.folder / f"{name}.safetensors") as path:
            write_file(path, planned, {_DIGEST: digest, _CONTENT: content})

    def file(self, name: str) -> Path:
        """Return where a finished file of another program's format is."""
        return self.folder / _FILES / name

    def file_digest(self, name: str) -> str | None:
        """Return the SHA-256 of a finished file; None where it isn't there, or not what it was when it was finished."""
        try:
            note = json.loads(self._note(name).read_text(encoding="utf-8"))
            digest = sha256(self.file(name))
        except (OSError, ValueError):
            return None
        return digest if note == {"key": self.key, "sha256": digest} else None

    def put_file(self, name: str, chunks: Iterator[bytes]) -> None:
        """Write a file, whole or not at all, and what it was made from beside it."""
        with self._partial(self.file(name)) as path:
            digest = write_chunks(path, chunks)
        with self._partial(self._note(name)) as path:
            path.write_text(json.dumps({"key": self.key, "sha256": digest}), encoding="utf-8")

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    @contextlib.contextmanager
    def _partial(self, target: Path) -> Iterator[Path]:
        """Yield a path to write to, which becomes ``target`` when the block ends well."""
        with writing(target), whole_file(target) as path:
            yield path

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Yield whether this process may work on a piece: whether no other that is alive does, or that is disregarded.

        Raises:
            CheckpointError: the folder is gone.
        """
        with contextlib.ExitStack() as held:
            try:
                if self.is_open() and (lock := take_lock(self._lock(name))) is not None:
                    held.callback(lock.release)
            except Timeout:
                if name not in self._disregarded:
                    yield False
                    return
            if not self.is_open():
                shutil.rmtree(self.folder, ignore_errors=True)  # where taking the lock made it anew
                raise CheckpointError(f"{self.folder} is gone: run the command again.")
            yield True

    def disregard(self, name: str, waited: float) -> str:
        """Let this process work on a piece whoever else does; return the sentence that says so.

        Args:
            name: the piece's.
            waited: seconds that were waited for it.
        """
        self._disregarded.add(name)
        return (
            f"waited {duration(waited)} for {name} in {self.folder}, which is being made by {owner(self._lock(name))}: "
            "it is made here as well."
        )

    def _lock(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    def clear(self) -> None:
        """Remove the folder, and those that other starts into the same place have left and nobody works in."""
        # Out of the way at once, so that another process that is late can't begin anew in what is left of it.
        gone = self.folder.with_name(f"{self.folder.name}.gone")
        with contextlib.suppress(OSError):
            self.folder.rename(gone)
        for own in (gone, self.folder):
            shutil.rmtree(own, ignore_errors=True)
        for folder in list(self.folder.parent.glob(f"{glob.escape(self._prefix)}*")):
            if folder.is_dir() and not _in_use(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    for path in folder.glob("*.lock"):
        try:
            lock = take_lock(path)
        except Timeout:
            return True
        if lock is not None:
            lock.release()
    return False


def _digest(content: str, tensors: Mapping[str, Iterable[bytes]]) -> str:
    """Return the SHA-256 of a piece's facts and of its tensors' names and bytes, whichever way those are cut up."""
    found = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        for chunk in tensors[name]:
            found.update(chunk)
    return found.hexdigest()
