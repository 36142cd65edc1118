"""Which process makes the factors of a key: one lock file for each key that is being made.

The locks are the operating system's (flock, LockFileEx), so the lock of a process that died is free at once, however
it died. On NFS, Linux keeps flock on the server, across machines; a machine that vanishes is forgotten with its
lease. Where a file system has no such locks, or no file can be made, factors are made without: perhaps twice, never
wrongly. A lock is never waited for without end either: it may be a stopped process's, or a dead one's whose child
lives on. A lock file says who holds it, for those who have waited too long.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import BaseFileLock, Timeout, UnixFileLock, WindowsFileLock

_FOLDER = "locks"
_SUFFIX = ".lock"
_STALE = 86_400.0
# After so many seconds in which nothing of what is waited for has come, it is made without. Only time is lost by that.
LONGEST_WAIT = 600.0
_MOST_OWNER_BYTES = 300

# Not filelock's FileLock, a mere marker where the platform has no locks: a killed process leaves that for good.
_SystemLock: type[BaseFileLock] = WindowsFileLock if sys.platform == "win32" else UnixFileLock


class Held:
    """The keys of which this process has the locks.

    Attributes:
        keys: those keys.
    """

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self._locks: dict[str, BaseFileLock] = {}

    def take(self, folder: Path, key: str, *, regardless: bool = False) -> None:
        """Take the lock of a key if it is free, or go without where locking isn't possible at all, or not minded."""
        path = lock_path(folder, key)
        try:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path)
        except Timeout:
            if not regardless:
                return
            lock = None
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
def held(folder: Path, keys: Sequence[str], *, regardless: bool = False) -> Iterator[Held]:
    """Yield the locks of those of ``keys`` that are free, without waiting: so no two processes wait for each other.

    ``regardless``: yield all keys, those too whose locks are another's.
    """
    locks = Held()
    try:
        for key in keys:
            locks.take(folder, key, regardless=regardless)
        yield locks
    finally:
        for key in list(locks.keys):
            locks.release(key, done=False)


def lock_path(folder: Path, key: str) -> Path:
    """Return where the lock file of a key lies."""
    return folder / _FOLDER / (key + _SUFFIX)


def remove_old_locks(folder: Path, age: float = _STALE) -> None:
    """Remove lock files older than ``age`` seconds that nobody holds: what failed or killed processes left."""
    for path in (folder / _FOLDER).glob("*" + _SUFFIX):
        with contextlib.suppress(OSError, Timeout):
            # Taking the lock signs it, which makes it young.
            if time.time() - path.stat().st_mtime > age and (lock := take_lock(path)) is not None:
                with contextlib.suppress(OSError):
                    path.unlink()
                lock.release()


def take_lock(path: Path) -> BaseFileLock | None:
    """Return the lock of a file, taken; None where the file can't be made or its file system has no locks.

    Raises:
        Timeout: another process, or another thread, has it.
    """
    lock = _SystemLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError):
        return None
    with contextlib.suppress(OSError):
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    return lock


def owner(path: Path) -> str:
    """Return in words who holds a lock, and for how long, as far as its file tells: "process 7 on host, for 90 s"."""
    try:
        with path.open("rb") as file:
            name = file.read(_MOST_OWNER_BYTES).decode(errors="replace").strip()
        age = time.time() - path.stat().st_mtime
    except OSError:
        return "another process"
    return f"{name or 'another process'}, for {duration(age)}"


class Patience:
    """For how long something has been waited for without any of it coming.

    Args:
        longest: seconds after which it is too long.

    Attributes:
        longest: as given.
    """

    def __init__(self, longest: float = LONGEST_WAIT) -> None:
        self.longest = longest
        self._began = time.monotonic()

    def renew(self) -> None:
        """Begin anew, as some of it came."""
        self._began = time.monotonic()

    @property
    def waited(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    @property
    def over(self) -> bool:
        """Whether that is too long."""
        return self.waited > self.longest


def duration(seconds: float) -> str:
    """Return a time as words: "90 s", "12 minutes"."""
    return f"{max(seconds, 0):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
