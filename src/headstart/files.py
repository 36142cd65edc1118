"""Files and folders that appear whole or not at all, however the process ends that writes them.

What is being written has a hidden name beside its own, ``.NAME.HOST-TOKEN.headstart``, and holds a lock that the system
takes from a process that dies. So what a killed process left is told from what a living one still writes, and is
removed the next time something is written there; where a file system has no locks, or another machine wrote it, a day
later.

Of folders that exist, only files of ours are replaced (a :class:`Kind` says which those are). Everything else stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import filecmp
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".headstart"
_ATTEMPTS = 5
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_HIDDEN = re.compile(rf"\..*\.(?P<host>[0-9a-f]{{8}})-[0-9a-f]{{16}}{re.escape(_SUFFIX)}", re.DOTALL)
# Where no lock tells whether the writer lives: no single file or folder takes this long.
_ABANDONED_SECONDS = 86_400.0
# renameat2's flag that makes two names change places, and the descriptor that stands for the current folder.
_EXCHANGE, _HERE = 2, -100


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        owned: returns the names, relative to a folder and with slashes, of the files that are ours to replace there.
            They need not exist.
        key: the file without which no program reads such a folder.
    """

    owned: Callable[[Path], Collection[str]]
    key: str


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield an empty file to write to, in place of ``path`` when the block ends well, and gone when not.

    Write into it: another file put in its place would have no lock. Not even a power cut needs waiting for the disk:
    what it leaves of a file that had its name already is found out by a checksum, where there is one.

    Raises:
        OSError: it can't be written, or its folder isn't there; ``path`` is then as it was.
    """
    remove_leftovers(path.parent)
    with _hidden(path.parent, path.name, folder=False) as work:
        yield work
        os.replace(work, path)  # noqa: PTH105 - Path.replace says nothing about what is there already


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that appears whole or not at all, in a folder that is made if need be; text in UTF-8.

    Raises:
        OSError: see :func:`whole_file`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as work:
        work.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(content: Any, path: Path) -> None:
    """Write JSON, readable, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def whole_folder(path: str | Path, kind: Kind, *, force: bool = False) -> Iterator[Path]:
    """Yield a work folder whose files are in ``path`` when the block ends well; it vanishes when not.

    Raises:
        CheckpointError: the path exists and ``force`` is not set; or it is no folder.
    """
    target = Path(path)
    check_free(target, kind, force)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Inside the folder where it can't be exchanged, so that files move within one file system.
    inside = target.is_dir() and (target.is_mount() or bool(_foreign(target, kind)))
    with work_folder(target if inside else target.parent, target.name) as work:
        yield work
        put_in_place(work, target, kind, force=force)


@contextlib.contextmanager
def work_folder(place: Path, name: str) -> Iterator[Path]:
    """Yield a new hidden folder in ``place``, private to this process and removed at the end if it is still there."""
    remove_leftovers(place)
    with _hidden(place, name, folder=True) as work:
        yield work


def check_free(target: Path, kind: Kind, force: bool) -> None:
    """Raise CheckpointError where nothing may be written to ``target``.

    With ``force`` it may be any folder: files of ours in it are replaced, and others stay.
    """
    if target.resolve() == Path.cwd():
        raise CheckpointError(f"{target} is the folder that the command runs in: name a folder to write in it.")
    if target.is_symlink() and not target.exists():
        raise CheckpointError(f"{target} is a link to something that doesn't exist: remove it, or choose another path.")
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} exists and is no folder, so it is not overwritten: choose another path.")
    if force:
        return
    ours = sorted(name for name in kind.owned(target) if os.path.lexists(target / name))
    changes = f"replaces {_listed(ours, most=len(ours))} there" if ours else "replaces nothing that is there"
    if others := _foreign(target, kind):
        changes += f", and leaves {_listed(others)} as {'it is' if len(others) == 1 else 'they are'}"
    raise CheckpointError(
        f"{target} exists: choose another path, or overwrite it with force=True (--force), which {changes}."
    )


def put_in_place(work: Path, target: Path, kind: Kind, *, force: bool = False) -> None:
    """Give a finished folder its name, and the modes of a user's own files.

    - A path that is free takes one rename.
    - A folder that holds nothing but files of ours is exchanged with the new one in one step, where the system can:
      there is always the old one or the new one.
    - Else each file is replaced by itself. Where more than one changes, :attr:`Kind.key` is taken away first and put
      back last: a kill in between leaves a folder that every program refuses, and none that mixes old and new.

    Raises:
        CheckpointError: the path has come into being meanwhile, and ``force`` is not set.
    """
    check_free(target, kind, force)
    target = target.resolve()
    open_modes(work)
    if not target.exists():
        work.rename(target)
        return
    if not _foreign(target, kind):
        work.chmod(target.stat().st_mode & 0o7777)
        if _exchanged(work, target):
            _clear_exchanged(work, target, kind)
            return
    _replace_files(work, target, kind)


def open_modes(work: Path) -> None:
    """Give what was made in private (work folders, and safetensors' files) the modes that the user's mask leaves."""
    mask = os.umask(0o077)  # for a moment, in all threads
    os.umask(mask)
    for path in (work, *work.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def remove_leftovers(place: Path) -> None:
    """Remove what processes that were killed have left in a folder; nothing of a living one's."""
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if (name := _HIDDEN.fullmatch(entry.name)) is not None:
                _remove_if_dead(Path(entry.path), name["host"] == _HOST)


def is_hidden(name: str) -> bool:
    """Return whether a file's or folder's name is that of work that is, or was, going on."""
    return _HIDDEN.fullmatch(name) is not None


@contextlib.contextmanager
def _hidden(place: Path, name: str, *, folder: bool) -> Iterator[Path]:
    """Yield a new hidden file or folder, locked; what is left of it is removed."""
    # A file system's names have 255 bytes.
    stem = name.encode()[:150].decode(errors="ignore")
    lock: int | None = None
    for attempt in range(_ATTEMPTS):
        work = place / f".{stem}.{_HOST}-{uuid.uuid4().hex[:16]}{_SUFFIX}"
        if folder:
            work.mkdir(mode=0o700)
        else:
            work.open("xb").close()
        try:
            lock = _locked(work)
        except BlockingIOError:  # somebody takes it for a dead process's, before it could be locked, and removes it
            if attempt < _ATTEMPTS - 1:
                continue
            lock = None  # or there are no locks to be had here
        if work.exists() or attempt == _ATTEMPTS - 1:
            break
        _unlock(lock)
    try:
        yield work
    finally:
        if folder:
            shutil.rmtree(work, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                work.unlink()
        _unlock(lock)


def _locked(work: Path) -> int | None:
    """Return an open descriptor that holds the lock of a file or folder; None where it can't be had.

    Raises:
        BlockingIOError: another process has it.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(work, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(error.errno, "another process works on it", str(work)) from None
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _remove_if_dead(work: Path, same_host: bool) -> None:
    with contextlib.suppress(OSError):
        lock = _locked(work)  # raises where its process lives
        try:
            # Locks of other machines may not be seen here.
            if (lock is None or not same_host) and time.time() - work.stat().st_mtime < _ABANDONED_SECONDS:
                return
            if work.is_dir():
                shutil.rmtree(work, ignore_errors=True)
            else:
                work.unlink()
        finally:
            _unlock(lock)


def _foreign(target: Path, kind: Kind) -> list[str]:
    """Return the names in a folder that aren't ours, or, of folders, that hold something that isn't."""
    owned = set(kind.owned(target))
    foreign = []
    for entry in sorted(target.iterdir()):
        if is_hidden(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            files = [path for path in entry.rglob("*") if path.is_symlink() or not path.is_dir()]
            ours = bool(files) and all(path.relative_to(target).as_posix() in owned for path in files)
        else:
            ours = entry.name in owned
        if not ours:
            foreign.append(entry.name)
    return foreign


def _files(folder: Path) -> list[Path]:
    """Return a work folder's files, relative to it, in a fixed order."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())


def _replace_files(work: Path, target: Path, kind: Kind) -> None:
    new = _files(work)
    stale = [Path(name) for name in sorted(kind.owned(target)) if os.path.lexists(target / name)]
    stale = [name for name in stale if name not in new]
    changed = [name for name in new if not _same(work / name, target / name)]
    if len(changed) + len(stale) > 1:
        (target / kind.key).unlink(missing_ok=True)
        changed.append(Path(kind.key))
    for name in stale:
        (target / name).unlink(missing_ok=True)
    last = Path(kind.key)
    for name in sorted(set(changed) & set(new), key=lambda name: (name == last, name)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / name, target / name)  # noqa: PTH105 - Path.replace says nothing about what is there already


def _same(new: Path, old: Path) -> bool:
    return old.is_file() and not old.is_symlink() and filecmp.cmp(new, old, shallow=False)


def _clear_exchanged(old: Path, target: Path, kind: Kind) -> None:
    """Move what somebody put into the old folder at the last moment to where they meant it."""
    for name in _foreign(old, kind):
        if not os.path.lexists(target / name):
            (old / name).rename(target / name)


def _exchanged(work: Path, target: Path) -> bool:
    """Let two folders change their names in one step; return False where the system can't."""
    rename = _renameat2()
    if rename is None:
        return False
    return bool(rename(_HERE, os.fsencode(work), _HERE, os.fsencode(target), _EXCHANGE) == 0)


@functools.cache
def _renameat2() -> Any:
    if platform.system() != "Linux":
        return None
    try:
        function = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # a C library that is older, or another
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function


def _listed(names: Collection[str], most: int = 4) -> str:
    shown = sorted(names)[:most]
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
