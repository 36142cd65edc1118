"""What is asked through lm-eval: its own task, with local files in place of its dataset where they are given."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from headstart.errors import DataError, TaskError
from headstart.evaluation.figures import Figure, figure, resampled
from headstart.evaluation.lm_groups import local_tasks
from headstart.evaluation.own import Asker, Measured
from headstart.tasks.base import Task
from headstart.tasks.rows import local_files

# By a file's ending, the builder of datasets that reads it.
_BUILDERS = {"json": "json", "jsonl": "json", "parquet": "parquet", "csv": "csv"}
HERE = "@HERE@"
"""What the files that a task was made of call their folder, until they lie in it."""

_FIELD = re.compile(r"[A-Za-z_]\w*")


class UnfitError(Exception):
    """Why lm-eval can't ask a task, as a clause that a sentence goes on from."""


def built(task: Task, source: str | None, shots: int | None) -> tuple[list[Any], dict[str, str]]:
    """Return lm-eval's task, or the tasks of its group, ready to be asked, and by name the files they were made of.

    The files' own folder is called :data:`HERE` in them.

    Args:
        task: whose ``lm_eval`` names it.
        source: a local file or folder in the layout of the dataset on the hub; None for lm-eval's own dataset.
        shots: examples before each item; None for as many as the task shows (MMLU five), else as lm-eval's task has.

    Raises:
        UnfitError: the local data aren't what lm-eval's prompt asks for.
        TaskError: lm-eval isn't installed, or shows examples that the local data don't have.
        DataError: lm-eval's dataset can't be had.
    """
    if find_spec("lm_eval") is None:
        raise TaskError(
            f'task {task.name!r} is asked through lm-eval: pip install "headstart[eval]", or give --engine headstart.'
        )
    shots = getattr(task, "shots", None) if shots is None else shots
    with _quiet():
        manager = _manager()
        entry = manager.task_index.get(task.lm_eval)
        if entry is None:
            raise UnfitError(f"this lm-eval has no task {task.lm_eval!r}")
        overrides: dict[str, Any] = {}
        group = entry.kind.name == "GROUP"
        if source is not None and not group:
            overrides |= _local(task, source, entry)
        if shots is not None:
            overrides["num_fewshot"] = shots
        shown = overrides.get("training_split")
        files: dict[str, str] = {}
        try:
            if group and source is None:
                tasks = list(manager.load([task.lm_eval])["tasks"].values())
            else:
                with TemporaryDirectory() as folder:
                    place = Path(folder)
                    contents: dict[str, Mapping[str, Any]]
                    if group:
                        shown = _shown(task, str(source)) if shots else None
                        leaves = _leaves(manager, entry, overrides)
                        parts = local_tasks(task, str(source), shown, leaves, place / "parts")
                        contents = {f"parts/{part['task']}.yaml": part for part in parts}
                    else:
                        include = {"include": str(Path(entry.yaml_path).resolve()), "task": task.lm_eval}
                        contents = {"task.yaml": include | overrides}
                    tasks, files = _loaded(manager, contents, place)
        except Exception as error:  # of datasets, of the network, of templates and of lm-eval's own functions
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            if source is not None:
                raise UnfitError(f"the data aren't what lm-eval's prompt asks for ({_reason(error)})") from error
            raise DataError(
                f"lm-eval can't have the data of task {task.name!r} ({reason.rstrip('. ')}): "
                f"name a local file or folder with --data {task.name}=PATH."
            ) from error
        if shots is not None:
            for part in tasks:  # those of a group, too
                part.set_config(key="num_fewshot", value=shots)
        if source is not None:
            for part in tasks:
                _check_fields(part)
            wanted = tasks[0].config.num_fewshot or 0
            if wanted and not shown and not tasks[0].config.fewshot_config.samples:
                raise TaskError(
                    f"lm-eval shows {wanted} rows of 'train' before each item of task {task.name!r}, and {source} has "
                    "none: give a folder with both files, or --fewshot 0."
                )
    return tasks, files


def _loaded(manager: Any, contents: Mapping[str, Mapping[str, Any]], place: Path) -> tuple[list[Any], dict[str, str]]:
    """Write settings into a place, by name; return their tasks, and all files that are there."""
    import yaml

    for name, content in contents.items():
        (place / name).write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    # As lm-eval's own command line takes them.
    tasks = list(manager.load([str(place / name) for name in contents])["tasks"].values())
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(place.rglob("*")) if path.is_file()}
    return tasks, {str(path.relative_to(place)): text.replace(str(place), HERE) for path, text in texts.items()}


def _shown(task: Task, source: str) -> str | None:
    """Return the split whose rows are shown: the task's own, else the training rows that a folder has."""
    if task.shown_split or "train" not in task.splits or not Path(source).expanduser().is_dir():
        return task.shown_split
    try:
        return "train" if local_files(task, source, "train") else None
    except DataError:  # none is needed where none is shown
        return None


def _leaves(manager: Any, group: Any, overrides: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return, by dataset, the tasks that lie beside a group's file, and the settings of each that include it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    leaves = {}
    for name, entry in manager.task_index.items():
        beside = entry.yaml_path and Path(entry.yaml_path).parent == Path(group.yaml_path).parent
        if beside and entry.kind.name == "TASK":
            part = load_yaml(entry.yaml_path, resolve_func=False).get("dataset_name")
            leaves[part] = (name, {"include": str(Path(entry.yaml_path).resolve()), **overrides})
    return leaves


def measured(asker: Asker, tasks: Sequence[Any]) -> Measured:
    """Ask lm-eval's tasks, and return records of the items and lm-eval's metrics."""
    with _quiet():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=asker.model, tokenizer=asker.tokenizer, batch_size=asker.asking.batch_size)
        most = asker.asking.max_new_tokens
        tokens = {} if most is None else {"gen_kwargs": {"max_gen_toks": most}}
        result: Any = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=asker.asking.limit,
            use_cache=str(asker.folder / "cache"),
            log_samples=True,
            bootstrap_iters=0,
            task_manager=_manager(),
            **tokens,
        )
    by_name = {part.config.task: part for part in tasks}
    records: list[dict[str, Any]] = []
    values: dict[str, list[Any]] = {}
    for name, samples in result["samples"].items():
        items: dict[int, dict[str, Any]] = {}
        for sample in samples:
            item = items.setdefault(sample["doc_id"], _record(name, sample))
            filtered = "" if sample["filter"] == "none" else f",{sample['filter']}"
            item["filtered"][sample["filter"]] = sample["filtered_resps"]
            for metric in sample["metrics"]:
                item["marks"][f"{metric}{filtered}"] = sample[metric]
                values.setdefault(f"{metric}{filtered}", []).append(sample[metric])
        records += [items[number] for number in sorted(items)]
    one = next(iter(by_name.values()))
    return records, {name: _figure(one, name.partition(",")[0], column) for name, column in values.items()}


@cache
def _manager() -> Any:
    """Return lm-eval's list of its tasks, thousands of files that take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _record(name: str, sample: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": name,
        "item": sample["doc_id"],
        "prompt": sample["arguments"][0][0],
        "reference": sample["target"],
        "choices": [argument[1] for argument in sample["arguments"] if isinstance(argument[1], str)],
        "outputs": sample["resps"],
        "filtered": {},
        "marks": {},
    }


def _figure(task: Any, metric: str, column: Sequence[Any]) -> Figure:
    """Return a metric by lm-eval's own aggregation, a mean or one of all items together."""
    aggregate: Callable[[Any], Any] = task.aggregation()[metric]
    higher = bool(task.higher_is_better().get(metric, True))
    if all(isinstance(value, Real) for value in column):
        plain = figure([float(value) for value in column])
        if float(aggregate(column)) == plain.value:
            return Figure(plain.value, plain.low, plain.high, plain.count, higher)
    value, columns = float(aggregate(column)), list(zip(*column, strict=True))
    if not all(isinstance(part, Real) for row in columns for part in row):
        return Figure(value, None, None, len(column), higher)
    return resampled(lambda *parts: aggregate(list(zip(*parts, strict=True))), *columns, value=value)


def _local(task: Task, source: str, entry: Any) -> dict[str, Any]:
    """Return what in lm-eval's task makes it read local files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(entry.yaml_path, resolve_func=False)
    measured_split = config.get("test_split") or config.get("validation_split")
    files = {measured_split: local_files(task, source, "test")}
    if not files[measured_split]:
        raise UnfitError(f"{source} is no local file or folder")
    overrides: dict[str, Any] = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
    overrides["test_split" if config.get("test_split") else "validation_split"] = measured_split
    if shown := _shown(task, source):
        files[shown] = local_files(task, source, shown)
        overrides |= {"training_split": shown, "fewshot_split": shown}
    endings = {file.name.removesuffix(".gz").rpartition(".")[2] for paths in files.values() for file in paths}
    builders = {_BUILDERS.get(ending) for ending in endings}
    if len(builders) != 1 or None in builders:
        raise UnfitError(f"lm-eval reads no files that end in {' and '.join(sorted(endings))}")
    named = {split: [str(path.resolve()) for path in paths] for split, paths in files.items()}
    return overrides | {
        "dataset_path": builders.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": named},
    }


def _check_fields(task: Any) -> None:
    """Refuse data that lm-eval's task would read without an error and get all wrong."""
    config = task.config
    for template in (config.doc_to_text, config.doc_to_target, config.doc_to_choice):
        # A bare word that is no field is taken for the text itself.
        if isinstance(template, str) and _FIELD.fullmatch(template) and template not in task.features:
            raise UnfitError(f"the data have no field {template!r}, which lm-eval's prompt asks for")
    if config.output_type != "multiple_choice":
        return
    for number, doc in enumerate(task.eval_docs, start=1):
        choices, right = task.doc_to_choice(doc), task.doc_to_target(doc)
        if not (right in range(len(choices)) if isinstance(right, int) else right in choices):
            raise UnfitError(f"the label {right!r} of row {number} is none of lm-eval's choices")


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no field {error.args[0]!r}"
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's and datasets' logs, notes and bars of reading to themselves."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            if not bars:
                datasets.enable_progress_bars()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
