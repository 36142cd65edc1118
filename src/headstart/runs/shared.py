"""What runs that ask for the same take from one another, so that a study does nothing twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from headstart.files import work_folder
from headstart.methods import parse_method
from headstart.progress import Show, silent
from headstart.runs.result import Result, read_result, write_result
from headstart.runs.tree import Evaluation, Optimizer, Run, Schedule
from headstart.store import Store
from headstart.training.wrap import accelerator

T = TypeVar("T")

# A base model is kept in memory where it takes no more than this share of what is free.
_ROOM = 0.2


class Shared:
    """The starts of a study, in a folder that several processes share; its base model and data, in this one's memory.

    Args:
        folder: gets a folder for each start.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, tuple[str, Any]] = {}

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
        return place, ready[key], is_new

    def data(self, run: Run, load: Callable[[], T]) -> T:
        """Return what ``load`` returns, the last one's where it read the same."""
        asked = run.evaluation.graded_examples
        return self._last("data", repr((run.data, asked)), load)

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
    same: dict[str, Any] = {
        "evaluation": Evaluation(graded_examples=run.evaluation.graded_examples),
        "monitor": 0,
        "report_to": (),
        "merged": False,
    }
    if not parse_method(run.start.method).reads_rate:
        same |= {"optimizer": Optimizer(), "schedule": Schedule()}
    return run.model_copy(update=same).key
