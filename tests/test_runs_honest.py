"""What a run says of its data and its end, and that it goes on with what it was begun with and with nothing else."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import tiny_mixtral
from headstart.errors import DataError, HeadstartError, RunError
from headstart.evaluation.answers import prompt_ids
from headstart.runs import stages
from headstart.runs.method_comparison import export
from headstart.runs.result import Result, read_result, write_result
from headstart.runs.stages import execute
from headstart.runs.trainers import _text_row, set_optimizer
from headstart.store.claims import alone_in
from headstart.study.results import Results
from headstart.study.study import run_study, start_over
from headstart.study.tree import validated_study
from headstart.tasks.base import Example
from running import bert_folder, llama_folder, sentiment_folder, small_run, sums, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture
def data(tmp_path):
    return sums(tmp_path / "sums.jsonl")


def stopped(monkeypatch, stage, run, folder):
    """Do a run as far as a stage."""

    def end(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, stage, end)
        with pytest.raises(KeyboardInterrupt):
            execute(run, folder)


# Data that change.


@pytest.mark.parametrize("stage", ["_train", "measured_at_the_end"])
def test_a_run_goes_on_with_the_data_that_it_was_begun_with_alone(stage, model, data, tmp_path, monkeypatch):
    run, kept = small_run(model, data), data.read_text()
    stopped(monkeypatch, stage, run, tmp_path / "run")
    data.write_text(kept.replace("It is.", "It was."))
    with pytest.raises(RunError, match=r"begun with other training data than are there now.*sums\.jsonl"):
        execute(run, tmp_path / "run")
    data.write_text(kept)
    assert execute(run, tmp_path / "run").status == "done"


def test_a_finished_run_is_of_the_data_that_it_was_done_with(model, data, tmp_path):
    run, kept = small_run(model, data, schedule={"steps": 1}), data.read_text()
    whole = execute(run, tmp_path / "run")
    data.write_text(kept.replace("It is.", "It was."))
    with pytest.raises(RunError, match="begun with other training data"):
        execute(run, tmp_path / "run")
    assert read_result(tmp_path / "run") == whole
    data.unlink()  # what can't be read any more says nothing against it
    assert execute(run, tmp_path / "run") == whole


def test_a_study_goes_on_with_the_data_that_it_was_begun_with_alone(model, data, tmp_path):
    base = small_run(model, data, schedule={"steps": 2}).model_dump(mode="json")
    settings = [
        validated_study({"base": base, "axes": {"start": starts}}, "s") for starts in (["lora"], ["lora", "pissa"])
    ]
    run_study(settings[0], tmp_path / "study")
    kept = data.read_text()
    data.write_text(kept.replace("It is.", "It was."))
    grid = run_study(settings[1], tmp_path / "study")
    results = [Results(tmp_path / "study").of(cell) for cell in grid.cells()]
    assert [result.status for result in results] == ["done", "failed"]
    assert "was begun with other training data" in results[1].reason
    data.write_text(kept)
    time.sleep(1.1)  # a result's time is in whole seconds, and what failed in this piece of work isn't tried again
    run_study(settings[1], tmp_path / "study")
    assert [Results(tmp_path / "study").of(cell).status for cell in grid.cells()] == ["done", "done"]


def test_starting_over_leaves_a_study_that_is_being_worked_on(model, data, tmp_path):
    base = small_run(model, data, schedule={"steps": 1}).model_dump(mode="json")
    grid = run_study(validated_study({"base": base}, "s"), tmp_path / "study")
    (cell,) = grid.cells()
    place = Results(tmp_path / "study").place(cell)
    with alone_in(place), pytest.raises(RunError, match="is being worked on by"):
        start_over(tmp_path / "study")
    assert read_result(place).status == "done"
    start_over(tmp_path / "study")
    assert not place.exists()


# What is left out, and what lies in order.


def test_what_is_cut_and_what_is_left_out_are_counted_apart(model, tmp_path):
    rows = [{"prompt": "a" * 30, "completion": "b"}] * 3 + [{"prompt": "a", "completion": "b" * 30}] * 2
    rows += [{"prompt": "a" * 4, "completion": "b" * 4}] * 12
    place = tmp_path / "rows.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = small_run(model, place, data={"held_out_examples": 0}, batch={"max_length": 16}, schedule={"steps": 2})
    told = []

    def tell(sentence):
        assert not (tmp_path / "run" / "trained").exists()
        told.append(sentence)

    result = execute(run, tmp_path / "run", tell=tell)
    assert (
        told
        == result.warnings
        == [
            "training: 2 of 17 lost what is beyond 16 tokens (batch.max_length)",
            "training: 3 of 17 were left out, as their prompts alone take 16 tokens (batch.max_length)",
        ]
    )
    assert result.data["train"]["examples"] == 14 and result.data["train"]["dropped"] == 3


def test_held_out_data_that_are_all_too_long_are_refused_before_training(model, tmp_path, monkeypatch):
    rows = [{"prompt": "a", "completion": "b"}] * 12 + [{"prompt": "a" * 30, "completion": "b"}] * 3
    place = tmp_path / "rows.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(stages, "_train", pytest.fail)
    run = small_run(model, place, data={"held_out_examples": 3}, batch={"max_length": 16})
    with pytest.raises(DataError, match="nothing is left to measure of the held out data within"):
        execute(run, tmp_path / "run")


def test_fewer_held_out_examples_than_asked_for_are_told(model, data, tmp_path):
    run = small_run(model, data, data={"held_out_examples": 30}, schedule={"steps": 1})
    (said,) = execute(run, tmp_path / "run").warnings
    assert said.startswith("held out: 12 examples in place of 30") and "a fifth" in said


def test_a_run_by_epochs_can_go_on_from_a_tenth(model, data, tmp_path, monkeypatch):
    saved = []

    def noted(self, args, state, control, **_):
        saved.append(state.global_step)

    monkeypatch.setattr(stages.Watch, "on_save", noted)
    execute(small_run(model, data, schedule={"steps": None, "epochs": 2}), tmp_path / "run")
    steps = math.ceil((60 - 6) / 4) * 2
    assert saved == [*range(math.ceil(steps / 10), steps, math.ceil(steps / 10)), steps]


def test_a_file_that_is_sorted_by_label_is_told(encoder, tmp_path):
    place = tmp_path / "sorted.tsv"
    place.write_text("".join(f"{'ao'[i // 20]}{'bcd'[i % 3]}\t{i // 20}\n" for i in range(40)))
    settings = {"adapter": {"targets": ["query"]}, "schedule": {"steps": 1}}
    sst2 = {"task": "sst-2", "held_out_examples": 8, "validation_examples": 6}
    result = execute(small_run(encoder, place, data=sst2, **settings), tmp_path / "run")
    assert [said.partition(" examples")[0] for said in result.warnings] == [
        "validation: none of 6",
        "held out: none of 8",
    ]
    mixed = sentiment_folder(tmp_path)
    sst2 |= {"held_out": str(mixed / "dev.tsv")}
    assert not execute(small_run(encoder, mixed / "train.tsv", data=sst2, **settings), tmp_path / "mixed").warnings


def test_a_state_that_reported_data_chose_is_told(model, data, tmp_path):
    best = {"evaluation": {"every": 2, "keep": "best"}, "schedule": {"steps": 2}}
    result = execute(small_run(model, data, **best), tmp_path / "run")
    assert any("keep=best" in said and "data.validation_examples" in said for said in result.warnings)
    chosen = execute(small_run(model, data, data={"validation_examples": 6}, **best), tmp_path / "chosen")
    assert not chosen.warnings


# Ends.


@pytest.mark.parametrize("kind", ["model", "encoder"])
def test_weights_that_the_last_step_destroys_are_no_result(kind, data, tmp_path, request):
    folder = request.getfixturevalue(kind)
    settings = {"trains": "full", "adapter": None, "schedule": {"steps": 1, "kind": "constant", "warmup": 0}}
    if kind == "encoder":
        labelled = sentiment_folder(tmp_path)
        data = labelled / "train.tsv"
        settings |= {"data": {"task": "sst-2", "held_out": str(labelled / "dev.tsv")}}
    settings |= {"optimizer": {"lr": 1e30}}
    result = execute(small_run(folder, data, **settings), tmp_path / "run")
    assert math.isfinite(result.series["loss"][-1][1])
    assert result.status == "diverged" and "no number after the last step" in result.reason


def test_a_trained_mixture_is_measured_as_it_was_trained(data, tmp_path, monkeypatch):
    """Transformers saves its experts under other names than they have in memory."""
    words = tokenizer()
    mixture = tiny_mixtral(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    mixture.save_pretrained(tmp_path / "mixtral")
    words.save_pretrained(tmp_path / "mixtral")
    run = small_run(tmp_path / "mixtral", data, trains="full", adapter=None)
    whole = execute(run, tmp_path / "whole")
    stopped(monkeypatch, "measured_at_the_end", run, tmp_path / "cut")
    assert execute(run, tmp_path / "cut").metrics == whole.metrics


def test_a_run_that_was_given_up_is_exported(model, data, tmp_path):
    execute(small_run(model, data, schedule={"steps": 1}), tmp_path / "run")
    result = read_result(tmp_path / "run")
    result.status, result.reason = "pruned", "hopeless"
    write_result(result, tmp_path / "run")
    (made,) = export([tmp_path / "run"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / made.name).read_text())["train_info"]["status"] == "canceled"


def test_the_card_reports_the_trained_classifier_alone(encoder, tmp_path):
    labelled = sentiment_folder(tmp_path)
    sst2 = {"task": "sst-2", "held_out": str(labelled / "dev.tsv"), "validation_examples": 6}
    settings = {"adapter": {"targets": ["query"]}, "schedule": {"steps": 1}}
    execute(small_run(encoder, labelled / "train.tsv", data=sst2, **settings), tmp_path / "run")
    card = ModelCard.load(tmp_path / "run" / "trained" / "adapter" / "README.md")
    made = {(one.task_type, one.dataset_name, one.metric_name) for one in card.data.eval_results}
    assert made == {("text-classification", "sst-2", name) for name in ("loss", "accuracy")}


# What is learned, and how fast.


def merging():
    """A tokenizer that has one token for ":a" and one for ":"."""
    words = ["<pad>", "<eos>", "<unk>", *"abc: ", ":a"]
    raw = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [(":", "a")], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_answers_are_learned_after_the_tokens_that_are_asked_with():
    words, example = merging(), Example("b c:", "ab")
    row = _text_row(example, words)
    asked = prompt_ids(example, words)
    assert row["input_ids"][: len(asked)] == asked and row["completion_mask"][: len(asked)] == [0] * len(asked)
    assert words.convert_ids_to_tokens(row["input_ids"]) == ["b", " ", "c", ":", "a", "b", "<eos>"]
    assert row["completion_mask"][len(asked) :] == [1] * 3


class _Trainer:
    """As much of a trainer as an optimizer needs, which decays as Transformers does."""

    def __init__(self, model, lr):
        self.model, self._lr, self.optimizer = model, lr, None

    def create_optimizer(self):
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.requires_grad and p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=self._lr
        )
        return self.optimizer


def test_lora_plus_raises_b_alone(model, data):
    """Not a head's bias, nor DoRA's magnitude, nor an embedding's A."""
    layer = torch.nn.Module()
    names = ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "score"]
    for name in names:
        part = torch.nn.Linear(2, 2) if name == "score" else torch.nn.Linear(2, 2, bias=False)
        layer.add_module(name, torch.nn.ModuleDict({"default": part}))
    run = small_run(model, data, optimizer={"lr": 1e-2, "lora_plus": 4})
    trainer = _Trainer(torch.nn.ModuleDict({"layer": layer}), 1e-2)
    set_optimizer(trainer, run)
    named = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {named[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(named.values())
    for name, rate in rates.items():
        assert rate == pytest.approx(4e-2 if "_B." in name else 1e-2), name
    decays = {named[id(p)]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {name for name, decay in decays.items() if not decay} == {"layer.score.default.bias"}


def test_lora_plus_of_a_core_is_refused(model, data, tmp_path):
    run = small_run(model, data, start={"method": "lora-xs"}, optimizer={"lora_plus": 4})
    with pytest.raises(HeadstartError, match="lora-xs trains a matrix between A and B"):
        execute(run, tmp_path / "run")
    assert isinstance(read_result(tmp_path / "run"), Result)
