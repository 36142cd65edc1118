"""What the command line says of settings and results."""

from __future__ import annotations

import json

import pytest

from headstart.cli import main
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
