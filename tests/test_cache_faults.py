"""The cache of factors under fire: killed writers, full and read-only disks, many processes, damaged files."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from cached import content, contents, decoded, encoded, factors_of, fetch, key_of
from children import ended, forked, killed
from headstart.cache import FactorCache
from headstart.cache.eviction import entry_path, evict, list_entries
from headstart.files import is_hidden, write_whole
from headstart.methods.base import Factors
from headstart.store import DamagedEntryError, store
from headstart.store.claims import claims

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes of these tests are forks")

KEYS = [key_of(number) for number in range(40)]


def large(key):
    """Factors of 256 KiB, so that a write takes a while."""
    generator = torch.Generator().manual_seed(int(key[:8], 16))
    return Factors(torch.randn(32, 1024, generator=generator), torch.randn(1024, 32, generator=generator))


def same(found, key):
    made = large(key)
    return torch.equal(found.A, made.A) and torch.equal(found.B, made.B)


def temporary(folder):
    return [path for path in folder.rglob("*") if is_hidden(path.name)]


def damaged(folder):
    return [sentence for _, sentence in FactorCache(folder, 2**40).verify() if sentence]


# Killed.


def test_killed_at_random_points_nothing_is_lost_or_believed_wrongly(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    draw = random.Random(0)
    made = {key: large(key) for key in KEYS[:12]}

    read, write = os.pipe()

    def work():
        with log.open("w") as announced:
            for key in made:
                os.read(read, 1)  # waits to be let on
                FactorCache(folder, 2**40).fetch([key], lambda _, key=key: [made[key]])
                print(key, file=announced, flush=True)

    began = time.monotonic()
    os.write(write, b"." * len(made))
    assert ended(forked(work)) == 0
    one = (time.monotonic() - began) / len(made)
    cut = 0
    for _ in range(40):
        for entry in list_entries(folder):
            entry.path.unlink()
        log.write_text("")
        # So many keys and no more, so that it never ends before it is killed: within the last of them, or after it.
        allowed = draw.randrange(1, len(made))
        os.write(write, b"." * allowed)
        child = forked(work)
        while len(log.read_text().splitlines()) < allowed - 1:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 2 * one))
        assert killed(child) == -signal.SIGKILL
        assert damaged(folder) == []
        there = {entry.key for entry in list_entries(folder)}
        assert set(log.read_text().split()) <= there
        cut += 0 < len(there) < len(made)
        for key in there:
            (found,) = FactorCache(folder, 2**40).fetch([key], pytest.fail)
            assert same(found, key)
        os.set_blocking(read, False)
        with contextlib.suppress(BlockingIOError):
            os.read(read, len(made))
        os.set_blocking(read, True)
    os.close(read)
    os.close(write)
    assert cut > 5
    assert fetch(folder, list(made), make=large)[0] == [content(each) for each in made.values()]
    evict(folder, 2**40)
    assert temporary(folder) == []


def test_killed_at_any_step_the_next_process_goes_on(tmp_path):
    """Each call of a function that the fetch makes, and each return, is a point to die at."""
    made = dict(zip(KEYS[:2], map(factors_of, KEYS[:2]), strict=True))

    def work(folder, steps):
        left = steps

        def count(*event):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        fetch(folder, KEYS[:2], make=made.get, groups=[[0], [1]])
        sys.setprofile(None)
        (tmp_path / "steps").write_text(str(steps - left))

    assert ended(forked(work, tmp_path / "whole", 10**9)) == 0
    steps = int((tmp_path / "steps").read_text())
    seen = set()
    for number in range(40):
        folder, step = tmp_path / str(number), 1 + number * steps // 40
        assert ended(forked(work, folder, step)) == -signal.SIGKILL
        there = {entry.key for entry in list_entries(folder)}
        seen.add(len(there))
        found, asked, sentences = fetch(folder, KEYS[:2])
        assert (found, sentences) == (contents(KEYS[:2]), [])
        assert set(asked) == set(KEYS[:2]) - there
    assert seen == {0, 1, 2}


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    ready, tell = os.pipe()

    def stuck(key):
        os.write(tell, b"!")
        time.sleep(600)

    child = forked(lambda: fetch(tmp_path, KEYS[:1], make=stuck))
    os.read(ready, 1)
    with claims(tmp_path, KEYS[:1]) as claimed:
        assert not claimed
    killed(child)
    began = time.monotonic()
    assert fetch(tmp_path, KEYS[:1]) == (contents(KEYS[:1]), KEYS[:1], [])
    assert time.monotonic() - began < 5


def test_a_process_that_only_pauses_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_PATIENCE", 0.1)
    ready, tell = os.pipe()
    go, on = os.pipe()

    def slow(key):
        os.write(tell, b"!")
        os.read(go, 1)
        return factors_of(key)

    child = forked(lambda: fetch(tmp_path, KEYS[:1], make=slow))
    os.read(ready, 1)
    shown = []

    def show(*step):
        shown.append(step)
        if len(shown) == 3:
            os.write(on, b"!")

    # What is free is made first.
    found, asked, _ = fetch(tmp_path, KEYS[:2], show=show)
    assert (found, asked) == (contents(KEYS[:2]), [KEYS[1]])
    assert shown[0] == ("waiting for another process", 1, 2)
    assert ended(child) == 0


# Together.


@pytest.mark.parametrize("processes", [2, 8])
def test_one_key_is_computed_once(processes, tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    log.touch()
    ready, go = os.pipe()

    def slow(key):
        with log.open("a") as file:
            file.write(f"{key}\n")
        time.sleep(0.3)
        return factors_of(key)

    def work():
        os.close(go)
        os.read(ready, 1)  # until the parent lets all go
        found, _, sentences = fetch(folder, KEYS[:1], make=slow)
        assert found == contents(KEYS[:1])
        assert sentences == []

    children = [forked(work) for _ in range(processes)]
    os.close(go)
    assert [ended(child) for child in children] == [0] * processes
    assert log.read_text().split() == KEYS[:1]


def test_eight_processes_share_forty_keys_and_some_die(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    log.touch()

    def slow(key):
        time.sleep(0.01)
        with log.open("a") as file:
            file.write(f"{key}\n")
        return factors_of(key)

    def work(number):
        draw = random.Random(number)
        mine = draw.sample(KEYS, 30)
        order = draw.sample(range(30), 30)
        groups = [order[start : start + 4] for start in range(0, 30, 4)]
        found, _, sentences = fetch(folder, mine, make=slow, groups=groups)
        assert found == contents(mine)
        assert sentences == []

    children = [forked(work, number) for number in range(8)]
    time.sleep(0.1)
    for child in children[:2]:
        child.kill()
    assert [ended(child) for child in children][2:] == [0] * 6
    made = log.read_text().split()
    # A killed process takes at most its group of four with it.
    assert len(made) <= len(set(made)) + 8
    assert fetch(folder, KEYS)[0] == contents(KEYS)
    assert damaged(folder) == []


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_without_locks_the_factors_are_still_right(error, tmp_path, monkeypatch):
    import fcntl

    def fails(*arguments):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", fails)
    assert fetch(tmp_path, KEYS[:3]) == (contents(KEYS[:3]), KEYS[:3], [])
    assert fetch(tmp_path, KEYS[:3]) == (contents(KEYS[:3]), [], [])
    # A marker that a killed process left is not waited for.
    if error == errno.ENOSYS:
        (tmp_path / "locks" / f"{KEYS[3]}.lock").write_text(f"{os.getppid()}\n")
        assert fetch(tmp_path, KEYS[3:4]) == (contents(KEYS[3:4]), KEYS[3:4], [])


def test_readers_are_right_while_others_evict(tmp_path):
    fetch(tmp_path, KEYS[:6])

    def work(number):
        draw = random.Random(number)
        for _ in range(60):
            mine = draw.sample(KEYS[:6], 2)
            found, _, sentences = fetch(tmp_path, mine, limit=3000)
            assert found == contents(mine)
            assert sentences == []
            evict(tmp_path, 2000)

    children = [forked(work, number) for number in range(4)]
    assert [ended(child) for child in children] == [0] * 4


def test_few_open_files_are_enough_for_many_keys(tmp_path):
    import resource

    keys = [key_of(number) for number in range(500)]

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))
        assert fetch(tmp_path, keys) == (contents(keys), keys, [])

    assert ended(forked(work)) == 0
    assert len(list_entries(tmp_path)) == 500


# Full, read-only, not there.


def test_a_full_disk_costs_nothing_but_the_entries(small_disk):
    disk = small_disk(1024)
    filler = disk / "filler"
    # On tmpfs, files take whole pages.
    filler.write_bytes(b"0" * (2**20 - 12 * 4096))
    found, asked, sentences = fetch(disk / "cache", KEYS, groups=[[position] for position in range(40)])
    assert (found, asked) == (contents(KEYS), KEYS)
    assert len(sentences) == 1
    assert os.strerror(errno.ENOSPC) in sentences[0]
    kept = {entry.key for entry in list_entries(disk / "cache")}
    assert 0 < len(kept) < 40
    assert temporary(disk) == damaged(disk / "cache") == []
    found, asked, sentences = fetch(disk / "cache", KEYS)
    assert (found, set(asked), len(sentences)) == (contents(KEYS), set(KEYS) - kept, 1)
    filler.unlink()
    assert fetch(disk / "cache", KEYS)[2] == []
    assert fetch(disk / "cache", KEYS) == (contents(KEYS), [], [])


def test_a_disk_that_fills_up_within_a_file_leaves_no_part_of_it(small_disk):
    disk = small_disk(1024)
    for room in range(1, 6):
        filler = disk / "filler"
        filler.write_bytes(b"0" * (2**20 - room * 40_000))
        found = FactorCache(disk / "cache", 2**40, lambda sentence: None).fetch(KEYS[:1], lambda _: [large(KEYS[0])])
        assert same(found[0], KEYS[0])
        assert list_entries(disk / "cache") == []
        assert temporary(disk) == []


def test_a_limit_on_file_sizes_leaves_no_part_of_a_file(tmp_path):
    import resource

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sentences = []
        found = FactorCache(tmp_path, 2**40, sentences.append).fetch(KEYS[:1], lambda _: [large(KEYS[0])])
        assert same(found[0], KEYS[0])
        assert len(sentences) == 1
        assert fetch(tmp_path, KEYS[1:2])[2] == []

    assert ended(forked(work)) == 0
    assert [entry.key for entry in list_entries(tmp_path)] == [KEYS[1]]
    assert temporary(tmp_path) == []


def test_a_read_only_cache_serves(small_disk):
    disk = small_disk(1024)
    folder = disk / "cache"
    fetch(folder, KEYS[:3])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert fetch(folder, KEYS[:3]) == (contents(KEYS[:3]), [], [])
    found, asked, sentences = fetch(folder, KEYS[:5])
    assert (found, asked, len(sentences)) == (contents(KEYS[:5]), KEYS[3:5], 1)
    assert os.strerror(errno.EROFS) in sentences[0]
    assert len(list_entries(folder)) == 3


def test_a_folder_that_cannot_be_made_costs_nothing_but_the_entries(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    found, asked, sentences = fetch(tmp_path / "file" / "cache", KEYS[:3])
    assert (found, asked, len(sentences)) == (contents(KEYS[:3]), KEYS[:3], 1)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_at_its_end_leaves_what_was_there(error, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"before")

    def fails(*paths):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match=os.strerror(error)):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert temporary(tmp_path) == []


# Damaged and foreign.


def test_every_flipped_bit_is_found(tmp_path):
    whole = encoded(KEYS[0], factors_of(KEYS[0], r=1, d_out=2, d_in=3), {"method": "pissa"})
    expected = content(decoded(KEYS[0], whole))
    believed = 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(DamagedEntryError):
            assert content(decoded(KEYS[0], bytes(flipped))) == expected
            believed += 1
    # Blanks between and after the fields of the header, which JSON has four kinds of.
    assert believed <= 16


def test_every_truncation_is_found():
    whole = encoded(KEYS[0], factors_of(KEYS[0]), {"method": "pissa"})
    for length in range(len(whole)):
        with pytest.raises(DamagedEntryError):
            decoded(KEYS[0], whole[:length])
    with pytest.raises(DamagedEntryError):
        decoded(KEYS[0], whole + b"0")


def foreign_files(folder):
    """Files that are not this key's, by what they are."""
    from safetensors.torch import save

    factors = factors_of(KEYS[0])
    longest = (2**63).to_bytes(8, "little")
    deep = b'{"__metadata__":' + b"[" * 5000
    return {
        "another key's": encoded(KEYS[1], factors_of(KEYS[1])),
        "another program's safetensors": save({"A": factors.A, "B": factors.B}),
        "another format": encoded(KEYS[0], factors).replace(b"headstart entry 1", b"headstart entry 0"),
        "nothing": b"",
        "text": b"hello, world. " * 100,
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
        "a long header": longest + b"{}",
        "deep nesting": len(deep).to_bytes(8, "little") + deep,
        "a pickle": b"\x80\x04\x95" + bytes(100),
    }


@pytest.mark.parametrize("what", foreign_files(None))
def test_a_foreign_file_is_not_believed_and_replaced(what, tmp_path):
    fetch(tmp_path, KEYS[:1])
    path = entry_path(tmp_path, KEYS[0])
    path.write_bytes(foreign_files(tmp_path)[what])
    found, asked, sentences = fetch(tmp_path, KEYS[:2])
    assert (found, asked) == (contents(KEYS[:2]), KEYS[:2])
    assert len(sentences) == 1
    assert str(path) in sentences[0]
    assert fetch(tmp_path, KEYS[:2]) == (contents(KEYS[:2]), [], [])


def test_what_is_no_file_is_left_alone(tmp_path):
    entry_path(tmp_path, KEYS[0]).mkdir(parents=True)
    entry_path(tmp_path, KEYS[1]).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(entry_path(tmp_path, KEYS[1]))
    found, asked, sentences = fetch(tmp_path, KEYS[:3])
    assert (found, asked) == (contents(KEYS[:3]), KEYS[:3])
    assert len(sentences) == 1
    assert entry_path(tmp_path, KEYS[0]).is_dir()
    assert fetch(tmp_path, KEYS[1:3]) == (contents(KEYS[1:3]), [], [])


def test_a_damaged_entry_in_a_read_only_cache_is_computed_each_time(small_disk):
    disk = small_disk(1024)
    folder = disk / "cache"
    fetch(folder, KEYS[:2])
    path = entry_path(folder, KEYS[0])
    path.write_bytes(path.read_bytes()[:-1])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for _ in range(2):
        found, asked, sentences = fetch(folder, KEYS[:2])
        assert (found, asked) == (contents(KEYS[:2]), KEYS[:1])
        assert len(sentences) == 2
