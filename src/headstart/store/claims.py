"""Which process makes an entry: one lock file for each that is being made.

The locks are the operating system's (flock, LockFileEx), so the lock of a process that died is free at once, however
it died. On NFS, Linux keeps flock on the server, across machines; a machine that vanishes is forgotten with its
lease. Where a file system has no such locks, or no file can be made, entries are made without: perhaps twice, never
wrongly. A lock file says who holds it, for those who have waited too long.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import BaseFileLock, Timeout, UnixFileLock, WindowsFileLock

from headstart.errors import RunError

_FOLDER = "locks"
_SUFFIX = ".lock"
_STALE = 86_400.0
_MOST_OWNER_BYTES = 300

# Not filelock's FileLock, a mere marker where the platform has no locks: a killed process leaves that for good.
_SystemLock: type[BaseFileLock] = WindowsFileLock if sys.platform == "win32" else UnixFileLock


@contextlib.contextmanager
def claims(folder: Path, names: Sequence[str], *, regardless: bool = False) -> Iterator[list[str]]:
    """Yield those of ``names`` whose locks are free, without waiting: so no two processes wait for each other.

    Within the block they are this process's alone; where it ends well, their lock files go.

    Args:
        folder: of the store.
        names: of entries.
        regardless: yield all names, those too whose locks are another's.
    """
    locks: list[BaseFileLock] = []
    claimed: list[str] = []
    try:
        for name in names:
            try:
                lock = take_lock(lock_path(folder, name))
            except Timeout:
                if not regardless:
                    continue
                lock = None
            claimed.append(name)
            if lock is not None:
                locks.append(lock)
        yield claimed
        for lock in locks:
            # Whoever waits for the removed file gets it too, and finds the entry. Windows doesn't remove open files.
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()
    finally:
        for lock in locks:
            with contextlib.suppress(OSError):
                lock.release()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Work in a folder that no other process works in; nothing of the lock is left.

    Raises:
        RunError: a living process is at it.
    """
    path = lock_path(folder, "run")
    try:
        lock = take_lock(path)
    except Timeout:
        raise RunError(f"{folder} is being worked on by {owner(path)}: wait for it, or end it.") from None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
            shutil.rmtree(path.parent, ignore_errors=True)


def lock_path(folder: Path, name: str) -> Path:
    """Return where the lock file of an entry lies."""
    return folder / _FOLDER / (name + _SUFFIX)


def lock_files(folder: Path) -> list[Path]:
    """Return the lock files that are there, taken or not."""
    return list((folder / _FOLDER).glob("*" + _SUFFIX))


def remove_old_locks(folder: Path) -> None:
    """Remove lock files older than a day that nobody holds: what failed or killed processes left."""
    for path in lock_files(folder):
        with contextlib.suppress(OSError, Timeout):
            # Taking the lock signs it, which makes it young.
            if time.time() - path.stat().st_mtime > _STALE and (lock := take_lock(path)) is not None:
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


def duration(seconds: float) -> str:
    """Return a time as words: "90 s", "12 minutes"."""
    return f"{max(seconds, 0):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
