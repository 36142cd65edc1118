"""Commonsense170K to learn from and the eight tasks to be graded by, in LLM-Adapters' words.

Hu et al. 2023, arXiv 2304.01933; github.com/AGI-Edgerunners/LLM-Adapters. A row asks, lists its choices, and ends in
"Answer format: answer1/answer2"; what is learned is "the correct answer is answer1". As in that script, an answer is
the first of the choices' names in what a model writes. Rows as the hub has them are put into the same words; the splits
are those whose rows LLM-Adapters' test files hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from headstart.errors import DataError
from headstart.tasks.base import Example, Row, reference_of, text_of
from headstart.tasks.instructed import Instructed, instruction_of
from headstart.tasks.registry import variant

_FORMAT = re.compile(r"Answer format:\s*(\w+(?:/\w+)+)\s*$")


@dataclass(frozen=True)
class Commonsense(Instructed):
    """Base of the commonsense tasks.

    Class attributes, of the hub's rows:
        lead: the words before the question.
        question: the fields that make up the question, as a template.
        choices: the fields with the choices, or the one with all of them.
        label: the field with the right choice, and what it holds for each of them.
        noun, between: what a choice is called, and what stands between two.
    """

    splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "validation"}
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    max_new_tokens: ClassVar[int] = 32
    lead: ClassVar[str] = "Please choose the correct answer to the question: "
    question: ClassVar[str] = "{question}"
    choices: ClassVar[tuple[str, ...]] = ()
    label: ClassVar[tuple[str, str]] = ("label", "0123")
    noun: ClassVar[str] = "answer"
    between: ClassVar[str] = " "

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Make an example of LLM-Adapters' row or of the hub's."""
        if "instruction" not in row and self.choices:
            row = self._adapted(row)
        (instruction, more), answer = instruction_of(row), text_of(row, "answer").strip()
        offered = _FORMAT.search(instruction)
        names = offered[1].split("/") if offered else []
        if answer not in names:
            raise DataError(
                f"field 'answer' is {answer!r}, not one of those after 'Answer format:' ({'/'.join(names)})."
            )
        made = [self.asked(instruction, more, f"the correct answer is {name}", reference=name) for name in names]
        right = made[names.index(answer)]
        choices = tuple(example.completion for example in made)
        return Example(right.prompt, right.completion, reference=answer, choices=choices)

    def grade(self, example: Example, output: str) -> dict[str, float]:
        """Take the first name of a choice."""
        names = "|".join(choice.rpartition(" ")[2] for choice in example.choices)
        named = re.search(names, self.cut(output))
        return {"accuracy": float(named is not None and named[0] == reference_of(example))}

    def _adapted(self, row: Row) -> Row:
        asked = {field: text_of(row, field) for field in re.findall(r"\{(\w+)\}", self.question)}
        question, (field, keys) = self.lead + self.question.format(**asked), self.label
        names, offered = [*self.choices], [*self.choices]
        if self.choices != ("true", "false"):
            texts, offered = self._offered(row, [*keys])
            names = [f"{self.noun}{number}" for number in range(1, len(texts) + 1)]
            listed = (f"{name.capitalize()}: {text}" for name, text in zip(names, texts, strict=True))
            question += "\n\n" + self.between.join(listed)
        right = str(row.get(field)).lower()
        if right not in offered[: len(names)]:
            raise DataError(f"field {field!r} is {row.get(field)!r}, which names none of the {len(names)} choices.")
        question += f"{' ' if self.noun == 'option' else chr(10) * 2}Answer format: {'/'.join(names)}"
        return {"instruction": question, "answer": names[offered.index(right)]}

    def _offered(self, row: Row, keys: list[str]) -> tuple[list[str], list[str]]:
        """Return the choices and what the label holds for each of them."""
        if len(self.choices) > 1:
            return [text_of(row, name) for name in self.choices], keys
        texts: Any = row.get(self.choices[0])
        if isinstance(texts, Mapping):  # ARC and OpenBookQA: a list of texts, and one of their letters
            texts, keys = texts.get("text"), [str(key).lower() for key in texts.get("label") or ()]
        if not isinstance(texts, list):
            raise DataError(f"field {self.choices[0]!r} is missing, or doesn't hold the choices.")
        return texts, keys


# fmt: off
variant(
    Commonsense, "commonsense170k", "Commonsense170K: the training sets of the eight tasks together.",
    source="Hu et al. 2023, arXiv 2304.01933; zwhe99/commonsense_170k; 170,420 rows",
    hub="zwhe99/commonsense_170k", splits={"train": "train"}, files=("commonsense_170k", "commonsense_15k"),
)
variant(
    Commonsense, "boolq", "BoolQ: true or false, without the passage.", lm_eval="boolq", hub="google/boolq",
    source="Clark et al. 2019, arXiv 1905.10044; google/boolq; 3,270 to test",
    lead="Please answer the following question with true or false, question: ", question="{question}?",
    choices=("true", "false"), label=("answer", ""),
)
variant(
    Commonsense, "piqa", "PIQA: which of two solutions works.", lm_eval="piqa", hub="baber/piqa",
    source="Bisk et al. 2020, arXiv 1911.11641; baber/piqa; 1,838 to test",
    lead="Please choose the correct solution to the question: ", question="{goal}",
    choices=("sol1", "sol2"), noun="solution", between="\n\n",
)
variant(
    Commonsense, "siqa", "Social IQA: what people do and feel.", lm_eval="social_iqa", hub="lighteval/siqa",
    source="Sap et al. 2019, arXiv 1904.09728; lighteval/siqa; 1,954 to test", files=("social_i_qa",),
    question="{context} {question}", choices=("answerA", "answerB", "answerC"), label=("label", "123"),
)
variant(
    Commonsense, "hellaswag", "HellaSwag: how a scene goes on.", lm_eval="hellaswag", hub="Rowan/hellaswag",
    source="Zellers et al. 2019, arXiv 1905.07830; Rowan/hellaswag; 10,042 to test",
    lead="Please choose the correct ending to complete the given sentence: ", question="{activity_label}: {ctx}",
    choices=("endings",), noun="ending", between="\n\n",
)
variant(
    Commonsense, "winogrande", "WinoGrande: which of two a blank stands for.", lm_eval="winogrande",
    source="Sakaguchi et al. 2019, arXiv 1907.10641; allenai/winogrande; 1,267 to test",
    hub="allenai/winogrande:winogrande_xl", question="{sentence}", choices=("option1", "option2"), noun="option",
    lead="Please choose the correct answer to fill in the blank to complete the given sentence: ",
    label=("answer", "12"),
)
for _name, _about in (("Easy", "2,376 to test"), ("Challenge", "1,172 to test, which retrieval gets wrong")):
    variant(
        Commonsense, f"arc-{_name.lower()}", f"ARC: questions of school science; {_about}.",
        source="Clark et al. 2018, arXiv 1803.05457; allenai/ai2_arc", files=(f"ARC-{_name}",),
        hub=f"allenai/ai2_arc:ARC-{_name}", splits={"train": "train", "test": "test"},
        lm_eval=f"arc_{_name.lower()}", choices=("choices",), label=("answerKey", ""),
    )
variant(
    Commonsense, "openbookqa", "OpenBookQA: elementary science.", lm_eval="openbookqa",
    source="Mihaylov et al. 2018, arXiv 1809.02789; allenai/openbookqa; 500 to test",
    hub="allenai/openbookqa:main", splits={"train": "train", "test": "test"},
    question="{question_stem}", choices=("choices",), label=("answerKey", ""),
)
# fmt: on
