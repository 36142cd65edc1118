"""What is asked through lm-eval: as lm-eval by hand, to the last item; and goes on where it was cut off."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from asking import adapter_folder, asked, read_lines, truths, write_lines
from children import ended, forked
from headstart.errors import TaskError
from headstart.evaluation import intervals
from headstart.evaluation.intervals import bootstrap, wilson
from running import llama_folder, sums

TASKS = Path(lm_eval.__file__).parent / "tasks"
NONE = TaskManager(include_defaults=False)  # it would read all of lm-eval's tasks
YAMLS = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "cola": "glue/cola/default.yaml",
    "mmlu_anatomy": "mmlu/default/mmlu_anatomy.yaml",
    "mmlu_virology": "mmlu/default/mmlu_virology.yaml",
    "hendrycks_math_algebra": "hendrycks_math/hendrycks_math_algebra.yaml",
    "hendrycks_math_counting_and_prob": "hendrycks_math/hendrycks_math_counting_and_prob.yaml",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few resamples, as scikit-learn's metrics take milliseconds each; and lm-eval lists no packages, as pip would."""
    monkeypatch.setattr(intervals, "_RESAMPLES", 60)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return adapter_folder(tmp_path_factory.mktemp("adapter") / "adapter", model)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files in the hub's layouts, by task."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "gsm8k").mkdir()
    sums(folder / "gsm8k" / "test.jsonl", 14)
    sums(folder / "gsm8k" / "train.jsonl", 30)
    letters = "ABCD"
    science = [
        {
            "question": f"what is {'abcdef'[i % 6] * 2}",
            "choices": {"text": [f"{word}{i}" for word in ("a", "bo", "cat", "dogs")], "label": list(letters)},
            "answerKey": letters[i % 4],
        }
        for i in range(16)
    ]
    write_lines(folder / "arc-easy.test.jsonl", science)
    write_lines(folder / "cola.jsonl", [{"sentence": "good " * (1 + i % 3) + "x", "label": i % 2} for i in range(12)])
    return {"gsm8k": folder / "gsm8k", "arc-easy": folder / "arc-easy.test.jsonl", "cola": folder / "cola.jsonl"}


def by_hand(model, adapter, task, files, folder, **settings):
    """What lm-eval by hand gives, on a configuration written by hand; without files, on one that is there."""
    yaml = folder / f"{task}.yaml"
    if files is None:
        return _by_hand(model, adapter, yaml, **settings)
    lines = [f"include: {TASKS / YAMLS[task]}", f"task: {task}", "dataset_path: json", "dataset_name: null"]
    lines += ["dataset_kwargs:", "  data_files:", *(f"    {split}: {path}" for split, path in files.items())]
    lines += [f"{split}_split: null" for split in ("training", "validation", "test") if f"{split}" not in files]
    lines = ["training_split: train" if line == "training_split: null" and "train" in files else line for line in lines]
    yaml.write_text("\n".join(lines) + "\n")
    return _by_hand(model, adapter, yaml, **settings)


def _by_hand(model, adapter, yaml, **settings):
    words = AutoTokenizer.from_pretrained(model)
    base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    lm = HFLM(pretrained=base, tokenizer=words, batch_size=4)
    return lm_eval.simple_evaluate(model=lm, tasks=[str(yaml)], bootstrap_iters=0, task_manager=NONE, **settings)


@pytest.mark.parametrize("name", ["gsm8k", "arc-easy", "cola"])
def test_agrees_with_lm_eval_by_hand_to_the_last_item(name, model, adapter, data, tmp_path):
    source, theirs = data[name], name.replace("-", "_")
    files = {"test": source}
    settings = {}
    if name == "gsm8k":
        files = {"test": source / "test.jsonl", "train": source / "train.jsonl"}
        settings = {"num_fewshot": 2, "gen_kwargs": {"max_gen_toks": 12}}
    if name == "cola":
        files = {"validation": source}
    hand = by_hand(model, adapter, theirs, files, tmp_path, **settings)
    own = {"fewshot": 2, "max_new_tokens": 12} if name == "gsm8k" else {}
    result, items = asked(adapter, [name], tmp_path / "out", data={name: str(source)}, batch_size=4, **own)
    assert result.engines == {name: "lm-eval"} and not result.notes
    samples = hand["samples"][theirs]
    assert len(items) == len({sample["doc_id"] for sample in samples}) > 10
    for sample in samples:
        item, label = items[sample["doc_id"]], "" if sample["filter"] == "none" else f",{sample['filter']}"
        assert item["prompt"] == sample["arguments"][0][0]
        assert item["outputs"] == json.loads(json.dumps(sample["resps"]))
        assert item["filtered"][sample["filter"]] == json.loads(json.dumps(sample["filtered_resps"]))
        for metric in sample["metrics"]:
            assert item["marks"][metric + label] == json.loads(json.dumps(sample[metric], default=int))
    compared = 0
    for key, figure in result.metrics.items():
        metric, _, kind = key.removeprefix(f"{name}/").partition(",")
        assert figure.value == pytest.approx(hand["results"][theirs][f"{metric},{kind or 'none'}"], abs=1e-12)
        compared += 1
    assert compared == {"gsm8k": 2, "arc-easy": 2, "cola": 1}[name]


def subjects(folder):
    """MMLU as published, of two subjects; and, by lm-eval's task, its rows as on the hub."""
    theirs = {}
    for subject in ("anatomy", "virology"):
        for split, count in (("dev", 5), ("test", 6)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            rows = [
                [f"{subject[0]}{i}, a?", "b", "c d", f"{i}", split, "ABCD"[(i + len(split)) % 4]] for i in range(count)
            ]
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
            hub = [{"question": q, "choices": choices, "answer": "ABCD".index(a)} for q, *choices, a in rows]
            theirs.setdefault(f"mmlu_{subject}", {})[split] = write_lines(folder / f"{subject}-{split}.jsonl", hub)
    return folder, theirs


def kinds(folder):
    """MATH of two types in one file; and, by lm-eval's task, the rows of each."""
    names = {"Algebra": "hendrycks_math_algebra", "Counting & Probability": "hendrycks_math_counting_and_prob"}
    rows = [
        {"problem": f"{i} + 1?", "level": "Level 1", "type": [*names][i % 2], "solution": rf"\boxed{{{i + 1}}}"}
        for i in range(9)
    ]
    theirs = {
        theirs: {"test": write_lines(folder / f"{theirs}.jsonl", [row for row in rows if row["type"] == kind])}
        for kind, theirs in names.items()
    }
    return write_lines(folder / "test.jsonl", rows), theirs


@pytest.mark.parametrize(("name", "made", "shots"), [("mmlu", subjects, 5), ("math", kinds, 0)])
def test_the_parts_of_a_group_are_asked_as_by_hand(name, made, shots, model, adapter, tmp_path):
    source, theirs = made(tmp_path)
    settings = {"max_new_tokens": 6} if name == "math" else {}
    result, items = asked(adapter, [name], tmp_path / "out", data={name: str(source)}, batch_size=4, **settings)
    assert result.engines == {name: "lm-eval"} and not result.notes
    assert {item["task"] for item in items} == set(theirs)
    marks = []
    for task, files in theirs.items():
        given = {"num_fewshot": shots} | ({"gen_kwargs": {"max_gen_toks": 6}} if name == "math" else {})
        samples = by_hand(model, adapter, task, files, tmp_path, **given)["samples"][task]
        mine = [item for item in items if item["task"] == task]
        assert len(mine) == len(samples) > 3
        for item, sample in zip(mine, samples, strict=True):
            assert item["prompt"] == sample["arguments"][0][0]
            assert item["outputs"] == json.loads(json.dumps(sample["resps"]))
            marks.append(sample[sample["metrics"][0]])
            assert item["marks"][sample["metrics"][0]] == marks[-1]
        again = by_hand(model, adapter, task, None, tmp_path / "out" / name / "parts", **given)["samples"][task]
        assert [sample["resps"] for sample in again] == [sample["resps"] for sample in samples]
    figure = next(iter(result.metrics.values()))
    assert figure.count == len(marks) and figure.value == pytest.approx(sum(marks) / len(marks))


def test_a_group_shows_as_many_as_it_is_told(model, tmp_path):
    (tmp_path / "alone").mkdir()
    source, _ = kinds(tmp_path / "alone")
    settings = dict(limit=1, max_new_tokens=2)
    with pytest.raises(TaskError, match=r"shows 2 rows of 'train'.*--fewshot 0"):
        asked(model, ["math"], tmp_path / "a", data={"math": str(source)}, fewshot=2, **settings)
    (tmp_path / "both").mkdir()
    learned, _ = kinds(tmp_path / "both")
    learned.with_name("train.jsonl").write_text(learned.read_text())
    _, items = asked(model, ["math"], tmp_path / "b", data={"math": str(learned.parent)}, fewshot=2, **settings)
    assert all(item["prompt"].count("Problem:") == 3 for item in items)
    questions = [{"question": "a?", "choices": [*"abcd"], "answer": 1, "subject": "anatomy"}]
    path = write_lines(tmp_path / "anatomy_test.jsonl", questions)
    _, items = asked(model, ["mmlu"], tmp_path / "c", data={"mmlu": str(path)}, fewshot=0)
    assert items[0]["prompt"].count("Answer:") == 1


def test_a_part_that_lm_eval_does_not_have_is_asked_in_headstarts_way(model, tmp_path):
    row = {"question": "a?", "choices": [*"abcd"], "answer": 1, "subject": "cookery"}
    for split in ("dev", "test"):
        write_lines(tmp_path / f"cookery_{split}.jsonl", [row] * 5)
    result, items = asked(model, ["mmlu"], tmp_path / "out", data={"mmlu": str(tmp_path)}, limit=2)
    assert result.engines == {"mmlu": "headstart"} and len(items) == 2
    assert "no part 'cookery'" in result.notes[0] and "own way" in result.notes[0]


def test_intervals_are_wilsons_for_shares_and_the_bootstraps_else(adapter, data, tmp_path):
    sources = {"arc-easy": str(data["arc-easy"]), "cola": str(data["cola"])}
    result, items = asked(adapter, ["arc-easy", "cola"], tmp_path / "out", data=sources)
    share = result.metrics["arc-easy/acc"]
    right = sum(item["marks"]["acc"] for item in items if item["task"] == "arc_easy")
    assert (share.low, share.high) == wilson(int(right), 16) and share.count == 16
    matthews = result.metrics["cola/mcc"]
    pairs = [item["marks"]["mcc"] for item in items if item["task"] == "cola"]
    from sklearn.metrics import matthews_corrcoef

    drawn = bootstrap(lambda a, b: matthews_corrcoef(a, b), *zip(*pairs, strict=True))
    assert (matthews.low, matthews.high) == pytest.approx(drawn)


def test_what_was_made_of_the_task_is_what_lm_eval_takes(adapter, model, data, tmp_path):
    result, _ = asked(adapter, ["arc-easy"], tmp_path / "out", data={"arc-easy": str(data["arc-easy"])})
    words = AutoTokenizer.from_pretrained(model)
    base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    recipe = str(tmp_path / "out" / "arc-easy" / "task.yaml")
    again = lm_eval.simple_evaluate(
        model=HFLM(pretrained=base, tokenizer=words, batch_size=16),
        tasks=[recipe],
        bootstrap_iters=0,
        task_manager=NONE,
    )
    assert again["results"]["arc_easy"]["acc,none"] == result.metrics["arc-easy/acc"].value


def _watched(log, kill_after=None):
    """Note every prompt that the model is given, and die before one of the batches."""
    plain, calls = HFLM._model_generate, []

    def watch(self, context, max_length, stop, **more):
        if len(calls) == kill_after:
            time.sleep(1)  # the cache writes in a thread of its own
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(1)
        with log.open("a") as file:
            for row in context:
                file.write(json.dumps(self.tok_decode(row.tolist(), skip_special_tokens=True)) + "\n")
        return plain(self, context, max_length, stop, **more)

    return watch


def test_after_a_kill_only_the_rest_is_asked(model, data, tmp_path, monkeypatch):
    settings = dict(data={"gsm8k": str(data["gsm8k"])}, fewshot=1, max_new_tokens=6, batch_size=4)
    whole, items = asked(model, ["gsm8k"], tmp_path / "whole", **settings)

    def first():
        HFLM._model_generate = _watched(tmp_path / "first", kill_after=2)
        asked(model, ["gsm8k"], tmp_path / "cut", **settings)

    assert ended(forked(first)) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "gsm8k" / "items.jsonl").exists()
    monkeypatch.setattr(HFLM, "_model_generate", _watched(tmp_path / "second"))
    cut, same = asked(model, ["gsm8k"], tmp_path / "cut", **settings)
    before, after = read_lines(tmp_path / "first"), read_lines(tmp_path / "second")
    assert len(before) == 8 and len(before) + len(after) == len(items) == 14
    assert same == items and cut.metrics == whole.metrics
    monkeypatch.setattr(HFLM, "_model_generate", None)
    assert asked(model, ["gsm8k"], tmp_path / "cut", **settings)[0].metrics == whole.metrics


def test_files_of_another_layout_are_asked_in_headstarts_way_and_it_says_so(model, data, tmp_path):
    boolq = truths(tmp_path / "boolq.test.json")
    settings = dict(data={"boolq": str(boolq)}, max_new_tokens=4, limit=4)
    result, items = asked(model, ["boolq"], tmp_path / "out", **settings)
    assert result.engines == {"boolq": "headstart"} and len(items) == 4
    assert len(result.notes) == 1 and "passage" in result.notes[0] and "own way" in result.notes[0]
    with pytest.raises(TaskError, match=r"through lm-eval: .*passage"):
        asked(model, ["boolq"], tmp_path / "other", engine="lm-eval", **settings)


def test_labels_that_lm_eval_would_get_all_wrong_are_not_asked_through_it(model, tmp_path):
    path = write_lines(tmp_path / "cola.jsonl", [{"sentence": "good", "label": str(i % 2)} for i in range(6)])
    with pytest.raises(TaskError, match=r"the label '0' of row 1 is none of lm-eval's choices"):
        asked(model, ["cola"], tmp_path / "out", data={"cola": str(path)})
    path = write_lines(tmp_path / "openbookqa.test.jsonl", [{"instruction": "?", "answer": "answer1"}])
    with pytest.raises(TaskError, match="through lm-eval"):
        asked(model, ["openbookqa"], tmp_path / "out", data={"openbookqa": str(path)}, engine="lm-eval")


def test_examples_that_are_not_there_are_not_shown(model, data, tmp_path):
    alone = str(data["gsm8k"] / "test.jsonl")
    with pytest.raises(TaskError, match=r"lm-eval shows 5 rows of 'train'.*--fewshot 0"):
        asked(model, ["gsm8k"], tmp_path / "out", data={"gsm8k": alone})
    settings = dict(fewshot=0, limit=3, max_new_tokens=3)
    result, items = asked(model, ["gsm8k"], tmp_path / "out", data={"gsm8k": alone}, **settings)
    assert items[0]["prompt"] == "Question: 0 + 0?\nAnswer:"
    assert result.metrics["gsm8k/exact_match,strict-match"].count == len(items) == 3


def test_without_lm_eval_a_sentence_says_what_to_install(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("headstart.evaluation.lm.find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r'pip install "headstart\[eval\]", or give --engine headstart'):
        asked(model, ["gsm8k"], tmp_path / "out", data={"gsm8k": str(data["gsm8k"])})
