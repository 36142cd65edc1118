"""The prompts that the papers share, and tasks that are an instruction and its answer.

``alpaca`` is Stanford Alpaca's template (github.com/tatsu-lab/stanford_alpaca), without input as MetaMath, PiSSA and
the papers of the starts use it, with input where a row has one; it ends in its response marker, which the completion
follows without a blank. ``alpaca-cot`` adds "Let's think step by step.", as MetaMath's and IniLoRA's scripts do when
they grade. ``plain`` is lm-eval's prompt of GSM8K; ``plain-cot`` that of PEFT's method_comparison, with "Think step by
step." after the question, which the completion follows without a blank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from headstart.tasks.base import Example, Row, Task, text_of

Prompt = Literal["alpaca", "alpaca-cot", "plain", "plain-cot"]

_TASK = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_WRITE = ". Write a response that appropriately completes the request.\n\n### Instruction:\n"


@dataclass(frozen=True)
class Instructed(Task):
    """Base of tasks in Alpaca's fields: ``instruction``, ``input`` (may be empty or missing) and ``output``.

    Attributes:
        prompt: "alpaca" (default), "alpaca-cot", "plain" or "plain-cot".
    """

    prompt: Prompt = "alpaca"

    @property
    def stop(self) -> tuple[str, ...]:
        """What a model writes when it goes on with a question of its own."""
        return ("Question:",) if self.prompt.startswith("plain") else ("### Instruction:", "### Response:")

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Make an example of the three fields."""
        return self.asked(*instruction_of(row), text_of(row, "output"))

    def asked(self, instruction: str, more: str, completion: str, **beside: Any) -> Example:
        """Put an instruction, its input and its completion (either may be empty) into the prompt's words."""
        instruction, more, completion = instruction.strip(), more.strip(), completion.strip()
        if self.prompt.startswith("plain"):
            thinking = " Think step by step." if self.prompt == "plain-cot" else ""
            prompt = f"Question: {instruction}{more and chr(10) + more}{thinking}\nAnswer:"
        else:
            told = f"### Input:\n{more}\n\n" if more else ""
            prompt = f"{_TASK}{_INPUT if more else ''}{_WRITE}{instruction}\n\n{told}### Response:"
        if self.prompt == "alpaca-cot":
            prompt += " Let's think step by step."
        blank = " " if completion and self.prompt in ("alpaca-cot", "plain") else ""
        return Example(prompt, blank + completion, **beside)


def instruction_of(row: Row) -> tuple[str, str]:
    """Return instruction and input of a row; the input is empty where there is none."""
    return text_of(row, "instruction"), text_of(row, "input") if row.get("input") else ""
