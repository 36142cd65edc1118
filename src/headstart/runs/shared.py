"""What runs that ask for the same take from one another, so that a study does nothing twice."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from headstart.files import work_folder, write_json
from headstart.methods import parse_method
from headstart.progress import Show, silent
from headstart.runs.examples import Examples
from headstart.runs.result import FILE, Result, read_result, write_result
from headstart.runs.tree import Evaluation, Optimizer, Run, Schedule, Start
from headstart.statistics.kept import KeptStatistics
from headstart.store import Store
from headstart.training.wrap import accelerator

T = TypeVar("T")

# In the folder of a study's starts.
STATISTICS, DATA = "statistics", "data"
# A base model is kept in memory where it takes no more than this share of what is free.
_ROOM = 0.2


class Shared:
    """The starts of a study, in a folder that several processes share; its base model and data, in this one's memory.

    Args:
        folder: gets a folder for each start.
        runs: all that share it, whose starts may be made of the same data.
    """

    def __init__(self, folder: Path, runs: Sequence[Run] = ()) -> None:
        self._folder = folder
        self._runs = runs
        self._kept: dict[str, tuple[str, Any]] = {}
        # By seed, by what is read.
        self._readings: dict[int, Mapping[str, dict[str, Run]]] = {}

    def start(self, run: Run, make: Callable[[Path], Result], show: Show = silent) -> tuple[Path, Result, bool]:
        """Return the folder of a run's start, what is known of it, and whether it was made for this run.

        Args:
            run: one of those that share it.
            make: makes the start in a folder, and returns what is known of it.
            show: draws progress.
        """
        key = start_key(run)
        place, is_new = self._folder / key, False

        def look_up(_: str) -> Result | None:
            return read_result(place)

        def made(_: list[str]) -> dict[str, Result]:
            nonlocal is_new
            with work_folder(self._folder, key) as work:
                result = make(work)
                write_result(result, work)
                try:
                    work.rename(place)
                except OSError:
                    if look_up(key) is None:
                        raise
                    # Another process, for which it took too long to wait, was faster: its start is the same.
            is_new = True
            return {key: result}

        ready = Store(self._folder).make_all([[key]], look_up, made, what="a start", show=show)
        if is_new:
            self._forget_statistics_of(run)
        return place, ready[key], is_new

    def statistics(self, run: Run) -> KeptStatistics | None:
        """Return where what a run's start reads is kept for others; None where no other one is to be made of it."""
        if not _reads_data(run):
            return None
        key, alike = self._alike(run)
        place = self._folder / STATISTICS / key
        if not place.is_dir() and all(self._is_made(start) for start in alike if start != start_key(run)):
            return None
        return KeptStatistics(place, [parse_method(other.start.method) for other in alike.values()])

    def forget_statistics(self) -> None:
        """Delete what starts were made of."""
        shutil.rmtree(self._folder / STATISTICS, ignore_errors=True)

    def _forget_statistics_of(self, run: Run) -> None:
        """Delete what a run's start was made of where no other start is left to be made of it."""
        if _reads_data(run):
            key, alike = self._alike(run)
            if all(map(self._is_made, alike)):
                shutil.rmtree(self._folder / STATISTICS / key, ignore_errors=True)

    def _is_made(self, key: str) -> bool:
        return (self._folder / key / FILE).is_file()

    def _alike(self, run: Run) -> tuple[str, dict[str, Run]]:
        """Return what runs whose starts read the same have in common, and by its key each such start with one run."""
        if run.seed not in self._readings:
            readings: dict[str, dict[str, Run]] = defaultdict(dict)
            # Thousands of runs may have few starts, and a key takes a millisecond.
            starts = {repr(_of_start(other)): other for other in self._runs if other.seed == run.seed}
            for other in filter(_reads_data, starts.values()):
                readings[_reading_key(other)][start_key(other)] = other
            self._readings[run.seed] = readings
        key = _reading_key(run)
        return key, self._readings[run.seed].get(key, {})

    def data(self, run: Run, load: Callable[[], T]) -> T:
        """Return what ``load`` returns, the last one's where it read the same."""
        asked = run.evaluation.graded_examples
        return self._last("data", repr((run.data, asked)), load)

    def check_data(self, run: Run, examples: Examples) -> None:
        """Raise RunError where the study has read other examples from where a run's come from."""
        digest = hashlib.sha256(repr((run.data, run.evaluation.graded_examples)).encode()).hexdigest()
        path = self._folder / DATA / f"{digest[:16]}.json"
        if path.is_file():
            noted = json.loads(path.read_text(encoding="utf-8"))
            examples.check_unchanged(noted, f"the study in {self._folder.parent}")
        else:
            write_json(examples.digests, path)

    def base(self, run: Run, load: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Return a base model that is the caller's to change, and its tokenizer.

        It is a copy of one that is kept in the CPU's memory, where that has room; quantised ones are loaded anew.
        """
        if run.model.bits != 16:
            return load()
        key = repr((run.model, run.data.task, run.precision, run.seed))
        if self._kept.get("base", ("", None))[0] != key:
            self._kept.pop("base", None)
            model, tokenizer = load()
            size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
            if size > psutil.virtual_memory().available * _ROOM:
                return model, tokenizer
            self._kept["base"] = (key, (model.to("cpu"), tokenizer))
        model, tokenizer = self._kept["base"][1]
        return copy.deepcopy(model).to(accelerator()), tokenizer

    def tokens(self, run: Run) -> dict[str, Any]:
        """Return what holds the data that a trainer has prepared; empty where the last run's were others."""
        key = repr((run.model.name, run.model.revision, run.data, run.batch, run.evaluation.graded_examples))
        made: dict[str, Any] = self._last("tokens", key, dict)
        return made

    def _last(self, name: str, key: str, load: Callable[[], T]) -> T:
        """Return what is kept under a name where it was made for this key; only the last of each name is kept."""
        known = self._kept.get(name)
        if known is None or known[0] != key:
            self._kept.pop(name, None)
            known = self._kept[name] = (key, load())
        value: T = known[1]
        return value


def start_key(run: Run) -> str:
    """Return what runs with the same start have in common, as a folder's name: all but how they train and are graded.

    The examples that are graded stay: of a single file they are cut off from those that are learned.
    """
    return _of_start(run).key


def _of_start(run: Run) -> Run:
    """Return a run's settings with those alone that its start depends on."""
    same: dict[str, Any] = {
        "evaluation": Evaluation(graded_examples=run.evaluation.graded_examples),
        "monitor": 0,
        "report_to": (),
        "merged": False,
    }
    if not parse_method(run.start.method).reads_rate:
        same |= {"optimizer": Optimizer(), "schedule": Schedule()}
    return run.model_copy(update=same)


def _reads_data(run: Run) -> bool:
    """Return whether one method starts all layers and reads the data to learn."""
    method = parse_method(run.start.method)
    return method.reads_task and method.methods == (method,)


def _reading_key(run: Run) -> str:
    """Return what runs whose starts read the same of the same data have in common: the rank isn't of it."""
    adapter = run.adapter.model_copy(
        update={"r": 8, "alpha": 16, "rslora": False, "dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}
    )
    same = {
        "adapter": adapter,
        "start": Start(memory_budget=run.start.memory_budget),
        "optimizer": Optimizer(),
        "schedule": Schedule(),
    }
    return start_key(run.model_copy(update=same))
