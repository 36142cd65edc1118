"""Answers graded: GLUE's metrics against their definitions, choices by their names and letters, programs by running."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import DataError, TaskError
from headstart.evaluation.figures import _OF_COUNTS, score_figures
from headstart.evaluation.intervals import bootstrap
from headstart.tasks import parse_task
from headstart.tasks.code import pass_at_k

LABELS = [1, 1, 1, 0, 0, 1, 0, 1, 0, 0]
GIVEN = [1, 1, 0, 0, 1, 1, 0, 1, 0, 1]  # 4 true positives, 1 false negative, 2 false positives, 3 true negatives


def test_metrics_by_hand():
    assert parse_task("rte").score(GIVEN, LABELS) == {"accuracy": 0.7}
    mrpc = parse_task("mrpc").score(GIVEN, LABELS)
    assert mrpc == pytest.approx({"accuracy": 0.7, "f1": 8 / 11})
    matthews = (4 * 3 - 2 * 1) / math.sqrt(6 * 5 * 5 * 4)
    assert parse_task("cola").score(GIVEN, LABELS) == pytest.approx({"matthews": matthews})
    assert parse_task("cola").score(torch.tensor(GIVEN), np.array(LABELS)) == pytest.approx({"matthews": matthews})
    assert list(parse_task("mrpc").score(GIVEN, LABELS)) == list(parse_task("mrpc").metrics)


def ranks(values):
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


SCORES = st.lists(st.tuples(st.floats(0, 5, width=16), st.floats(0, 5, width=16)), min_size=2, max_size=20)


@settings(deadline=None)
@given(SCORES)
def test_correlations_by_their_definitions(pairs):
    given_, labels = zip(*pairs, strict=True)
    marks = parse_task("sts-b").score(given_, labels)
    if len({*given_}) == 1 or len({*labels}) == 1:
        assert marks == {"pearson": 0.0, "spearman": 0.0}
        return
    if min(np.std(given_), np.std(labels)) > 1e-3:
        assert marks["pearson"] == pytest.approx(np.corrcoef(given_, labels)[0, 1], abs=1e-6)
    assert marks["spearman"] == pytest.approx(np.corrcoef(ranks(given_), ranks(labels))[0, 1], abs=1e-9)


def test_predictions_that_say_nothing():
    assert parse_task("cola").score([1] * 10, LABELS) == {"matthews": 0.0}
    assert parse_task("mrpc").score([0] * 10, LABELS) == {"accuracy": 0.5, "f1": 0.0}
    assert all(math.isnan(mark) for mark in parse_task("sts-b").score([math.nan] * 3, [1, 2, 3]).values())
    text = parse_task("mrpc:form=text")
    given_ = [text.prediction(output) for output in ("equivalent", " not_equivalent\n", "perhaps", "")]
    assert given_[:2] == [1.0, 0.0] and all(map(math.isnan, given_[2:]))
    assert text.score(given_, [1, 0, 0, 1]) == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}
    assert [parse_task("sts-b:form=text").prediction(output) for output in ("3.4", " 5 ", "much")] == [3.4, 5.0, 0.0]


@pytest.mark.parametrize(("given_", "labels"), [([], []), ([1], [1, 0]), ([1, 0], [1])])
def test_as_many_predictions_as_labels(given_, labels):
    with pytest.raises(DataError, match=f"task 'rte': there are {len(given_)} predictions for {len(labels)} labels"):
        parse_task("rte").score(given_, labels)


def test_what_is_not_graded_together_says_so():
    with pytest.raises(TaskError, match="task 'gsm8k' is graded answer by answer"):
        parse_task("gsm8k").score([1], [1])
    with pytest.raises(TaskError, match="task 'gsm8k' has no labels"):
        parse_task("gsm8k").prediction("x")
    together = [name for name in ("gsm8k", "mmlu", "boolq", "cola", "sts-b", "humaneval") if parse_task(name).together]
    assert together == ["cola", "sts-b"]


SIQA = {"instruction": "Q?\n\nAnswer format: answer1/answer2/answer3", "input": "", "answer": "answer2"}


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("the correct answer is answer2", 1),
        ("answer2, not answer1", 1),
        ("not answer1 but answer2", 0),
        ("the correct answer is Answer2", 0),
        ("the correct answer is answer4", 0),
        ("### Response: answer2", 0),
        ("", 0),
    ],
)
def test_the_first_name_of_a_choice_counts(output, right):
    task = parse_task("siqa")
    assert task.grade(task.example(SIQA), output) == {"accuracy": right}


@pytest.mark.parametrize(
    ("output", "right"),
    [(" B", 1), ("B. because", 1), ("(B)", 1), ("Because", 0), ("A or B", 0), ("the answer is B", 0)],
)
def test_the_letter_that_an_answer_begins_with_counts(output, right):
    task = parse_task("mmlu:shots=0")
    example = task.example({"question": "q", "subject": "us_history", "choices": [*"1234"], "answer": 1})
    assert example.prompt.startswith("The following are multiple choice questions (with answers) about us history.")
    assert (example.completion, example.choices) == (" B", (" A", " B", " C", " D"))
    assert task.grade(example, output) == {"accuracy": right}


HEAD = 'import math\n\n\ndef root(x):\n    """The square root."""\n'
ROW = {
    "task_id": "HumanEval/0",
    "prompt": HEAD,
    "entry_point": "root",
    "canonical_solution": "    return math.sqrt(x)\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}


def run(program):
    try:
        exec(compile(program, "program", "exec", dont_inherit=True), {"__name__": "program"})
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    ("prompt", "output", "passes"),
    [
        ("plain", "    return math.sqrt(x)\n", True),
        ("plain", "    return x ** 0.5\n\ndef root(x):\n    return 3\nprint(root(4))\n", True),
        ("plain", "    return x\n", False),
        ("plain", "", False),
        ("plain", "  return (\n", False),
        ("alpaca", f"Here it is:\n```python\n{HEAD}    return math.sqrt(x)\n```\nIt works.", True),
        ("alpaca", "def root(x):\n    return x ** 0.5", True),
        ("alpaca", "```\ndef root(x):\n    return x ** 0.5", True),
        ("alpaca", "It is x ** 0.5.", False),
        ("alpaca", " def root(x):\n    return x ** 0.5", True),
        ("alpaca-cot", " def root(x):\n    return x ** 0.5", True),
        ("alpaca", "\ndef root(x):\n    return x ** 0.5", True),
        ("alpaca", "    return x ** 0.5", True),
        ("alpaca", "```python\n    return x ** 0.5\n```", True),
        ("alpaca", "Use:\n```python\nprint(root(4))\n```\n```python\ndef root(x):\n    return x ** 0.5\n```", True),
        ("alpaca", "```\ndef rooted(x):\n    return 3\n```\n```\ndef root(x):\n    return x ** 0.5\n```\n", True),
        ("alpaca", "```\ndef root(x):\n    return x ** 0.5\n```\nNot:\n```\ndef root(x):\n    return x\n```", True),
        ("alpaca", "```sh\nrun\n```\n```python\n    y = x ** 0.5\n    return y\n```", True),
        ("alpaca", "```\n```\n```\ndef root(x):\n    return x ** 0.5\n```", True),
    ],
)
def test_programs(prompt, output, passes):
    task = parse_task(f"humaneval:prompt={prompt}")
    example = task.example(ROW)
    assert run(task.program(example, output)) is passes
    assert task.grade_samples(example, [output], run) == {"pass@1": float(passes)}


def test_a_function_is_gone_on_from_or_asked_for_whole():
    plain, alpaca = (parse_task(f"humaneval:prompt={prompt}").example(ROW) for prompt in ("plain", "alpaca"))
    assert (plain.prompt, plain.completion) == (HEAD, ROW["canonical_solution"])
    assert alpaca.prompt.startswith("Below is") and HEAD.strip() in alpaca.prompt
    assert parse_task("humaneval").stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def test_nothing_is_run_that_was_not_asked_for():
    task = parse_task("humaneval")
    with pytest.raises(TaskError, match="grades programs by running them: give it something that does"):
        task.grade_samples(task.example(ROW), ["    return x\n"])


def test_ten_samples():
    task, example = parse_task("humaneval"), parse_task("humaneval").example(ROW)
    outputs = ["    return math.sqrt(x)\n"] * 3 + ["    return x\n"] * 9
    marks = task.grade_samples(example, outputs, run)
    assert marks == {"pass@1": pytest.approx(0.25), "pass@10": 1.0}
    assert list(marks) == list(task.metrics)


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, c, k) for c in range(6) for k in range(1, 6)])
def test_pass_at_k_is_the_share_of_all_draws(samples, passed, k):
    draws = list(combinations([True] * passed + [False] * (samples - passed), k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0)])
def test_pass_at_k_of_what_cannot_be(samples, passed, k):
    with pytest.raises(TaskError, match=f"pass@{k} can't be had from {passed} of {samples} samples"):
        pass_at_k(samples, passed, k)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, math.nan]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=40))
def test_intervals_of_counts_are_those_of_resampled_items(items):
    predictions, labels = ([pair[side] for pair in items] for side in (0, 1))
    for name in ("cola", "mrpc"):
        task = parse_task(name)
        for metric, figure in score_figures(task, predictions, labels).items():
            statistic = _OF_COUNTS.get(metric)
            if statistic is None:
                continue
            counts = np.zeros((1, 3, 3), dtype=int)
            for prediction, label in items:
                counts[0, int(label) + 1, 0 if math.isnan(prediction) else int(prediction) + 1] += 1
            assert statistic(counts)[0] == pytest.approx(figure.value, abs=1e-12)
            assert figure.low <= figure.high


def test_the_interval_of_counts_is_as_wide_as_the_bootstrap_over_items():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 300).astype(float)
    predictions = np.where(draw.random(300) < 0.7, labels, 1 - labels)
    figure = score_figures(parse_task("cola"), predictions.tolist(), labels.tolist())["matthews"]
    low, high = bootstrap(lambda p, t: np.corrcoef(p, t)[0, 1], predictions, labels)  # which it is of two classes
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=0.02)
