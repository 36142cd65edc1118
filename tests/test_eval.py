"""What is asked in headstart's own way, of runs, adapters and models; and every refusal in a sentence."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from asking import adapter_folder, asked, read_lines, truths, write_lines
from children import ended, forked
from headstart.cli import main
from headstart.errors import CheckpointError, DataError, ModelError, RunError, TaskError
from headstart.evaluation import answers, own, texts
from headstart.evaluation.evaluate import split_names
from headstart.evaluation.intervals import bootstrap, wilson
from headstart.evaluation.target import find_target
from headstart.runs.stages import execute
from headstart.store.claims import alone_in
from running import bert_folder, llama_folder, sentiments, small_run, sums, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return adapter_folder(tmp_path_factory.mktemp("adapter") / "adapter", model)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sums(folder / "sums.jsonl", 14)
    truths(folder / "boolq.test.json")
    (folder / "text.txt").write_text("The cat sat on the mät. " * 30)
    return folder


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    execute(small_run(model, data / "sums.jsonl", start={"method": "pissa"}, merged=True), folder)
    return folder


def own_way(target, data, folder, **asking):
    sources = {"gsm8k": str(data / "sums.jsonl"), "boolq": str(data / "boolq.test.json")}
    tasks = ["boolq", f"loss:{data / 'text.txt'}"]
    return asked(target, tasks, folder, data={"boolq": sources["boolq"]}, likelihood=True, engine="headstart", **asking)


# What is measured.


def test_a_run_its_adapter_and_its_merged_model_give_the_same(run, model, data, tmp_path):
    places = {"run": run, "adapter": run / "trained" / "adapter", "merged": run / "trained" / "merged", "base": model}
    results = {name: own_way(place, data, tmp_path / name) for name, place in places.items()}
    expected, items = results["run"]
    text = {"loss:text.txt/loss", "loss:text.txt/bits_per_byte"}
    assert expected.metrics.keys() == {"boolq/acc", "boolq/acc_norm"} | text
    for name in ("adapter", "merged"):
        result, others = results[name]
        for key, figure in result.metrics.items():
            assert figure.value == pytest.approx(expected.metrics[key].value, rel=1e-5)
        for item, other in zip(items, others, strict=True):
            assert other.get("nats", 0) == pytest.approx(item.get("nats", 0), rel=1e-4)
            assert other.get("log_likelihoods", 0) == pytest.approx(item.get("log_likelihoods", 0), rel=1e-4)
    forgotten = results["base"][0].metrics["loss:text.txt/loss"].value - expected.metrics["loss:text.txt/loss"].value
    assert abs(forgotten) > 1e-3


def text_nats(model, tokens, length):
    """The losses of a text's windows, by a dense float64 pass."""
    sums = []
    for start in range(0, len(tokens) - 1, length - 1):
        window = tokens[start : start + length]
        steps = dense(model, window)
        sums.append(-sum(float(steps[place, window[place + 1]]) for place in range(len(window) - 1)))
    return sums


def test_forgetting_is_what_the_text_costs_more_than_it_cost_the_base(run, model, data, tmp_path):
    text = (data / "text.txt").read_text()
    ids = [tokenizer().eos_token_id, *tokenizer()(text)["input_ids"]]
    before = text_nats(AutoModelForCausalLM.from_pretrained(model).double().eval(), ids, 64)[:5]
    merged = AutoModelForCausalLM.from_pretrained(run / "trained" / "merged").double().eval()
    after = text_nats(merged, ids, 64)[:5]
    task = f"forgetting:{data / 'text.txt'}"
    for number, place in enumerate((run, run / "trained" / "adapter")):
        result, items = asked(place, [task], tmp_path / f"{number}", max_length=64, limit=5)
        assert [item["nats_start"] for item in items] == pytest.approx(before, rel=1e-5)
        assert [item["nats"] for item in items] == pytest.approx(after, rel=1e-5) and len(items) == 5
        figures = {key.partition("/")[2]: figure for key, figure in result.metrics.items()}
        tokens = sum(item["tokens"] for item in items)
        assert figures["start"].value == pytest.approx(sum(before) / tokens, rel=1e-5)
        assert figures["end"].value == pytest.approx(sum(after) / tokens, rel=1e-5)
        rise = figures["difference"]
        assert rise.value == pytest.approx((sum(after) - sum(before)) / tokens, rel=1e-3) and abs(rise.value) > 1e-3
        # Pairs differ less than windows do.
        assert rise.low < rise.value < rise.high and rise.high - rise.low < figures["end"].high - figures["end"].low
        assert not any(figure.higher_is_better for figure in figures.values())
    with pytest.raises(ModelError, match="whole model, which doesn't say what it was trained from"):
        asked(run / "trained" / "merged", [task], tmp_path / "merged")


@pytest.mark.parametrize(
    "change",
    [
        {"start": {"method": "pissa", "form": "residual"}},
        {"trains": "full", "adapter": None},
        {"adapter": {"kind": "vera", "alpha": 16}, "start": {"method": "pissa"}, "optimizer": {"lr": 0.1}},
    ],
    ids=["residual", "full", "vera"],
)
def test_the_base_of_what_is_forgotten_is_the_pretrained_model_whatever_was_trained(change, model, data, tmp_path):
    execute(small_run(model, data / "sums.jsonl", **change), tmp_path / "run")
    task = f"forgetting:{data / 'text.txt'}"
    _, items = asked(tmp_path / "run", [task, f"loss:{data / 'text.txt'}"], tmp_path / "out", max_length=64)
    _, base = asked(model, [f"loss:{data / 'text.txt'}"], tmp_path / "base", max_length=64)
    compared, trained = items[: len(base)], items[len(base) :]
    assert [item["nats_start"] for item in compared] == [item["nats"] for item in base]
    assert [item["nats"] for item in compared] == [item["nats"] for item in trained]
    assert max(abs(item["nats"] - item["nats_start"]) for item in compared) > 1e-3


def test_what_is_forgotten_is_measured_on_after_a_cut(run, data, tmp_path, monkeypatch):
    task = f"forgetting:{data / 'text.txt'}"
    whole, items = asked(run, [task], tmp_path / "whole", max_length=32)
    plain, calls = texts.nats_of, []

    def cut(asker, rows):
        calls.append(len(rows))
        if len(calls) == 15:
            raise KeyboardInterrupt
        return plain(asker, rows)

    monkeypatch.setattr(texts, "nats_of", cut)
    with pytest.raises(KeyboardInterrupt):
        asked(run, [task], tmp_path / "cut", max_length=32)
    again, same = asked(run, [task], tmp_path / "cut", max_length=32)
    assert same == items and again.metrics == whole.metrics
    assert sum(calls) == 2 * len(items) + calls[14]


def test_a_text_is_read_from_tables_too(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    documents = ["One.", "", "Two\tthree."]
    parquet.write_table(arrow.table({"text": documents, "id": [1, 2, 3]}), tmp_path / "text.parquet")
    (tmp_path / "text.json").write_text(json.dumps([{"text": text} for text in documents]))
    for name in ("text.parquet", "text.json"):
        assert texts.read_texts(str(tmp_path / name), "test") == [documents[0], documents[2]]


def dense(model, ids):
    """Log-probabilities of each next token, in float64."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_likelihoods_are_those_of_a_dense_float64_pass(model, data, tmp_path):
    result, items = own_way(model, data, tmp_path / "out", batch_size=5)
    words, exact = tokenizer(), AutoModelForCausalLM.from_pretrained(model).double().eval()
    right = []
    chosen = [item for item in items if "log_likelihoods" in item]
    for item in chosen:
        prompt, sums = words(item["prompt"])["input_ids"], []
        for choice in item["choices"]:
            ids = prompt + words(choice)["input_ids"]
            steps = dense(exact, ids)
            sums.append(sum(float(steps[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
        assert item["log_likelihoods"] == pytest.approx(sums, abs=1e-4)
        assert item["outputs"] == [item["choices"][sums.index(max(sums))]]
        right.append(item["outputs"][0].endswith(f" {item['reference']}"))
    share = result.metrics["boolq/acc"]
    assert share.value == sum(right) / len(right) and (share.low, share.high) == wilson(sum(right), len(right))
    assert len(chosen) == share.count == 12


@pytest.mark.parametrize("length", [16, 1000])
def test_the_loss_on_a_text_is_that_of_a_dense_float64_pass(model, tmp_path, length):
    documents = ["The cat sat on the mät, twice. " * 5, "Another öne.", "  led by blanks"]
    path = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in documents])
    result, items = asked(model, [f"loss:{path}"], tmp_path / "out", max_length=length)
    words, exact = tokenizer(), AutoModelForCausalLM.from_pretrained(model).double().eval()
    total, count, parts = 0.0, 0, []
    width = min(length, 64)  # the model has no more positions
    for text in documents:
        ids = [words.eos_token_id, *words(text)["input_ids"]]
        for start in range(0, len(ids) - 1, width - 1):
            window = ids[start : start + width]
            steps = dense(exact, window)
            parts.append(-sum(float(steps[place, window[place + 1]]) for place in range(len(window) - 1)))
            total, count = total + parts[-1], count + len(window) - 1
    assert [item["nats"] for item in items] == pytest.approx(parts, abs=1e-4)
    assert count == sum(map(len, documents)) == sum(item["tokens"] for item in items)
    size = sum(len(text.encode()) for text in documents)
    assert size == sum(item["bytes"] for item in items) > count
    loss, bits = result.metrics["loss:text.jsonl/loss"], result.metrics["loss:text.jsonl/bits_per_byte"]
    assert loss.value == pytest.approx(total / count, rel=1e-6) and not loss.higher_is_better
    assert bits.value == pytest.approx(total / size / math.log(2), rel=1e-6)
    drawn = bootstrap(lambda a, b: a.sum() / b.sum(), [item["nats"] for item in items], [i["tokens"] for i in items])
    assert (loss.low, loss.high) == drawn and loss.low < loss.value < loss.high


def test_classes_are_those_that_the_run_measured(tmp_path):
    encoder = bert_folder(tmp_path / "bert")
    (tmp_path / "labelled").mkdir()
    sentiments(tmp_path / "labelled" / "train.tsv")
    sentiments(tmp_path / "labelled" / "dev.tsv", 20)
    change = {"data": {"task": "sst-2", "held_out_examples": 20}, "schedule": {"steps": 3}}
    runs = {
        "adapter": small_run(encoder, tmp_path / "labelled", adapter={"targets": ["query", "value"]}, **change),
        "whole": small_run(encoder, tmp_path / "labelled", trains="full", adapter=None, **change),
    }
    for name, settings in runs.items():
        measured = execute(settings, tmp_path / name).metrics["accuracy/end"]
        places = [tmp_path / name] + [tmp_path / name / "trained" / "model"] * (name == "whole")
        for number, place in enumerate(places):
            out = tmp_path / f"{name}-{number}"
            result, items = asked(place, ["sst-2"], out, data={"": str(tmp_path / "labelled")}, batch_size=6)
            assert result.metrics["sst-2/accuracy"] == measured and len(items) == 20
            assert all(item["logits"].index(max(item["logits"])) == item["marks"]["prediction"] for item in items)
    with pytest.raises(TaskError, match="tells 2 classes, so task 'gsm8k' can't"):
        asked(tmp_path / "adapter", ["gsm8k"], tmp_path / "out")


# Answers, kept and drawn.


def test_answers_go_on_after_a_kill_and_nothing_is_asked_twice(model, data, tmp_path, monkeypatch):
    settings = dict(data={"gsm8k": str(data / "sums.jsonl")}, engine="headstart", max_new_tokens=4, batch_size=4)
    whole, items = asked(model, ["gsm8k"], tmp_path / "whole", **settings)
    assert len(items) == 14 and all(len(item["outputs"]) == 1 for item in items)
    plain = answers.padded

    def watched(log, most=None):
        calls = []

        def pad(prompts, *more, **side):
            if len(calls) == most:
                with (tmp_path / "cut" / "gsm8k" / "answers.jsonl").open("a") as file:
                    file.write('{"item": 13, "ans')  # half a line
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(1)
            with log.open("a") as file:
                file.writelines(json.dumps(prompt) + "\n" for prompt in prompts)
            return plain(prompts, *more, **side)

        return pad

    def first():
        answers.padded = watched(tmp_path / "first", most=2)
        asked(model, ["gsm8k"], tmp_path / "cut", **settings)

    assert ended(forked(first)) == -signal.SIGKILL
    monkeypatch.setattr(answers, "padded", watched(tmp_path / "second"))
    cut, same = asked(model, ["gsm8k"], tmp_path / "cut", **settings)
    assert same == items and cut.metrics == whole.metrics
    assert len(read_lines(tmp_path / "first")) == 8 and len(read_lines(tmp_path / "second")) == 6
    monkeypatch.setattr("headstart.evaluation.target.Target.load", None)
    assert asked(model, ["gsm8k"], tmp_path / "cut", **settings)[0].metrics == whole.metrics


def test_draws_depend_on_the_seed_alone(model, data, tmp_path):
    settings = dict(data={"gsm8k": str(data / "sums.jsonl")}, max_new_tokens=6, samples=3, limit=4)
    _, one = asked(model, ["gsm8k"], tmp_path / "one", seed=1, **settings)
    _, again = asked(model, ["gsm8k"], tmp_path / "again", seed=1, **settings)
    _, other = asked(model, ["gsm8k"], tmp_path / "other", seed=2, **settings)
    assert one == again != other and len({text for item in one for text in item["outputs"]}) > 6
    assert all(len(item["outputs"]) == 3 for item in one)


PROBLEMS = [
    {
        "task_id": f"T/{name}",
        "prompt": f'def {name}(a, b):\n    """Return the {name} of two numbers."""\n',
        "canonical_solution": f"    return {body}\n",
        "test": f"def check(candidate):\n    assert candidate(3, 4) == {value}\n",
        "entry_point": name,
    }
    for name, body, value in (("total", "a + b", 7), ("product", "a * b", 12), ("least", "min(a, b)", 3))
]


def test_programs_are_run_and_graded_where_that_is_allowed(model, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "humaneval.jsonl", PROBLEMS)
    chosen = []

    def answer(_, __, examples, **settings):
        chosen.append(settings)
        right = [example.completion for example in examples]
        return [text if place % 4 and place < 20 else "    return None\n" for place, text in enumerate(right)]

    monkeypatch.setattr(own, "answered", answer)
    settings = dict(data={"humaneval": str(path)}, samples=10, run_code=True)
    result, items = asked(model, ["humaneval"], tmp_path / "out", **settings)
    assert chosen[0]["temperature"] == 0.8 and len(chosen) == 1
    # Of ten answers 7, 8 and none are right.
    assert [item["marks"]["pass@1"] for item in items] == pytest.approx([0.7, 0.8, 0.0])
    assert result.metrics["humaneval/pass@1"].value == pytest.approx(0.5)
    assert result.metrics["humaneval/pass@10"].value == pytest.approx(2 / 3)
    assert [len(item["outputs"]) for item in items] == [10, 10, 10]


def test_programs_are_not_run_unless_that_is_allowed(model, tmp_path, capsys, monkeypatch):
    path = write_lines(tmp_path / "humaneval.jsonl", PROBLEMS)
    monkeypatch.setattr("headstart.evaluation.target.Target.load", None)
    code, err = refused(capsys, model, "--tasks", "humaneval", "--data", path, "--out", tmp_path / "out")
    assert code == 2 and "--allow-code-execution" in err and not (tmp_path / "out").exists()


# The command.


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["eval", *map(str, arguments)])
    err = capsys.readouterr().err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    return stop.value.code, err


def test_the_command_prints_a_table_and_writes_a_result(model, adapter, data, tmp_path, capsys):
    arguments = ["eval", str(adapter), "--tasks", "boolq", "--data", f"boolq={data / 'boolq.test.json'}"]
    arguments += ["--engine", "headstart", "--limit", "4", "--max-new-tokens", "3", "--text", str(data / "text.txt")]
    main([*arguments, "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert all(word in out for word in ("boolq", "accuracy", "bits_per_byte", "95 % interval", "headstart"))
    main([*arguments, "--out", str(tmp_path / "out"), "--json"])
    printed, written = json.loads(capsys.readouterr().out), json.loads((tmp_path / "out" / "result.json").read_text())
    assert printed["metrics"] == written["metrics"] and printed["metrics"]["boolq/accuracy"]["count"] == 4
    assert written["environment"]["versions"]["torch"] and written["settings"]["target"]["base"] == str(model)
    code, err = refused(capsys, *arguments[1:], "--limit", "5", "--out", tmp_path / "out")
    assert code == 2 and "other settings or data (limit" in err


def test_two_commands_do_not_work_in_one_folder(model, data, tmp_path):
    own_way(model, data, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"boolq", "loss_text.txt", "evaluation.json", "result.json"}
    with alone_in(tmp_path / "out"), pytest.raises(RunError, match="is being worked on by process"):
        own_way(model, data, tmp_path / "out")


def other_tensors(place):
    content = bytearray((place / "adapter_model.safetensors").read_bytes())
    content[-2000:] = bytes(2000)
    (place / "adapter_model.safetensors").write_bytes(content)


def other_alpha(place):
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4000}))


def other_template(place):
    (place / "chat_template.jinja").write_text("{{ messages[0].content }}")


@pytest.mark.parametrize("change", [other_tensors, other_alpha, other_template])
def test_another_adapter_in_the_same_place_is_another_evaluation(change, model, data, tmp_path):
    place = adapter_folder(tmp_path / "adapter", model)
    own_way(place, data, tmp_path / "out")
    own_way(place, data, tmp_path / "out")
    change(place)
    with pytest.raises(RunError, match=r"other settings or data \(target.weights\)"):
        own_way(place, data, tmp_path / "out")


REFUSALS = {
    "no task": (("MODEL",), 2, "no task is named"),
    "unknown task": (("MODEL", "--tasks", "gsm9k"), 2, "Did you mean 'gsm8k'"),
    "unknown setting": (("MODEL", "--tasks", "gsm8k:promt=plain"), 2, "Did you mean 'prompt'"),
    "data of no task": (("MODEL", "--tasks", "boolq", "--data", "bolq=x"), 2, "Did you mean 'boolq'"),
    "nothing graded": (("MODEL", "--tasks", "metamath,sharegpt"), 2, "nothing to grade"),
    "missing file": (("MODEL", "--tasks", "svamp", "--data", "svamp=gone.json"), 1, "gone.json"),
    "missing text": (("MODEL", "--text", "gone.txt"), 1, "'gone.txt' does not exist"),
    "a base that isn't known": (("MODEL", "--forgetting", "TEXT"), 1, "which doesn't say what it was trained from"),
    "missing target": (("./gone", "--text", "TEXT"), 1, "./gone is no run, adapter or model"),
    "empty target": (("EMPTY", "--text", "TEXT"), 1, "is no run, adapter or model"),
    "base of a model": (("MODEL", "--base", "MODEL", "--text", "TEXT"), 1, "leave --base out"),
    "classes of a language model": (("MODEL", "--tasks", "sts-b", "--data", "TEXT"), 1, "wants a head for classes"),
    "choices where there are none": (
        ("MODEL", "--tasks", "problems", "--likelihood", "--limit", "3"), 1, "no choices whose likelihoods"),
    "a task twice": (("MODEL", "--tasks", "problems,problems:size=1000"), 1, "'problems' is asked twice"),
    "examples without lm-eval": (("MODEL", "--tasks", "problems", "--fewshot", "2"), 1, "--fewshot is lm-eval's"),
    "a folder of something else": (("MODEL", "--text", "TEXT", "--out", "MODEL"), 2, "holds no evaluation"),
    "an unknown split": (("MODEL", "--tasks", "problems", "--split", "tset"), 1, "Did you mean 'test'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_every_refusal_is_a_sentence_before_the_model_is_loaded(case, model, data, tmp_path, capsys, monkeypatch):
    arguments, code, said = REFUSALS[case]
    (tmp_path / "empty").mkdir()
    places = {"MODEL": model, "TEXT": data / "text.txt", "EMPTY": tmp_path / "empty"}
    monkeypatch.setattr("headstart.evaluation.target.Target.load", None)
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *(places.get(word, word) for word in arguments))[0] == code
    with pytest.raises(SystemExit):
        main(["eval", *(str(places.get(word, word)) for word in arguments)])
    assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


def test_targets_that_are_damaged_or_unfinished_are_named(model, adapter, tmp_path):
    write_lines(tmp_path / "run" / "run.json", [{"settings": {}}])
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        find_target(str(tmp_path / "run"))
    settings = small_run(model, "x").model_dump(mode="json")
    write_lines(tmp_path / "run" / "run.json", [{"key": "", "settings": settings}])
    with pytest.raises(CheckpointError, match="nothing trained yet"):
        find_target(str(tmp_path / "run"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_lines(tmp_path / "classes" / "adapter_config.json", [config | {"task_type": "SEQ_CLS"}])
    with pytest.raises(CheckpointError, match="only its run knows"):
        find_target(str(tmp_path / "classes"))
    write_lines(tmp_path / "alone" / "adapter_config.json", [config | {"base_model_name_or_path": None}])
    with pytest.raises(CheckpointError, match="--base"):
        find_target(str(tmp_path / "alone"))
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "config.json").write_text("{")
        find_target(str(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no rows in it"),
        ('{"text": " "}', "no text in it"),
        ('{"text": 3}', "line 1: there is no field 'text'"),
        ("{", "line 1: the line is not JSON"),
    ],
)
def test_texts_that_can_not_be_read_are_named(content, said, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        texts.read_texts(str(path), "test")


def test_tasks_and_their_settings_are_told_apart():
    text = "gsm8k:prompt=plain, mmlu:shots=0,subject=anatomy,loss:a=b.txt,boolq"
    assert split_names(text) == ["gsm8k:prompt=plain", "mmlu:shots=0,subject=anatomy", "loss:a=b.txt", "boolq"]
