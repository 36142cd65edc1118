"""The cache of factors: what is kept is read bit for bit, computed once, and shared."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cached import Maker, content, contents, decoded, encoded, factors_of, fetch, key_of
from headstart.cache import FactorCache, open_cache
from headstart.cache.eviction import entry_path, evict, list_entries
from headstart.errors import HeadstartError, HeadstartWarning

KEYS = [key_of(number) for number in range(8)]


@pytest.mark.parametrize("number", range(6))
def test_an_entry_is_read_bit_for_bit(number):
    factors = factors_of(key_of(number))
    assert content(decoded(KEYS[0], encoded(KEYS[0], factors))) == content(factors)


def test_what_is_read_can_be_written_to(tmp_path):
    fetch(tmp_path, KEYS[:1])
    (factors,) = FactorCache(tmp_path, 2**30).fetch(KEYS[:1], pytest.fail)
    factors.A.zero_()
    assert fetch(tmp_path, KEYS[:1])[0] == contents(KEYS[:1])


def test_views_and_shared_memory_can_be_kept(tmp_path):
    def views(key):
        whole = torch.arange(40.0)
        return dataclasses.replace(factors_of(key), A=whole[:20].view(5, 4).T, B=whole[10:30].view(5, 4), core=None)

    assert fetch(tmp_path, KEYS[:1], make=views)[0] == fetch(tmp_path, KEYS[:1])[0] == contents(KEYS[:1], views)


def test_each_key_is_computed_once(tmp_path):
    keys = [KEYS[0], KEYS[1], KEYS[0], KEYS[2], KEYS[1]]
    assert fetch(tmp_path, keys) == (contents(keys), KEYS[:3], [])
    assert fetch(tmp_path, KEYS[:4][::-1]) == (contents(KEYS[:4][::-1]), [KEYS[3]], [])
    assert fetch(tmp_path, []) == ([], [], [])


def test_groups_are_computed_together_and_kept_one_by_one(tmp_path):
    fetch(tmp_path, [KEYS[1]])
    maker = Maker(KEYS[:6])
    FactorCache(tmp_path, 2**30).fetch(KEYS[:6], maker, groups=[[0, 1, 5], [4], [2, 3]])
    assert maker.calls == [[KEYS[0], KEYS[5]], [KEYS[4]], [KEYS[2], KEYS[3]]]

    def fails(positions):
        if positions != [6]:
            raise RuntimeError("no")
        return [factors_of(KEYS[6])]

    with pytest.raises(RuntimeError):
        FactorCache(tmp_path, 2**30).fetch(KEYS, fails, groups=[[0, 1, 2, 3, 4, 5, 6], [7]])
    assert fetch(tmp_path, KEYS)[1] == [KEYS[7]]
    with pytest.raises(ValueError, match="each position once"):
        FactorCache(tmp_path, 2**30).fetch(KEYS[:2], fails, groups=[[0], [0, 1]])
    with pytest.raises(ValueError, match="is not a key"):
        FactorCache(tmp_path, 2**30).fetch(["../../somewhere"], fails)


def test_many_keys_are_handed_over_in_pieces(tmp_path):
    keys = [key_of(number) for number in range(150)]
    maker = Maker(keys)
    FactorCache(tmp_path, 2**30).fetch(keys, maker)
    assert [len(call) for call in maker.calls] == [64, 64, 22]
    assert maker.asked == keys


def test_threads_share_the_work(tmp_path):
    calls, results = [], []
    barrier = threading.Barrier(4)

    def slow(key):
        calls.append(key)
        time.sleep(0.02)
        return factors_of(key)

    def work():
        barrier.wait()
        results.append(fetch(tmp_path, KEYS, make=slow, groups=[[i] for i in range(8)])[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == sorted(KEYS)
    assert results == [contents(KEYS)] * 4


def test_nothing_but_entries_is_left(tmp_path):
    fetch(tmp_path, KEYS)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {entry_path(tmp_path, key) for key in KEYS}


def test_what_cannot_be_kept_is_used(tmp_path):
    def odd(key):
        return dataclasses.replace(factors_of(key), info={"error": object()})

    found, asked, sentences = fetch(tmp_path, KEYS[:2], make=odd)
    assert len(found) == len(asked) == 2
    assert len(sentences) == 1
    assert "is used, and not kept" in sentences[0]


def test_warnings_are_headstarts_by_default(tmp_path):
    fetch(tmp_path, KEYS[:1])
    entry_path(tmp_path, KEYS[0]).write_bytes(b"not an entry")
    with pytest.warns(HeadstartWarning, match="is damaged .*truncated.* computed again"):
        FactorCache(tmp_path, 2**30).fetch(KEYS[:1], Maker(KEYS[:1]))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("fetch"), st.lists(st.integers(0, 4), max_size=5), st.integers(0, 4000)),
            st.tuples(st.just("flip"), st.integers(0, 4), st.integers(0, 10**6)),
            st.tuples(st.just("cut"), st.integers(0, 4), st.integers(0, 10**6)),
            st.tuples(st.just("copy"), st.integers(0, 4), st.integers(0, 4)),
            st.tuples(st.just("evict"), st.integers(0, 4000), st.just(0)),
        ),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_to_the_files_the_factors_are_those_computed(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("cache")
    written = {}

    def sound(key):
        path = entry_path(folder, key)
        return path.exists() and path.read_bytes() == written.get(key)

    for what, first, second in steps:
        if what == "fetch":
            keys = [KEYS[number] for number in first]
            missing = [key for key in dict.fromkeys(keys) if not sound(key)]
            damaged = [key for key in missing if entry_path(folder, key).exists()]
            found, asked, sentences = fetch(folder, keys, limit=second)
            assert found == contents(keys)
            # A flip in the header's padding may change nothing that is read.
            assert set(asked) <= set(missing)
            assert {key for key in missing if key not in damaged} <= set(asked)
            assert len(sentences) == len(set(asked) & set(damaged))
            written |= {key: entry_path(folder, key).read_bytes() for key in keys}
            others = sum(entry.bytes for entry in list_entries(folder) if entry.key not in keys)
            assert not asked or not others or sum(entry.bytes for entry in list_entries(folder)) <= second
        elif what == "evict":
            assert evict(folder, first) == sum(entry.bytes for entry in list_entries(folder)) <= first
        elif (path := entry_path(folder, KEYS[first])).exists():
            data = bytearray(path.read_bytes())
            if what == "flip" and data:
                data[second // 8 % len(data)] ^= 1 << second % 8
            elif what == "cut":
                data = data[: second % (len(data) + 1)]
            elif what == "copy" and (other := entry_path(folder, KEYS[second])).exists():
                data = other.read_bytes()
            path.write_bytes(bytes(data))


def test_which_store_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "20GiB")
    assert open_cache(False) is None
    assert open_cache(True).folder == tmp_path / "home" / "factors"
    assert open_cache(tmp_path).folder == open_cache(str(tmp_path)).folder == tmp_path / "factors"
    assert open_cache(True).limit_bytes == 20 * 2**30
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "")
    assert open_cache(True).limit_bytes == 10 * 2**30
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "0")
    assert open_cache(True) is None
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "plenty")
    with pytest.raises(HeadstartError, match="HEADSTART_CACHE_LIMIT='plenty'"):
        open_cache(True)
