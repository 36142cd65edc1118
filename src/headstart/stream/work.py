"""What a streamed start has finished so far: a store in a folder beside the one to write.

Each piece holds the key of the settings and the checkpoint that it was made from; of a file of another program's
making, such as a shard, a piece of its own says so, and what it holds. What doesn't match is not believed, and made
again.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout
from torch import Tensor

from headstart.errors import CheckpointError
from headstart.files import sha256, whole_file
from headstart.store import DamagedEntryError, Entry, Store
from headstart.store.claims import lock_files, take_lock
from headstart.stream.tensors import write_chunks

_FILES = "files"


class Work(Store):
    """The folder of one start's finished pieces; another start into the same ``out`` has a folder of its own.

    Args:
        out: the folder that the start will write.
        settings: all that the pieces depend on.
        warn: see :class:`headstart.store.Store`.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], warn: Callable[[str], None] | None = None) -> None:
        self._settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self._prefix = f".{out.name}.stream-"
        super().__init__(out.parent / f"{self._prefix}{self._settings[:16]}", warn)

    def create(self) -> None:
        """Make the folder, or go on with the one that is there."""
        with writing(self.folder):
            (self.folder / _FILES).mkdir(parents=True, exist_ok=True)

    def is_open(self) -> bool:
        """Return whether the folder is there: made, and not cleared away."""
        return (self.folder / _FILES).is_dir()

    def key(self, name: str) -> str:
        """Return what a piece's file says that it was made from."""
        return f"{self._settings} {name}"

    def facts(self, name: str) -> dict[str, Any] | None:
        """Return the facts of a finished piece; None where there is none that can be believed."""
        try:
            piece = self.read(name)
        except (DamagedEntryError, OSError):
            return None
        return None if piece is None else piece.facts

    def need(self, name: str) -> Entry:
        """Return a piece that was finished before.

        Raises:
            CheckpointError: it is gone.
        """
        with contextlib.suppress(DamagedEntryError, OSError):
            if (piece := self.read(name)) is not None:
                return piece
        raise self.lost(name)

    def lost(self, name: str) -> CheckpointError:
        """Return the error that says so of what was finished before."""
        return CheckpointError(f"{self.folder} lost what was finished as {name!r}: run the command again.")

    def put(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a finished piece, whole or not at all.

        Raises:
            CheckpointError: it can't be written; a folder that was cleared away is not made anew.
        """
        with writing(self.path(name)):
            if self.is_open():
                self.write(name, tensors, facts)
                return
        raise self._gone()

    def file(self, name: str) -> Path:
        """Return where a finished file of another program's format is."""
        return self.folder / _FILES / name

    def file_digest(self, name: str) -> str | None:
        """Return the SHA-256 of a finished file; None where it isn't there, or not what it was when it was finished."""
        facts = self.facts(f"file-{name}")
        with contextlib.suppress(OSError):
            if facts is not None and facts["sha256"] == sha256(self.file(name)):
                return str(facts["sha256"])
        return None

    def put_file(self, name: str, chunks: Iterator[bytes]) -> str:
        """Write a file, whole or not at all, and what it was made from beside it; return its SHA-256."""
        with writing(self.file(name)), whole_file(self.file(name)) as path:
            digest = write_chunks(path, chunks)
        self.put(f"file-{name}", {}, {"sha256": digest})
        return digest

    @contextlib.contextmanager
    def claims(self, names: Sequence[str], *, regardless: bool = False) -> Iterator[list[str]]:
        """Yield those of ``names`` that are this process's to make.

        Raises:
            CheckpointError: the folder is gone.
        """
        with super().claims(names, regardless=regardless) as claimed:
            if not self.is_open():
                shutil.rmtree(self.folder, ignore_errors=True)  # where taking a lock made it anew
                raise self._gone()
            yield claimed

    def _gone(self) -> CheckpointError:
        return CheckpointError(f"{self.folder} is gone: run the command again.")

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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise CheckpointError in place of an OSError within the block, with the path and what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be written ({error.strerror or error}): make room or choose another --out; the same command "
            "goes on where it was."
        ) from error


def _in_use(folder: Path) -> bool:
    for path in lock_files(folder):
        try:
            lock = take_lock(path)
        except Timeout:
            return True
        if lock is not None:
            lock.release()
    return False
