"""The cache of factors: looked up before they are computed, computed once, believed only with their checksum."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.cache.entries import KEY, DamagedEntryError, decode, encode, entry_path
from headstart.cache.eviction import Entry, evict, list_entries, remove_entry
from headstart.cache.folder import factors_folder, size_limit
from headstart.cache.locks import LONGEST_WAIT, Patience, duration, held, lock_path, owner
from headstart.errors import HeadstartWarning
from headstart.files import write_whole
from headstart.methods.base import Factors
from headstart.progress import Show, silent

Compute = Callable[[list[int]], Sequence[Factors]]

# Locks held at a time, each an open file: systems allow 256 and more.
_MOST_LOCKS = 64
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
_PATIENCE = 3.0


def open_store(cache: bool | str | os.PathLike[str], warn: Callable[[str], None] | None = None) -> Store | None:
    """Return the store that ``cache=`` asks for: True for the user's own, a folder, or False for none.

    There is none either where ``HEADSTART_CACHE_LIMIT`` is 0.

    Args:
        cache: a folder holds the factors in ``factors``, as the folder that ``HEADSTART_CACHE`` names does.
        warn: see :class:`Store`.

    Raises:
        HeadstartError: ``HEADSTART_CACHE_LIMIT`` is not a size.
    """
    if cache is False or size_limit() == 0:
        return None
    return Store(factors_folder(None if cache is True else cache), size_limit(), warn, everything=cache is not True)


class Store:
    """A folder of factors, shared by any number of processes.

    Args:
        folder: made when something is written.
        limit_bytes: how much it may hold; beyond that the least recently used go.
        warn: what becomes of a sentence about something that didn't work; by default a HeadstartWarning.
        everything: keep whatever depends on weights alone, and not only what costs more than its looking up.

    Attributes:
        served: layers whose factors were found.
        computed: layers whose factors were computed here.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        limit_bytes: int,
        warn: Callable[[str], None] | None = None,
        *,
        everything: bool = True,
    ) -> None:
        self.everything = everything
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.served = 0
        self.computed = 0
        self._warn = warn or _warn
        self._warned: set[str] = set()
        # Bytes in the folder when last counted and those written since; None before.
        self._bytes: int | None = None

    def fetch(
        self,
        keys: Sequence[str],
        compute: Compute,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        describe: Callable[[int], Mapping[str, Any]] | None = None,
        show: Show = silent,
    ) -> list[Factors]:
        """Return the factors of all keys: those that are there, and of the others what ``compute`` makes of them.

        Each group is written before the next is begun, so a process that is killed loses one group. What another
        process is making at the moment is left to it, and waited for when nothing else is left to do: processes
        that ask for the same keys share the work. Where none of it comes for 10 minutes, it is computed here as well,
        with a sentence. An error in ``compute`` passes through.

        Args:
            keys: of :func:`headstart.cache.keys.layer_key`; some may be the same.
            compute: takes positions in ``keys``, never two of the same key, and returns their factors in that order.
            groups: positions worth computing together, each position once; by default as many as 64 at a time, which
                is also the most that a call of ``compute`` gets.
            describe: what to note of a position for ``headstart cache list``.
            show: called with (step, done, total) once another process has been waited for for 3 seconds.

        Returns:
            What was found on the CPU, and what was computed where ``compute`` left it; in the order of ``keys``.
        """
        if malformed := [key for key in keys if not KEY.fullmatch(key)]:
            raise ValueError(f"{malformed[0]!r} is not a key")
        if groups is not None and sorted(position for group in groups for position in group) != [*range(len(keys))]:
            raise ValueError("groups must hold each position once")
        found: dict[str, Factors] = {}
        for key in dict.fromkeys(keys):
            if (known := self._read(key)) is not None:
                found[key] = known
        self.served += len(found)
        pending = _pieces(keys, groups, found)
        wrote = False
        wait = _Wait(show, len(set(keys)))
        while pending:
            before = len(found)
            if regardless := wait.patience.over:
                self._warn(self._tired(wait.patience, [keys[position] for group in pending for position in group]))
            for group in pending:
                asked = [keys[position] for position in group]
                with held(self.folder, asked, regardless=regardless) as locks:
                    mine = [position for position in group if keys[position] in locks.keys]
                    for position in list(mine):
                        # Another process may have made it before the lock was free.
                        if (known := self._read(keys[position])) is not None:
                            found[keys[position]] = known
                            self.served += 1
                            mine.remove(position)
                            locks.release(keys[position], done=True)
                    for position, factors in zip(mine, compute(mine) if mine else (), strict=True):
                        key = keys[position]
                        found[key] = factors
                        self.computed += 1
                        written = self._write(key, factors, describe(position) if describe else {})
                        wrote = wrote or written
                        locks.release(key, done=written)
                if wrote and (self._bytes is None or self._bytes > self.limit_bytes):
                    self._bytes = evict(self.folder, self.limit_bytes, set(keys))
            pending = _pieces(keys, pending, found)
            if len(found) > before:
                wait.patience.renew()
            elif pending:
                wait(len(found))
        if wrote:
            # Counted again: other processes write too.
            self._bytes = evict(self.folder, self.limit_bytes, set(keys))
        return [found[key] for key in keys]

    def entries(self) -> list[Entry]:
        """Return what the folder holds, the least recently used first."""
        return list_entries(self.folder)

    def verify(self) -> Iterator[tuple[Entry, str]]:
        """Read every entry; yield it with what is wrong with it, an empty string where nothing is."""
        for entry in self.entries():
            try:
                decode(entry.key, entry.path.read_bytes())
            except FileNotFoundError:
                continue
            except (DamagedEntryError, OSError) as error:
                yield entry, str(error)
            else:
                yield entry, ""

    def remove(self, entry: Entry) -> bool:
        """Remove an entry, unless it was used since it was listed; return whether it is gone."""
        return remove_entry(entry)

    def _tired(self, patience: Patience, keys: Sequence[str]) -> str:
        """Return what to say where another process keeps keys for too long."""
        return (
            f"waited {duration(patience.waited)} for factors of {len(keys)} layers in {self.folder}, which are "
            f"being computed by {owner(lock_path(self.folder, keys[0]))}: they are computed here as well."
        )

    def _read(self, key: str) -> Factors | None:
        """Return a key's factors, None where there are none or nothing that can be believed."""
        path = entry_path(self.folder, key)
        try:
            if not path.is_file():
                return None
            factors = decode(key, path.read_bytes())
        except FileNotFoundError:
            return None
        except (DamagedEntryError, OSError) as error:
            self._warn_once(key, f"{path} in the cache is damaged ({error}); its factors are computed again.")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return factors

    def _write(self, key: str, factors: Factors, about: Mapping[str, Any]) -> bool:
        """Write a key's factors; return whether that worked."""
        try:
            content = encode(key, factors, {"created": time.time()} | dict(about))
            write_whole(entry_path(self.folder, key), content)
        except (OSError, TypeError, ValueError) as error:
            self._warn_once(
                "write",
                f"the cache {self.folder} can't be written ({error}): what is computed is used, and not kept. Make "
                "room there, or choose another folder (HEADSTART_CACHE, cache=).",
            )
            return False
        if self._bytes is not None:
            self._bytes += len(content)
        return True

    def _warn_once(self, about: str, sentence: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            self._warn(sentence)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, HeadstartWarning, stacklevel=5)


class _Wait:
    """Waits longer each time, and shows it once that takes a while."""

    def __init__(self, show: Show, total: int) -> None:
        self.patience = Patience(LONGEST_WAIT)
        self._show = show
        self._total = total
        self._pause = _FIRST_PAUSE
        self._waited = 0.0

    def __call__(self, done: int) -> None:
        if self._waited > _PATIENCE:
            self._show("waiting for another process", done, self._total)
        time.sleep(self._pause)
        self._waited += self._pause
        self._pause = min(1.5 * self._pause, _LONGEST_PAUSE)


def _pieces(
    keys: Sequence[str], groups: Sequence[Sequence[int]] | None, found: Mapping[str, Factors]
) -> list[list[int]]:
    """Return the groups without what is found and without second positions of a key, none of them too large."""
    groups = [range(len(keys))] if groups is None else groups
    seen = set(found)
    pieces: list[list[int]] = []
    for group in groups:
        rest: list[int] = []
        for position in group:
            if keys[position] not in seen:
                seen.add(keys[position])
                rest.append(position)
        pieces += [rest[start : start + _MOST_LOCKS] for start in range(0, len(rest), _MOST_LOCKS)]
    return pieces
