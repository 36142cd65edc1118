"""SIGKILL at random moments of studies: of who does the cells, of a worker, of a worker on Ray.

``HEADSTART_KILL_ROUNDS=20`` makes as many kills of each.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from importlib.util import find_spec

import psutil
import pytest

from children import ended, forked, killed
from headstart.runs.result import FILE, read_result
from headstart.study.cells import Grid
from headstart.study.results import CELLS, Results
from headstart.study.study import run_study
from headstart.study.tree import validated_study
from running import llama_folder, small_run, sums

ROUNDS = int(os.environ.get("HEADSTART_KILL_ROUNDS", "1"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    base = small_run(
        llama_folder(folder / "model"), sums(folder / "sums.jsonl", 60), schedule={"steps": 3}, batch={"size": 2}
    )
    axes = {"start": ["lora", "pissa"], "optimizer.lr": [1e-3, 1e-2]}
    return validated_study({"base": base.model_dump(mode="json"), "axes": axes}, "study")


@pytest.fixture(scope="module")
def uncut(study, tmp_path_factory):
    """The losses of a study that nobody kills, and how long it takes."""
    folder, began = tmp_path_factory.mktemp("uncut"), time.monotonic()
    assert ended(forked(run_study, study, folder)) == 0
    return losses(study, folder), time.monotonic() - began


def losses(study, folder):
    results = Results(folder)
    return {cell.name: results.of(cell).series["loss"] for cell in Grid(study).cells()}


def finished(folder):
    """When each cell's result was written; all that are there are whole."""
    places = [path.parent for path in (folder / CELLS).glob(f"*/{FILE}")]
    assert all(read_result(place).status == "done" for place in places)
    return {place.name: (place / FILE).stat().st_mtime_ns for place in places}


def test_who_does_the_cells_is_killed(study, uncut, tmp_path):
    draw, (wanted, seconds), kills, number = random.Random(0), uncut, 0, 0
    while True:
        folder = tmp_path / str(number)
        before = finished(folder)
        process = forked(run_study, study, folder)
        if kills < ROUNDS:
            time.sleep(draw.uniform(0, seconds))
            kills += killed(process) == -signal.SIGKILL
        else:
            assert ended(process) == 0
        after = finished(folder)
        # What was done was not done again.
        assert before.items() <= after.items()
        if len(after) == 4:
            assert losses(study, folder) == wanted
            if kills >= ROUNDS:
                return
            number += 1  # also where it ended before it was killed: there is nothing left to kill


class Killer(threading.Thread):
    """Kills one process of this one's whose command line has a name, at a random moment of what it does."""

    def __init__(self, name, folder, delay):
        super().__init__(daemon=True)
        self.name, self.folder, self.delay = name, folder, delay
        self.over, self.before = threading.Event(), None

    def run(self):
        while not self.over.wait(0.1):
            if found := [child for child in psutil.Process().children(recursive=True) if self.name in words(child)]:
                if self.over.wait(self.delay):
                    return
                before, victim = finished(self.folder), found[0]
                if victim.is_running():
                    victim.kill()
                    self.before = before
                return


def words(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def killed_in_each(study, tmp_path, name, uncut, **further):
    """Have one worker killed in each study, until as many are as asked for."""
    draw, kills, number, (wanted, seconds) = random.Random(1), 0, 0, uncut
    while kills < ROUNDS:
        folder, number = tmp_path / str(number), number + 1
        # Two workers need about half as long as one process.
        killer = Killer(name, folder, draw.uniform(0, seconds / 2))
        killer.start()
        run_study(study, folder, **further)
        killer.over.set()
        killer.join()
        assert losses(study, folder) == wanted
        if killer.before is not None:
            kills += 1
            assert killer.before.items() <= finished(folder).items()


def test_a_worker_is_killed(study, uncut, tmp_path):
    killed_in_each(study, tmp_path, "spawn_main", uncut, workers=2)


@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
def test_a_worker_on_ray_is_killed(study, uncut, tmp_path):
    killed_in_each(study, tmp_path, "ray::_work", uncut, workers=2, ray="local")
