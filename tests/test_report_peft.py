"""Runs in the schema of PEFT's method_comparison: every key, what its table does with them, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest

from headstart.cli import main
from headstart.errors import CheckpointError, HeadstartError, RunError, TaskError
from headstart.progress import silent
from headstart.runs.method_comparison import export, exported
from headstart.runs.read import read_run, tasks_of
from headstart.runs.result import Result, read_result, write_result
from headstart.runs.stages import execute
from headstart.runs.watch import Watch, reserved, windows
from running import llama_folder, small_run, sums, tokenizer

NUMBER = (int, float)
# What method_comparison writes, as types; a tuple of none says that the parts have keys of their own.
SCHEMA = {
    "run_info": {
        "created_at": str,
        "total_time": float,
        "experiment_name": str,
        "peft_branch": str,
        "train_config": {
            "model_id": str,
            "dtype": str,
            "max_seq_length": int,
            "batch_size": int,
            "batch_size_eval": int,
            "max_steps": int,
            "eval_steps": int,
            "compile": bool,
            "use_gc": bool,
            "query_template": str,
            "seed": int,
            "grad_norm_clip": float,
            "optimizer_type": str,
            "optimizer_kwargs": {"lr": float, "weight_decay": float},
            "lr_scheduler": str,
            "use_amp": bool,
            "autocast_adapter_dtype": bool,
            "generation_kwargs": {"max_new_tokens": int},
            "attn_implementation": str,
            "init_kv_cache_prefix": str,
        },
        "peft_config": {"peft_type": str, "r": int, "lora_alpha": NUMBER, "target_modules": list, "task_type": str},
        "error_msg": str,
    },
    "train_info": {
        "accelerator_memory_reserved_avg": int,
        "accelerator_memory_max": int,
        "accelerator_memory_reserved_99th": int,
        "train_time": float,
        "file_size": int,
        "num_trainable_params": int,
        "num_total_params": int,
        "status": str,
        "metrics": list,
    },
    "meta_info": {
        "model_info": {"sha": str, "created_at": str},
        "dataset_info": {"metamath": {"sha": str, "created_at": str}, "gsm8k": {"sha": str, "created_at": str}},
        "package_info": {
            f"{package}-{what}": str
            for package in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
            for what in ("version", "commit-hash")
        },
        "system_info": dict.fromkeys(("system", "release", "version", "machine", "processor", "accelerator"), str),
        "pytorch_info": str,
    },
}
MEASURED = {"step": int, "valid accuracy": float, "train loss": float, "train samples": int} | dict.fromkeys(
    ("train time", "eval time", "tokens / sec", "mem allocated avg", "mem reserved avg", "elapsed time"), float
)
LAST = {"step": int, "test accuracy": float, "train loss": float, "train samples": int, "train total tokens": int}
LAST |= {"forgetting": float}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Sixteen rows like MetaMathQA's, and five like GSM8K's."""
    folder = tmp_path_factory.mktemp("problems")
    rows = [{"query": f"{i} + 1?", "response": f"{'So. ' * (i % 3)}The answer is: {i + 1}"} for i in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums(folder / "test.jsonl", 5)
    return folder


def comparison(model, problems, **changes):
    """A run of one epoch in the shape of the recipe."""
    changes.setdefault("evaluation", {"every": 2, "graded_examples": 4, "max_new_tokens": 3})
    data = {"task": "metamath:prompt=plain-cot", "train": str(problems / "train.jsonl"), "held_out_examples": 0}
    data |= {"held_out": str(problems / "test.jsonl"), "held_out_task": "gsm8k:prompt=plain-cot"}
    batch = {"size": 2, "max_length": 128}
    return small_run(model, problems, data=data, batch=batch, **changes)


@pytest.fixture(scope="module")
def done(model, problems, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "done"
    execute(comparison(model, problems, start={"method": "pissa"}), folder)
    return folder


@pytest.fixture
def measured_on_a_gpu(done, tmp_path):
    """The run as if there had been an accelerator."""
    folder = tmp_path / "gpu"
    shutil.copytree(done, folder)
    result = read_result(folder)
    result.memory |= {"reserved": 3 * 2**30, "reserved_mean": 2**30, "reserved_99th": 2**31}
    write_result(result, folder)
    return folder


def assert_like(value, kind, at):
    if isinstance(kind, dict):
        assert isinstance(value, dict), at
        for key, below in kind.items():
            assert key in value, f"{at}.{key}"
            assert_like(value[key], below, f"{at}.{key}")
    elif value is not None:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        assert isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)), (at, value)


def strictly(path):
    """Read JSON without NaN and infinities, which it doesn't have."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def row_of_table(content):
    """What the table takes of a file, as the types it takes it for: numbers must be there, words may be missing."""
    run, train, meta = content["run_info"], content["train_info"], content["meta_info"]
    last, config = train["metrics"][-1], run["peft_config"]
    packages = {name: meta["package_info"][f"{name}-version"] for name in ("peft", "transformers", "datasets", "torch")}
    whole = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th")
    whole = (*whole, "file_size", "num_trainable_params")
    values = {key: train[key] for key in (*whole, "train_time")} | {key: run[key] for key in ("total_time",)}
    values |= {key: last[key] for key in ("test accuracy", "train loss", "train samples", "train total tokens")}
    values |= {"forgetting": last.get("forgetting", 123), "created_at": run["created_at"], **packages}
    values |= {"type": config["peft_type"] if config else "full-finetuning", "branch": run["peft_branch"]}
    values |= {"bitsandbytes": meta["package_info"]["bitsandbytes-version"], "model": run["train_config"]["model_id"]}
    values |= {"name": run["experiment_name"], "config": config, "packages": meta["package_info"]}
    values |= {"system": meta["system_info"], "settings": run["train_config"]}
    floats = ("train_time", "total_time", "test accuracy", "train loss", "forgetting")
    kinds = dict.fromkeys(values, "string") | dict.fromkeys(floats, float)
    kinds |= dict.fromkeys((*whole, "train samples", "train total tokens"), int)
    frame = pd.DataFrame([values]).astype(kinds)
    frame["created_at"] = pd.to_datetime(frame["created_at"])
    return frame.iloc[0]


# What is written.


def test_every_key_of_the_schema_is_there(done, tmp_path):
    (made,) = export([done], tmp_path / "out")
    (path,) = (tmp_path / "out").iterdir()
    content = strictly(path)
    assert path.name == made.name == content["run_info"]["experiment_name"].replace("/", "--") + ".json"
    assert_like(content, SCHEMA, "")
    assert content["train_info"]["status"] == "success" and content["run_info"]["error_msg"] == ""
    *measured, last = content["train_info"]["metrics"]
    assert [row["step"] for row in measured] == [2, 4, 6, 8]
    for row in measured:
        assert row.keys() == MEASURED.keys()
        assert_like(row, MEASURED, "metrics")
    assert last.keys() == LAST.keys()
    assert_like(last, LAST, "metrics")
    # What a run on a CPU without a commit of anything knows nothing of.
    assert content["run_info"]["peft_branch"] is content["meta_info"]["system_info"]["accelerator"] is None
    assert content["train_info"]["accelerator_memory_max"] is last["forgetting"] is None
    assert content["headstart"]["start"]["method"] == "pissa"


def test_the_table_takes_a_file(measured_on_a_gpu):
    made = exported(measured_on_a_gpu)
    row = row_of_table(made.content)
    assert made.unknown == []
    assert (row["type"], row["accelerator_memory_max"], row["train samples"]) == ("LORA", 3 * 2**30, 16)
    assert row["created_at"].utcoffset().total_seconds() == 0 and 0 < row["train_time"] < row["total_time"]


def test_numbers_that_the_table_misses_are_named(done):
    made = exported(done)
    kinds = ("reserved_avg", "max", "reserved_99th")
    assert made.unknown == [f"accelerator_memory_{kind}" for kind in kinds]
    with pytest.raises((TypeError, ValueError)):
        row_of_table(made.content)


def test_the_numbers_are_the_run_s(done, model, problems):
    result, content = read_result(done), exported(done).content
    train = content["train_info"]
    *measured, last = train["metrics"]
    losses = [loss for _, loss in result.series["loss"]]
    assert [row["train loss"] for row in measured] == pytest.approx(
        [sum(losses[at : at + 2]) / 2 for at in (0, 2, 4, 6)]
    )
    assert last["train loss"] == pytest.approx(sum(losses[-2:]) / 2)
    # One epoch: each row once, with its prompt, its answer and the end of the sequence.
    words, count = tokenizer(), 0
    for line in (problems / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        count += len(words(f"Question: {row['query']} Think step by step.\nAnswer:{row['response']}")["input_ids"]) + 1
    assert last["train total tokens"] == count and last["train samples"] == 16
    tokens = [row["tokens / sec"] * row["train time"] for row in measured]
    assert sum(tokens) == pytest.approx(count) and [row["train samples"] for row in measured] == [4, 8, 12, 16]
    elapsed = sum(row["train time"] + row["eval time"] for row in measured)
    assert measured[-1]["elapsed time"] == pytest.approx(elapsed) and train["train_time"] < elapsed
    assert last["test accuracy"] == result.metrics["exact_match"].value and result.metrics["exact_match"].count == 4
    adapter = done / "trained" / "adapter" / "adapter_model.safetensors"
    assert train["file_size"] == adapter.stat().st_size
    # Rank 2 on q and v of both layers; an anchored start's two copies stand beside it, frozen.
    assert train["num_trainable_params"] == result.trainable
    assert train["num_total_params"] == result.parameters + 2 * result.trainable
    assert content["run_info"]["peft_config"]["init_lora_weights"] == "pissa"
    assert content["run_info"]["train_config"]["query_template"] == "Question: {query} Think step by step.\nAnswer:"


def test_what_is_held_out_may_be_of_another_task(done):
    items = json.loads((done / "items.json").read_text())
    assert [item["where"].rpartition("/")[2] for item in items] == [f"test.jsonl, line {n}" for n in range(1, 5)]
    assert items[3]["prompt"] == "Question: 3 + 3? Think step by step.\nAnswer:" and items[3]["reference"] == "6"


def test_a_run_that_was_cut_off_counts_each_step_once(model, problems, done, tmp_path, monkeypatch):
    run = comparison(model, problems, start={"method": "pissa"})
    plain = Watch.on_step_end

    def ends(self, args, state, control, **rest):
        plain(self, args, state, control, **rest)
        if state.global_step == 5:
            raise RuntimeError("the lights went out")

    with monkeypatch.context() as patch, pytest.raises(HeadstartError, match="the lights went out"):
        patch.setattr(Watch, "on_step_end", ends)
        execute(run, tmp_path / "cut")
    failed = exported(tmp_path / "cut").content
    result = execute(run, tmp_path / "cut")
    counted = [[window[key] for key in ("step", "samples", "tokens", "loss")] for window in result.windows]
    whole = read_result(done)
    assert counted == [[window[key] for key in ("step", "samples", "tokens", "loss")] for window in whole.windows]
    assert result.created_at == read_result(tmp_path / "cut" / "start").created_at
    assert failed["train_info"]["status"] == "failed"
    assert failed["run_info"]["error_msg"].endswith("the lights went out")


def test_a_run_that_diverged_has_their_status_and_its_reason(model, problems, tmp_path):
    run = comparison(model, problems, trains="full", adapter=None, optimizer={"name": "sgd", "lr": 1e30})
    run = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"max_grad_norm": 0.0})})
    execute(run, tmp_path / "run")
    (made,) = export([tmp_path / "run"], tmp_path / "out")
    content = strictly(tmp_path / "out" / made.name)
    assert_like({**content["run_info"], "peft_config": {}}, {**SCHEMA["run_info"], "peft_config": {}}, "")
    assert content["train_info"]["status"] == "failed" and "is no number" in content["run_info"]["error_msg"]
    assert content["run_info"]["peft_config"] is None and made.unknown == []
    # As what was not a success has there: with its time, so that none replaces another.
    assert made.name.startswith("full-finetuning--llama-s0-") and made.name.endswith("+00-00.json")


def test_several_runs_and_a_folder_of_them(model, problems, done, tmp_path):
    quick = {"evaluation": {}, "schedule": {"steps": 2}}
    ways = {
        "a": {"start": {"method": "lora-sb:samples=4"}},
        "b": {"trains": "full", "adapter": None},
        "c": {"trains": "lora-fa", "optimizer": {"lora_plus": 4}, "schedule": {"steps": 2, "kind": "constant"}},
    }
    for name, way in ways.items():
        execute(comparison(model, problems, **(quick | way)), tmp_path / "runs" / name)
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other.json").write_text("{}")
    made = export([done, tmp_path / "runs", tmp_path / "runs" / "a"], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"other.json", *(one.name for one in made)} and len(made) == 4
    _, core, full, fixed = [strictly(tmp_path / "out" / one.name) for one in made]
    assert core["run_info"]["peft_config"]["init_lora_weights"] == "lora-sb:samples=4"
    assert core["train_info"]["num_trainable_params"] == 4 * 2**2
    assert full["run_info"]["peft_config"] is None
    assert full["train_info"]["num_trainable_params"] == full["train_info"]["num_total_params"]
    settings = fixed["run_info"]["train_config"]
    assert settings["optimizer_type"] == "lora+" and settings["optimizer_kwargs"]["loraplus_lr_ratio"] == 4
    assert settings["lr_scheduler"] == "constant" and settings["generation_kwargs"] == {}
    assert made[1].unknown[-1] == "test accuracy"


def test_the_recipe_is_their_setting(tmp_path):
    """Value by value of the settings that they publish with a result."""
    run, _ = read_run("peft/metamathqa-llama3.2-3b")
    (tmp_path / "run.json").write_text("{}")
    write_result(Result(run.key, run.model_dump(mode="json"), "failed", "not run"), tmp_path)
    config = exported(tmp_path).content["run_info"]["train_config"]
    assert config.pop("batch_size_eval") == 8
    assert config == {
        "model_id": "meta-llama/Llama-3.2-3B",
        "dtype": "bfloat16",
        "max_seq_length": 768,
        "batch_size": 4,
        "max_steps": 5000,
        "eval_steps": 250,
        "compile": False,
        "use_gc": False,
        "query_template": "Question: {query} Think step by step.\nAnswer:",
        "seed": 0,
        "grad_norm_clip": 1.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
        "lr_scheduler": "cosine",
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": 300},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }
    assert run.schedule.warmup == 0.1
    adapter = run.adapter
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.targets) == (32, 64, 0.0, ("q_proj", "v_proj"))
    assert run.data.train_examples == run.schedule.steps * run.batch.size and run.evaluation.graded_examples == 1319


def test_memory_over_the_steps():
    history = [{"loss": 1.0, "step": n, "step_seconds": 1.0, "allocated": n, "reserved": 2 * n} for n in range(1, 101)]
    history.insert(50, {"eval_loss": 1.0, "eval_runtime": 3.0, "step": 50})
    assert reserved(history) == {"reserved_mean": 101, "reserved_99th": 198}
    first, second = windows(history, 4)
    assert (first["reserved"], second["allocated"]) == (51.0, 75.5)
    assert first["evaluation_seconds"] == 3.0 and "evaluation_seconds" not in second
    assert reserved([{"loss": 1.0, "step": 1}]) == {} and windows([], 4) == []


@pytest.mark.parametrize("between", ["on_evaluate", "on_save", None])
def test_a_step_s_seconds_are_without_measurements_and_saves(between, monkeypatch):
    now = [10.0]
    monkeypatch.setattr("headstart.runs.watch.time", SimpleNamespace(perf_counter=lambda: now[0]))
    watch, state = Watch(silent), SimpleNamespace(global_step=0, max_steps=2, log_history=[])
    watch.on_train_begin(None, state, None)
    for seconds, tokens in ((2.0, 30), (3.0, 50)):
        now[0] += seconds
        state.log_history.append({"loss": 1.0})
        watch.on_log(None, state, None, {"loss": 1.0, "num_tokens": tokens})
        now[0] += 100.0
        if between:
            getattr(watch, between)(None, state, None)
    costs = [(row["step_seconds"], row["step_tokens"]) for row in state.log_history]
    assert costs == [(2.0, 30), (3.0 if between else 103.0, 20)]


# What is refused.


def _not_done(folder):
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    return [folder]


def _damaged(folder, done, name, text):
    shutil.copytree(done, folder / "run")
    (folder / "run" / name).write_text(text)
    return [folder / "run"]


def _biases(folder, done):
    shutil.copytree(done, folder / "run")
    result = read_result(done)
    result.settings |= {"trains": "bitfit", "adapter": {}, "start": {}}
    write_result(result, folder / "run")
    return [folder / "run"]


@pytest.mark.parametrize(
    ("places", "words", "kind"),
    [
        (lambda folder, _: [folder / "none"], "there is no folder", RunError),
        (lambda folder, _: [folder], "holds no run: give a folder", RunError),
        (lambda folder, _: _not_done(folder), "isn't done: `headstart train` goes on with it", RunError),
        (lambda folder, done: [done, shutil.copytree(done, folder / "b")], "hold the same run", RunError),
        (_biases, "trains biases alone", RunError),
        (lambda folder, done: _damaged(folder, done, "result.json", "{"), "result.json is damaged", CheckpointError),
        (
            lambda folder, done: _damaged(folder, done, "trained/checkpoint/adapter_config.json", "[]"),
            "adapter_config.json is damaged",
            CheckpointError,
        ),
    ],
)
def test_what_cannot_be_exported_is_one_sentence_and_nothing_is_written(places, words, kind, done, tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(kind, match=words) as error:
        export([done, *places(tmp_path / "runs", done)], tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_target_that_is_none(done, tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match=r"is no folder|can't be written to"):
            export([done], target)


def test_a_file_is_written_whole_or_not_at_all(done, tmp_path, monkeypatch):
    (made,) = export([done], tmp_path / "out")
    before = (tmp_path / "out" / made.name).read_bytes()
    changed = shutil.copytree(done, tmp_path / "run")
    result = read_result(changed)
    result.file_size = 1
    write_result(result, changed)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="can't be written to: No space left on device"):
        export([changed], tmp_path / "out")
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [before]


def test_the_command(done, tmp_path, capsys):
    main(["report", str(done), "--peft", str(tmp_path / "out")])
    said = capsys.readouterr()
    (path,) = (tmp_path / "out").iterdir()
    assert said.out == f"wrote {path}\n"
    assert said.err.startswith(f"warning: the run of {path.name} doesn't know accelerator_memory_reserved_avg, ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["report", "runs"], 1, "error: runs holds no study"),
        (["report", "none", "--peft", "out"], 2, "error: there is no folder 'none'."),
        (["train", "data.task=metamath", "data.held_out_task=gsm", "--show"], 2, "error: unknown task 'gsm'."),
        (["train", "data.task=metamath", "data.held_out_task=sst-2", "--show"], 2, "only where both are of text"),
    ],
)
def test_wrong_usage_is_one_sentence(words, code, sentence, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    said = capsys.readouterr()
    assert left.value.code == code and sentence in said.err and said.err.strip().count("\n") == 0


def test_the_tasks_of_a_run(model, problems):
    learned, asked = tasks_of(comparison(model, problems))
    assert (str(learned), str(asked)) == ("metamath:prompt=plain-cot", "gsm8k:prompt=plain-cot")
    plain, same = tasks_of(small_run(model, problems))
    assert plain is same
    with pytest.raises(TaskError):
        tasks_of(small_run(model, problems, data={"held_out_task": "gsm"}))
