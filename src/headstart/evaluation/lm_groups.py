"""Local files for one of lm-eval's groups, whose tasks each read a dataset of their own: MMLU's subjects, MATH's kinds.

The files' rows are divided by the dataset that they belong to, in the layout that it has on the hub; a task is made for
each of lm-eval's that rows are there for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.errors import DataError
from headstart.tasks.base import Row, Task
from headstart.tasks.rows import raw_rows


def divided(task: Task, source: str, split: str) -> dict[str, list[Row]]:
    """Return a split's rows by the hub's dataset that they belong to.

    Raises:
        DataError: a row can't be read, or doesn't say which it belongs to.
    """
    parts: dict[str, list[Row]] = {}
    for place, row in raw_rows(task, source, split):
        try:
            part, published = task.part_of_group(row)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        parts.setdefault(part, []).append(published)
    return parts


def local_tasks(
    task: Task, source: str, shown: str | None, leaves: Mapping[str, tuple[str, Mapping[str, Any]]], folder: Path
) -> list[dict[str, Any]]:
    """Return the settings of lm-eval's tasks with files, written into a folder, in place of their datasets.

    Args:
        task: with ``part_of_group``.
        source: a local file or folder of its rows.
        shown: the split whose rows are shown before each item; None for none.
        leaves: by dataset, the name of lm-eval's task that reads it, and what overrides it beside the data.
        folder: made, and gets the files.

    Raises:
        DataError: see :func:`divided`; or rows are of a dataset that no task reads, or has none to show.
    """
    folder.mkdir()
    by_split = {split: divided(task, source, split) for split in ("test", shown) if split}
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": shown}
    settings = []
    for part in sorted(by_split["test"]):
        if part not in leaves:
            raise DataError(f"lm-eval has no part {part!r} of {task.lm_eval!r}")
        name, overrides = leaves[part]
        files = {split: folder / f"{part}-{split}.jsonl" for split in by_split}
        for split, path in files.items():
            if part not in by_split[split]:
                raise DataError(f"the split {split!r} has no rows of {part!r}")
            lines = (json.dumps(row) + "\n" for row in by_split[split][part])
            path.write_text("".join(lines), encoding="utf-8")
        named = {split: str(path) for split, path in files.items()}
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": named}}
        settings.append({**overrides, "task": name, **splits, **data})
    return settings
