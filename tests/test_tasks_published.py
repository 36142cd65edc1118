"""Every task on rows as they are published: files of its authors, the hub's rows, and refusals of what isn't one."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from headstart.errors import DataError
from headstart.tasks import parse_task, read
from headstart.tasks.code import HumanEval

DATA = Path(os.environ.get("HEADSTART_DATA", Path(__file__).parents[2] / "shared" / "data"))
present = pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not there: set HEADSTART_DATA")

# Task, folder, split, rows, and what the first row's reference or label is.
PUBLISHED = [
    ("gsm8k", "gsm8k", "train", 7473, "72"),
    ("gsm8k", "gsm8k", "test", 1319, "18"),
    ("text", "gsm8k", "test", 1319, "18"),
    ("boolq", "commonsense", "train", 9427, "true"),
    ("boolq", "commonsense", "test", 3270, "false"),
    ("piqa", "commonsense", "test", 1838, "solution1"),
    ("siqa", "commonsense", "test", 1954, "answer3"),
    ("winogrande", "commonsense", "test", 1267, "option2"),
    ("arc-easy", "commonsense", "test", 2376, "answer1"),
    ("arc-challenge", "commonsense", "train", 1119, "answer1"),
    ("openbookqa", "commonsense", "train", 4957, "answer4"),
    ("cola", "glue/cola", "train", 8551, 1),
    ("cola", "glue", "test", 527, 1),
    ("mrpc", "glue/mrpc", "train", 4076, 1),
    ("mrpc", "glue", "test", 1725, 1),
    ("rte", "glue/rte", "train", 2490, 1),
    ("rte", "glue", "test", 277, 1),
    ("sst-2", "glue/sst2", "train", 6920, 1),
    ("sst-2", "glue", "test", 872, 0),
    ("sts-b", "glue/stsb", "train", 5749, 5.0),
    ("sts-b", "glue", "test", 1500, 5.0),
    ("mmlu:shots=0", "mmlu", "test", 14042, "B"),
    ("mmlu:subject=anatomy", "mmlu", "test", 135, "A"),
]


@present
@pytest.mark.parametrize(("name", "folder", "split", "count", "first"), PUBLISHED)
def test_published_files_are_read_whole(name, folder, split, count, first):
    found = read(parse_task(name), DATA / folder, split=split)
    assert (len(found.examples), found.bad) == (count, [])
    example = found.examples[0]
    assert first == (example.label if example.reference is None else example.reference)
    for example in found.examples:
        assert not example.choices or example.completion in example.choices


@present
def test_labels_are_balanced_as_published():
    counts = Counter(e.label for e in read(parse_task("cola"), DATA / "glue", split="test").examples)
    assert counts == {1: 365, 0: 162}
    assert sum(e.label for e in read(parse_task("mrpc"), DATA / "glue", split="test").examples) == 1147
    assert sum(e.label for e in read(parse_task("rte"), DATA / "glue", split="test").examples) == 131


@present
@pytest.mark.parametrize("prompt", ["plain", "alpaca"])
def test_the_solutions_of_humaneval_pass_their_own_tests(prompt):
    task = HumanEval(prompt=prompt)
    found = read(task, DATA / "humaneval", split="test")
    assert len(found.examples) == 164

    def run(program):
        exec(compile(program, "program", "exec", dont_inherit=True), {"__name__": "program"})
        return True

    for example in found.examples[:12]:
        assert task.grade_samples(example, [example.completion], run) == {"pass@1": 1.0}


@present
def test_five_answered_questions_of_the_subject_come_before_one_of_mmlu():
    found = read(parse_task("mmlu"), DATA / "mmlu", split="test", limit=101)
    first, last = found.examples[0].prompt, found.examples[100].prompt
    assert first.startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: B\n\n"
    )
    assert first.count("\nAnswer: ") == 5 and first.endswith("sqrt(18)) over Q.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:")
    assert "about anatomy." in last and last.count("\nAnswer: ") == 5
    assert (
        read(parse_task("mmlu:shots=2"), DATA / "mmlu", split="test", limit=1).examples[0].prompt.count("Answer: ") == 2
    )


LEAD = "Please choose the correct answer to the question: "
# The hub's row, and the question and answer of LLM-Adapters' row of it.
HUB = {
    "boolq": (
        {"question": "is it so", "passage": "p", "answer": True},
        "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "How?", "sol1": "a", "sol2": "b", "label": 1},
        "Please choose the correct solution to the question: How?\n\nSolution1: a\n\nSolution2: b\n\n"
        "Answer format: solution1/solution2",
        "solution2",
    ),
    "siqa": (
        {"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        f"{LEAD}C. Q?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Travel", "ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "3", "ind": 1},
        "Please choose the correct ending to complete the given sentence: Travel: A man\n\nEnding1: a\n\nEnding2: b\n\n"
        "Ending3: c\n\nEnding4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending4",
    ),
    "winogrande": (
        {"sentence": "S _.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: S _.\n\n"
        "Option1: Sarah Option2: Maria Answer format: option1/option2",
        "option2",
    ),
    "arc-challenge": (
        {"id": "x", "question": "Q?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        f"{LEAD}Q?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "openbookqa": (
        {"question_stem": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        f"{LEAD}Q\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
        "answer1",
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_commonsense_is_put_into_the_words_of_llm_adapters(name):
    row, instruction, answer = HUB[name]
    task = parse_task(name)
    adapted = {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
    assert task.example(row) == task.example(adapted)
    assert task.example(row).completion == f"the correct answer is {answer}"


@present
@pytest.mark.parametrize(("name", "file"), [("piqa", "piqa"), ("siqa", "social_i_qa"), ("openbookqa", "openbookqa")])
def test_and_those_are_the_words_in_their_files(name, file):
    rows = json.loads((DATA / "commonsense" / f"{file}.test.json").read_text(encoding="utf-8"))
    task = parse_task(name)
    for row in rows[:50]:
        rest = row["instruction"].partition(": ")[2]
        body, _, names = rest.rpartition("\n\nAnswer format: ")
        starts = [body.index(f"{name.capitalize()}: ") for name in names.split("/")]
        question = body[: starts[0]].removesuffix("\n\n")
        texts = [body[a:b].removesuffix(task.between) for a, b in pairwise([*starts, None])]
        choices = [text.partition(": ")[2] for text in texts]
        hub = {"piqa": {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": int(row["answer"][-1]) - 1}}
        hub["openbookqa"] = {
            "question_stem": question,
            "choices": {"text": choices, "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[int(row["answer"][-1]) - 1],
        }
        hub["siqa"] = {
            "context": question.split(" ")[0],
            "question": question.partition(" ")[2],
            "label": row["answer"][-1],
        }
        hub["siqa"] |= {f"answer{letter}": text for letter, text in zip("ABC", choices, strict=False)}
        assert task.example(hub[name]).prompt == task.example(row).prompt


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("boolq", {"question": "q", "answer": "maybe"}, "field 'answer' is 'maybe', which names none of the 2 choices"),
        ("boolq", {"question": "q"}, "field 'answer' is None"),
        ("piqa", {"goal": "q", "sol1": "a", "label": 0}, "field 'sol2' is missing"),
        ("piqa", {"goal": "q", "sol1": "a", "sol2": "b", "label": 2}, "field 'label' is 2, which names none of the 2"),
        ("hellaswag", {"activity_label": "a", "ctx": "b", "label": ""}, "field 'endings' is missing, or doesn't hold"),
        ("arc-easy", {"question": "q", "answerKey": "A"}, "field 'choices' is missing, or doesn't hold the choices"),
        ("arc-easy", {"question": "q", "choices": {"text": ["a"]}, "answerKey": "A"}, "names none of the 1 choices"),
        ("siqa", {"instruction": "q", "answer": "answer1"}, "'answer1', not one of those after 'Answer format:'"),
        ("siqa", {"instruction": "Answer format: a/b", "answer": "c"}, r"'c', not one of .* \(a/b\)"),
        ("commonsense170k", {"output": "x"}, "field 'instruction' is missing; the row has 'output'"),
        ("codealpaca", {"instruction": "q", "input": ""}, "field 'output' is missing"),
        ("humaneval", {"prompt": "p", "canonical_solution": "s", "test": "t"}, "field 'entry_point' is missing"),
        ("cola", {"sentence": "s"}, "field 'label' is missing"),
        ("cola", {"sentence": "s", "label": -1}, "field 'label' is -1, not one of 0, 1, unacceptable, acceptable"),
        ("rte", {"sentence1": "s", "label": 0}, "field 'sentence2' is missing"),
        ("sts-b", {"sentence1": "s", "sentence2": "t", "label": "6"}, "field 'label' is '6', not a score from 0 to 5"),
        ("sts-b", {"sentence1": "s", "sentence2": "t", "label": -1}, "field 'label' is -1, not a score"),
        ("mmlu", {"question": "q", "A": "1", "B": "2", "C": "3", "D": "", "answer": "A"}, "choice D is empty"),
        ("mmlu", {"question": "q", "choices": ["1"], "answer": 0}, "field 'choices' must be a list of four"),
        ("mmlu", {"question": "q", "choices": [*"1234"], "answer": 4}, "field 'answer' is 4, not one of A, B, C, D"),
        ("mmlu", {"question": "q", "choices": [*"1234"], "answer": "AB"}, "field 'answer' is 'AB'"),
    ],
)
def test_a_row_that_cannot_be_used(name, row, message):
    with pytest.raises(DataError, match=message):
        parse_task(name).example(row)


def test_commonsense170k():
    instruction = f"{LEAD}Q?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"
    row = {"instruction": instruction, "input": "", "output": "the correct answer is answer2", "answer": "answer2"}
    example = parse_task("commonsense170k").example(row)
    assert example.completion == "the correct answer is answer2" and example.reference == "answer2"
    assert example.choices == ("the correct answer is answer1", "the correct answer is answer2")
    plain = parse_task("commonsense170k:prompt=plain").example(row)
    assert plain.prompt.endswith("answer1/answer2\nAnswer:") and plain.choices[0] == " the correct answer is answer1"


GLUE_ROWS = [
    ("cola", {"sentence": "S", "label": 1, "idx": 0}, None, 1, "cola sentence: S", "acceptable"),
    ("mrpc", {"#1 String": "S", "#2 String": "T", "Quality": "0"}, "T", 0, "mrpc sentence1: S sentence2: T",
     "not_equivalent"),
    ("qnli", {"question": "S", "sentence": "T", "label": "entailment"}, "T", 0, "qnli question: S sentence: T",
     "entailment"),
    ("rte", {"index": "0", "sentence1": "S", "sentence2": "T", "label": "not_entailment"}, "T", 1,
     "rte sentence1: S sentence2: T", "not_entailment"),
    ("sst-2", {"sentence": "S", "label": "0"}, None, 0, "sst2 sentence: S", "negative"),
    ("sts-b", {"sentence1": "S", "sentence2": "T", "score": "3.33"}, "T", 3.33,
     "stsb sentence1: S sentence2: T", "3.4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "pair", "label", "prompt", "word"), GLUE_ROWS)
def test_a_row_of_glue_in_both_forms(name, row, pair, label, prompt, word):
    task, text = parse_task(name), parse_task(f"{name}:form=text")
    example = task.example(row)
    assert (example.prompt, example.pair, example.label, example.completion) == ("S", pair, label, "")
    assert task.kind == ("regression" if name == "sts-b" else "classification")
    example = text.example(row)
    assert (example.prompt, example.completion, example.label) == (prompt, word, label)
    assert text.kind == "text" and text.prediction(word) == (3.4 if name == "sts-b" else label)


def test_a_table_of_glue_with_a_header_in_place_of_none(tmp_path):
    (tmp_path / "train.tsv").write_text('sentence\tlabel\na "b\t1\nc\t0\n', encoding="utf-8")
    found = read(parse_task("sst-2"), tmp_path)
    assert [(e.prompt, e.label) for e in found.examples] == [('a "b', 1), ("c", 0)]


def test_the_shown_questions_need_the_folder_of_both_splits(tmp_path):
    path = tmp_path / "anatomy_test.csv"
    path.write_text("Q,1,2,3,4,C\n", encoding="utf-8")
    assert read(parse_task("mmlu:shots=0"), path, split="test").examples[0].reference == "C"
    with pytest.raises(DataError, match="show rows of 'dev'; give the folder of both"):
        read(parse_task("mmlu"), path, split="test")
    with pytest.raises(DataError, match="no file of task 'mmlu', split 'dev'"):
        read(parse_task("mmlu"), tmp_path, split="test")
    (tmp_path / "anatomy_dev.csv").write_text("R,5,6,7,8,A\n", encoding="utf-8")
    (example,) = read(parse_task("mmlu"), tmp_path, split="test").examples
    assert example.prompt == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "R\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer: A\n\nQ\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
