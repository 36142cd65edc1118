"""Whatever headstart waits for, it goes on in the end, and says what it waited for, whose it was, and how long."""

from __future__ import annotations

import datetime
import errno
import multiprocessing
import os
import re
import socket
import threading
import time
import warnings
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from filelock import Timeout
from peft import LoraConfig

import headstart as hs
from cached import contents, factors_of, fetch, key_of
from conftest import tiny_llama
from headstart.cache import locks, store
from headstart.cache.entries import encode, entry_path
from headstart.cache.locks import Patience, duration, held, owner, take_lock
from headstart.files import write_whole
from headstart.processes import Processes
from headstart.stream import run, stream_start
from headstart.stream.parts import Work

KEYS = [key_of(number) for number in range(5)]
HERE = re.escape(f"process {os.getpid()} on {socket.gethostname()}, for ")


@pytest.fixture
def impatient(monkeypatch):
    for module in (store, run):
        monkeypatch.setattr(module, "LONGEST_WAIT", 0.3)


# The cache.


@pytest.mark.parametrize("groups", [None, [[0], [1, 2]], [[2, 1, 0]]])
def test_factors_that_another_process_never_finishes_are_made_here(groups, tmp_path, impatient):
    with held(tmp_path, KEYS[:2]) as others:
        assert others.keys == set(KEYS[:2])
        found, asked, (sentence,) = fetch(tmp_path, KEYS[:3], groups=groups)
    # What is free is made first, and what others hold once and no more.
    assert found == contents(KEYS[:3])
    assert asked[0] == KEYS[2] and sorted(asked) == sorted(KEYS[:3])
    place = re.escape(str(tmp_path))
    assert re.match(rf"waited \d+ s for factors of 2 layers in {place}, .* by {HERE}\d+ s: ", sentence)
    assert fetch(tmp_path, KEYS[:3]) == (contents(KEYS[:3]), [], [])


def test_the_wait_begins_anew_with_everything_that_comes(tmp_path, monkeypatch):
    """A process that needs longer for all than another waits, and less for each, is waited for."""
    monkeypatch.setattr(store, "LONGEST_WAIT", 2.0)

    def work(holding):
        with held(tmp_path, KEYS) as others:
            holding.set()
            for key in KEYS:
                time.sleep(0.5)
                write_whole(entry_path(tmp_path, key), encode(key, factors_of(key), {}))
                others.release(key, done=True)

    context = multiprocessing.get_context("fork")
    holding = context.Event()
    process = context.Process(target=work, args=(holding,), daemon=True)
    process.start()
    assert holding.wait(60)
    began = time.monotonic()
    assert fetch(tmp_path, KEYS) == (contents(KEYS), [], [])
    assert time.monotonic() - began > 2
    process.join(60)
    assert process.exitcode == 0


def test_what_is_computed_here_for_long_is_no_wait(tmp_path, monkeypatch):
    """A lock that another takes meanwhile is respected."""
    taken, release = threading.Event(), threading.Event()

    def slow(key):
        # Two hours later, another process has begun the second key.
        now = time.monotonic() + 7200
        monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
        threading.Thread(target=other, daemon=True).start()
        assert taken.wait(60)
        threading.Timer(0.4, release.set).start()
        return factors_of(key)

    def other():
        with held(tmp_path, KEYS[1:2]) as others:
            taken.set()
            release.wait(60)
            write_whole(entry_path(tmp_path, KEYS[1]), encode(KEYS[1], factors_of(KEYS[1]), {}))
            others.release(KEYS[1], done=True)

    assert fetch(tmp_path, KEYS[:2], make=slow, groups=[[0], [1]]) == (contents(KEYS[:2]), KEYS[:1], [])


# A streamed start.


def streamed(folder, out):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    report = stream_start(folder, "pissa", config, out, cache=False, progress=False, form="residual")
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return report, files


@pytest.mark.parametrize("pieces", [["layer-00001"], ["layer-00000", "layer-00003", "shard-00000"]])
def test_pieces_that_another_process_never_finishes_are_made_here(pieces, tmp_path, monkeypatch, impatient):
    tiny_llama().save_pretrained(tmp_path / "model")
    _, expected = streamed(tmp_path / "model", tmp_path / "whole")
    made, begun = Work.create, []

    def create(self):
        made(self)
        other = Work(tmp_path / "out", {})
        other.folder = self.folder
        begun.extend(stack.enter_context(other.claim(piece)) for piece in pieces)

    with ExitStack() as stack:
        monkeypatch.setattr(Work, "create", create)
        report, files = streamed(tmp_path / "model", tmp_path / "out")
    assert begun == [True] * len(pieces)
    assert files == expected
    assert len(report.warnings) == len(pieces)
    for piece, sentence in zip(pieces, report.warnings, strict=True):
        assert re.match(rf"waited \d+ s for {piece} in .*, which is being made by {HERE}\d+ s: ", sentence)
    assert not list(tmp_path.glob(".out.stream-*"))


def test_what_is_made_without_a_lock_goes_to_a_file_of_its_own(tmp_path):
    one, other = Work(tmp_path / "out", {}), Work(tmp_path / "out", {})
    one.create()
    other.disregard("a", 1.0)
    with one.claim("a") as first, other.claim("a") as second:
        assert first and second
        with one._partial(one.file("a")) as mine, other._partial(other.file("a")) as theirs:
            assert mine != theirs
            mine.write_text("one")
            theirs.write_text("one")
    assert one.file("a").read_text() == "one"


# Processes that PyTorch's process group joins.


def alone(rank, folder, answers):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=2)
    )
    if rank == 1:
        answers.get()  # alive, and never there
        return
    try:
        Processes.joined().gather("here")
    except hs.HeadstartError as error:
        answers.put(str(error))
        answers.put(None)


def test_a_process_that_does_not_come_is_a_sentence(tmp_path):
    context = multiprocessing.get_context("fork")
    answers, unused = context.Queue(), context.Queue()
    queues = (answers, unused)
    started = [context.Process(target=alone, args=(rank, tmp_path, queues[rank]), daemon=True) for rank in range(2)]
    for process in started:
        process.start()
    sentence = answers.get(timeout=120)
    for process in started:
        process.kill()
    assert re.match(r"process 0 waited \d+ s for 1 other process: .*Timed out", sentence)


# Locks.


def test_a_lock_says_whose_it_is_and_for_how_long(tmp_path):
    path = tmp_path / "a.lock"
    lock = take_lock(path)
    with pytest.raises(Timeout):
        take_lock(path)
    assert re.fullmatch(HERE + "[01] s", owner(path))
    os.utime(path, (time.time() - 600,) * 2)
    assert re.fullmatch(HERE + "10 minutes", owner(path))
    lock.release()
    path.write_bytes(b"\xff" * 10_000)
    assert len(owner(path)) < 400
    path.write_bytes(b"")
    assert owner(path) == "another process, for 0 s"
    assert owner(tmp_path / "none.lock") == "another process"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_no_marker_takes_their_place(number, tmp_path, monkeypatch):
    import fcntl

    def fails(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    path = tmp_path / "a.lock"
    for content in (None, f"{os.getppid()}\n{socket.gethostname()}\n"):
        if content is not None:
            path.write_text(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert take_lock(path) is None
            assert take_lock(path) is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0 s"), (0.4, "0 s"), (119, "119 s"), (120, "2 minutes"), (3600, "60 minutes")]
)
def test_durations_are_words(seconds, words):
    assert duration(seconds) == words


def test_ten_minutes_are_the_end_of_patience():
    patience = Patience()
    assert patience.longest == 600 and not patience.over
    assert Patience(-1.0).over
