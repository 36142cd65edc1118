"""Examples to learn from: read, checked, tokenised and put into batches.

An example is a prompt and the completion to learn. It comes from a JSON-lines file, a folder with one such
file for each split, or a dataset of the Hugging Face Hub, and is written there in one of three ways:
``prompt`` and ``completion``; ``question`` and ``answer`` (GSM8K's words); or ``messages``, a chat whose last
assistant message is learned. What is wrong with a line is said with its file and number.

Prompt and completion are tokenised apart from each other, so the model trains after exactly the tokens that
it is given when it generates. TRL tokenises the two as one text instead and masks the common prefix; the
tokens are the same unless a tokenizer merges across the border.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headstart.errors import DataError
from headstart.statistics.batches import IGNORED
from headstart.tasks.base import Example
from headstart.tasks.text import Text

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


def load_examples(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[Example]:
    """Read examples from a file, a folder or the Hugging Face Hub.

    Args:
        source: A JSON-lines file; a folder that holds ``train.jsonl``, ``test.jsonl``, …; or the name of a
            hub dataset, with ``:configuration`` at its end where it has several (``openai/gsm8k:main``). A
            file or folder goes before a dataset of the same name. Blank lines are passed over. A hub dataset
            may have further columns, a file may not.
        split: Which file of a folder, or split of a hub dataset (default ``"train"``). A single file has
            no splits.
        limit: Read only the first so many examples (default None: all). Lines after them aren't looked at.

    Raises:
        DataError: Nothing is there, it can't be read, it is empty, or a line isn't an example.
    """
    if limit is not None and limit < 1:
        raise DataError(f"The limit on the number of examples must be at least 1, not {limit}.")
    path = Path(source).expanduser()
    if path.is_dir():
        path = _file_of_split(path, split)
    if path.is_file():
        examples = list(islice(_examples_of_file(path), limit))
        where = str(path)
    elif isinstance(source, str) and _HUB_NAME.fullmatch(source):
        examples = _examples_of_hub(source, split, limit)
        where = f"dataset {source!r}, split {split!r}"
    else:
        raise DataError(f"The data {str(source)!r} does not exist: give a .jsonl file or a folder with train.jsonl.")
    if not examples:
        raise DataError(f"{where}: there are no examples in it.")
    return examples


# A name like data/train.jsonl would pass for a dataset by its characters; nobody names a dataset so.
_HUB_NAME = re.compile(r"(?!.*\.(?:jsonl?|csv|parquet|txt)$)(?:\w[\w.-]*/)?\w[\w.-]*(?::[\w.-]+)?", re.ASCII)


def _file_of_split(folder: Path, split: str) -> Path:
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        others = sorted(file.name for file in folder.glob("*.jsonl"))
        holds = f"it holds {', '.join(others[:5])}" if others else "it holds no .jsonl file at all"
        raise DataError(f"The folder {folder} has no {path.name} for the split {split!r}; {holds}.")
    return path


def _examples_of_file(path: Path) -> Iterator[Example]:
    # Bytes, not text: text mode would also split lines at characters that JSON allows inside a string.
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    where = f"{path}, line {number}"
                    yield example_from_record(_record_of_line(line, where), where=where)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error


def _record_of_line(line: bytes, where: str) -> Mapping[str, object]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the line is not UTF-8 text; save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the line is not JSON ({error}); each line must be one JSON object.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: the line must be a JSON object such as {{…}}, but is a {type(record).__name__}.")
    return record


def _examples_of_hub(name: str, split: str, limit: int | None) -> list[Example]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"There is no file or folder {name!r}; to read a dataset of the Hugging Face Hub, "
            'install its library: pip install "headstart[study]".'
        ) from error
    dataset, _, configuration = name.partition(":")
    part = split if limit is None else f"{split}[:{limit}]"
    # The library raises a dozen unrelated kinds of errors, some of them of its own dependencies.
    try:
        rows = load_dataset(dataset, configuration or None, split=part)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"There is no file or folder {name!r}, and the Hugging Face Hub gave no such dataset with the "
            f"split {split!r} ({reason})."
        ) from error
    return [
        example_from_record(row, where=f"dataset {name!r}, split {split!r}, row {number}", strict=False)
        for number, row in enumerate(rows, start=1)
    ]


def example_from_record(record: Mapping[str, object], *, where: str = "the record", strict: bool = True) -> Example:
    """Make an example of a JSON object, or of a row of a table: see :class:`headstart.tasks.text.Text`.

    Args:
        record: Holds ``prompt`` and ``completion``, or ``question`` and ``answer``, or ``messages``.
        where: What errors call it.
        strict: Whether a further field is an error (default), or not looked at.

    Raises:
        DataError: A field is missing, unknown, empty or not text, or the chat has no answer to learn.
    """
    if not strict:
        record = {field: value for field, value in record.items() if field in Text.fields}
    try:
        return Text().example(record)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


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
    chat = [{"role": message.role, "content": message.content} for message in example.messages]
    try:
        prompt: str = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        whole: str = tokenizer.apply_chat_template(chat, tokenize=False)
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
    completion = list(tokenizer(completion_text, add_special_tokens=False)["input_ids"])
    return prompt, [*completion, tokenizer.eos_token_id]


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
