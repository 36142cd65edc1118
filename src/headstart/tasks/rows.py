"""Reading: the rows of a split, from files, folders or the Hugging Face Hub, and what was wrong with the others.

A row that a task can't use is counted and named with its file and line, and left out; where more than half are so, the
file is another task's, and refused.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from headstart.errors import DataError, HeadstartWarning, nearest
from headstart.progress import Show, silent
from headstart.tasks.base import Example, Row, Task

# Where it stands, and the row or what is wrong with it.
_Located: TypeAlias = tuple[str, Row | DataError]

_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".tsv", ".txt")
_NAMED = 3  # bad rows that a warning quotes
_STEP = 2000  # rows from one report of progress to the next


@dataclass(frozen=True)
class Rows:
    """The examples in the rows' order, a sentence for each bad row that was left out, and what messages call it all."""

    examples: list[Example]
    bad: list[str]
    where: str


def read(
    task: Task,
    source: str | Path | None = None,
    *,
    split: str = "train",
    limit: int | None = None,
    offset: int = 0,
    show: Show = silent,
) -> Rows:
    """Read the examples of one split.

    Args:
        task: what makes an example of a row.
        source: a file (JSON lines or JSON, with gzip or without, Parquet, CSV with quotes, tab-separated text without);
            a folder, in which the task knows its files' names; or a dataset of the hub, ``owner/name`` or
            ``owner/name:configuration``, which a file or folder of the same name goes before. None (default) is the
            task's own data. A single file has no splits.
        split: the task's name for it.
        limit: the first so many rows (default None: all), the bad ones counted; those after them aren't looked at.
        offset: pass over so many rows first.
        show: is told how many rows are done.

    Raises:
        DataError: nothing is there, it can't be read, it is empty, or most of it isn't this task's.

    Warns:
        HeadstartWarning: how many rows were left out, and what is wrong with the first of them.
    """
    if limit is not None and limit < 1:
        raise DataError(f"The limit on the number of rows must be at least 1, not {limit}.")
    if offset < 0:
        raise DataError(f"The number of rows to pass over must not be negative, but is {offset}.")
    where, rows = _rows_of(task, source, split)
    shown = _rows_of(task, source, task.shown_split)[1] if task.shown_split else ()
    context = tuple(row for _, row in shown if not isinstance(row, DataError))
    examples: list[Example] = []
    bad: list[str] = []
    for place, row in islice(rows, offset, None if limit is None else offset + limit):
        try:
            if isinstance(row, DataError):
                raise row
            examples.append(replace(task.example(row, context), where=place))
        except DataError as error:
            bad.append(f"{place}: {error}")
        done = len(examples) + len(bad)
        if done % _STEP == 0:
            show(f"reading {task.name}", done, max(done, limit or 0))
    total = len(examples) + len(bad)
    if not total:
        raise DataError(f"{where}: there are no rows in it{f' after the first {offset}' if offset else ''}.")
    if 2 * len(bad) > total:
        count = "" if total == 1 else f" {len(bad)} of {total} rows can't be used as task {task.name!r}."
        raise DataError(bad[0] + count)
    if bad:
        quoted = "; ".join(sentence.removesuffix(".") for sentence in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        text = f"{where}: {len(bad)} of {total} rows are left out: {quoted}{more}."
        warnings.warn(text, HeadstartWarning, stacklevel=2)
    return Rows(examples, bad, where)


def raw_rows(task: Task, source: str | Path, split: str) -> Iterator[tuple[str, Row]]:
    """Yield where a row stands, and the row as it lies in the file.

    Raises:
        DataError: nothing is there, or it, or a row, can't be read.
    """
    for place, row in _rows_of(task, source, split)[1]:
        if isinstance(row, DataError):
            raise DataError(f"{place}: {row}")
        yield place, row


def local_files(task: Task, source: str | Path | None, split: str) -> list[Path]:
    """Return a source's own files of a split: of a folder those that the task knows; none where it is of the hub.

    Raises:
        DataError: a folder has no such file.
    """
    if source is None:
        return []
    path = Path(source).expanduser()
    return _files_of(task, path, split) if path.is_dir() else [path] if path.is_file() else []


# A name like data/train.jsonl would pass for a dataset by its characters; nobody names a dataset so.
_HUB_NAME = re.compile(r"(?!.*\.(?:jsonl?|csv|tsv|parquet|txt|gz)$)(?:\w[\w.-]*/)?\w[\w.-]*(?::[\w.-]+)?", re.ASCII)


def _rows_of(task: Task, source: str | Path | None, split: str) -> tuple[str, Iterator[_Located]]:
    if task.splits and split not in task.splits:
        known = ", ".join(map(repr, task.splits))
        raise DataError(f"task {task.name!r} has no split {split!r}.{nearest(split, task.splits)} It has: {known}.")
    made = task.own_rows(split) if source is None else None
    if made is not None:
        return f"task {task.name!r}", ((f"problem {number}", row) for number, row in enumerate(made, start=1))
    source = source if source is not None else task.hub
    if source is None:
        raise DataError(f"task {task.name!r} has no data of its own: name a file, a folder or a dataset of the hub.")
    path = Path(source).expanduser()
    if path.is_dir():
        files = _files_of(task, path, split)
        return str(files[0] if len(files) == 1 else path), chain.from_iterable(_rows_in(file, task) for file in files)
    if path.is_file() and split == task.shown_split:
        raise DataError(f"{path}: the prompts of task {task.name!r} show rows of {split!r}; give the folder of both.")
    if path.is_file():
        return str(path), _rows_in(path, task)
    if isinstance(source, str) and _HUB_NAME.fullmatch(source):
        return f"dataset {source!r}, split {split!r}", _rows_of_hub(source, task.splits.get(split, split), task)
    raise DataError(f"The data {str(source)!r} does not exist: give a file, a folder, or a dataset of the hub.")


def _files_of(task: Task, folder: Path, split: str) -> list[Path]:
    patterns = task.patterns(split)
    for name in (pattern + ending for pattern in patterns for ending in _ENDINGS):
        if files := sorted(folder.glob(name)):
            return files
    looked = ", ".join(f"{pattern}.*" for pattern in dict.fromkeys((patterns[0], split, patterns[-1])))
    there = sorted(file.name for file in folder.iterdir())
    holds = f"it holds {', '.join(there[:5])}{', …' if len(there) > 5 else ''}" if there else "it is empty"
    raise DataError(f"The folder {folder} has no file of task {task.name!r}, split {split!r} ({looked}); {holds}.")


def _rows_in(path: Path, task: Task) -> Iterator[_Located]:
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        if kind == "parquet":
            yield from _columns(path)
        elif kind in ("csv", "tsv", "txt"):
            yield from _table(path, task.columns, "," if kind == "csv" else "\t")
        elif kind in ("json", "jsonl"):
            with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
                yield from _lines(path, file) if kind == "jsonl" else _values(path, file.read().decode("utf-8-sig"))
        else:
            raise DataError(f"{path}: its ending says nothing of what it is; these are read: {', '.join(_ENDINGS)}.")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8.") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}.") from error


def _lines(path: Path, lines: Iterable[bytes]) -> Iterator[_Located]:
    # Bytes, not text: text mode would also split lines at characters that JSON allows inside a string.
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield f"{path}, line {number}", _row_of_line(line)


def _row_of_line(line: bytes) -> Row | DataError:
    try:
        return _object(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError:
        return DataError("the line is not UTF-8 text; save the file as UTF-8.")
    except (ValueError, RecursionError) as error:
        return DataError(f"the line is not JSON ({error}); each line must be one JSON object.")


def _object(value: object) -> Row | DataError:
    wrong = f"the row must be a JSON object such as {{…}}, but is a {type(value).__name__}."
    return value if isinstance(value, dict) else DataError(wrong)


def _values(path: Path, text: str) -> Iterator[_Located]:
    """Yield the objects of a JSON list, or objects that follow each other, one at a time: a limit saves the rest."""
    between, decoder = re.compile(r"[\s,]*"), json.JSONDecoder()
    start = len(text) - len(text.lstrip())
    listed = text.startswith("[", start)
    position, counted, line = start + listed, 0, 1
    while True:
        position = between.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, position)
        counted = position
        if text[position : position + 1] in ("", "]"):
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: from here on it is not JSON ({error}).") from error
        yield f"{path}, line {line}", _object(value)
    if text[position:].strip() != "]" * listed:
        raise DataError(f"{path}, line {line}: the file is cut off, or goes on after the end of its list.")


def _table(path: Path, columns: tuple[str, ...], delimiter: str) -> Iterator[_Located]:
    """Yield rows by the header's names, or by the task's where there is no header; then with the ``file``'s too."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE, strict=True
        )
        names: list[str] = []
        beside: Row = {}
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield f"{path}, line {reader.line_num}", DataError(f"the line is not part of a table ({error}).")
                continue
            if cells is None:
                return
            if not names and cells:
                headed = not columns or len({*cells} & {*columns}) > 1
                names, beside = (cells, {}) if headed else ([*columns], {"file": path.name})
                cells = [] if headed else cells
            if cells:
                wrong = f"there are {len(cells)} columns, not {len(names)}: {', '.join(names)}."
                row = {**dict(zip(names, cells, strict=False)), **beside}
                yield f"{path}, line {reader.line_num}", row if len(cells) == len(names) else DataError(wrong)


def _library(name: str, use: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(f'{use} needs {name.partition(".")[0]}: pip install "headstart[study]".') from error


def _columns(path: Path) -> Iterator[_Located]:
    arrow, parquet = (_library(name, f"{path}: Parquet") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        batches = parquet.ParquetFile(path).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"{path}, row {number}", row
    except arrow.ArrowException as error:
        raise DataError(f"{path} is no Parquet file, or a damaged one ({str(error).splitlines()[0]}).") from error


def _rows_of_hub(name: str, split: str, task: Task) -> Iterator[_Located]:
    datasets = _library("datasets", f"There is no file or folder {name!r}, and a dataset of the Hugging Face Hub")
    dataset, _, configuration = name.partition(":")
    # The library raises a dozen unrelated kinds of errors, some of them of its own dependencies.
    try:
        rows = datasets.load_dataset(dataset, configuration or None, split=split)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"There is no file or folder {name!r}, and the Hugging Face Hub gave no such dataset with the split "
            f"{split!r} ({reason})."
        ) from error
    for number, row in enumerate(rows, start=1):
        kept = {field: row[field] for field in task.fields if field in row} if task.fields else row
        yield f"dataset {name!r}, split {split!r}, row {number}", kept
