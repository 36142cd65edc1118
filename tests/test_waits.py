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
from collections import Counter
from concurrent.futures.thread import BrokenThreadPool
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from filelock import Timeout
from peft import LoraConfig

import headstart as hs
from cached import contents, encoded, factors_of, fetch, key_of
from children import ended, forked, killed
from conftest import tiny_llama
from headstart.cache.eviction import entry_path
from headstart.files import sha256, write_whole
from headstart.linalg.lowrank import adam_lowrank
from headstart.processes import Processes
from headstart.store import store
from headstart.store.claims import claims, duration, owner, take_lock
from headstart.stream import stream_start
from headstart.stream.work import Work

KEYS = [key_of(number) for number in range(5)]
HERE = re.escape(f"process {os.getpid()} on {socket.gethostname()}, for ")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(store, "LONGEST_WAIT", 0.3)


# The cache.


@pytest.mark.parametrize("groups", [None, [[0], [1, 2]], [[2, 1, 0]]])
def test_factors_that_another_process_never_finishes_are_made_here(groups, tmp_path, impatient):
    with claims(tmp_path, KEYS[:2]) as others:
        assert others == KEYS[:2]
        found, asked, (sentence,) = fetch(tmp_path, KEYS[:3], groups=groups)
    # What is free is made first, and what others hold once and no more.
    assert found == contents(KEYS[:3])
    assert asked[0] == KEYS[2] and sorted(asked) == sorted(KEYS[:3])
    place = re.escape(str(tmp_path))
    assert re.match(rf"waited \d+ s for factors of layers \(2\) in {place}, being made by {HERE}\d+ s: ", sentence)
    assert fetch(tmp_path, KEYS[:3]) == (contents(KEYS[:3]), [], [])


def test_the_wait_begins_anew_with_everything_that_comes(tmp_path, monkeypatch):
    """A process that needs longer for all than another waits, and less for each, is waited for."""
    monkeypatch.setattr(store, "LONGEST_WAIT", 2.0)

    def work(holding):
        own = {key: claims(tmp_path, [key]) for key in KEYS}
        for claim in own.values():
            claim.__enter__()
        holding.set()
        for key, claim in own.items():
            time.sleep(0.5)
            write_whole(entry_path(tmp_path, key), encoded(key, factors_of(key)))
            claim.__exit__(None, None, None)

    holding = multiprocessing.get_context("fork").Event()
    process = forked(work, holding)
    assert holding.wait(60)
    began = time.monotonic()
    assert fetch(tmp_path, KEYS) == (contents(KEYS), [], [])
    assert time.monotonic() - began > 2
    assert ended(process) == 0


def test_what_is_computed_here_for_long_is_no_wait(tmp_path, monkeypatch):
    """A lock that another takes meanwhile is respected."""
    taken, release = threading.Event(), threading.Event()

    def slow(key):
        # Two hours later, another process has begun the second key.
        now = time.monotonic() + 7200
        monkeypatch.setattr(store, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
        threading.Thread(target=other, daemon=True).start()
        assert taken.wait(60)
        threading.Timer(0.4, release.set).start()
        return factors_of(key)

    def other():
        with claims(tmp_path, KEYS[1:2]):
            taken.set()
            release.wait(60)
            write_whole(entry_path(tmp_path, KEYS[1]), encoded(KEYS[1], factors_of(KEYS[1])))

    assert fetch(tmp_path, KEYS[:2], make=slow, groups=[[0], [1]]) == (contents(KEYS[:2]), KEYS[:1], [])


# A streamed start.


def streamed(folder, out):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    report = stream_start(folder, "pissa", config, out, cache=False, progress=False, form="residual")
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return report, files


@pytest.mark.parametrize("pieces", [["layer-00001"], ["layer-00000", "layer-00003", "model.safetensors"]])
def test_pieces_that_another_process_never_finishes_are_made_here(pieces, tmp_path, monkeypatch, impatient):
    tiny_llama().save_pretrained(tmp_path / "model")
    _, expected = streamed(tmp_path / "model", tmp_path / "whole")
    made, begun = Work.create, []

    def create(self):
        made(self)
        begun.extend(stack.enter_context(claims(self.folder, pieces)))

    with ExitStack() as stack:
        monkeypatch.setattr(Work, "create", create)
        report, files = streamed(tmp_path / "model", tmp_path / "out")
    assert begun == pieces
    assert files == expected
    waited = Counter("shards" if piece.startswith("model") else "layers" for piece in pieces)
    for (what, count), sentence in zip(waited.items(), report.warnings, strict=True):
        assert re.match(rf"waited \d+ s for {what} \({count}\) in .*, being made by {HERE}\d+ s: ", sentence)
    assert not list(tmp_path.glob(".out.stream-*"))


def test_what_is_made_without_a_lock_goes_to_a_file_of_its_own(tmp_path):
    one, other = (Work(tmp_path / "out", {}) for _ in range(2))
    one.create()

    def slowly():
        yield b"on"
        assert other.put_file("a", iter([b"one"])) == sha256(other.file("a"))
        yield b"e"

    with one.claims(["a"]) as first, other.claims(["a"], regardless=True) as second:
        assert first == second == ["a"]
        assert one.put_file("a", slowly()) == one.file_digest("a")
    assert one.file("a").read_bytes() == b"one"


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
    started = [forked(alone, rank, tmp_path, queues[rank]) for rank in range(2)]
    sentence = answers.get(timeout=120)
    for process in started:
        killed(process)
    assert re.match(r"process 0 waited \d+ s for 1 other process: .*Timed out", sentence)


# Threads.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_that_cannot_begin_are_not_waited_for(monkeypatch):
    plain = torch.set_num_threads

    def fails(count):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no thread can be had")
        plain(count)

    monkeypatch.setattr(torch, "set_num_threads", fails)
    W, A, B = torch.randn(2, 6, 5), torch.randn(2, 2, 5), torch.randn(2, 6, 2)
    with pytest.raises(BrokenThreadPool):
        adam_lowrank(W, A, B, steps=3)


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
    assert store.LONGEST_WAIT == 600
