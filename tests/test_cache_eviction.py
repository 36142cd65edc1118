"""What leaves the cache, and what stays: by last use, by what a call asked for, by who left it."""

from __future__ import annotations

import os

from cached import age, fetch, key_of
from headstart.cache import FactorCache
from headstart.cache.eviction import entry_path, evict, list_entries
from headstart.files import is_hidden

KEYS = [key_of(number) for number in range(8)]


def test_the_least_recently_used_go_first(tmp_path):
    fetch(tmp_path, KEYS[:5])
    sizes = {entry.key: entry.bytes for entry in list_entries(tmp_path)}
    entry_path(tmp_path, KEYS[4]).unlink()
    for number, key in enumerate(KEYS[:4]):
        age(tmp_path, key, 1000 - number)
    fetch(tmp_path, [KEYS[0]])  # used: now the newest
    fetch(tmp_path, [KEYS[4]], limit=sizes[KEYS[0]] + sizes[KEYS[3]] + sizes[KEYS[4]])
    assert {entry.key for entry in list_entries(tmp_path)} == {KEYS[0], KEYS[3], KEYS[4]}


def test_what_a_call_asked_for_stays(tmp_path):
    fetch(tmp_path, KEYS[:3], limit=1)
    assert len(list_entries(tmp_path)) == 3
    fetch(tmp_path, KEYS[2:4], limit=1)
    assert {entry.key for entry in list_entries(tmp_path)} == {KEYS[2], KEYS[3]}


def test_reading_evicts_nothing(tmp_path):
    fetch(tmp_path, KEYS)
    fetch(tmp_path, KEYS[:1], limit=1)
    assert len(list_entries(tmp_path)) == len(KEYS)


def test_an_entry_used_since_it_was_listed_stays(tmp_path):
    fetch(tmp_path, KEYS[:1])
    age(tmp_path, KEYS[0], 100)
    store = FactorCache(tmp_path, 2**30)
    (entry,) = store.entries()
    fetch(tmp_path, KEYS[:1])
    assert not entry.remove()
    (entry,) = store.entries()
    assert entry.remove()
    assert entry.remove()


def test_what_killed_processes_left_goes(tmp_path):
    fetch(tmp_path, KEYS[:2])
    shard = entry_path(tmp_path, KEYS[0]).parent
    (tmp_path / "locks").mkdir(exist_ok=True)
    # Another machine's locks may not be seen here, so that time has to tell.
    elsewhere = f"00000000-{'0' * 16}.headstart"
    assert is_hidden(f".a.{elsewhere}")
    old = [shard / f".a.{elsewhere}", tmp_path / f".b.{elsewhere}", tmp_path / "locks" / f"{KEYS[0]}.lock"]
    young = [shard / f".c.{elsewhere}", tmp_path / "locks" / f"{KEYS[1]}.lock"]
    foreign = [tmp_path / "notes.txt", shard / "notes.safetensors", tmp_path / "models" / "x.tmp"]
    foreign[2].parent.mkdir()
    for path in old + young + foreign:
        path.write_bytes(b"")
    for path in old + foreign:
        os.utime(path, (0, 0))
    evict(tmp_path, 2**30)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in young + foreign)
    evict(tmp_path, 0)
    assert list_entries(tmp_path) == []
    assert all(path.exists() for path in foreign)
