"""Examples to learn from: tokenised and put into batches.

The prompt is tokenised by itself, so the model trains after exactly the tokens that it is given when it
generates; the completion's tokens are those that it has after the prompt. TRL tokenises the two as one text
and masks the common prefix; the tokens are the same unless a tokenizer merges across the border.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headstart.errors import DataError
from headstart.statistics.batches import IGNORED
from headstart.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenized:
    """Tokenised examples and what became of the others.

    Attributes:
        rows: For each example kept ``input_ids``, ``labels`` and ``attention_mask``, as lists of one length.
        dropped: How many examples were left out because nothing to learn was left of them.
        truncated: How many of the rows lost their end.
    """

    rows: list[dict[str, list[int]]]
    dropped: int
    truncated: int


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return prompt and completion as the model reads them: a chat goes through the tokenizer's chat
    template.

    Raises:
        DataError: The tokenizer has no chat template, it refuses the chat, or what it makes of the chat
            doesn't begin with what it makes of the prompt.
    """
    if example.messages is None:
        return example.prompt, example.completion
    if tokenizer.chat_template is None:
        raise DataError(
            "The examples are chats ('messages'), but the tokenizer has no chat template; use that of a "
            "chat model, set tokenizer.chat_template, or give 'prompt' and 'completion'."
        )
    try:
        prompt: str = tokenizer.apply_chat_template(example.chat[:-1], tokenize=False, add_generation_prompt=True)
        whole: str = tokenizer.apply_chat_template(example.chat, tokenize=False)
    except Exception as error:  # templates are programs: they raise what they like
        raise DataError(f"The tokenizer's chat template refuses a chat: {error}") from error
    if not whole.startswith(prompt):
        raise DataError(
            "The tokenizer's chat template changes the prompt once the answer is there, so the two can't be "
            "told apart; give 'prompt' and 'completion' instead of 'messages'."
        )
    return prompt, whole.removeprefix(prompt)


def tokenize_examples(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Tokenized:
    """Turn examples into tokens, with the completion and the end-of-sequence token after it as labels.

    A row longer than ``max_length`` loses its end; an example of which no label is left is dropped and
    counted.

    Raises:
        DataError: No example is left, the tokenizer has no end-of-sequence token, or a chat can't be
        rendered.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no eos_token; set one, or the model never learns where an answer ends.")
    rows = []
    truncated = 0
    for example in examples:
        prompt, completion = token_ids(example, tokenizer)
        ids = (prompt + completion)[:max_length]
        labels = ([IGNORED] * len(prompt) + completion)[:max_length]
        # The model predicts each token from those before it, so a label on the first token teaches nothing.
        if any(label != IGNORED for label in labels[1:]):
            rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
            truncated += len(ids) < len(prompt) + len(completion)
    if not rows:
        raise DataError(
            f"None of the {len(examples)} examples has anything to learn within max_length={max_length} "
            "tokens: the prompts alone are longer. Use a larger max_length."
            if examples
            else "There are no examples to tokenise."
        )
    return Tokenized(rows, dropped=len(examples) - len(rows), truncated=truncated)


def token_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt and those of the completion, which end with the end-of-sequence token."""
    prompt_text, completion_text = render(example, tokenizer)
    # A chat template writes its special tokens itself, often with the end of the answer and a line break.
    if example.messages is not None and completion_text.rstrip().endswith(tokenizer.eos_token):
        completion_text = completion_text.rstrip().removesuffix(tokenizer.eos_token)
    prompt = list(tokenizer(prompt_text, add_special_tokens=example.messages is None)["input_ids"])
    if example.messages is None and prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt.pop()  # some tokenizers end every text, but this one goes on
    completion = following_ids(completion_text, prompt_text, tokenizer)
    return prompt, [*completion, tokenizer.eos_token_id]


def following_ids(text: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text where it follows a prompt: those of both less the prompt's.

    Some tokenizers begin every text as if a blank stood before it, which isn't there after a prompt. Where a token
    reaches across the border, it is the text's tokens after a line break, which begin at the border all the same.
    """

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for before in (prompt, "\n"):
        first, both = plain(before), plain(before + text)
        if both[: len(first)] == first:
            return both[len(first) :]
    return plain(text)


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """Put rows into one batch of int64 tensors, padded on the right; no padding is attended to or learned."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor(
            [[*row[key], *[value] * (longest - len(row[key]))] for row in rows], dtype=torch.long, device="cpu"
        )

    return {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORED),
        "attention_mask": padded("attention_mask", 0),
    }


def batches(rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int, pad_token_id: int) -> list[dict[str, Tensor]]:
    """Put rows into batches of ``batch_size`` in their order; the last may be smaller. May be gone through
    often.

    Raises:
        DataError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise DataError(f"The batch size must be at least 1, not {batch_size}.")
    starts = range(0, len(rows), batch_size)
    return [collate(rows[start : start + batch_size], pad_token_id) for start in starts]
