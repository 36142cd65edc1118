"""Text whose ability is to stay, as batches that a start reads (``start.preserve``)."""

from __future__ import annotations

from typing import Any

from headstart.errors import DataError, RunError
from headstart.evaluation.texts import read_texts, windows_of
from headstart.methods.base import Method
from headstart.statistics.training import TrainingData
from headstart.training.data import batches


def check_preserved(method: Method, source: str | None, option: str) -> None:
    """Refuse a method that protects an ability without data of it; ``option`` is how these are given.

    Raises:
        RunError: they are missing.
    """
    if method.reads_preserved and source is None:
        raise RunError(f"{method.name} protects an ability, and needs a text that shows it: give {option}.")


def preserved_data(
    source: str | None, method: Method, tokenizer: Any, *, max_length: int, batch_size: int
) -> TrainingData | None:
    """Return the first windows of a text, as many as the method reads samples; None where it reads none.

    Args:
        source: a text file, a file of rows with ``text``, or a dataset of the hub.
        method: what reads it.
        tokenizer: of the model; pads on the right.
        max_length: tokens of a window.
        batch_size: windows of a batch.

    Raises:
        DataError: see :func:`headstart.evaluation.texts.read_texts`; or the text holds no token.
    """
    if source is None or not method.reads_preserved:
        return None
    wanted = max(own.sample_count() for own in method.methods if own.reads_preserved)
    rows: list[dict[str, list[int]]] = []
    for text in read_texts(source, "train"):
        for ids in windows_of(tokenizer, text, max_length)[: wanted - len(rows)]:
            rows.append({"input_ids": ids, "labels": list(ids), "attention_mask": [1] * len(ids)})
        if len(rows) >= wanted:
            break
    if not rows:
        raise DataError(f"{source}: the tokenizer makes no token of the text.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return TrainingData(batches(rows, batch_size, pad))
