"""``accelerate launch`` in front of the command: two processes, their parameters whole (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from headstart.errors import RunError
from headstart.runs.method_comparison import exported
from headstart.runs.read import read_run
from headstart.runs.result import read_result
from headstart.runs.stages import execute
from running import bert_folder, llama_folder, sentiments

TESTS = Path(__file__).parent
SHARDED = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
}


def answers(path):
    """Sums with answers of very different lengths, so that samples, batches and processes differ in tokens."""
    rows = [
        {"question": f"{i % 7}+{i % 3}?", "answer": f"{'So. ' * (i * i % 7)}\n#### {i % 7 + i % 3}"} for i in range(50)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """A folder with the runs, each for one process and for two."""
    folder = tmp_path_factory.mktemp("recipes")
    text = {
        "model": str(llama_folder(folder / "llama")),
        "data": {"task": "text", "train": str(answers(folder / "sums.jsonl")), "held_out_examples": 7},
        "adapter": {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "optimizer": {"lr": 1e-2},
        "schedule": {"steps": 5},
        "evaluation": {"every": 2, "graded_examples": 5, "max_new_tokens": 4},
    }
    classes = text | {
        "model": str(bert_folder(folder / "bert")),
        "data": {"task": "sst-2", "train": str(sentiments(folder / "sst2.tsv")), "held_out_examples": 7},
        "adapter": {"r": 2, "alpha": 4, "targets": ["query", "value"]},
        "evaluation": {"every": 2},
    }
    full = {**text, "trains": "full", "optimizer": {"lr": 1e-3}}
    del full["adapter"]
    for name, settings in (("text", text), ("classes", classes), ("full", full)):
        for count, size in ((1, 4), (2, 2)):
            batch = {"size": size, "accumulation": 2, "max_length": 60}
            (folder / f"{name}-{count}.yaml").write_text(json.dumps(settings | {"batch": batch}))
    # What dropout draws is each process's own.
    path = folder / "bert" / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | still))
    (folder / "fsdp2.yaml").write_text(json.dumps(SHARDED))
    return folder


def launch(recipes, way, *program, **variables):
    """Start the program in two processes; return its exit code, what it said and the seconds it took."""
    how = ["--config_file", str(recipes / "fsdp2.yaml")]
    if way == "ddp":
        # The name of several processes on one machine: with --cpu there is one, whatever --num_processes says.
        how = [
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *how, *program]
    environment = {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1", **variables}
    began = time.monotonic()
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def train(recipes, way, runs, *cut):
    return launch(recipes, way, str(TESTS / "programs" / "launched.py"), json.dumps(runs), *cut)


def alone(recipes, folder, name, *words):
    """Do in this process what two do, with batches twice as large."""
    return execute(read_run(recipes / f"{name}-1.yaml", words)[0], folder)


def same(result, expected):
    """Compare losses step by step, and what was measured at both ends."""
    found, wanted = ([loss for _, loss in each.series["loss"]] for each in (result, expected))
    # A mean of the processes' own means would be off by 1e-4: tokens of this model are all about as likely.
    assert found == pytest.approx(wanted, rel=5e-6) and wanted[0] != pytest.approx(wanted[-1], rel=1e-3)
    assert result.metrics.keys() == expected.metrics.keys()
    for name, figure in expected.metrics.items():
        assert result.metrics[name].value == pytest.approx(figure.value, rel=5e-6), name
        assert result.metrics[name].count == figure.count, name
    assert (result.status, result.processes) == ("done", 2)


def words(recipes, name, out, *changes):
    return ["train", str(recipes / f"{name}-2.yaml"), *changes, "--out", str(out)]


def test_in_two_processes_a_run_is_cut_off_and_ends_as_one_process_does(recipes, tmp_path):
    text = words(recipes, "text", tmp_path / "text", "start=lora-one:samples=8")
    code, said, _ = train(recipes, "ddp", [text], "0", "3", "kill")
    assert code and (tmp_path / "text" / "trainer" / "checkpoint-2").is_dir(), said[-3000:]
    classes = words(recipes, "classes", tmp_path / "classes", "start=pissa")
    with pytest.raises(RunError, match=r"by a number of 2 processes.*go on with 2"):
        execute(read_run(recipes / "text-2.yaml", ["start=lora-one:samples=8"])[0], tmp_path / "text")
    code, said, _ = train(recipes, "ddp", [[*text, "--show"], [*text, "--check"], text, classes])
    assert code == 0, said[-3000:]
    assert [said.count(each) for each in ("batch.accumulation", "adapted layers", "done; wrote")] == [1, 1, 2]
    same(read_result(tmp_path / "text"), alone(recipes, tmp_path / "one", "text", "start=lora-one:samples=8"))
    same(read_result(tmp_path / "classes"), alone(recipes, tmp_path / "other", "classes", "start=pissa"))
    items, expected = (json.loads((tmp_path / name / "items.json").read_text()) for name in ("text", "one"))
    assert items == expected and len(items) == 5
    # Costs are those of all processes.
    windows = [
        [[row["samples"], row["tokens"]] for row in read_result(tmp_path / name).windows] for name in ("text", "one")
    ]
    assert windows[0] == windows[1] and sum(samples for samples, _ in windows[0]) == 40
    settings = [exported(tmp_path / name).content["run_info"]["train_config"] for name in ("text", "one")]
    assert [setting["batch_size"] for setting in settings] == [8, 8]


def test_sharded_a_failing_process_ends_all_and_the_run_goes_on(recipes, tmp_path):
    text = words(recipes, "text", tmp_path / "text", "start=pissa", "merged=true")
    code, said, seconds = train(recipes, "fsdp2", [text], "1", "3", "fail")
    assert code and "the disk of this process is gone" in said and seconds < 100
    whole = words(recipes, "full", tmp_path / "full")
    code, said, _ = train(recipes, "fsdp2", [text, whole])
    assert code == 0, said[-3000:]
    result = read_result(tmp_path / "text")
    assert result.series["loss"][0][0] == 1 and len(result.series["loss"]) == 5
    same(result, alone(recipes, tmp_path / "one", "text", "start=pissa", "merged=true"))
    same(
        read_result(tmp_path / "full"),
        alone(recipes, tmp_path / "other", "full"),
    )
    models = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(recipes / "llama"), folder / "adapter")
        for folder in (tmp_path / "text" / "trained", tmp_path / "one" / "trained")
    ]
    models += [AutoModelForCausalLM.from_pretrained(tmp_path / "text" / "trained" / "merged")]
    with torch.no_grad():
        live, one, merged = (model(torch.arange(3, 40)[None]).logits for model in models)
    assert torch.allclose(live, one, atol=1e-4) and torch.allclose(live, merged, atol=1e-5)


def test_wrong_settings_are_said_once(recipes):
    code, said, _ = launch(recipes, "ddp", "-m", "headstart.cli", "train", "optimzer.lr=1")
    assert code and said.count("no setting 'optimzer'") == 1


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1"),
    ],
)
def test_engines_that_divide_single_layers_are_refused(variables, name, recipes, tmp_path, monkeypatch):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(RunError, match=f"under {name}, .*fsdp_version: 2"):
        alone(recipes, tmp_path / "run", "text")
    assert not (tmp_path / "run").exists()
