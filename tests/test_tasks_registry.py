"""Tasks by name and settings, what every task says of itself, the papers' prompts, and what all tasks share."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from headstart.errors import DataError, TaskError
from headstart.tasks import Example, Task, base, get_task, parse_task, register, registry, task_class, task_names

COMMONSENSE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-easy", "arc-challenge", "openbookqa")
LEARNED = ("text", "problems", "metamath", "gsm8k", "math_10k", "commonsense170k", "codealpaca", "sharegpt")
GLUE = ("cola", "mrpc", "qnli", "rte", "sts-b", "sst-2")
GRADED = ("gsm8k", "math", "svamp", "aqua", "multiarith", "addsub", "singleeq", "humaneval", "mmlu")


@pytest.mark.parametrize("name", [*COMMONSENSE, *LEARNED, *GLUE, *GRADED])
def test_every_task_is_there_and_says_what_it_is(name):
    task = parse_task(name)
    assert isinstance(task, Task) and task.name == str(task) == name
    assert type(task).__doc__ and task.source
    assert pickle.loads(pickle.dumps(task)) == task
    assert "train" in task.splits or name in ("text", "humaneval", "mmlu")
    assert "test" in task.splits or name in {*LEARNED} - {"problems", "gsm8k"}
    assert task.metrics or name in ("codealpaca", "sharegpt")


def test_the_families_come_in_their_order():
    names = task_names()
    assert names[:2] == ["text", "problems"]
    assert [name for name in names if name in COMMONSENSE] == list(COMMONSENSE)
    assert {*COMMONSENSE, *LEARNED, *GLUE, *GRADED} == {*names}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gsm8", r"unknown task 'gsm8'\. Did you mean 'gsm8k'\? There are: text, "),
        ("hella-swag", "Did you mean 'hellaswag'"),
        ("gsm8k:promt=plain", r"task 'gsm8k' has no setting 'promt'\. Did you mean 'prompt'\? It has: prompt\."),
        ("gsm8k:prompt=chat", "task 'gsm8k': prompt='chat' is not one of 'alpaca', 'alpaca-cot', 'plain'"),
        ("gsm8k:plain", "'plain' must read setting=value, as in gsm8k:prompt=plain"),
        ("cola:form=t5", "form='t5' is not one of 'label', 'text'"),
        ("problems:size=many", "size='many' must be a whole number"),
        ("problems:size=2.5", "size=2.5 must be a whole number"),
        ("mmlu:shots=6", "shots=6 must be from 0 to 5"),
        ("sharegpt:prompt=plain", "has no setting 'prompt'. It has: none"),
    ],
)
def test_a_wrong_name_or_setting_is_one_sentence(text, message):
    with pytest.raises(TaskError, match=message.replace("(", r"\(")):
        parse_task(text)


@pytest.mark.parametrize(
    "text", ["gsm8k:prompt=alpaca-cot", "problems:size=12,seed=3", "mmlu:shots=0", "rte:form=text"]
)
def test_text_and_back(text):
    task = parse_task(text)
    assert str(task) == text
    assert get_task(task.name, **dataclasses.asdict(task)) == task
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "x"


def test_a_task_of_ones_own():
    @register("capitals")
    @dataclasses.dataclass(frozen=True)
    class Capitals(Task):
        def example(self, row, context=()):
            return Example(base.text_of(row, "country"), base.text_of(row, "capital"))

    try:
        assert task_class("capitals") is Capitals and parse_task("capitals").kind == "text"
        assert Capitals().grade(Example("France", "Paris"), "Paris") == {}
        with pytest.raises(TaskError, match="two tasks are named 'capitals': Capitals and Capitals"):
            register("capitals")(Capitals)
        for missing in (lambda: Capitals().prediction("x"), lambda: Capitals().score([1], [1])):
            with pytest.raises(TaskError, match="task 'capitals'"):
                missing()
    finally:
        registry._TASKS.pop("capitals")


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nHow many?\n\n### Response:"
)


@pytest.mark.parametrize(
    ("style", "prompt", "completion"),
    [
        ("alpaca", ALPACA, "Two.\n#### 2"),
        ("alpaca-cot", f"{ALPACA} Let's think step by step.", " Two.\n#### 2"),
        ("plain", "Question: How many?\nAnswer:", " Two.\n#### 2"),
        ("plain-cot", "Question: How many? Think step by step.\nAnswer:", "Two.\n#### 2"),
    ],
)
def test_the_prompts_of_the_papers(style, prompt, completion):
    example = parse_task(f"gsm8k:prompt={style}").example({"question": "How many? ", "answer": "Two.\n#### 2"})
    assert (example.prompt, example.completion) == (prompt, completion)


def test_an_input_stands_under_a_heading_of_its_own():
    row = {"instruction": "Sort.", "input": "3 1", "output": "1 3"}
    assert parse_task("codealpaca").example(row).prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\n3 1\n\n### Response:"
    )
    assert parse_task("codealpaca:prompt=plain").example(row).prompt == "Question: Sort.\n3 1\nAnswer:"


def lm_evals_tasks():
    """Its list of tasks, read once a process: thousands of files."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from headstart.evaluation.lm import _manager

    return _manager()


def test_lm_eval_knows_the_tasks_that_are_said_to_be_its():
    manager = lm_evals_tasks()
    named = [task_class(name).lm_eval for name in task_names()]
    assert [name for name in named if name and name not in manager.all_tasks] == []


def test_lm_eval_asks_gsm8k_in_the_same_words():
    manager = lm_evals_tasks()
    asked = manager.task_index["gsm8k"]
    text = (asked["yaml_path"] if isinstance(asked, dict) else asked.yaml_path).read_text(encoding="utf-8")
    prompt = parse_task("gsm8k:prompt=plain").example({"question": "{{question}}", "answer": "#### 1"}).prompt
    assert json.dumps(prompt) in text


def test_an_answer_ends_at_the_first_of_the_texts_that_end_it():
    task = parse_task("gsm8k")
    assert task.cut("5 ### Response: 6 ### Instruction: 7") == "5 "
    assert task.cut("5") == "5"
    assert parse_task("sharegpt").cut("5 ### Response:") == "5 ### Response:"


def test_several_answers_are_graded_by_their_means():
    task, example = parse_task("problems"), Example("q", "#### 5", reference="5")
    assert task.grade_samples(example, ["#### 5", "#### 6", "5", "x\n#### 5.0"]) == {"exact_match": 0.5}
    assert task.grade_samples(example, []) == {}


def test_a_record_is_plain():
    example = Example("q", "a", reference={"x": 1}, where="file, line 3")
    record = parse_task("problems").record(example, ("a", "b"), {"exact_match": 0.5})
    assert json.loads(json.dumps(record)) == {
        "where": "file, line 3",
        "prompt": "q",
        "reference": {"x": 1},
        "label": None,
        "outputs": ["a", "b"],
        "marks": {"exact_match": 0.5},
    }


def test_an_item_without_a_reference_is_not_graded():
    task = parse_task("metamath")
    example = dataclasses.replace(task.example({"query": "q", "response": "just so"}), where="f, line 2")
    with pytest.raises(DataError, match="f, line 2: there is nothing in it to grade an answer by"):
        task.grade(example, "5")


def test_a_grader_that_is_missing_is_named_before_anything_is_loaded(monkeypatch):
    parse_task("gsm8k").check()
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    parse_task("problems").check()
    with pytest.raises(TaskError, match=r"needs math_verify: pip install .headstart\[eval\]"):
        parse_task("gsm8k").check()
    with pytest.raises(TaskError, match="task 'cola' needs sklearn"):
        parse_task("cola").check()


def test_importing_the_tasks_imports_no_library():
    heavy = '{"datasets", "sklearn", "scipy", "math_verify", "lm_eval", "pyarrow", "pandas"}'
    code = "import sys, torch, headstart; before = set(sys.modules); import headstart.tasks; "
    code += f"print({heavy} & (sys.modules.keys() - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "set()"
