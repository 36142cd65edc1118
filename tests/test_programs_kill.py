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
from conftest import perturb, tiny_llama, word_tokenizer
from headstart.cli import main
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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny model with a tokenizer, questions with answers, and the arguments of a comparison on them."""

    folder = tmp_path_factory.mktemp("small")
    tiny_llama(max_position_embeddings=128).save_pretrained(folder / "tiny")
    words = ["<pad>", "<eos>", "<unk>", "Question", "Answer", *"#+=.:?", *(str(number) for number in range(70))]
    word_tokenizer(words).save_pretrained(folder / "tiny")
    rows = [{"question": f"{i} + {i} ?", "answer": f"{i} + {i} = {2 * i} .\n#### {2 * i}"} for i in range(30)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return [
        sys.executable, "-c", "from headstart.cli import main; main()", "compare", str(folder / "tiny"),
        "--data", str(folder / "sums.jsonl"), "--methods", "pissa,lora-xs:std=0.01", "--steps", "40",
        "--batch-size", "4", "--rank", "2", "--held-out-examples", "4", "--graded-examples", "2",
        "--max-new-tokens", "3", "--out",
    ]  # fmt: skip


def test_a_comparison_that_is_killed_goes_on(small, tmp_path):
    cut, chance = tmp_path / "cut", random.Random(SEEDS[0])
    process = subprocess.Popen([*small, str(cut)], env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    # It saves every ten of its 40 steps: once the second method has a save, the end of its training is not far.
    deadline = time.monotonic() + 240
    while not last_save(cut / "lora-xs_std=0.01" / "trainer") and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (cut / "pissa" / "result.json").exists()
    assert not (cut / "lora-xs_std=0.01" / "result.json").exists()
    done = subprocess.run([*small, str(cut)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    main([*small[3:], str(tmp_path / "uncut")])
    for method in ("pissa", "lora-xs_std=0.01"):
        mine, theirs = (json.loads((out / method / "result.json").read_text()) for out in (cut, tmp_path / "uncut"))
        assert len(theirs["series"]["loss"]) == 40
        for key in ("series", "metrics"):
            assert mine[key] == theirs[key], key


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
