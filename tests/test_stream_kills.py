"""Kills, late processes and full disks: a streamed start loses nothing that was finished, and goes on from it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import time

import pytest

from children import ended, forked, killed
from headstart import files
from headstart.errors import CheckpointError
from headstart.stream import run
from headstart.stream.work import Work
from streamed import contents, finished, finished_files, save_model, start, start_and_stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    start(folder, out)
    return contents(out)


def start_arranged(folder, out, arrange):
    arrange()
    start(folder, out)


def at_each_file(happens):
    """Let something happen whenever a file has been begun, under its hidden name."""
    plain = files._hidden

    @contextlib.contextmanager
    def hidden(*place, **kind):
        with plain(*place, **kind) as path:
            happens()
            yield path

    files._hidden = hidden


def test_kills_at_random_times_lose_nothing(folder, expected, tmp_path):
    out = tmp_path / "out"
    generator = random.Random(0)
    kept: dict[str, bytes] = {}
    for _ in range(5):
        # So many of the 46 files and no more, however fast the machine: never the last one before the kill.
        allowed = generator.randrange(2, 10)
        gate = multiprocessing.get_context("fork").Semaphore(allowed)

        def arrange(gate=gate):
            at_each_file(gate.acquire)

        child = forked(start_arranged, folder, out, arrange)
        while len(finished_files(out)) < len(kept) + allowed - 1 and child.is_alive():
            time.sleep(0.001)
        # Within the last piece that it may make, or before the next.
        time.sleep(generator.uniform(0, 0.02))
        assert killed(child) == -signal.SIGKILL and not out.exists()
        now = finished(out)
        assert len(now) > len(kept)
        assert all(now.get(name) == data for name, data in kept.items())
        kept = now
    start(folder, out)
    assert contents(out) == expected
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("count", [1, 9, 22, 43, 46])
def test_kills_in_the_middle_of_a_write_lose_nothing(folder, expected, tmp_path, count):
    out = tmp_path / "out"

    def arrange():
        begun = 0

        def cut():
            nonlocal begun
            begun += 1
            if begun == count:
                next(path for path in out.parent.rglob(".*.headstart") if path.is_file()).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)

        at_each_file(cut)

    assert ended(forked(start_arranged, folder, out, arrange)) == -signal.SIGKILL
    assert not out.exists()
    made = []
    plain = Work.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "put", lambda self, name, *rest: (made.append(name), plain(self, name, *rest)))
        before = set(finished(out))
        start(folder, out)
    assert contents(out) == expected
    assert not {f"{name}.safetensors" for name in made} & before


def test_a_kill_between_the_two_renames_is_not_seen(folder, expected, tmp_path):
    """Killed after the folder took its place, and before the pieces were removed."""
    out = tmp_path / "out"

    def arrange():
        Work.clear = lambda self: os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(start_arranged, folder, out, arrange)) == -signal.SIGKILL
    assert contents(out) == expected
    with pytest.raises(CheckpointError, match="exists"):
        start(folder, out)
    start(folder, out, force=True)
    assert contents(out) == expected
    assert not list(tmp_path.glob(".*"))


def test_a_dead_process_leaves_its_layers_to_the_others(folder, expected, tmp_path):
    """The first process waits while another holds a layer, and takes it over when that one dies."""
    out = tmp_path / "out"
    held = multiprocessing.get_context("fork").Event()

    def hold():
        os.environ.update(RANK="1", WORLD_SIZE="2")

        def wait(self, name, *rest):
            held.set()
            time.sleep(600)

        Work.put = wait

    start_and_stop(folder, out, 1)
    other = forked(start_arranged, folder, out, hold)
    assert held.wait(60)
    first = forked(start, folder, out)
    first.join(3)
    assert first.is_alive() and not out.exists()
    killed(other)
    first.join(60)
    assert first.exitcode == 0
    assert contents(out) == expected


def test_late_processes_find_everything_done(folder, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(run.psutil.Process, "create_time", lambda self: time.time() - 100)
    start(folder, out)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start(folder, out) is None
    assert contents(out) == expected and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("step", ["claims", "need", "put"])
def test_a_process_that_is_late_leaves_quietly(folder, tmp_path, monkeypatch, step):
    """The first process finishes, and clears the pieces away, while this one is at some step."""
    plain, out = getattr(Work, step), tmp_path / "out"
    Work(out, {}).create()

    def cleared(self, *arguments, **options):
        self.clear()
        return plain(self, *arguments, **options)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run, "_invited", lambda work, *_: work.create() or True)
    monkeypatch.setattr(Work, step, cleared)
    assert start(folder, out) is None
    assert not list(tmp_path.glob(".out.stream-*"))


def test_a_first_process_that_doesnt_come_is_waited_for_and_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run, "_PATIENCE", 0.1)
    with pytest.raises(CheckpointError, match=r"process 1 waited .* for process 0"):
        start(folder, tmp_path / "out")


@pytest.mark.parametrize("size", [4, 64, 160, 260])
def test_a_full_disk_is_one_sentence_and_goes_on_after_room_was_made(folder, expected, tmp_path, small_disk, size):
    place = small_disk(size)
    with pytest.raises(CheckpointError, match=r"can't be written \(No space left on device\): make room"):
        start(folder, place / "out")
    assert not (place / "out").exists()
    kept = finished(place / "out")
    subprocess.run(["mount", "-o", "remount,size=4096k", place], check=True)
    start(folder, place / "out")
    assert contents(place / "out") == expected
    assert kept or size < 100
