"""What lies in the cache, and what has to go when there is too much."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from headstart.cache.entries import KEY, entry_path
from headstart.cache.locks import remove_old_locks
from headstart.files import remove_leftovers


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes:
        path: where it is.
        key: what it is filed under.
        bytes: its size.
        used: when it was written or last read, in seconds since 1970.
    """

    path: Path
    key: str
    bytes: int
    used: float


def list_entries(folder: Path) -> list[Entry]:
    """Return what lies in the cache, the least recently used first; files that are not named by a key don't count."""
    return sorted(_scan(folder), key=lambda entry: (entry.used, entry.key))


def evict(folder: Path, limit: int, keep: Collection[str] = ()) -> int:
    """Remove the least recently used entries until the rest takes ``limit`` bytes, and what killed processes left.

    Args:
        folder: of the cache.
        limit: bytes.
        keep: keys that stay whatever they take.

    Returns:
        The bytes that remain.
    """
    entries = _scan(folder)
    for shard in (folder, *map(Path, _shards(folder))):
        remove_leftovers(shard)
    remove_old_locks(folder)
    total = sum(entry.bytes for entry in entries)
    for entry in sorted(entries, key=lambda entry: (entry.used, entry.key)):
        if total <= limit:
            break
        if entry.key not in keep and remove_entry(entry):
            total -= entry.bytes
    return total


def remove_entry(entry: Entry) -> bool:
    """Remove an entry, unless it was used again since it was listed; return whether it is gone.

    A process that is reading it reads on to the end; one that comes later computes.
    """
    try:
        if entry.path.stat().st_mtime == entry.used:
            entry.path.unlink()
            return True
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def _scan(folder: Path) -> list[Entry]:
    entries: list[Entry] = []
    for file in (file for shard in _shards(folder) for file in _children(Path(shard))):
        path = Path(file.path)
        with contextlib.suppress(OSError):
            found = file.stat()
            if KEY.fullmatch(path.stem) and path == entry_path(folder, path.stem) and stat.S_ISREG(found.st_mode):
                entries.append(Entry(path, path.stem, found.st_size, found.st_mtime))
    return entries


def _shards(folder: Path) -> list[os.DirEntry[str]]:
    return [shard for shard in _children(folder) if len(shard.name) == 2]


def _children(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
