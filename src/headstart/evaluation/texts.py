"""The held-out loss on running text, and how much of it training has cost: what a model has forgotten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from headstart.errors import CheckpointError, DataError
from headstart.evaluation.answers import asked, kept_answers
from headstart.evaluation.figures import loss_figure, resampled
from headstart.evaluation.own import Asker, Measured, nats_of
from headstart.tasks.base import Example, Row, Task
from headstart.tasks.rows import read

_WINDOW = 2048
_STARTS = "start.jsonl"
_TABLES = {"jsonl", "json", "parquet", "csv", "gz"}


@dataclass(frozen=True)
class _Document(Task):
    """A row whose ``text`` is a document, which may be empty: WikiText has such rows between its paragraphs."""

    name: ClassVar[str] = "loss"
    splits: ClassVar[Mapping[str, str]] = {}
    fields: ClassVar[tuple[str, ...]] = ("text",)

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        text = row.get("text")
        if not isinstance(text, str):
            raise DataError("there is no field 'text' with a text in it.")
        return Example(text)


def text_loss(asker: Asker, texts: Sequence[str], kept: str = "losses.jsonl") -> Measured:
    """Return the loss on running text, as nats a token and bits a byte.

    Each text is cut into windows whose tokens are each predicted once, from those before it in the window. The first
    of a text is predicted from the token that begins one, or, of a tokenizer without it, that ends one.

    Args:
        asker: the model.
        texts: documents.
        kept: the name of the file for what has been measured so far.
    """
    length, limit = min(asker.asking.max_length or _WINDOW, asker.positions), asker.asking.windows or asker.asking.limit
    windows: list[list[int]] = []
    sizes: list[int] = []
    for text in texts:
        for ids, size in _windows(asker.tokenizer, text, length):
            windows.append(ids)
            sizes.append(size)
        if limit is not None and len(windows) >= limit:
            break
    windows, sizes = windows[:limit], sizes[:limit]
    if not windows:
        raise DataError("the tokenizer makes no token of the held-out text.")
    nats: list[float] = asked(
        [len(window) for window in windows],
        lambda places: nats_of(asker, [(windows[place], 1) for place in places]),
        batch_size=max(1, asker.asking.batch_size // 8),
        path=asker.folder / kept,
        progress=lambda _, done, total: asker.show("held-out text", done, total),
    )
    tokens = [len(window) - 1 for window in windows]
    records = [
        {"tokens": count, "bytes": size, "nats": loss} for count, size, loss in zip(tokens, sizes, nats, strict=True)
    ]
    bits = [loss / math.log(2) for loss in nats]
    return records, {"loss": loss_figure(nats, tokens), "bits_per_byte": loss_figure(bits, sizes)}


def measure_starts(asker: Asker, texts: Sequence[str]) -> None:
    """Measure, and keep in the asker's folder, the losses of the base model, for :func:`forgotten`."""
    text_loss(asker, texts, _STARTS)


def forgotten(asker: Asker, texts: Sequence[str]) -> Measured:
    """Return the loss on running text before and after training, and what it has risen by, in nats a token.

    ``start`` is the base model's, ``end`` the trained one's on the same windows, and ``difference`` the second less the
    first, with an interval over pairs.

    Raises:
        CheckpointError: the base model's losses aren't in the asker's folder (:func:`measure_starts`).
    """
    path = asker.folder / _STARTS
    records, figures = text_loss(asker, texts)
    starts = kept_answers(path)
    if starts.keys() != set(range(len(records))):
        raise CheckpointError(f"{path} doesn't hold the base model's loss of every window: remove {asker.folder}.")
    before = [float(starts[number]) for number in range(len(records))]
    after, tokens = [record["nats"] for record in records], [record["tokens"] for record in records]
    rise = resampled(
        lambda first, last, counts: (last.sum() - first.sum()) / counts.sum(),
        before,
        after,
        tokens,
        value=(sum(after) - sum(before)) / sum(tokens),
        higher_is_better=False,
    )
    items = [record | {"nats_start": first} for record, first in zip(records, before, strict=True)]
    return items, {"start": loss_figure(before, tokens), "end": figures["loss"], "difference": rise}


def read_texts(source: str, split: str) -> list[str]:
    """Return the documents of a file or of a dataset of the hub.

    A file of JSON lines, JSON, Parquet or CSV, and a dataset, has one in each row's ``text``; any other file is one.

    Args:
        source: the file, or ``owner/name`` or ``owner/name:configuration``.
        split: of a dataset.

    Raises:
        DataError: it can't be read, there is no text in it, or most rows have none.
    """
    path = Path(source).expanduser()
    if not path.is_file() or path.name.rpartition(".")[2].lower() in _TABLES:
        texts = [example.prompt for example in read(_Document(), source, split=split).examples]
    else:
        try:
            texts = [path.read_text(encoding="utf-8")]
        except OSError as error:
            raise DataError(f"the text {path} can't be read: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8.") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{source}: there is no text in it.")
    return texts


def windows_of(tokenizer: Any, text: str, length: int) -> list[list[int]]:
    """Return the tokens of a text in windows of at most ``length``, each beginning with the last of the one before."""
    return [ids for ids, _ in _windows(tokenizer, text, length)]


def _windows(tokenizer: Any, text: str, length: int) -> list[tuple[list[int], int]]:
    """Return a text's windows of tokens, each beginning with the last of the one before, and the bytes they predict."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise DataError("the tokenizer has no token that begins or ends a text, so its first token can't be predicted.")
    ids = [first, *encoded["input_ids"]]
    count = len(ids) - 1
    begins = [start for start, _ in encoded["offset_mapping"]] if fast else []
    if not fast:  # as if all tokens were of one length
        begins = [len(text) * place // count for place in range(count)]
    borders = [0, *begins[1:], len(text)]
    cuts = range(0, count, length - 1)
    return [
        (ids[cut : cut + length], len(text[borders[cut] : borders[min(cut + length - 1, count)]].encode()))
        for cut in cuts
    ]
