"""A folder of entries that several processes make together, each once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from headstart.errors import HeadstartWarning
from headstart.files import write_whole
from headstart.progress import Show, silent
from headstart.store.claims import claims, duration, lock_path, owner
from headstart.store.entries import SUFFIX, Entry, decode, encode

T = TypeVar("T")

# A lock is never waited for without end: it may be a stopped process's, or a dead one's whose child lives on. After so
# many seconds in which nothing of what is waited for has come, it is made without; only time is lost by that.
LONGEST_WAIT = 600.0
# Locks held at a time, each an open file: systems allow 256 and more.
_MOST_LOCKS = 64
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
_PATIENCE = 3.0


class Store:
    """Entries by name: written whole or not at all, believed only with their checksum.

    Args:
        folder: made when something is written.
        warn: what becomes of a sentence about something that didn't work; by default a HeadstartWarning.

    Attributes:
        folder: as given.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self.warn = warn or _warn

    def path(self, name: str) -> Path:
        """Return where an entry's file lies."""
        return self.folder / (name + SUFFIX)

    def key(self, name: str) -> str:
        """Return the key that is written into an entry's file."""
        return name

    def read(self, name: str) -> Entry | None:
        """Return an entry, None where there is none.

        Raises:
            DamagedEntryError: its file is not what was written under this name.
            OSError: it can't be read.
        """
        path = self.path(name)
        try:
            return decode(self.key(name), path.read_bytes()) if path.is_file() else None
        except FileNotFoundError:
            return None

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int:
        """Write an entry; return its bytes.

        Raises:
            OSError: it can't be written.
            TypeError, ValueError: ``facts`` hold something that JSON doesn't have.
        """
        content = encode(self.key(name), tensors, facts)
        write_whole(self.path(name), content)
        return len(content)

    def claims(self, names: Sequence[str], *, regardless: bool = False) -> AbstractContextManager[list[str]]:
        """Yield those of ``names`` that are this process's to make; see :func:`headstart.store.claims.claims`."""
        return claims(self.folder, names, regardless=regardless)

    def make_all(
        self,
        groups: Sequence[Sequence[str]],
        look_up: Callable[[str], T | None],
        make: Callable[[list[str]], Mapping[str, T]],
        *,
        what: str,
        step: str = "",
        show: Show = silent,
    ) -> dict[str, T]:
        """Return by name what ``look_up`` returns, and of all else what ``make`` makes, together with other processes.

        What another process is making at the moment is left to it, and waited for when nothing else is left to do;
        should that process die, its claim is free. Where nothing comes for 10 minutes, it is made here as well, with a
        sentence. An error in ``make`` passes through.

        Args:
            groups: names worth making together, each name once.
            look_up: returns what there is of a name, None where it has to be made.
            make: makes and writes at most 64 names of one group, and returns all of them.
            what: the entries in words, for the sentence.
            step: for ``show``, which is called with (step, done, total) after each group; "" for not.
            show: called, too, once another process has been waited for for 3 seconds.
        """
        total = sum(map(len, groups))
        ready = {name: value for group in groups for name in group if (value := look_up(name)) is not None}
        pending = _pieces(groups, ready)
        came, pause = time.monotonic(), _FIRST_PAUSE
        while pending:
            before, waited = len(ready), time.monotonic() - came
            if regardless := waited > LONGEST_WAIT:
                names = [name for group in pending for name in group]
                self.warn(
                    f"waited {duration(waited)} for {what} ({len(names)}) in {self.folder}, being made by "
                    f"{owner(lock_path(self.folder, names[0]))}: made here as well."
                )
            for group in pending:
                with self.claims(group, regardless=regardless) as claimed:
                    # Another process may have made it before the lock was free.
                    ready |= {name: value for name in claimed if (value := look_up(name)) is not None}
                    if missing := [name for name in claimed if name not in ready]:
                        ready |= make(missing)
                if step:
                    show(step, len(ready), total)
            pending = _pieces(pending, ready)
            if len(ready) > before:
                came, pause = time.monotonic(), _FIRST_PAUSE
            elif pending:
                if waited > _PATIENCE:
                    show("waiting for another process", len(ready), total)
                time.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_PAUSE)
        return ready


def _pieces(groups: Sequence[Sequence[str]], ready: Collection[str]) -> list[list[str]]:
    """Return the groups without what is there, none of them too large."""
    pieces: list[list[str]] = []
    for group in groups:
        missing = [name for name in group if name not in ready]
        pieces += [missing[start : start + _MOST_LOCKS] for start in range(0, len(missing), _MOST_LOCKS)]
    return pieces


def _warn(sentence: str) -> None:
    warnings.warn(sentence, HeadstartWarning, stacklevel=5)
