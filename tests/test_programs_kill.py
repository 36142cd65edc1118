"""Programs that are killed with SIGKILL at a random moment and started again end in what they would have ended in."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import headstart as hs
from children import ended, forked
from conftest import perturb, tiny_llama
from headstart.layers import files
from headstart.runs.folder import last_save
from programs import train as program
from programs.train import FORMS

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SEEDS = [1, 2]


def killed(command, lines, wait):
    """Start a program, kill it ``wait`` seconds after it has printed ``lines`` lines of a step; return its status."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        seen = 0
        for line in process.stdout:
            seen += line.startswith("step")
            if seen == lines:
                break
        time.sleep(wait)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return process.returncode


def test_a_trainer_that_is_killed_goes_on(tmp_path):
    settings = {"steps": 10, "batch_size": 4, "dropout": 0.1, "save_strategy": "steps", "save_steps": 2}
    arguments = [str(TESTS / "programs" / "train.py"), str(tmp_path / "cut"), json.dumps(settings)]
    left = 10 * len(FORMS)
    for seed in SEEDS:
        chance = random.Random(seed)
        # The wait is about that of a step and a save.
        lines = chance.randint(4, 14)
        assert killed([sys.executable, *arguments], lines, chance.uniform(0, 0.1)) == -signal.SIGKILL
        left -= lines - 2
    assert not all((tmp_path / "cut" / form / "losses.json").is_file() for form in FORMS)
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    # It went on: a kill costs the steps since the last save, two at most.
    assert 0 < sum(line.startswith("step") for line in done.stdout.splitlines()) <= left
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process that is killed is forked")
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
