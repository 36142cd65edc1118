"""Digests of weights: of a tensor's content, remembered for the tensors of files on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from headstart.files import write_whole
from headstart.layers.weights import weight_digest

_FILE = "digests.json"
# A file that changed this short a time ago may change again without its time telling (coarse clocks).
_SETTLED = 2.0
_MOST_FILES = 512
_SAVE_EVERY = 10.0


class FileDigests:
    """Digests of tensors in files, remembered as long as a file's size, times and inode stay as they were.

    Kept in one JSON file with a checksum, which is written whole or not at all; what can't be read or written is
    forgotten, and costs no more than hashing again. Several processes may use it: the last to save wins for a file, and
    what the others found for other files stays. Use it as a context, or call :meth:`save`.

    Args:
        folder: where to keep them (see :func:`headstart.cache.folder.factors_folder`).
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / _FILE
        self._files = _load(self._path)
        self._fresh: set[str] = set()
        self._saved = time.monotonic()

    def digest_of(self, file: str | Path, name: str, load: Callable[[], Tensor]) -> str:
        """Return `weight_digest` of a tensor in a file; ``load`` is called only where it isn't known.

        Args:
            file: the file; links are followed, so that several names of one file share their digests.
            name: the tensor's name in it.
            load: returns the tensor as it is stored.
        """
        path = Path(file).resolve()
        before = _stamp(path)
        record = self._files.get(str(path))
        if record is not None and record["stamp"] == before and name in record["tensors"]:
            self._used(str(path), record)
            return str(record["tensors"][name])
        digest = weight_digest(load())
        if before == _stamp(path) and time.time() - max(before[1], before[2]) / 1e9 > _SETTLED:
            if record is None or record["stamp"] != before:
                record = {"stamp": before, "tensors": {}}
            record["tensors"][name] = digest
            self._used(str(path), record)
            if time.monotonic() - self._saved > _SAVE_EVERY:
                self.save()
        return digest

    def save(self) -> None:
        """Write what was found; nothing happens where that isn't possible."""
        self._saved = time.monotonic()
        if not self._fresh:
            return
        files = _load(self._path)
        for path in self._fresh:
            mine, theirs = self._files[path], files.get(path)
            if theirs is not None and theirs["stamp"] == mine["stamp"]:
                mine["tensors"] = theirs["tensors"] | mine["tensors"]
            files[path] = mine
        newest = sorted(files, key=lambda path: -files[path]["used"])[:_MOST_FILES]
        body = json.dumps({path: files[path] for path in sorted(newest) if Path(path).exists()}, sort_keys=True)
        try:
            write_whole(self._path, json.dumps({"checksum": _checksum(body), "body": body}).encode())
        except OSError:
            return
        self._fresh.clear()

    def clear(self) -> None:
        """Forget everything, on disk too."""
        self._files.clear()
        self._fresh.clear()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.save()

    def _used(self, path: str, record: dict[str, Any]) -> None:
        now = time.time()
        # When it was last used is of interest to the day.
        if path not in self._fresh and now - record.get("used", 0.0) < 86_400 and record is self._files.get(path):
            return
        self._files[path] = record | {"used": now}
        self._fresh.add(path)


def _stamp(path: Path) -> list[int]:
    """Return what changes when a file does: size, times of content and of inode (which can't be set), inode, device."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _checksum(body: str) -> str:
    return hashlib.sha256(f"headstart digests 1\n{body}".encode()).hexdigest()


def _load(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
        body = content["body"]
        # A flipped bit could turn one tensor's name into another's.
        if content["checksum"] != _checksum(body):
            return {}
        files: dict[str, dict[str, Any]] = json.loads(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return files
