"""Runs of encoder-decoders: text to text, from the config to grades, and each step's loss weighted right."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, T5EncoderModel

from asking import asked, truths
from headstart.cli import main
from headstart.errors import ModelError, RunError, TaskError
from headstart.methods import parse_method
from headstart.progress import silent
from headstart.runs import stages
from headstart.runs.model import load_base, made_ready
from headstart.runs.plan import planned
from headstart.runs.stages import execute
from headstart.runs.trainers import make_trainer
from headstart.runs.watch import Watch
from headstart.statistics.trainer import from_trainer
from headstart.tasks.registry import parse_task
from headstart.tasks.rows import read
from headstart.training.models import resolve_model
from running import bert_folder, sentiment_folder, small_run, t5_folder, tokenizer

TASK = "sst-2:form=text"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return t5_folder(tmp_path_factory.mktemp("model") / "t5")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sentiment_folder(tmp_path_factory.mktemp("data"))


def t5_run(model, data, /, **changes):
    """Eight steps on a few sentences, written as words."""
    given = {"data": {"task": TASK, "held_out_examples": 12}, "adapter": {"targets": ["q", "v"]}}
    return small_run(
        model,
        data,
        **{name: given.get(name, {}) | changes.get(name, {}) for name in given},
        **{name: change for name, change in changes.items() if name not in given},
    )


def losses_by_hand(model, examples, dtype=torch.float64):
    """The sum of each answer's loss and how many tokens it has: one sample at a time, so that nothing is padded."""
    words, sums_and_counts = tokenizer(ended=True), []
    for example in examples:
        source = torch.tensor([words(example.prompt)["input_ids"]])
        target = torch.tensor(words(example.completion)["input_ids"])
        written = torch.cat([torch.tensor([0]), target[:-1]])[None]
        with torch.no_grad():
            logits = model.to(dtype)(input_ids=source, decoder_input_ids=written).logits[0]
        sums_and_counts.append((float(functional.cross_entropy(logits, target, reduction="sum")), len(target)))
    return sums_and_counts


def mean_by_hand(model, examples):
    sums_and_counts = losses_by_hand(model, examples)
    return sum(total for total, _ in sums_and_counts) / sum(count for _, count in sums_and_counts)


# What is learned, and what it leaves.


@pytest.fixture(scope="module")
def learned(model, data, tmp_path_factory):
    """A run that learns which sentences have an a."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    run = t5_run(
        model,
        data,
        adapter={"targets": ["q", "k", "v", "o", "wi", "wo"], "r": 8, "alpha": 32},
        start={"method": "init-ab"},
        schedule={"steps": 100},
        batch={"size": 16},
        evaluation={"graded_examples": 12, "every": 50},
        merged=True,
    )
    return folder, execute(run, folder)


def test_the_words_are_learned_and_graded_by_the_tasks_own_metric(learned, model, data):
    folder, result = learned
    assert result.metrics["accuracy"].value == 1.0 and result.metrics["accuracy"].count == 12
    assert [step for step, _ in result.series["held-out loss"]] == [50, 100]
    items = json.loads((folder / "items.json").read_text())
    assert {item["outputs"][0] for item in items} == {"negative", "positive"}
    assert all(item["prompt"].startswith("sst2 sentence: ") for item in items)


def test_an_anchored_start_begins_at_the_loss_of_the_base_model_and_the_end_is_that_of_the_adapter(
    learned, model, data
):
    folder, result = learned
    examples = read(parse_task(TASK), str(data), split="test", limit=12).examples
    base = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    assert result.metrics["loss/start"].value == pytest.approx(mean_by_hand(base, examples), rel=1e-5)
    adapter = folder / "trained" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    adapted = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(model), adapter).eval()
    merged = AutoModelForSeq2SeqLM.from_pretrained(folder / "trained" / "merged").eval()
    expected = result.metrics["loss/end"].value
    assert expected < 0.8 < 4 < result.metrics["loss/start"].value
    assert mean_by_hand(adapted, examples) == pytest.approx(expected, rel=1e-4)
    assert mean_by_hand(merged, examples) == pytest.approx(expected, rel=1e-4)


def test_the_card_says_what_was_measured(learned):
    text = (learned[0] / "trained" / "adapter" / "README.md").read_text()
    assert "start `init-ab` (form anchored)" in text and "| accuracy | 1.0000 |" in text


def test_the_run_its_adapter_and_its_merged_model_answer_alike(learned, data, tmp_path):
    folder, _ = learned
    places = {"run": folder, **{name: folder / "trained" / name for name in ("adapter", "merged")}}
    for name, place in places.items():
        evaluation, items = asked(place, [TASK], tmp_path / name, data={"": str(data)}, batch_size=7)
        assert evaluation.metrics[f"{TASK}/accuracy"].value == 1.0
        assert [item["outputs"] for item in items][:12] == [
            item["outputs"] for item in json.loads((folder / "items.json").read_text())
        ]


def test_an_adapter_is_merged_by_command(learned, model, tmp_path):
    folder, _ = learned
    checkpoint = folder / "trained" / "checkpoint"
    main(["export", str(checkpoint), "--out", str(tmp_path / "merged"), "--to", "merged"])
    ids = {"input_ids": torch.arange(3, 20)[None], "decoder_input_ids": torch.tensor([[0, 5, 6]])}
    both = [
        AutoModelForSeq2SeqLM.from_pretrained(place).eval()(**ids).logits
        for place in (tmp_path / "merged", folder / "trained" / "merged")
    ]
    assert torch.allclose(*both, atol=1e-5)


# Ways to train.


@pytest.mark.parametrize(
    "changes",
    [
        {"start": {"method": "lora-one:samples=8"}},
        {"start": {"method": "lora-da:samples=8"}},
        {"start": {"method": "lora-sb:samples=8"}},
        {"start": {"method": "pissa", "form": "residual"}},
        {"trains": "lora-fa"},
        {"trains": "full", "adapter": None, "data": {"task": TASK}},
        {"precision": "bfloat16"},
        {"gradient_checkpointing": True},
        {"evaluation": {"every": 2, "keep": "best"}},
    ],
    ids=str,
)
def test_every_way_to_train_ends_in_a_result(changes, model, data, tmp_path):
    make = small_run if "adapter" in changes else t5_run
    run = make(model, data, **changes)
    result = execute(run, tmp_path / "run")
    assert result.status == "done" and result.metrics["loss/end"].value < result.metrics["loss/start"].value


def trainer_of(run, folder):
    """A run's trainer on plain LoRA, before it has been given a start, and the examples."""
    task = parse_task(run.data.task)
    base, words = load_base(run, task)
    examples = read(task, run.data.train).examples
    trainer, _ = make_trainer(run, task, made_ready(base, run, task), words, {"train": examples}, folder, Watch(silent))
    return trainer, examples


def without_dropout(folder):
    path = folder / "config.json"
    rates = ("dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob")
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(rates, 0.0)))
    return folder


def test_a_start_reads_the_models_own_loss_through_the_trainer(model, data, tmp_path):
    trainer, _ = trainer_of(t5_run(model, data), tmp_path)
    given = from_trainer(trainer, 8, 0)
    assert given.loss is None and not given.single
    assert parse_method("lora-one:samples=8").sample_count() == 8


def test_accumulated_batches_weigh_by_their_labels(tmp_path):
    model = without_dropout(t5_folder(tmp_path / "t5"))
    # Answers of many lengths, so that a mean of the batches' means is another number.
    rows = [{"prompt": f"{'ab'[i % 2] * 3}", "completion": " " + "xyz"[i % 3] * (1 + 5 * i % 23)} for i in range(16)]
    place = tmp_path / "rows.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = []
    for size, accumulation in ((16, 1), (4, 4), (1, 16)):
        run = t5_run(
            model,
            place,
            data={"task": "text", "held_out_examples": 0},
            batch={"size": size, "accumulation": accumulation},
            schedule={"steps": 1, "warmup": 0},
            optimizer={"max_grad_norm": 1e9},
        )
        trainer, examples = trainer_of(run, tmp_path / str(size))
        trainer.train()
        first.append({key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm")})
    bare = [type(one)(one.prompt, one.completion.strip()) for one in examples]
    wanted = mean_by_hand(AutoModelForSeq2SeqLM.from_pretrained(model).eval(), bare)
    for logged in first:
        assert logged["loss"] == pytest.approx(wanted, rel=1e-4)
        assert logged["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-3)


def test_accumulated_batches_of_a_classifier_count_as_one(data, tmp_path):
    encoder, logged = without_dropout(bert_folder(tmp_path / "bert")), []
    for size, accumulation in ((48, 1), (12, 4), (20, 3)):
        run = small_run(
            encoder,
            data,
            data={"task": "sst-2", "held_out_examples": 0},
            adapter={"targets": ["query", "value"]},
            batch={"size": size, "accumulation": accumulation},
            schedule={"steps": 1, "warmup": 0},
            optimizer={"max_grad_norm": 1e9},
        )
        trainer, _ = trainer_of(run, tmp_path / str(size))
        trainer.train()
        logged.append([trainer.state.log_history[0][key] for key in ("loss", "grad_norm")])
    assert logged[1] == pytest.approx(logged[0], rel=1e-4) and logged[2] == pytest.approx(logged[0], rel=1e-4)


def test_cut_off_it_ends_with_the_losses_of_the_uncut_run(model, data, tmp_path):
    run = t5_run(model, data, start={"method": "lora-one:samples=8"}, evaluation={"every": 2, "graded_examples": 4})
    whole = execute(run, tmp_path / "whole")

    def killed():
        from headstart.runs.watch import Watch

        torch.set_num_threads(1)
        plain = Watch.on_step_end

        def end(self, args, state, control, **rest):
            plain(self, args, state, control, **rest)
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        Watch.on_step_end = end
        execute(run, tmp_path / "cut")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    result = execute(run, tmp_path / "cut")
    assert result.series == whole.series and result.metrics == whole.metrics


# What is asked of it.


def test_answers_do_not_depend_on_who_shares_the_batch(learned, data, tmp_path):
    def answers(size):
        _, items = asked(learned[0], [TASK], tmp_path / str(size), data={"": str(data)}, batch_size=size)
        return [item["outputs"] for item in items]

    assert answers(1) == answers(20)


def test_likelihoods_are_those_of_a_float64_pass(model, tmp_path):
    rows = truths(tmp_path / "boolq.test.json")
    settings = dict(data={"boolq": str(rows)}, likelihood=True, engine="headstart", batch_size=5)
    _, items = asked(model, ["boolq"], tmp_path / "out", **settings)
    exact, words = AutoModelForSeq2SeqLM.from_pretrained(model).double().eval(), tokenizer()
    for item in items:
        source = torch.tensor([[*words(item["prompt"])["input_ids"], words.eos_token_id]])
        for choice, given in zip(item["choices"], item["log_likelihoods"], strict=True):
            target = torch.tensor(words(choice.strip())["input_ids"])
            written = torch.cat([torch.tensor([0]), target[:-1]])[None]
            with torch.no_grad():
                logits = exact(input_ids=source, decoder_input_ids=written).logits[0]
            assert given == pytest.approx(-float(functional.cross_entropy(logits, target, reduction="sum")), abs=1e-4)


def test_what_is_too_long_is_counted_on_either_side(model, tmp_path):
    rows = [{"prompt": "a" * 30, "completion": "b"}, {"prompt": "a", "completion": "b" * 30}]
    rows += [{"prompt": "a" * 8, "completion": " " + "b" * 8}] * 14
    place = tmp_path / "rows.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = t5_run(model, place, data={"task": "text", "held_out_examples": 3}, batch={"max_length": 9})
    result = execute(run, tmp_path / "run")
    assert result.warnings == ["training: 2 of 13 lost what is beyond 9 tokens (batch.max_length)"]


def test_check_counts_without_weights(model, data):
    run = t5_run(model, data)
    plan = planned(run)
    # q and v of two encoder layers, and of two decoder layers' two attentions; 32 wide, rank 2.
    assert plan.trainable == (2 + 2 * 2) * 2 * 2 * (32 + 32) and plan.head == 0
    assert plan.shapes == {(32, 32): 12}
    whole = sum(parameter.numel() for parameter in AutoModelForSeq2SeqLM.from_pretrained(model).parameters())
    assert plan.parameters == whole


def test_with_labels_the_same_model_has_a_head_for_classes_that_trains_whole(model, data, tmp_path):
    run = t5_run(model, data, data={"task": "sst-2"})
    head = (32 * 32 + 32) + (32 * 2 + 2)
    assert planned(run).head == head and planned(run).trainable == head + 1536
    result = execute(run, tmp_path / "run")
    assert result.trainable == head + 1536 and {"accuracy/start", "accuracy/end"} < result.metrics.keys()
    kept = load_file(tmp_path / "run" / "trained" / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for name, tensor in kept.items() if "classification_head" in name) == head


# What is refused.


def test_packing_is_refused_before_training(model, data, tmp_path, monkeypatch):
    run = t5_run(model, data, batch={"packing": True})
    with pytest.raises(RunError, match=r"batch\.packing is for causal language models, and .* is an encoder-decoder"):
        planned(run)
    monkeypatch.setattr(stages, "make_trainer", pytest.fail)
    with pytest.raises(RunError, match="is an encoder-decoder"):
        execute(run, tmp_path / "run")


def test_a_running_text_is_refused_before_anything_is_asked(model, data, tmp_path):
    (tmp_path / "text.txt").write_text("words " * 30)
    with pytest.raises(TaskError, match="is an encoder-decoder: it has no loss on a running text"):
        asked(model, [TASK, f"loss:{tmp_path / 'text.txt'}"], tmp_path / "out", data={"": str(data)})
    assert not list((tmp_path / "out").glob("*/answers.jsonl"))


def test_a_model_that_reads_no_text_is_named(tmp_path):
    from transformers import WhisperConfig

    WhisperConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is of the type 'whisper', which doesn't make text of text"):
        resolve_model(str(tmp_path), head="text")


def test_an_encoder_without_its_decoder_lacks_weights(model, tmp_path):
    T5EncoderModel.from_pretrained(model).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="of the model's weights"):
        resolve_model(str(tmp_path), head="text")


def test_a_verb_for_causal_models_refuses_it(model):
    with pytest.raises(ModelError, match="is a T5ForConditionalGeneration, not a causal language model"):
        resolve_model(str(model))
