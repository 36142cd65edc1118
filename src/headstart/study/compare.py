"""The same run from several starts: same seed, same data in the same order; what is done is never done again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from headstart.errors import HeadstartError, MethodError, RunError
from headstart.methods import parse_method
from headstart.names import plain
from headstart.progress import Show, silent
from headstart.runs.folder import ITEMS, SAVES, SETTINGS, START, TRAINED, changed_settings, noted_run
from headstart.runs.result import FILE, Result, read_result
from headstart.runs.stages import execute
from headstart.runs.tree import Run

# What the command line writes into a comparison's folder, beside its runs.
PAGES = ("table.md", "report.html")


def runs_of(base: Run, methods: Sequence[str]) -> dict[str, Run]:
    """Return the run of each start, by the name of its folder.

    Raises:
        MethodError: there is no method, or one of them is unknown, has an unknown setting, or is there twice.
    """
    if not methods:
        raise MethodError("no method to compare: name some, as in lora,pissa.")
    for method in methods:
        parse_method(method)
    runs = {plain(method): _started(base, method) for method in methods}
    if len(runs) < len(methods):
        twice = next(method for method in methods if methods.count(method) > 1)
        raise MethodError(f"method {twice!r} is named twice: leave one out, or give it other settings.")
    return runs


def compare(
    base: Run,
    methods: Sequence[str],
    folder: Path,
    *,
    show: Show = silent,
    finished: Callable[[list[Result]], None] | None = None,
) -> list[Result]:
    """Train from every start that has no result in ``folder`` yet; return the results in the methods' order.

    A run that fails or diverges keeps no other from being done; its result says so.

    Args:
        base: the settings that all have in common.
        methods: how they start, such as ``lora`` and ``init-ab:beta=2``.
        folder: gets one folder a method. Interrupted, the same call goes on where it was cut off.
        show: draws progress.
        finished: called after each run with the results so far.

    Raises:
        MethodError: see :func:`runs_of`.
        RunError: the folder holds runs with other settings, or something else.
        HeadstartError: every run failed; this is the first one's reason.
    """
    runs = runs_of(base, methods)
    _check_alike(base, folder)
    results: list[Result] = []
    failures: list[HeadstartError] = []
    for name, run in runs.items():
        try:
            result = execute(run, folder / name, show=_under(run.start.method, show))
        except HeadstartError as error:
            failed = read_result(folder / name) if (folder / name).is_dir() else None
            if failed is None or failed.status != "failed":
                raise
            result = failed
            failures.append(error)
        results.append(result)
        if finished is not None and len(failures) < len(results):
            finished(results)
    if len(failures) == len(results):
        raise failures[0]
    return results


def start_over(folder: Path) -> None:
    """Delete what an earlier comparison wrote in a folder: its runs and its pages; all else in it stays.

    Raises:
        RunError: it holds something else than a comparison.
    """
    for place in _places(folder):
        for name in (START, TRAINED, SAVES):
            shutil.rmtree(place / name, ignore_errors=True)
        # The settings last: a folder that a kill leaves is still known to be a run's.
        for name in (FILE, ITEMS, SETTINGS):
            (place / name).unlink(missing_ok=True)
        with suppress(OSError):  # something of the user's is in it
            place.rmdir()
    for name in PAGES:
        (folder / name).unlink(missing_ok=True)


def described(base: Run, results: Sequence[Result]) -> str:
    """Return the conditions that the runs share in one sentence, for tables and pages."""
    optimizer, adapter, data = base.optimizer, base.adapter, base.data
    source = f" ({Path(data.train).name})" if data.train else ""
    # What was measured may be less than what was asked for.
    done = [result.data for result in results if result.data]
    held_out = done[0]["held_out"]["examples"] if done else data.held_out_examples
    steps = max((rows[-1][0] for result in results if (rows := result.series.get("loss"))), default=0)
    return (
        f"{base.model.name}, task {data.task}{source}, {steps} steps of {base.batch.size * base.batch.accumulation} "
        f"examples, {optimizer.name} at {optimizer.lr:g}, rank {adapter.r}, alpha {adapter.alpha:g}, seed {base.seed}; "
        f"{held_out} held-out examples"
    )


def _check_alike(base: Run, folder: Path) -> None:
    """Refuse a folder whose runs differ from this comparison's in more than their starts."""
    for place in _places(folder):
        other = noted_run(place)
        if other is not None and _started(other, base.start.method).key != base.key:
            changed = ", ".join(changed_settings(base, _started(other, base.start.method)))
            raise RunError(
                f"{folder} holds a comparison with other settings ({changed}): give another --out, or --force to "
                "start over."
            )


def _started(run: Run, method: str) -> Run:
    """Return the run from another start."""
    return run.model_copy(update={"start": run.start.model_copy(update={"method": method})})


def _places(folder: Path) -> list[Path]:
    """Return the folders of the runs in a comparison's folder.

    Raises:
        RunError: it holds something else.
    """
    if not folder.exists():
        return []
    places = [path.parent for path in sorted(folder.glob(f"*/{SETTINGS}"))] if folder.is_dir() else []
    # A kill may leave a folder for the first run, with nothing in it yet.
    if not places and (not folder.is_dir() or any(path.is_file() for path in folder.rglob("*"))):
        raise RunError(
            f"{folder} holds something else than a comparison, so nothing in it is touched: give another --out."
        )
    return places


def _under(method: str, show: Show) -> Show:
    return lambda step, done, total: show(f"{method}: {step}", done, total)
