"""Mathematics graded: which number counts, by which of the three metrics, in the published formats."""

from __future__ import annotations

import threading
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import DataError
from headstart.tasks import parse_task
from headstart.tasks.mathematics import _NUMBER, answer_in, same_answer

GSM8K = parse_task("gsm8k")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5.\n#### 5", "5"),
        ("#### 1,234.50 dollars", "1,234.50 dollars"),
        ("The answer is: 7. No. The answer is: 8.", "8"),
        ("The answer is 8", "8"),
        ("The answer is: $.5.", ".5"),
        ("so the answer is: $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("The answer is:\n\n12\nThat's it.", "12"),
        ("The answer is: 3\n#### 4", "4"),
        ("it is $\\boxed{\\frac{1}{\\sqrt{2}}}$, not 3", "\\frac{1}{\\sqrt{2}}"),
        ("The answer is: $\\boxed{9}$", "9"),
        ("thus \\boxed 7$.", "7"),
        ("\\boxed{never closed", None),
        ("seven, that is 7", None),
        ("####", ""),
        ("", None),
    ],
)
def test_the_answer_stands_after_the_last_mark(text, answer):
    assert answer_in(text) == answer


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("12 + 5 = 17.", ["12", "5", "17"]),
        ("3-4=-1", ["3", "4", "-1"]),
        ("$1,234.50, then $ 6 and -$7", ["$1,234.50", "$ 6", "-$7"]),
        ("1,2,3 and 12,34 and 1,000,000", ["1", "2", "3", "12", "34", "1,000,000"]),
        (".5 of 0.25", [".5", "0.25"]),
        ("x2 and 50%, 3rd", ["50", "3"]),
        ("(5) - 3", ["5", "- 3"]),
        ("none", []),
    ],
)
def test_numbers_of_a_text(text, numbers):
    assert [number.strip() for number in _NUMBER.findall(text)] == numbers


NUMBERS = st.decimals(-(10**9), 10**9, allow_nan=False, places=2)


@settings(deadline=None)
@given(
    NUMBERS, NUMBERS, st.sampled_from(["", "$", "€"]), st.sampled_from([".", "", " apples.", "\n", "%", ", at last"])
)
def test_a_number_is_found_whatever_stands_around_it(number: Decimal, other: Decimal, currency: str, end: str):
    sign, size = "-" if number < 0 else "", abs(number)
    for written in (f"{sign}{currency}{size:,}", f"{sign}{currency}{size}", f"{sign}{currency}{size:,}00"):
        text = f"First {other:,}, then {other} is less. The answer is: {written}{end}"
        assert same_answer(answer_in(text), str(number))
        assert same_answer(answer_in(text), str(other)) == (number == other)
        assert GSM8K.grade(GSM8K.example({"question": "q", "answer": f"#### {number:,}"}), text)["last_number"] == 1.0


@settings(deadline=None)
@given(st.text())
def test_any_text_can_be_graded(text):
    example = parse_task("svamp").example({"instruction": "q", "input": "", "output": "o", "answer": [22.0]})
    marks = parse_task("svamp").grade(example, text)
    assert {*marks.values()} <= {0.0, 1.0} and list(marks) == ["last_number", "exact_match", "math_verify"]


@pytest.mark.parametrize(
    ("output", "verified", "exact", "last"),
    [
        ("70000", 1, 0, 1),
        ("He made 200,000-130,000=$70,000.\n#### 70,000", 1, 1, 1),
        ("The answer is: $70,000.00.", 1, 1, 1),
        ("The answer is: \\boxed{70000}", 1, 1, 1),
        ("The answer is: 70000 dollars, or 3 years' pay", 1, 1, 0),
        ("The answer is: 7000", 0, 0, 0),
        ("The answer is: -70000", 0, 0, 0),
        ("The answer is: seventy thousand", 0, 0, 0),
        ("The answer is: 70000 ### Instruction: How many? The answer is: 3", 1, 1, 1),
        ("", 0, 0, 0),
    ],
)
def test_gsm8k(output, verified, exact, last):
    example = GSM8K.example({"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 70,000"})
    assert (example.completion, example.reference) == ("1+1=2\n#### 70,000", "70000")
    assert GSM8K.grade(example, output) == {"math_verify": verified, "exact_match": exact, "last_number": last}


@pytest.mark.parametrize(
    ("solution", "reference", "output", "verified", "exact"),
    [
        ("So $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", "The answer is: $\\dfrac{1}{2}$.", 1, 1),
        ("So $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", "The answer is: 0.5", 1, 0),
        ("First \\boxed{1}, then \\boxed{\\left(3, \\frac{\\pi}{2}\\right)}.", "\\left(3, \\frac{\\pi}{2}\\right)",
         "it is $\\boxed{(3,\\frac{\\pi}{2})}$", 1, 1),
        ("\\boxed{x^2+2x+1}", "x^2+2x+1", "The answer is: $(x+1)^2$", 1, 0),
        ("\\boxed{1,024}", "1,024", "#### 1024", 1, 1),
        ("\\boxed{\\text{even}}", "\\text{even}", "The answer is: \\text{odd}", 0, 0),
        ("$\\boxed 7$", "7", "The answer is: 7.0", 1, 1),
    ],
)  # fmt: skip
def test_math(solution, reference, output, verified, exact):
    task = parse_task("math")
    example = task.example({"problem": "p", "level": "Level 1", "type": "Algebra", "solution": solution})
    assert example.reference == reference
    marks = task.grade(example, output)
    assert (marks["math_verify"], marks["exact_match"]) == (verified, exact)


def test_of_answers_that_are_no_numbers_the_last_number_is_none():
    task = parse_task("math")
    example = task.example({"problem": "p", "solution": "\\boxed{\\frac{1}{2}}"})
    assert task.grade(example, "a 2")["last_number"] == 0.0


def test_metamath():
    task = parse_task("metamath")
    row = {"type": "GSM_Rephrased", "query": "How many?", "original_question": "o", "response": "2.\nThe answer is: 2"}
    example = task.example(row)
    assert (example.completion, example.reference) == ("2.\nThe answer is: 2", "2")
    assert task.grade(example, example.completion) == dict.fromkeys(task.metrics, 1.0)


@pytest.mark.parametrize(
    ("name", "answer", "reference", "output", "last"),
    [
        ("addsub", ["118558.0"], "118558.0", "118,558 houses", 1),
        ("addsub", ["10.333333333333334"], "10.333333333333334", "about 10.3333 pounds", 1),
        ("addsub", ["10.333333333333334"], "10.333333333333334", "about 10.33 pounds", 0),
        ("svamp", [22.0], "22", "14 + 8 = 22", 1),
        ("multiarith", ["7"], "7", "8", 0),
        ("singleeq", 0.1, "0.1", "It is .1 of them", 1),
        ("math_10k", "-3", "-3", "so 2 - 5 = -3", 1),
    ],
)
def test_llm_adapters_format(name, answer, reference, output, last):
    task = parse_task(name)
    example = task.example({"instruction": "q ", "input": "", "output": "worked", "answer": answer})
    assert (example.completion, example.reference) == ("worked", reference)
    assert task.grade(example, output)["last_number"] == last
    assert task.example({"instruction": "q", "answer": answer}).completion == ""


@pytest.mark.parametrize(
    ("name", "row", "asked", "reference"),
    [
        ("svamp", {"Body": "Two pens.", "Question": "How many?", "Answer": "2.0"}, "Two pens. How many?", "2.0"),
        ("multiarith", {"question": " How many? ", "final_ans": "8"}, "How many?", "8"),
        ("aqua", {"question": "2 + 2?", "options": ["A)4", "B)f(x)"], "rationale": "r", "correct": "A"},
         "2 + 2? Answer Choices: (A) 4 (B) f(x)", "A"),
    ],
)  # fmt: skip
def test_the_hubs_rows_of_the_small_sets(name, row, asked, reference):
    task = parse_task(name)
    assert task.example(row) == task.example({"instruction": asked, "answer": [reference]})
    with pytest.raises(DataError, match="field 'answer' must be text, but is of type NoneType"):
        task.example({**row, "Answer": None, "final_ans": None, "correct": None})


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("900 + 60 = 960.The answer is (E).", 1),
        ("The answer is: E", 1),
        ("(A) is too small, so (E)", 1),
        ("E", 1),
        ("A good guess: (B). The answer is (C).", 0),
        ("Each of them", 0),
        ("", 0),
    ],
)
def test_aqua_takes_a_letter(output, right):
    task = parse_task("aqua")
    example = task.example({"instruction": "900 + 5 x 12? Answer Choices: (A) 820 (E) 960", "answer": ["E"]})
    assert task.grade(example, output) == {"exact_match": right}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "5"}, "field 'answer' has no '####' with the answer after it"),
        ("gsm8k", {"question": "q", "answer": "#### five"}, "field 'answer' has no '####' with the answer"),
        ("gsm8k", {"answer": "#### 5"}, "field 'question' is missing; the row has 'answer'"),
        ("math", {"problem": "p", "solution": "5"}, r"field 'solution' has no '.*boxed'"),
        ("math", {"problem": "p", "solution": "\\boxed{5"}, r"field 'solution' has no '.*boxed'"),
        ("metamath", {"query": "q"}, "field 'response' is missing; the row has 'query'"),
        ("svamp", {"instruction": "q", "input": ""}, "field 'answer' is missing"),
        ("svamp", {"instruction": "q", "answer": []}, "field 'answer' must be text, but is of type list"),
        ("svamp", {"instruction": "q", "answer": [""]}, "field 'answer' is empty"),
        ("addsub", {"instruction": "q", "answer": "5", "input": 3}, "field 'input' must be text"),
    ],
)
def test_a_row_that_cannot_be_used(name, row, message):
    with pytest.raises(DataError, match=message):
        parse_task(name).example(row)


def test_grading_in_a_thread():
    example, marks = GSM8K.example({"question": "q", "answer": "#### 5"}), []
    thread = threading.Thread(target=lambda: marks.append(GSM8K.grade(example, "The answer is: 5")))
    thread.start()
    thread.join(60)
    assert marks == [dict.fromkeys(GSM8K.metrics, 1.0)]
