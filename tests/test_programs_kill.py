"""Programs that are killed with SIGKILL at a random moment and started again end in what they would have ended in."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import headstart as hs
from children import ended, forked, killed
from conftest import perturb, tiny_llama
from headstart.layers import files
from headstart.runs.folder import last_save
from programs import train as program
from programs.train import FORMS

SEEDS = [1, 2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that are killed are forked")


def work(folder, settings, said):
    """What the program does, with its lines in a file."""
    sys.stdout = said.open("w", encoding="utf-8")
    program.main(folder, settings)


def steps(said):
    """How many lines of a step there are."""
    return sum(line.startswith("step") for line in said.read_text(encoding="utf-8").splitlines())


def test_a_trainer_that_is_killed_goes_on(tmp_path):
    settings = {"steps": 10, "batch_size": 4, "dropout": 0.1, "save_strategy": "steps", "save_steps": 2}
    said = tmp_path / "said"
    left = 10 * len(FORMS)
    for seed in SEEDS:
        chance = random.Random(seed)
        # The wait is about that of a step and a save.
        lines = chance.randint(4, 14)
        said.write_text("")
        process = forked(work, tmp_path / "cut", settings, said)
        while process.is_alive() and steps(said) < lines:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        assert killed(process) == -signal.SIGKILL
        left -= lines - 2
    assert not all((tmp_path / "cut" / form / "losses.json").is_file() for form in FORMS)
    assert ended(forked(work, tmp_path / "cut", settings, said)) == 0
    # It went on: a kill costs the steps since the last save, two at most.
    assert 0 < steps(said) <= left
    program.main(tmp_path / "uncut", settings)
    for form in FORMS:
        cut, uncut = (json.loads((tmp_path / each / form / "losses.json").read_text()) for each in ("cut", "uncut"))
        assert len(uncut) == 10
        assert cut == uncut
        found, expected = (load_file(tmp_path / e / form / "factors-0.safetensors") for e in ("cut", "uncut"))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


def test_a_save_that_was_cut_short_is_passed_over(tmp_path):
    """The Trainer's state is the last file of a save, and a kill may leave half of it."""
    for step, state in ((10, '{"global_step": 10, "max_steps": 40}'), (20, '{"best_metric": nul'), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_save(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_killed_save_of_a_checkpoint_leaves_the_old_one(tmp_path, monkeypatch):
    model = program.prepare("anchored")
    hs.save_checkpoint(model, tmp_path / "start")
    expected = program.factors(model)
    perturb(model)
    monkeypatch.setattr(files, "save_file", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    save = functools.partial(hs.save_checkpoint, model, tmp_path / "start", force=True)
    assert ended(forked(save)) == -signal.SIGKILL
    for name, value in program.factors(hs.load_checkpoint(tiny_llama(), tmp_path / "start")).items():
        assert torch.equal(value, expected[name]), name
