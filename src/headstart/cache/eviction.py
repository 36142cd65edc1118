"""What lies in the cache, and what has to go when there is too much."""

from __future__ import annotations

import contextlib
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from headstart.files import remove_leftovers
from headstart.store.claims import remove_old_locks
from headstart.store.entries import SUFFIX

KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CachedFile:
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

    def remove(self) -> bool:
        """Remove it, unless it was used again since it was listed; return whether it is gone.

        A process that is reading it reads on to the end; one that comes later computes.
        """
        try:
            if self.path.stat().st_mtime == self.used:
                self.path.unlink()
                return True
        except FileNotFoundError:
            return True
        except OSError:
            pass
        return False


def entry_path(folder: Path, key: str) -> Path:
    """Return where the entry of a key lies: in one of 256 folders, which keeps each small."""
    return folder / key[:2] / (key + SUFFIX)


def list_entries(folder: Path) -> list[CachedFile]:
    """Return what lies in the cache, the least recently used first; files that are not named by a key don't count."""
    entries = []
    for path in folder.glob(f"??/*{SUFFIX}"):
        with contextlib.suppress(OSError):
            status = path.stat()
            if KEY.fullmatch(path.stem) and path == entry_path(folder, path.stem) and stat.S_ISREG(status.st_mode):
                entries.append(CachedFile(path, path.stem, status.st_size, status.st_mtime))
    return sorted(entries, key=lambda entry: (entry.used, entry.key))


def evict(folder: Path, limit: int, keep: Collection[str] = ()) -> int:
    """Remove the least recently used entries until the rest takes ``limit`` bytes, and what killed processes left.

    Args:
        folder: of the cache.
        limit: bytes.
        keep: keys that stay whatever they take.

    Returns:
        The bytes that remain.
    """
    entries = list_entries(folder)
    for place in (folder, *folder.glob("??")):
        remove_leftovers(place)
    remove_old_locks(folder)
    total = sum(entry.bytes for entry in entries)
    for entry in entries:
        if total <= limit:
            break
        if entry.key not in keep and entry.remove():
            total -= entry.bytes
    return total
