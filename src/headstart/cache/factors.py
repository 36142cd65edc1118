"""The cache of factors: looked up before they are computed, computed once, the least recently used going first."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from headstart.cache.eviction import KEY, CachedFile, entry_path, evict, list_entries
from headstart.cache.folder import factors_folder, size_limit
from headstart.methods.base import Factors
from headstart.progress import Show, silent
from headstart.store import DamagedEntryError, Entry, Store

Compute = Callable[[list[int]], Sequence[Factors]]


def open_cache(cache: bool | str | os.PathLike[str], warn: Callable[[str], None] | None = None) -> FactorCache | None:
    """Return what ``cache=`` asks for: True for the user's own, a folder, or False for none.

    There is none either where ``HEADSTART_CACHE_LIMIT`` is 0.

    Args:
        cache: a folder holds the factors in ``factors``, as the folder that ``HEADSTART_CACHE`` names does.
        warn: see :class:`FactorCache`.

    Raises:
        HeadstartError: ``HEADSTART_CACHE_LIMIT`` is not a size.
    """
    if cache is False or size_limit() == 0:
        return None
    return FactorCache(
        factors_folder(None if cache is True else cache), size_limit(), warn, everything=cache is not True
    )


class FactorCache(Store):
    """A folder of factors, shared by any number of processes.

    Args:
        folder: made when something is written.
        limit_bytes: how much it may hold; beyond that the least recently used go.
        warn: what becomes of a sentence about something that didn't work; by default a HeadstartWarning.
        everything: keep whatever depends on weights alone, and not only what costs more than its looking up.

    Attributes:
        served: layers whose factors were there.
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
        super().__init__(Path(folder), warn)
        self.everything = everything
        self.limit_bytes = limit_bytes
        self.served = 0
        self.computed = 0
        self._warned: set[str] = set()
        # Bytes in the folder when last counted and those written since; None before.
        self._bytes: int | None = None

    def path(self, name: str) -> Path:
        """Return where the entry of a key lies."""
        return entry_path(self.folder, name)

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

        Each group is written before the next is begun, so a process that is killed loses one group, and processes that
        ask for the same keys share the work: see :meth:`headstart.store.Store.make_all`.

        Args:
            keys: of :func:`headstart.cache.keys.layer_key`; some may be the same.
            compute: takes positions in ``keys``, never two of the same key, and returns their factors in that order.
            groups: positions worth computing together, each position once; by default as many as 64 at a time, which
                is also the most that a call of ``compute`` gets.
            describe: what to note of a position for ``headstart cache list``.
            show: called with (step, done, total) once another process has been waited for for 3 seconds.

        Returns:
            What was there on the CPU, and what was computed where ``compute`` left it; in the order of ``keys``.
        """
        if malformed := [key for key in keys if not KEY.fullmatch(key)]:
            raise ValueError(f"{malformed[0]!r} is not a key")
        groups = [range(len(keys))] if groups is None else groups
        if sorted(position for group in groups for position in group) != [*range(len(keys))]:
            raise ValueError("groups must hold each position once")
        places: dict[str, int] = {}
        for position in (position for group in groups for position in group):
            places.setdefault(keys[position], position)
        computed, wrote = self.computed, False

        def make(missing: list[str]) -> dict[str, Factors]:
            nonlocal wrote
            positions = [places[key] for key in missing]
            fresh = dict(zip(missing, compute(positions), strict=True))
            for key, factors in fresh.items():
                self.computed += 1
                wrote |= self._keep(key, factors, describe(places[key]) if describe else {})
            if wrote and (self._bytes is None or self._bytes > self.limit_bytes):
                self._bytes = evict(self.folder, self.limit_bytes, set(keys))
            return fresh

        own = [[keys[position] for position in group if places[keys[position]] == position] for group in groups]
        by_key = self.make_all(own, self._look_up, make, what="factors of layers", show=show)
        self.served += len(by_key) - (self.computed - computed)
        if wrote:
            # Counted again: other processes write too.
            self._bytes = evict(self.folder, self.limit_bytes, set(keys))
        return [by_key[key] for key in keys]

    def entries(self) -> list[CachedFile]:
        """Return what the folder holds, the least recently used first."""
        return list_entries(self.folder)

    def verify(self) -> Iterator[tuple[CachedFile, str]]:
        """Read every entry; yield it with what is wrong with it, an empty string where nothing is."""
        for listed in self.entries():
            try:
                if (entry := self.read(listed.key)) is None:
                    continue
                unpack(entry)
            except (DamagedEntryError, OSError) as error:
                yield listed, str(error)
            else:
                yield listed, ""

    def _look_up(self, key: str) -> Factors | None:
        """Return a key's factors, None where there are none or nothing that can be believed."""
        try:
            entry = self.read(key)
            if entry is None:
                return None
            factors = unpack(entry)
        except (DamagedEntryError, OSError) as error:
            self._warn_once(key, f"{self.path(key)} in the cache is damaged ({error}); its factors are computed again.")
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path(key))
        return factors

    def _keep(self, key: str, factors: Factors, about: Mapping[str, Any]) -> bool:
        """Write a key's factors; return whether that worked."""
        try:
            written = self.write(key, *pack(factors, {"created": time.time()} | dict(about)))
        except (OSError, TypeError, ValueError) as error:
            self._warn_once(
                "write",
                f"the cache {self.folder} can't be written ({error}): what is computed is used, and not kept. Make "
                "room there, or choose another folder (HEADSTART_CACHE, cache=).",
            )
            return False
        if self._bytes is not None:
            self._bytes += written
        return True

    def _warn_once(self, about: str, sentence: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            self.warn(sentence)


def pack(factors: Factors, about: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return factors as an entry's tensors and facts, the latter with what is to be said about them."""
    values = {field.name: getattr(factors, field.name) for field in dataclasses.fields(factors)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in values.items() if name not in tensors} | {"info": dict(factors.info)}
    return tensors, {"factors": plain, "about": dict(about)}


def unpack(entry: Entry) -> Factors:
    """Return the factors in an entry.

    Raises:
        DamagedEntryError: it holds something else.
    """
    try:
        fields = {name: _as_tuples(value) for name, value in entry.facts["factors"].items()}
        return Factors(**(fields | entry.tensors))
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedEntryError(f"another release of headstart wrote it: {error}") from None


def _as_tuples(value: Any) -> Any:
    """Return a field as it was before JSON, which has no tuples."""
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list) else value
