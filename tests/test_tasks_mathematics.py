"""Mathematics graded: which number counts, by which of the three metrics, in the published formats."""

from __future__ import annotations

import threading
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import DataError
from headstart.tasks import parse_task
from headstart.tasks.mathematics import _NUMBER, answer_in, equal, same_answer

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
        ("So $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", "The answer is: 0.5", 1, 1),
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


SAYS = {  # by reference, answers that are it, with | between them
    "18": r"18.|18\%|18%|\$18|$18$|18 dollars|18 \text{ dollars}|18^\circ|18cm|18 cm^2|18 miles/hour|18-year|US$18"
    r"|x = 18|10 + 8 = 18|20 - 2 = 18 apples|18, at last|18 apples. There are 5 left.|about 18 years, or 3 less|18.0",
    "1234.5": r"$1,234.50|1234.500|1{,}234.5|1,\!234.5",
    "-5": "-5|\N{MINUS SIGN}5|-$5|x = -5",
    "0.5": r"1/2|\frac{1}{2}|\frac12|\dfrac{1}{2}|.5|1/2 cup",
    "-0.75": r"-\frac{3}{4}|-3/4|\frac{-3}{4}",
    "7": r"**7**|**7** days|7.0|Tom has 7 apples",
    r"\frac{1}{2}": r"1/2|0.5|\tfrac{1}{2}",
    r"90^\circ": "90|90^{\\circ}|90\N{DEGREE SIGN}",
    r"\text{Monday}": r"Monday|\text{Monday}|\mathrm{Monday}",
    r"\text{(A)}": r"A|(A)|\text{A}",
    "x+1": r"x + 1|$x+1$",
}
SAYS_NOT = {
    "3": r"\frac{3}{4}|3/4|3\sqrt{2}|3x+1|3x|3\pi|x\in[3,5]|3:2|-3|3!|3 - 5|3 x|3 million|3 1/2|3 or 4|3, 4|x=3 or x=4"
    r"|3\ldots 5",
    "2": r"(2, 5)|2 hours 30 minutes|2.5|120_2|x^2|2^{10}",
    "10": r"10^5|10!|x \le 10|10(3)|10 + 1",
    "1": r"\frac{1}{2}|x_1|seventy-one",
    "6": r"x=5, y=6|x=5 or x=6",
    "12": "12!|120",
    r"\text{June 20}": r"20|July 20",
    r"\text{(A)}": r"B|(C)",
}
MARKS = ("The answer is: {}", "The answer is: ${}$.", "#### {}", "So it is $\\boxed{{{}}}$.")


def listed(table):
    return [(reference, answer) for reference, answers in table.items() for answer in answers.split("|")]


@pytest.mark.parametrize(("reference", "answer"), listed(SAYS))
def test_an_answer_that_says_the_reference_is_right_by_both_metrics(reference, answer):
    assert same_answer(answer, reference)
    assert equal(f"The answer is: {answer}", reference) and equal(f"So \\boxed{{{answer}}}.", reference)


@pytest.mark.parametrize(("reference", "answer"), listed(SAYS_NOT))
def test_a_number_in_an_expression_is_not_the_answer(reference, answer):
    assert not same_answer(answer, reference)
    assert not equal(f"The answer is: {answer}", reference)


EQUAL = {
    r"3\sqrt{2}": r"3 \sqrt 2|\sqrt{18}",
    r"\frac{\pi}{2}": r"\pi/2|0.5\pi",
    "(2,5)": r"(2, 5)|\left(2,5\right)",
    "[2,5)": r"[2, 5)|x\in[2,5)|the interval $[2,5)$",
    r"(-\infty,5]": r"(-\infty, 5]",
    r"(2,5)\cup(7,9)": r"(7,9)\cup(2,5)",
    r"\{1,2,3\}": r"\{3, 2, 1\}",
    "3,4,5": "5, 4, 3|3, 4, and 5",
    "x+1": "1+x",
    "x^2+2x+1": "(x+1)^2",
    "2^{10}": "1024|2^10",
    r"10\%": r"10%|0.1|10|\frac{1}{10}",
    "5": "x=5|25/5|2+3",
    r"3\text{ inches}": r"3 inches|3|3 \text{ inches}",
    r"\text{Monday}": "monday",
    r"\$32,348": r"32348|\$32,348 dollars",
    r"\begin{pmatrix}1\\2\end{pmatrix}": r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
    r"\sin x": r"\sin(x)",
    "2+3i": "3i + 2",
    "120_8": "120_{8}",
    r"\frac{\sqrt{3}}{2}": r"\sqrt{3}/2|\sqrt{\frac{3}{4}}",
}
UNEQUAL = {
    r"3\sqrt{2}": r"3|\sqrt{2}|3\sqrt{3}",
    "(2,5)": "[2,5]|2|(5,2)",
    "x+1": "x|x-1",
    r"\{1,2\}": r"\{1,2,3\}|1",
    r"\text{even}": r"odd|\text{odd}",
    r"\text{seat}": r"\text{east}|seta",
    "120_8": "120_9|120",
    "3": r"3\sqrt{2}|3x+1|\frac{3}{4}",
    r"10\%": r"20\%|0.2",
}


@pytest.mark.parametrize(("reference", "answer"), listed(EQUAL))
def test_what_is_equal_as_mathematics(reference, answer):
    assert equal(f"We find 7.\nThe answer is: {answer}", reference) and equal(f"\\boxed{{{answer}}}", reference)


@pytest.mark.parametrize(("reference", "answer"), listed(UNEQUAL))
def test_what_is_not_equal_as_mathematics(reference, answer):
    assert not equal(f"It is {reference}, no:\nThe answer is: {answer}", reference)
    assert not equal(f"\\boxed{{{answer}}}", reference)


ATOMS = st.one_of(
    st.integers(-999, 9999).map(str),
    st.sampled_from([r"\pi", "x", r"\sqrt{2}", r"\infty", r"\text{Monday}", "east", "0.25", r"1{,}000", "i"]),
)
BUILT = st.recursive(
    ATOMS,
    lambda parts: st.one_of(
        *(
            st.builds(shape.format, parts, parts)
            for shape in (r"\frac{{{}}}{{{}}}", "({}, {})", "[{},{})", r"\{{{},{}\}}", "{}+{}", "{}^{{{}}}", "{} = {}")
        ),
        *(st.builds(shape.format, parts) for shape in (r"3\sqrt{{{}}}", r"{}\%", "{} cm", r"\left({}\right)")),
    ),
    max_leaves=4,
)


@settings(deadline=None, max_examples=60)
@given(BUILT, st.sampled_from(MARKS))
def test_an_answer_equals_itself_behind_every_mark(answer, mark):
    text = f"2 and 5.\n{mark.format(answer)}"
    assert same_answer(answer_in(text), answer) and equal(text, answer)


@pytest.mark.parametrize("answer", ["9" * 5000, "18" + " " * 20000 + "!", "18 " + "ab " * 5000 + "!", "1," * 5000])
def test_endless_answers_are_graded_as_soon_as_others(answer):
    started = time.monotonic()
    assert not same_answer(answer, "18") and time.monotonic() - started < 2


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
