"""Mathematics in words: MetaMathQA and math_10k to learn from, GSM8K, MATH and five smaller sets to be graded by.

An answer stands after the last "The answer is", ``####`` or in the last ``\\boxed{}`` of a worked text. Three metrics:

- ``math_verify``: the answer equals the reference as mathematics, by Hugging Face's math-verify; where nothing is
  marked, what it finds in the whole text.
- ``exact_match``: what stands after the last of the three marks is the reference, as MetaMath's, PiSSA's and IniLoRA's
  scripts grade after "The answer is: "; no mark, no point. Numbers, fractions too, are compared as numbers, the letter
  of a choice as that, other answers as text without blanks. A number counts beside words, a unit, a currency or %, and
  after =; as a part of an expression it doesn't.
- ``last_number``: the last number anywhere is the reference, within 0.001: as LLM-Adapters' script grades its sets.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any, ClassVar

from headstart.errors import DataError
from headstart.tasks.base import Example, Row, reference_of, text_of
from headstart.tasks.instructed import Instructed, instruction_of
from headstart.tasks.registry import register, variant
from headstart.tasks.text import without_annotations
from headstart.tasks.word_problems import final_number

_MARK = re.compile(r"####|[Tt]he answer is:?|\\boxed\s*(?=\{)|\\boxed\s+(?=\w)")
# A minus after a digit, a letter or a bracket takes away; a comma belongs to a number before three digits alone.
_NUMBER = re.compile(r"(?<![\w.)])(?:-\s?)?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")
_LETTER = re.compile(r"(?<![A-Za-z])[A-E](?![A-Za-z])")
_CHOICE = re.compile(r"\(?([A-E])\)?")
_SLACK = 1e-3  # LLM-Adapters' evaluate.py
_DIGITS = 1000  # more are no number: Python refuses to read them from some thousands on
_SECONDS = 5  # for math-verify to parse one answer, and to compare two

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_VALUE = re.compile(
    rf"([-+]?)\s*(?:\\[dt]?frac\s*(?:{{\s*(-?\d+)\s*}}|(\d))\s*(?:{{\s*(\d+)\s*}}|(\d))|({_DECIMAL})(?:\s*/\s*(\d+))?)"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# Words that make another number of the one beside them.
_COUNTING = re.compile(
    r"\b(?:hundred|thousand|[mb]illion|trillion|dozen|squared|cubed|factorial|half|halves|minus|negative|plus|times|over"
    r"|mod|pi|sqrt|sin|cos|tan|log|ln|exp|theta|alpha)\b",
    re.IGNORECASE,
)
# One letter is a variable, unless it is a unit or an article apart from the number.
_POWER = r"(?:\^?\{?[23]\}?|[²³])?"
_UNIT = rf"(?:[A-Za-z][A-Za-z']+|[aAgmshlLCFJKNVW]){_POWER}"
_BESIDE = rf"(?:[A-Za-z']{{3,}}|[cmk]m|[mk]g|[cm][lL]|lbs?|oz|ft|in|hr|mi|yd|[ap]m|st|nd|rd|th){_POWER}"
_BEFORE = re.compile(r"(?:(?:[A-Za-z][A-Za-z']+\.?|[aAI])[\s,:]+)*")
_AFTER = re.compile(
    rf"\s*%?(?:{_BESIDE}|(?:\s+|-){_UNIT})?(?:(?:\s+|-|\s*/\s*){_UNIT})*\s*"
    r"(?:$|[.;](?!\d)|\s\(\s*[A-Za-z]{2}|,\s*(?!or\b|and\b)[A-Za-z])"
)
_UNITED = re.compile(r"\s*%?\s+[A-Za-z']{3,}(?:\s+[A-Za-z']+)*,")  # after which a new clause may say anything
_SIGNS = {0x2212: "-", 0x2019: "'"}  # minus and apostrophe as printers have them
_BASE = re.compile(r"\d\s*_")  # of a number written to another base, which math-verify passes over
_FUNCTIONS = re.compile(r"\b(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|max|min|gcd|and|lcm|mod|arc\w+|inf\w*)\b")


def answer_in(text: str) -> str | None:
    """Return what stands after the last mark of an answer, on its line or in its box; None where there is no mark."""
    rest = _marked(text)
    return rest if rest is None else rest.lstrip(" $").rstrip(" .$")


def same_answer(answer: str | None, reference: str) -> bool:
    """Tell whether an answer is the reference: the same text, the same number, or the same letter of a choice."""
    if answer is None:
        return False
    if _tidy(answer) == _tidy(reference):
        return True
    if choice := _CHOICE.fullmatch(_tidy(reference)):
        return next(iter(_LETTER.findall(answer)), None) == choice[1]
    number = _number(reference, alone=True)
    return number is not None and _number(answer) == number


def equal(output: str, reference: str) -> bool:
    """Tell by math-verify whether a worked answer comes to the reference."""
    from math_verify import parse, verify

    rest = _marked(output)
    # One line that says nothing but mathematics is an answer without a mark.
    line = output.strip()
    answer = answer_in(output) or (line if "\n" not in line and not _is_worded(line) else "")
    if answer and (same_answer(answer, reference) or _folded(answer) == _folded(reference)):
        return True
    # It keeps its time by a signal, which only the main thread may set.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None

    def parsed(text: str) -> list[Any]:
        return list(parse(text, parsing_timeout=seconds))

    if _BASE.search(answer + reference):
        return False
    number = _number(answer) if answer else None
    if number is not None:
        said = parsed(_written(number, answer))
    elif answer and (_is_worded(answer) or _is_worded(reference)):
        # Letters of words aren't factors; mathematics among them is between dollars.
        said = parsed(rest) if rest and "$" in rest and not _is_worded(reference) else []
    else:
        said = parsed(f"${answer}$" if answer else output)
    gold = _number(reference, alone=True)
    wanted = f"${reference}$" if gold is None else _written(gold, reference)
    return bool(verify(parsed(wanted), said, timeout_seconds=seconds))


def _marked(text: str) -> str | None:
    """Return what stands after the last mark, as it stands."""
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    rest = text[marks[-1].end() :].lstrip()
    if rest.startswith("{"):
        depths = list(accumulate((sign == "{") - (sign == "}") for sign in rest))
        return rest[1 : depths.index(0)].strip() if 0 in depths else None
    return rest.partition("\n")[0]


def _number(text: str, *, alone: bool = False) -> Fraction | None:
    """Return the one number that a text says, after its last =; None where it says another thing.

    Args:
        text: of an answer.
        alone: no word may stand beside the number.
    """
    text = _WRAPPED.sub(r" \1", text.translate(_SIGNS))
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text)  # bold in Markdown
    text = re.sub(r"\\!|\^\s*(?:\\circ|\{\s*\\circ\s*\})|°|\\(?=[%$])|(?<=\d)\{(?=,\})|(?<=,)\}", "", text)
    text = re.sub(r"\\[()\[\],;: ]|[$€£~]", " ", text)
    *steps, text = re.split(r"(?<![<>!\\])=|\\approx|≈", text)
    if any(re.search(r"[;]|,(?!\d{3})|\b(?:or|and)\b", step) for step in steps):
        return None
    text = " ".join(text.split())
    before = _BEFORE.match(text)
    place = before.end() if before else 0
    value = _VALUE.match(text, place)
    if value is None or len(value[0]) > _DIGITS:
        return None
    rest = text[value.end() :]
    if alone and (place or not re.fullmatch(r"\s*%?\.?\s*", rest)):
        return None
    fits = _AFTER.match(rest) or _UNITED.match(rest)
    if not fits or _COUNTING.search(text[:place]) or _COUNTING.search(fits[0]):
        return None
    sign, top, digit, bottom, low, decimal, divisor = value.groups()
    above = Fraction(decimal.replace(",", "") if decimal else int(top or digit))
    below = int(divisor or 1) if decimal else int(bottom or low)
    return above / below * (-1 if sign == "-" else 1) if below else None


def _written(number: Fraction, text: str) -> str:
    """Return a text's number in LaTeX, divided where the text says per cent."""
    sign, size = "-" if number < 0 else "", abs(number) / (100 if "%" in text else 1)
    return rf"${sign}\frac{{{size.numerator}}}{{{size.denominator}}}$"


def _tidy(latex: str) -> str:
    """Return LaTeX without blanks, and with the one spelling of fractions, brackets and words."""
    latex = _WRAPPED.sub(r"\1", re.sub(r"\\[dt]frac", r"\\frac", latex))
    latex = re.sub(r"([_^])\{(\w)\}", r"\1\2", latex)
    return re.sub(r"\\left|\\right|\\!|\\,|\\(?=%)|\s|\$", "", latex)


def _folded(latex: str) -> str:
    """Return tidy LaTeX, of which words are in small letters."""
    return _tidy(latex).casefold() if _is_worded(latex) else _tidy(latex)


def _is_worded(latex: str) -> bool:
    """Tell whether an answer says something in words, of three letters or in text of LaTeX."""
    return bool(_WRAPPED.search(latex) or re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", _FUNCTIONS.sub("", latex)))


def _near(output: str, reference: str) -> bool:
    if not (numbers := _NUMBER.findall(output)) or not _NUMBER.fullmatch(reference):
        return False
    a, b = (float(re.sub(r"[$€£,\s]", "", number)) for number in (numbers[-1], reference))
    return abs(a - b) <= _SLACK


@dataclass(frozen=True)
class Mathematics(Instructed):
    """Base of the tasks in mathematics."""

    metrics: ClassVar[tuple[str, ...]] = ("math_verify", "exact_match", "last_number")
    max_new_tokens: ClassVar[int] = 512
    needs: ClassVar[tuple[str, ...]] = ("math_verify",)
    parts: ClassVar[tuple[str, str]] = ("query", "response")  # the fields with question and worked answer
    mark: ClassVar[str] = ""  # what every worked answer must have in it, before its answer

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Make an example graded by the answer in the worked one; where none is marked, it can be learned alone."""
        asks, answers = self.parts
        worked = text_of(row, answers)
        if self.mark == "####":
            worked = without_annotations(worked)
        answer = final_number(worked) if self.mark == "####" else answer_in(worked)
        if self.mark not in worked or (self.mark and not answer):
            raise DataError(f"field {answers!r} has no {self.mark!r} with the answer after it.")
        return self.asked(text_of(row, asks), "", worked, reference=answer)

    def grade(self, example: Example, output: str) -> dict[str, float]:
        """Grade by those of the three metrics that the task has."""
        output, reference = self.cut(output), str(reference_of(example))
        graders = {
            "math_verify": lambda: equal(output, reference),
            "exact_match": lambda: same_answer(answer_in(output), reference),
            "last_number": lambda: _near(output, reference),
        }
        return {metric: float(graders[metric]()) for metric in self.metrics}


@dataclass(frozen=True)
class Competition(Mathematics):
    """Base of MATH, whose problems are of seven types."""

    def part_of_group(self, row: Row) -> tuple[str, Row]:
        """Return the ``type`` in the words of the datasets, as "counting_and_probability", and the row."""
        return text_of(row, "type").strip().lower().replace(" & ", " and ").replace(" ", "_"), row


# fmt: off
variant(
    Mathematics, "metamath", 'MetaMathQA: training problems rewritten; answers end in "The answer is: N".',
    source="Yu et al. 2023, arXiv 2309.12284; meta-math/MetaMathQA; 395,000 rows",
    hub="meta-math/MetaMathQA", splits={"train": "train"},
    files=("MetaMathQA", "MetaMathQA-395K", "MetaMathQA-40K"),
)
variant(
    Mathematics, "gsm8k", "GSM8K: grade-school problems, worked, ending in '#### N'; without the calculator's notes.",
    source="Cobbe et al. 2021, arXiv 2110.14168; openai/gsm8k; 7,473 to train, 1,319 to test",
    hub="openai/gsm8k:main", lm_eval="gsm8k", parts=("question", "answer"), mark="####",
)
variant(
    Competition, "math", "MATH: competition problems; the answer is in the solution's last box.",
    source="Hendrycks et al. 2021, arXiv 2103.03874; DigitalLearningGmbH/MATH-lighteval; 5,000 to test",
    hub="DigitalLearningGmbH/MATH-lighteval", lm_eval="hendrycks_math", max_new_tokens=1024,
    parts=("problem", "solution"), mark="\\boxed",
)
# fmt: on


@dataclass(frozen=True)
class Adapted(Mathematics):
    """Base of the sets in LLM-Adapters' format: instruction, input, output, and an answer, often in a list of one."""

    source: ClassVar[str] = "Hu et al. 2023, arXiv 2304.01933; github.com/AGI-Edgerunners/LLM-Adapters"
    metrics: ClassVar[tuple[str, ...]] = ("last_number", "exact_match", "math_verify")
    parts: ClassVar[tuple[str, str]] = ("", "")  # of a hub's row, the question's fields as a template and the answer's

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Read the four fields, or the hub's; without ``output``, a worked answer, nothing is to be learned."""
        asked, answered = self.parts
        if asked and "instruction" not in row:
            told = {field: text_of(row, field).strip() for field in re.findall(r"\{(\w+)\}", asked)}
            row = {"instruction": asked.format(**told), "answer": row.get(answered)}
        answer: Any = row.get("answer")
        answer = answer[-1] if isinstance(answer, list) and answer else answer
        if isinstance(answer, (int, float)):
            answer = f"{answer:.15g}"
        reference = text_of({"answer": answer} if "answer" in row else row, "answer").strip()
        return self.asked(
            *instruction_of(row), text_of(row, "output") if row.get("output") else "", reference=reference
        )


# fmt: off
variant(
    Adapted, "math_10k", "math_10k: LLM-Adapters' training set, of GSM8K, MAWPS and AQuA, worked by ChatGPT.",
    hub="lmms-lab/Math10K", splits={"train": "train"}, files=("Math10K", "math10k"), metrics=Mathematics.metrics,
)
# fmt: on
for _name, _hub, _parts, _about in (
    ("SVAMP", "ChilleD/SVAMP", ("{Body} {Question}", "Answer"), "elementary problems varied; 1,000 to test"),
    ("MultiArith", "ChilleD/MultiArith", ("{question}", "final_ans"), "problems of several steps; 600 to test"),
    ("AddSub", None, ("", ""), "problems of addition and subtraction; 395 to test"),
    ("SingleEq", None, ("", ""), "problems of one equation; 508 to test"),
):
    variant(Adapted, _name.lower(), f"{_name}: {_about}.", hub=_hub, parts=_parts, files=(_name,))


@register("aqua")
@dataclass(frozen=True)
class AQuA(Adapted):
    """AQuA: algebra with five choices; 254 to test.

    The letter after the last mark counts, or where there is no mark the last in brackets; LLM-Adapters' script takes
    the first of the capitals A to E anywhere, the A of "Answer" too.
    """

    files: ClassVar[tuple[str, ...]] = ("AQuA",)
    metrics: ClassVar[tuple[str, ...]] = ("exact_match",)
    needs: ClassVar[tuple[str, ...]] = ()
    lm_eval: ClassVar[str | None] = "agieval_aqua_rat"
    hub: ClassVar[str | None] = "deepmind/aqua_rat:raw"

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Read LLM-Adapters' fields, or the hub's ``question``, ``options`` such as ``A)21``, and ``correct``."""
        options: Any = row.get("options")
        if "instruction" not in row and isinstance(options, list):
            listed = " ".join(f"({str(option).replace(')', ') ', 1)}" for option in options)
            asked = f"{text_of(row, 'question')} Answer Choices: {listed}"
            row = {"instruction": asked, "answer": row.get("correct")}
        return super().example(row)

    def grade(self, example: Example, output: str) -> dict[str, float]:
        """Compare letters."""
        output = self.cut(output)
        answer = answer_in(output) or "".join(re.findall(r"\([A-E]\)|^\s*[A-E]\b", output)[-1:])
        return {"exact_match": float(same_answer(answer, reference_of(example)))}
