"""Grade-school word problems made on the spot: data to fine-tune on and to grade, with no download.

A problem is a template (a sentence with gaps and the steps that solve it) with names and numbers filled in.
Its answer is worked as in GSM8K: one line for each step, then ``#### `` and the result, which is what is
graded.

Which split a problem belongs to is decided by a hash of its template and its numbers, so the two splits can't
share a problem, whatever the seeds, and no held-out problem is a training problem with the names changed.
"""

from __future__ import annotations

import hashlib
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from headstart.errors import DataError

Split = Literal["train", "test"]
"""The two parts of the built-in problems."""

# fmt: off
_NAMES = (
    "Anna", "Ben", "Carl", "Clara", "Dan", "David", "Emma", "Eric", "Grace", "Henry", "Jack", "James",
    "Jane", "John", "Kate", "Laura", "Leo", "Lily", "Lucy", "Maria", "Mark", "Mary", "Max", "Mia", "Nina",
    "Oscar", "Paul", "Peter", "Rose", "Sam", "Sara", "Tom",
)
_ITEMS = (
    "apples", "balls", "beads", "books", "buttons", "cards", "coins", "cups", "eggs", "flowers", "keys",
    "pens", "shells", "stamps", "stones", "toys",
)
# fmt: on

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
_LARGEST = 120  # of any number in a worked answer: a model should fail at reasoning, not at its tables
_HELD_OUT = 0.2  # the share of all problems that belongs to the test split
_PATIENCE = 2000  # draws without a new problem after which the templates count as used up


@dataclass(frozen=True)
class _Template:
    """A question with gaps, the range (both ends included) of each number in it, and the steps to its answer.

    A step such as ``"x = a + b"`` names its result; a later step may use it. The last result is the answer.
    """

    question: str
    numbers: dict[str, tuple[int, int]]
    steps: tuple[str, ...]

    def solve(self, numbers: dict[str, int]) -> list[tuple[int, str, int, int]] | None:
        """Return left, operator, right, result of each step; None if one isn't a small positive integer."""
        values = dict(numbers)
        worked = []
        for step in self.steps:
            result, _, left, sign, right = step.split()
            a = values[left] if left in values else int(left)
            b = values[right] if right in values else int(right)
            if sign == "/" and a % b:
                return None
            c = _OPERATORS[sign](a, b)
            if not 1 <= c <= _LARGEST:
                return None
            values[result] = c
            worked.append((a, sign, b, c))
        return worked


_TEMPLATES = (
    _Template(
        "{name} has {a} {item}, buys {b} more and gives {c} away. How many {item} are left?",
        {"a": (5, 40), "b": (3, 20), "c": (2, 15)},
        ("x = a + b", "y = x - c"),
    ),
    _Template(
        "{name} fills {a} boxes with {b} {item} each and has {c} left over. How many {item} are there?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 12)},
        ("x = a * b", "y = x + c"),
    ),
    _Template(
        "{name} finds {a} {item} and {friend} finds {b}. They share them equally. How many does each get?",
        {"a": (3, 40), "b": (3, 40)},
        ("x = a + b", "y = x / 2"),
    ),
    _Template(
        "{name} reads {a} pages a day for {b} days. The book has {c} pages. How many pages are left?",
        {"a": (3, 12), "b": (2, 8), "c": (30, 100)},
        ("x = a * b", "y = c - x"),
    ),
    _Template(
        "{name} has {a} {item}. {friend} has {b} more than {name}. How many {item} do they have together?",
        {"a": (3, 30), "b": (2, 20)},
        ("x = a + b", "y = a + x"),
    ),
    _Template(
        "{name} has {a} {item} and {friend} has twice as many. They lose {b}. How many {item} are left?",
        {"a": (3, 20), "b": (2, 9)},
        ("x = a * 2", "y = a + x", "z = y - b"),
    ),
    _Template(
        "{name} buys {a} {item} for {b} dollars each and pays with {c} dollars. How much change is due?",
        {"a": (2, 9), "b": (2, 9), "c": (20, 100)},
        ("x = a * b", "y = c - x"),
    ),
    _Template(
        "A bus carries {a} people. At each of {b} stops {c} get on, then {d} get off. How many are on it?",
        {"a": (3, 20), "b": (2, 5), "c": (2, 6), "d": (2, 9)},
        ("x = b * c", "y = a + x", "z = y - d"),
    ),
    _Template(
        "{name} earns {a} dollars an hour for {b} hours and spends {c} dollars. How many dollars are left?",
        {"a": (4, 12), "b": (2, 8), "c": (3, 30)},
        ("x = a * b", "y = x - c"),
    ),
    _Template(
        "{name} bakes {a} cookies and eats {b}. The rest go into {c} equal bags. How many are in a bag?",
        {"a": (12, 60), "b": (2, 12), "c": (2, 8)},
        ("x = a - b", "y = x / c"),
    ),
    _Template(
        "A hall has {a} rows of {b} chairs. {name} takes {c} chairs away. How many chairs are left?",
        {"a": (3, 9), "b": (3, 12), "c": (2, 15)},
        ("x = a * b", "y = x - c"),
    ),
    _Template(
        "{name} keeps {a} cows and {b} hens. How many legs do the animals have?",
        {"a": (2, 20), "b": (2, 20)},
        ("x = a * 4", "y = b * 2", "z = x + y"),
    ),
    _Template(
        "{name} walks {a} miles on Monday, {b} more on Tuesday than on Monday, and {c} on Friday. "
        "How many miles is that?",
        {"a": (2, 15), "b": (2, 9), "c": (2, 15)},
        ("x = a + b", "y = a + x", "z = y + c"),
    ),
    _Template(
        "{name} is {a} years old. {friend} is {b} years younger. How old will {friend} be in {c} years?",
        {"a": (9, 50), "b": (2, 8), "c": (2, 20)},
        ("x = a - b", "y = x + c"),
    ),
    _Template(
        "{name} cuts a rope of {a} feet into {b} equal parts and uses {c} of them. How many feet are left?",
        {"a": (8, 80), "b": (3, 8), "c": (2, 6)},
        ("x = a / b", "y = x * c", "z = a - y"),
    ),
    _Template(
        "{name} has {a} {item}. Half are red, {b} are blue, the rest are green. How many {item} are green?",
        {"a": (10, 60), "b": (2, 20)},
        ("x = a / 2", "y = x - b"),
    ),
    _Template(
        "{name} buys {a} packs of {b} {item} and splits them among {c} children. How many does each get?",
        {"a": (2, 9), "b": (2, 12), "c": (2, 9)},
        ("x = a * b", "y = x / c"),
    ),
    _Template(
        "A garden is {a} feet long and {b} feet wide. How long is a fence around it with a gap of {c} feet?",
        {"a": (4, 25), "b": (3, 20), "c": (2, 6)},
        ("x = a + b", "y = x * 2", "z = y - c"),
    ),
    _Template(
        "{name} sells {a} {item} on Monday, half as many on Tuesday, for {b} dollars each. What is earned?",
        {"a": (4, 40), "b": (2, 6)},
        ("x = a / 2", "y = a + x", "z = y * b"),
    ),
    _Template(
        "{name} has {a} {item}, {friend} twice as many. They buy {b} more and make {c} equal piles. How many in each?",
        {"a": (2, 15), "b": (2, 12), "c": (2, 8)},
        ("w = a * 2", "x = a + w", "y = x + b", "z = y / c"),
    ),
)


def generate_problems(n: int, *, seed: int, split: Split = "train") -> list[dict[str, str]]:
    """Make ``n`` different word problems, each a dict of ``question`` and ``answer``.

    The same seed gives the same problems, and a smaller ``n`` gives the first of a larger one's. Templates
    are used about equally often. Seeds of one split may share problems; the splits never do.

    Args:
        n: How many, at least 0.
        seed: Any integer.
        split: ``"train"`` (default) or ``"test"``.

    Raises:
        DataError: ``n`` is negative, the split is unknown, or there aren't as many different problems.
    """
    if split not in get_args(Split):
        raise DataError(f"The built-in problems have the splits 'train' and 'test', not {split!r}.")
    if n < 0:
        raise DataError(f"The number of problems must not be negative, but {n} were asked for.")
    # Python seeds from a string by its SHA-512: the same draws in every process and version.
    rng = random.Random(f"headstart problems {split} {seed}")
    problems: list[dict[str, str]] = []
    seen: set[str] = set()
    misses = 0
    templates = _rounds(rng)
    while len(problems) < n:
        problem = _draw(next(templates), rng, split)
        if problem["question"] in seen:
            misses += 1
            if misses == _PATIENCE:
                raise DataError(
                    f"The built-in problems don't hold {n} different ones in the split {split!r}; "
                    f"ask for {len(problems)} or fewer."
                )
            continue
        misses = 0
        seen.add(problem["question"])
        problems.append(problem)
    return problems


def _rounds(rng: random.Random) -> Iterator[_Template]:
    """Yield all templates in a random order, again and again: a small sample has every kind in it."""
    while True:
        yield from rng.sample(_TEMPLATES, len(_TEMPLATES))


def _draw(template: _Template, rng: random.Random, split: Split) -> dict[str, str]:
    """Fill in a template with numbers of the split that make every step a small positive integer."""
    while True:
        numbers = {name: rng.randint(low, high) for name, (low, high) in template.numbers.items()}
        worked = template.solve(numbers)
        if worked is not None and _split_of(template, list(numbers.values())) == split:
            break
    name, friend = rng.sample(_NAMES, 2)
    question = template.question.format(name=name, friend=friend, item=rng.choice(_ITEMS), **numbers)
    lines = [f"{a} {sign} {b} = {c}." for a, sign, b, c in worked]
    return {"question": question, "answer": "\n".join([*lines, f"#### {worked[-1][-1]}"])}


def _split_of(template: _Template, numbers: Sequence[int]) -> Split:
    """Return the only split that may hold this template with these numbers."""
    key = f"{template.question}|{','.join(map(str, numbers))}"
    byte = hashlib.blake2b(key.encode(), digest_size=1).digest()[0]
    return "test" if byte < 256 * _HELD_OUT else "train"


_FINAL = re.compile(r"[ \t]*([-+]?)[ \t]*[$€£]?[ \t]*([-+]?)([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def final_number(text: str) -> str | None:
    """Return the number that follows the last ``####`` of a worked answer, in its plainest form.

    Commas, a currency sign, a trailing dot and needless zeros are gone: ``"#### $1,234.00."`` gives
    ``"1234"``. None where there is no ``####``, or no number right after the last one on its line.
    """
    _, mark, rest = text.rpartition("####")
    return _plain(rest) if mark else None


def same_number(a: str | None, b: str | None) -> bool:
    """Tell whether two numbers given as text are the same one; None and other text equal nothing."""
    if a is None or b is None:
        return False
    left = _plain(a)
    return left is not None and left == _plain(b)


def _plain(text: str) -> str | None:
    # On the digits themselves: a float or a Decimal of limited precision would call two long numbers equal.
    match = _FINAL.match(text)
    if match is None:
        return None
    whole, _, fraction = match[3].replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    negative = number != "0" and (match[1] + match[2]) == "-"
    return f"-{number}" if negative else number
