"""The command in two processes, and what the command line says of settings and results."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from headstart.cli import main
from headstart.runs.method_comparison import exported
from headstart.runs.result import read_result
from running import llama_folder, sums


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sums(tmp_path_factory.mktemp("data") / "sums.jsonl")


def recipe(path, model, data, **batch):
    settings = {
        "model": str(model),
        "data": {"task": "text", "train": str(data), "held_out_examples": 6},
        "adapter": {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "start": "lora-one:samples=8",
        "optimizer": {"lr": 1e-2},
        "schedule": {"steps": 4},
        "batch": {"max_length": 64, **batch},
    }
    path.write_text(json.dumps(settings))
    return path


def run(capsys, *arguments):
    capsys.readouterr()
    code = 0
    try:
        main(["train", *map(str, arguments)])
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def losses(folder):
    return [loss for _, loss in read_result(folder).series["loss"]]


def test_two_processes_train_as_one_does(model, data, tmp_path):
    """Samples weigh by their tokens, in whichever process and batch they are."""
    one = recipe(tmp_path / "one.yaml", model, data, size=2, accumulation=2)
    two = recipe(tmp_path / "two.yaml", model, data, size=1, accumulation=2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command, path in (([sys.executable], one), (launch, two)):
        out = path.with_suffix("")
        done = subprocess.run(
            [*command, "-m", "headstart.cli", "train", str(path), "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    first, second = (read_result(tmp_path / name).metrics["loss/end"].value for name in ("one", "two"))
    assert first == pytest.approx(second, rel=1e-4)
    # Costs are those of all processes.
    windows = [read_result(tmp_path / name).windows for name in ("one", "two")]
    first, second = ([[row["samples"], row["tokens"]] for row in rows] for rows in windows)
    assert first == second and first[0][0] == 16
    settings = [exported(tmp_path / name).content["run_info"]["train_config"] for name in ("one", "two")]
    assert [setting["batch_size"] for setting in settings] == [4, 4]


def test_train_prints_a_result_and_says_where_it_is(capsys, model, data, tmp_path):
    path = recipe(tmp_path / "run.yaml", model, data, size=2)
    code, said = run(capsys, path, "seed=3", "--out", tmp_path / "run")
    assert code == 0 and "loss/end" in said and f"done; wrote {tmp_path / 'run'}" in " ".join(said.split())
    assert read_result(tmp_path / "run").settings["seed"] == 3


def test_show_says_where_every_value_came_from(capsys, model, data, tmp_path):
    path = recipe(tmp_path / "run.yaml", model, data)
    code, said = run(capsys, path, "optimizer.lr=3e-4", "--show")
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if "." in line.split()[0]}
    assert code == 0
    assert rows["optimizer.lr"] == ["0.0003", "optimizer.lr=3e-4"]
    assert rows["adapter.r"] == ["2", "run.yaml"] and rows["optimizer.name"] == ["adamw", "default"]


def test_check_counts_without_weights(capsys, model, data, tmp_path):
    code, said = run(capsys, recipe(tmp_path / "run.yaml", model, data), "--check")
    words = " ".join(said.split())
    # Two layers, q of 32 x 32 and v of 16 x 32, at rank 2.
    assert code == 0 and "2 of 32 x 32, 2 of 16 x 32" in words and "trainable 448" in words and "steps 4" in words


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optimzer.lr=1"], "no setting 'optimzer'"),
        (["start=pisa"], "unknown method 'pisa'. Did you mean 'pissa'?"),
        (["data=gsm9k"], "unknown task 'gsm9k'. Did you mean 'gsm8k'?"),
        (["none.yaml"], "no file 'none.yaml'"),
    ],
)
def test_wrong_settings_are_one_sentence_and_exit_code_2(words, sentence, capsys):
    code, said = run(capsys, *words)
    assert code == 2 and sentence in " ".join(said.split())
