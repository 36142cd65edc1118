"""Runs from settings to result: every way to train, and every way to be cut off."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from asking import asked, read_lines, truths
from headstart.errors import CheckpointError, DataError, HeadstartError, LayerError, RunError
from headstart.runs import stages
from headstart.runs.result import Result, read_result, write_result
from headstart.runs.stages import execute
from headstart.tasks.registry import parse_task
from headstart.tasks.rows import read
from running import bert_folder, llama_folder, sentiment_folder, small_run, sums, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sums(tmp_path_factory.mktemp("data") / "sums.jsonl")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return sentiment_folder(tmp_path_factory.mktemp("labelled"))


def losses(result):
    return [loss for _, loss in result.series["loss"]]


# Ways to train.

WAYS = {
    "lora": {"start": {"method": "lora"}},
    "pissa, residual": {"start": {"method": "pissa", "form": "residual"}},
    "a gradient start": {"start": {"method": "lora-one:samples=8"}},
    "a core": {"start": {"method": "lora-sb:samples=8"}},
    "ranks of its own": {"start": {"method": "eva:samples=8,rho=2"}},
    "LoRA-FA": {"trains": "lora-fa"},
    "DoRA": {"adapter": {"dora": True}},
    "rsLoRA": {"adapter": {"rslora": True, "rank_pattern": {"q_proj": 3}}},
    "LoRA+": {"optimizer": {"lora_plus": 4}},
    "SGD": {"optimizer": {"name": "sgd", "momentum": 0.5}},
    "full": {"trains": "full", "adapter": None},
    "packing": {"batch": {"packing": True}},
    "accumulation": {"batch": {"size": 2, "accumulation": 2}},
    "bfloat16": {"precision": "bfloat16"},
    "checkpointing": {"gradient_checkpointing": True},
    "best": {"evaluation": {"every": 2, "keep": "best"}, "schedule": {"kind": "constant"}},
    "best of epochs": {"evaluation": {"every": "epoch", "keep": "best"}, "schedule": {"steps": None, "epochs": 2}},
    "each epoch": {"evaluation": {"every": "epoch"}, "schedule": {"steps": None, "epochs": 2}},
    "VeRA": {"adapter": {"kind": "vera", "alpha": 16}, "start": {"method": "pissa"}, "optimizer": {"lr": 0.1}},
    "epochs": {"schedule": {"steps": None, "epochs": 0.5}},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_ends_in_a_result(way, model, data, tmp_path):
    result = execute(small_run(model, data, **WAYS[way]), tmp_path / "run")
    assert result.status == "done" and result == read_result(tmp_path / "run")
    assert all(map(math.isfinite, losses(result))) and len(losses(result)) >= 6
    assert result.metrics["loss/end"].value < result.metrics["loss/start"].value
    for figure in result.metrics.values():
        assert figure.low <= figure.value <= figure.high
    assert 0 < result.trainable <= result.parameters
    assert result.memory["resident"] > 0 and result.seconds["training"] > 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "run.json",
        "start",
        "trained",
        "result.json",
        "losses.json",
    }


def test_watched_layers_are_in_the_result_also_of_a_run_that_was_cut(model, data, tmp_path, monkeypatch):
    settings = {"start": {"method": "init-ab"}, "monitor": 3, "evaluation": {"every": 2}}
    whole = execute(small_run(model, data, **settings), tmp_path / "whole")
    steps = sorted({row["step"] for row in whole.monitor})
    assert steps == list(range(1, len(losses(whole)) + 1))
    assert len({row["layer"] for row in whole.monitor}) == 3
    # A warm-up begins at a rate of 0.
    assert all(row["delta1"] > 0 and row["delta2"] > 0 for row in whole.monitor if row["step"] > 1)
    assert losses(whole) == losses(execute(small_run(model, data, start={"method": "init-ab"}), tmp_path / "plain"))

    def killed(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages.Watch, "on_step_end", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(small_run(model, data, **settings), tmp_path / "cut")
    monkeypatch.undo()
    cut = execute(small_run(model, data, **settings), tmp_path / "cut")
    assert cut.monitor == whole.monitor


@pytest.mark.parametrize("settings", [{"trains": "full", "adapter": None}, {"adapter": {"kind": "vera"}}])
def test_what_has_no_layers_of_lora_is_not_watched(settings, model, data):
    with pytest.raises(ValueError, match="monitor watches layers of LoRA"):
        small_run(model, data, monitor=2, **settings)


def test_a_run_asks_further_tasks_and_what_it_forgot_as_eval_does(model, data, tmp_path):
    pytest.importorskip("math_verify")
    problems = truths(tmp_path / "boolq.test.json")
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 30)
    evaluation = {
        "tasks": ["boolq", "gsm8k:prompt=plain"],
        "data": {"boolq": str(problems), "gsm8k": str(data)},
        "limit": 5,
        "max_new_tokens": 4,
        "forgetting": str(tmp_path / "text.txt"),
        "forgetting_windows": 6,
    }
    run = small_run(model, data, start={"method": "pissa", "form": "residual"}, evaluation=evaluation)
    result = execute(run, tmp_path / "run")
    asking = dict(data=evaluation["data"], limit=5, windows=6, max_new_tokens=4, max_length=64)
    tasks = [*evaluation["tasks"], f"forgetting:{evaluation['forgetting']}"]
    by_hand, items = asked(tmp_path / "run", tasks, tmp_path / "by hand", **asking)
    renamed = {key.replace(":text.txt", "").replace("/difference", ""): value for key, value in by_hand.metrics.items()}
    figures = {key: figure for key, figure in result.metrics.items() if not key.startswith("loss/")}
    assert figures.keys() == renamed.keys() > {"boolq/accuracy", "forgetting/start", "forgetting/end", "forgetting"}
    for key, figure in figures.items():
        assert figure.value == pytest.approx(renamed[key].value, rel=1e-5) and figure.count == renamed[key].count
    assert figures["forgetting"].count == 6 and abs(figures["forgetting"].value) > 1e-4
    kept = (tmp_path / "run" / "evaluation").glob("*/items.jsonl")
    assert sum(len(read_lines(path)) for path in kept) == len(items) == 16


def test_what_can_not_be_asked_is_said_before_training(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("headstart.runs.stages.load_base", None)
    refused = (
        ({"tasks": "gsm9k"}, "Did you mean 'gsm8k'"),
        ({"tasks": "humaneval"}, "evaluation.allow_code_execution=true"),
        ({"tasks": "svamp", "data": str(tmp_path / "gone.json")}, "gone.json"),
        ({"tasks": "sst-2", "data": str(tmp_path)}, "wants a head for classes|no file of task"),
        ({"forgetting": str(tmp_path / "gone.txt")}, "gone.txt"),
    )
    for number, (evaluation, said) in enumerate(refused):
        with pytest.raises(HeadstartError, match=said):
            execute(small_run(model, data, evaluation=evaluation), tmp_path / f"run-{number}")


def test_the_best_of_the_epochs_is_kept(model, data, tmp_path):
    # At such rates the loss goes up and down, on each processor elsewhere: until the last epoch is not the best.
    for lr in (0.5, 0.7, 1.0, 1.5, 2.0):
        run = small_run(
            model,
            data,
            evaluation={"every": "epoch", "keep": "best"},
            schedule={"steps": None, "epochs": 4, "kind": "constant"},
            optimizer={"lr": lr},
        )
        result = execute(run, tmp_path / f"run-{lr}")
        steps, measured = zip(*result.series["held-out loss"], strict=True)
        if min(measured) < measured[-1] - 2e-3:
            break
    assert steps == (14, 28, 42, 56) and min(measured) < measured[-1] - 2e-3
    assert result.metrics["loss/end"].value == pytest.approx(min(measured), rel=2e-4)


def test_biases_of_an_encoder(encoder, labelled, tmp_path):
    run = small_run(encoder, labelled, trains="bitfit", adapter=None, data={"task": "sst-2", "held_out_examples": 20})
    result = execute(run, tmp_path / "run")
    assert result.status == "done" and {"accuracy/start", "accuracy/end"} < result.metrics.keys()
    assert (tmp_path / "run" / "trained" / "model" / "config.json").is_file()


def test_classes_with_an_adapter(encoder, labelled, tmp_path):
    run = small_run(
        encoder,
        labelled,
        data={"task": "sst-2", "held_out_examples": 20},
        adapter={"targets": ["query", "value"]},
        schedule={"steps": 40},
        start={"method": "lora-one:samples=16"},
    )
    result = execute(run, tmp_path / "run")
    assert result.metrics["accuracy/end"].value == 1.0 and result.metrics["accuracy/end"].low < 0.9
    assert "classifier" in " ".join(_tensors(tmp_path / "run" / "trained" / "adapter"))


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


# What it leaves.


def test_the_adapter_and_the_merged_model_are_what_was_measured(model, data, tmp_path):
    run = small_run(model, data, start={"method": "pissa"}, merged=True, evaluation={"graded_examples": 3})
    result = execute(run, tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "trained" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "trained" / "merged")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)
        assert not torch.allclose(
            adapted(ids).logits, AutoModelForCausalLM.from_pretrained(model)(ids).logits, atol=1e-3
        )
    items = json.loads((tmp_path / "run" / "items.json").read_text())
    assert len(items) == result.metrics["exact_match"].count == 3
    assert all({"where", "prompt", "reference", "outputs", "marks"} <= item.keys() for item in items)


def test_the_card_is_one_that_a_hub_accepts(model, data, tmp_path):
    execute(small_run(model, data, start={"method": "pissa"}), tmp_path / "run")
    card = ModelCard.load(tmp_path / "run" / "trained" / "adapter" / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == str(model)
    assert {result.metric_name for result in card.data.eval_results} == {"loss"}
    assert "start `pissa`" in card.text and "95 % interval" in card.text


def test_the_held_out_loss_is_a_mean_over_tokens(model, data, tmp_path):
    result = execute(small_run(model, data, data={"held_out_examples": 12}), tmp_path / "run")
    words, base = tokenizer(), AutoModelForCausalLM.from_pretrained(model).double()
    total, count = 0.0, 0
    for example in read(parse_task("text"), data).examples[-12:]:
        prompt = words(example.prompt)["input_ids"]
        ids = prompt + words(example.completion)["input_ids"] + [words.eos_token_id]
        with torch.no_grad():
            logits = base(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logits[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))
        count += len(ids) - len(prompt)
    assert result.metrics["loss/start"].value == pytest.approx(total / count, rel=1e-5)


# Cut off.


def child(run, folder, arrange=None):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_in_child, args=(run, folder, arrange))
    process.start()
    return process


def _in_child(run, folder, arrange):
    torch.set_num_threads(1)
    if arrange is not None:
        arrange()
    execute(run, folder)


def killing_after(steps):
    """Let the process be killed when so many steps are done."""

    def arrange():
        from headstart.runs.watch import Watch

        plain = Watch.on_step_end

        def end(self, args, state, control, **rest):
            plain(self, args, state, control, **rest)
            if state.global_step == steps:
                os.kill(os.getpid(), signal.SIGKILL)

        Watch.on_step_end = end

    return arrange


def test_cut_in_three_the_losses_are_those_of_the_uncut_run(model, data, tmp_path):
    run = small_run(model, data, start={"method": "lora-one:samples=8"}, evaluation={"every": 2})
    whole = execute(run, tmp_path / "whole")
    starts = []
    for steps in (3, 6):
        process = child(run, tmp_path / "cut", killing_after(steps))
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        starts.append((tmp_path / "cut" / "start" / "checkpoint" / "adapter_model.safetensors").stat().st_mtime_ns)
    result = execute(run, tmp_path / "cut")
    assert losses(result) == losses(whole)
    assert result.metrics == whole.metrics and result.series == whole.series
    # The start was made once.
    assert len(set(starts)) == 1 and result.start["method"] == "lora-one:samples=8"


@pytest.fixture(scope="module")
def uncut(model, data, tmp_path_factory):
    """A run with every stage, and its result."""
    run = small_run(model, data, start={"method": "pissa"}, evaluation={"graded_examples": 2, "max_new_tokens": 16})
    return run, execute(run, tmp_path_factory.mktemp("uncut") / "whole")


@pytest.mark.parametrize("stage", ["_begin", "_train", "save_trained", "graded_answers", "write_result"])
def test_killed_at_any_stage_the_same_call_goes_on(stage, uncut, tmp_path):
    run, whole = uncut

    def arrange():
        setattr(stages, stage, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))

    process = child(run, tmp_path / "cut", arrange)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and read_result(tmp_path / "cut") is None
    result = execute(run, tmp_path / "cut")
    assert losses(result) == losses(whole) and result.metrics == whole.metrics


def test_vera_goes_on_from_its_start_and_from_what_was_trained(model, data, tmp_path):
    changes = {"adapter": {"kind": "vera", "alpha": 16}, "optimizer": {"lr": 0.1}}
    run = small_run(model, data, start={"method": "pissa"}, **changes)
    whole = execute(run, tmp_path / "whole")
    for stage in ("_train", "write_card"):

        def arrange(stage=stage):
            setattr(stages, stage, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))

        process = child(run, tmp_path / "cut", arrange)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    result = execute(run, tmp_path / "cut")
    assert losses(result) == losses(whole) and result.metrics == whole.metrics


def test_what_is_done_is_not_done_again(model, data, tmp_path, monkeypatch):
    run = small_run(model, data)
    result = execute(run, tmp_path / "run")
    monkeypatch.setattr(stages, "load_base", pytest.fail)
    assert execute(run, tmp_path / "run") == result


# What goes wrong.


def test_a_run_that_diverges_is_a_result(model, data, tmp_path):
    run = small_run(model, data, trains="full", adapter=None, optimizer={"name": "sgd", "lr": 1e30, "max_grad_norm": 0})
    result = execute(run, tmp_path / "run")
    assert result.status == "diverged" and "is no number" in result.reason
    assert "loss/end" not in result.metrics and result.series["loss"]
    assert not math.isfinite(losses(read_result(tmp_path / "run"))[-1])


def test_a_run_that_fails_says_so_and_is_tried_again(model, data, tmp_path, monkeypatch):
    run = small_run(model, data)
    plain = stages.make_trainer

    def fails(*_):
        raise LayerError("layer 'q': something is wrong.")

    monkeypatch.setattr(stages, "make_trainer", fails)
    with pytest.raises(LayerError):
        execute(run, tmp_path / "run")
    assert read_result(tmp_path / "run").status == "failed"
    assert read_result(tmp_path / "run").reason == "layer 'q': something is wrong."
    monkeypatch.setattr(stages, "make_trainer", plain)
    assert execute(run, tmp_path / "run").status == "done"


def test_an_error_of_a_library_is_named(model, data, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stages, "make_trainer", fails)
    with pytest.raises(HeadstartError, match="the run failed: RuntimeError: out of memory"):
        execute(small_run(model, data), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": {"method": "lora-one:samples=8"}, "adapter": {"targets": ["q"]}}, "'q' is not in the model"),
        ({"adapter": {"r": 40}}, "rank 40 is more than"),
        ({"trains": "bitfit", "adapter": None}, "the model has no bias"),
        ({"data": {"train": "none.jsonl"}}, "none.jsonl"),
        ({"data": {"task": "gsm"}}, "unknown task 'gsm'"),
        ({"start": {"method": "pisa"}}, "unknown method 'pisa'"),
        ({"model": {"name": "no/such-model"}}, "no/such-model"),
        ({"batch": {"max_length": 2}}, "nothing is left to learn"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(changes, words, model, data, tmp_path):
    with pytest.raises(HeadstartError, match=words) as error:
        execute(small_run(model, data, **changes), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_what_cannot_be_graded_is_said_before_training(model, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "load_base", pytest.fail)
    prose = tmp_path / "prose.jsonl"
    prose.write_text("".join(json.dumps({"prompt": f"{i}", "completion": " words"}) + "\n" for i in range(20)))
    with pytest.raises(DataError, match="no held-out example has an answer to grade by"):
        execute(small_run(model, prose, evaluation={"graded_examples": 2}), tmp_path / "run")


def test_a_folder_of_another_run_is_left_alone(model, data, tmp_path):
    execute(small_run(model, data), tmp_path / "run")
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(RunError, match=r"other settings \(optimizer.lr, seed\)"):
        execute(small_run(model, data, seed=1, optimizer={"lr": 0.5}), tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(RunError, match="holds no run"):
        execute(small_run(model, data), tmp_path / "mine")
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_one_process_at_a_time(model, data, tmp_path):
    run = small_run(model, data)

    def arrange():
        stages.load_base = lambda *_: time.sleep(600)

    process = child(run, tmp_path / "run", arrange)
    lock = tmp_path / "run" / "locks" / "run.lock"
    # There is a file before it is locked, and only then is it signed.
    while not (lock.is_file() and lock.read_text()):
        time.sleep(0.01)
    try:
        with pytest.raises(RunError, match=f"is being worked on by process {process.pid}"):
            execute(run, tmp_path / "run")
    finally:
        process.kill()
        process.join()
    assert execute(run, tmp_path / "run").status == "done"


def test_results_of_later_releases(tmp_path):
    write_result(Result("0" * 8, {}, "done"), tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(content | {"more": 1}))
    assert read_result(tmp_path) == Result("0" * 8, {}, "done")
    (tmp_path / "result.json").write_text(json.dumps(content | {"schema": 99}))
    with pytest.raises(CheckpointError, match="later release"):
        read_result(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_result(tmp_path)
