"""SIGKILL at random moments of starts with the cache on: what is written is whole, and what is there is right.

``HEADSTART_KILL_ROUNDS=100`` makes as many rounds of it.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from peft import LoraConfig

import headstart as hs
from children import ended, forked, killed
from conftest import tiny_llama, wrap
from headstart.cache import open_cache
from headstart.stream import stream_start

ROUNDS = int(os.environ.get("HEADSTART_KILL_ROUNDS", "6"))
METHOD = "inilora:solver=adam,steps=40"


def in_memory(base, out, cache):
    model = wrap(tiny_llama())
    hs.initialize_(model, METHOD, cache=cache, progress=False)
    hs.save_checkpoint(model, out, force=True)


def streamed(base, out, cache):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    stream_start(base, METHOD, config, out, cache=cache, force=True, progress=False)


def run(start, *arguments, kill_after=None):
    """Run in a process of its own, killed after so many seconds; return how long it ran."""
    began = time.monotonic()
    process = forked(start, *arguments)
    if kill_after is None:
        assert ended(process) == 0
    else:
        time.sleep(kill_after)
        # It may have ended by itself before.
        assert killed(process) in (0, -signal.SIGKILL)
    return time.monotonic() - began


def contents(folder):
    return {each.name: each.read_bytes() for each in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize("start", [in_memory, streamed])
def test_killed_starts_leave_a_whole_folder_or_none(start, tmp_path, monkeypatch):
    monkeypatch.delenv("HEADSTART_CACHE_LIMIT")
    base, cache, out = tmp_path / "base", tmp_path / "cache", tmp_path / "out"
    tiny_llama().save_pretrained(base)
    reference = tmp_path / "reference"
    whole = run(start, base, reference, False)
    expected = contents(reference)
    draw = random.Random(1)
    for number in range(ROUNDS):
        if number % 5 == 0:  # from nothing, now and then
            for entry in open_cache(cache).entries():
                entry.path.unlink()
        run(start, base, out, cache, kill_after=draw.uniform(0, whole))
        found = contents(out)
        assert not found or found == expected
        assert not [problem for _, problem in open_cache(cache).verify() if problem]
        if number % 3 == 0:
            run(start, base, out, cache)
            assert contents(out) == expected
    run(start, base, out, cache)
    assert contents(out) == expected
    # Nothing that killed processes left is still there.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "cache", "out", "reference"]
