"""Which process makes the factors of a key: one lock file for each key that is being made.

The locks are the operating system's (flock, LockFileEx), so the lock of a process that died is free at once, however
it died. On NFS, Linux keeps flock on the server, across machines; a machine that vanishes is forgotten with its
lease. Where a file system has no such locks, or no file can be made, factors are made without: perhaps twice, never
wrongly.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

_FOLDER = "locks"
_SUFFIX = ".lock"
_STALE = 86_400.0


class Held:
    """The keys of which this process has the locks.

    Attributes:
        keys: those keys.
    """

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self._locks: dict[str, FileLock] = {}

    def take(self, folder: Path, key: str) -> None:
        """Take the lock of a key if it is free, or go without where locking isn't possible at all."""
        path = folder / _FOLDER / (key + _SUFFIX)
        try:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path)
        except Timeout:
            return
        if lock is not None:
            self._locks[key] = lock
        self.keys.add(key)

    def release(self, key: str, *, done: bool) -> None:
        """Let go of a key. ``done``: its entry is there, so its lock file isn't needed any more."""
        self.keys.discard(key)
        lock = self._locks.pop(key, None)
        if lock is None:
            return
        if done:
            # Whoever waits for the removed file gets it too, and finds the entry. Windows doesn't remove open files.
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()
        with contextlib.suppress(OSError):
            lock.release()


@contextlib.contextmanager
def held(folder: Path, keys: Sequence[str]) -> Iterator[Held]:
    """Yield the locks of those of ``keys`` that are free, without waiting: so no two processes wait for each other."""
    locks = Held()
    try:
        for key in keys:
            locks.take(folder, key)
        yield locks
    finally:
        for key in list(locks.keys):
            locks.release(key, done=False)


def remove_old_locks(folder: Path, age: float = _STALE) -> None:
    """Remove lock files older than ``age`` seconds that nobody holds: what failed or killed processes left."""
    for path in (folder / _FOLDER).glob("*" + _SUFFIX):
        with contextlib.suppress(OSError, Timeout):
            if time.time() - path.stat().st_mtime > age and (lock := take_lock(path)) is not None:
                with contextlib.suppress(OSError):
                    path.unlink()
                lock.release()


def take_lock(path: Path) -> FileLock | None:
    """Return the lock of a file, taken; None where the file can't be made or its file system has no locks.

    Raises:
        Timeout: another process, or another thread, has it.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        if not isinstance(lock, SoftFileLock):
            raise
        return None
    except (OSError, NotImplementedError):
        return None
    if isinstance(lock, SoftFileLock):
        # Without flock it turned into a mere marker, which a killed process would leave for good.
        lock.release()
        return None
    return lock
