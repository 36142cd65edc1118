"""Programs: CodeAlpaca to learn from, HumanEval to be graded by. Nothing here runs a program."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from headstart.errors import TaskError
from headstart.tasks.base import Example, Row, Run, reference_of, text_of
from headstart.tasks.instructed import Instructed, Prompt
from headstart.tasks.registry import register, variant

_FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_WHOLE = "Complete the following Python function. Answer with the whole function.\n\n"
_KS = (1, 10)

variant(
    Instructed,
    "codealpaca",
    "CodeAlpaca-20k: instructions about code and their answers, many with an input.",
    source="Chaudhary 2023, github.com/sahil280114/codealpaca; sahil2801/CodeAlpaca-20k; 20,022 rows",
    hub="sahil2801/CodeAlpaca-20k",
    splits={"train": "train"},
    files=("code_alpaca_20k", "CodeAlpaca-20k", "CodeAlpaca_20K"),
)


@register("humaneval")
@dataclass(frozen=True)
class HumanEval(Instructed):
    """HumanEval: functions to complete, each with tests; an answer is right where its program comes to its end.

    Attributes:
        prompt: "plain" (default) gives the function's head, which the answer goes on from up to the next thing at the
            margin, as the paper does; "alpaca" and "alpaca-cot" ask for the whole function.
    """

    source: ClassVar[str] = "Chen et al. 2021, arXiv 2107.03374; openai/openai_humaneval; 164 rows"
    hub: ClassVar[str | None] = "openai/openai_humaneval"
    splits: ClassVar[Mapping[str, str]] = {"test": "test"}
    files: ClassVar[tuple[str, ...]] = ("HumanEval",)
    metrics: ClassVar[tuple[str, ...]] = ("pass@1", "pass@10")
    max_new_tokens: ClassVar[int] = 512
    lm_eval: ClassVar[str | None] = "humaneval"
    runs_code: ClassVar[bool] = True

    prompt: Prompt = "plain"

    @property
    def stop(self) -> tuple[str, ...]:
        """The paper's: what can't be part of a function's body."""
        return ("\nclass", "\ndef", "\n#", "\nif", "\nprint") if self.prompt == "plain" else super().stop

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Read ``prompt``, ``canonical_solution``, ``test`` and ``entry_point``."""
        head, solution = text_of(row, "prompt"), text_of(row, "canonical_solution")
        reference = {"head": head, "test": text_of(row, "test"), "entry_point": text_of(row, "entry_point")}
        if self.prompt == "plain":
            return Example(head, solution, reference=reference)
        return self.asked(_WHOLE + head, "", f"```python\n{head}{solution}```", reference=reference)

    def program(self, example: Example, output: str) -> str:
        """Return what to run for an answer: the function's head, the answer, the tests, and their call.

        The head alone is a function, whose body is its description; a whole function after it takes its place.
        """
        reference, answer = reference_of(example), self.cut(output)
        if self.prompt != "plain":
            answer = "\n" + _code_in(answer, reference["entry_point"])
        return f"{reference['head']}{answer}\n{reference['test']}\ncheck({reference['entry_point']})\n"

    def grade_samples(self, example: Example, outputs: Sequence[str], run: Run | None = None) -> dict[str, float]:
        """Run the programs of an item's answers, and return pass@1 and, from ten answers on, pass@10."""
        if run is None:
            raise TaskError(f"task {self.name!r} grades programs by running them: give it something that does.")
        passed = sum(run(self.program(example, output)) for output in outputs)
        return {f"pass@{k}": pass_at_k(len(outputs), passed, k) for k in _KS if k <= len(outputs)}


def _code_in(answer: str, function: str) -> str:
    """Return an answer's code: the first fenced block that defines the function, else the longest; all without fences.

    One blank before what else begins at the margin is the prompt's, after which an answer goes on.
    """
    blocks = [re.sub(r"\A (?=\S)", "", block) for block in _FENCE.findall(answer) or [answer]]
    head = re.compile(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(function)}\b", re.MULTILINE)
    return next((block for block in blocks if head.search(block)), max(blocks, key=len))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the chance that one of k answers, drawn from those there are, is right: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, equation 1: the unbiased estimate from n samples of which c passed.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise TaskError(f"pass@{k} can't be had from {passed} of {samples} samples.")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
