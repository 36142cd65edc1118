"""A study's cells are done once each, by one process or several, and after any kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter

import pytest

from headstart.errors import HeadstartError, RunError
from headstart.runs.result import Result, read_result, write_result
from headstart.runs.shared import Shared, start_key
from headstart.runs.stages import execute
from headstart.study import work as work_module
from headstart.study.cells import Grid
from headstart.study.estimate import estimated
from headstart.study.prune import hopeless
from headstart.study.results import CELLS, STARTS, Results, all_cells
from headstart.study.study import noted_study, run_study, start_over
from headstart.study.summary import summarised
from headstart.study.tree import validated_study
from headstart.study.work import Terms, Worker
from running import llama_folder, small_run, sums


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return llama_folder(folder / "model"), sums(folder / "sums.jsonl", 90)


def study(material, **settings):
    base = small_run(*material, data={"validation_examples": 6}, schedule={"steps": 6}, batch={"size": 2})
    settings = {"axes": {"start": ["lora", "lora-one:samples=4"], "optimizer.lr": [1e-3, 1e-2]}, **settings}
    return validated_study({"base": base.model_dump(mode="json"), **settings}, "study")


def losses(grid, folder):
    results = Results(folder)
    return {cell.name: results.of(cell).metrics["loss/end"].value for cell in grid.cells()}


def test_cells_are_those_of_runs_on_their_own_and_share_their_starts(material, tmp_path, monkeypatch):
    from headstart.runs import stages

    made = Counter()
    original = stages.initialize_

    def counting(model, method, **further):
        made[str(method)] += 1
        return original(model, method, **further)

    monkeypatch.setattr(stages, "initialize_", counting)
    settings = study(material)
    grid = run_study(settings, tmp_path / "study")
    # Two rates each: a start doesn't depend on the rate.
    assert made == {"lora": 1, "lora-one:samples=4": 1}
    alone = {cell.name: stages.execute(cell.run, tmp_path / cell.run.key) for cell in grid.cells()}
    shared = Results(tmp_path / "study")
    for cell in grid.cells():
        one, other = shared.of(cell), alone[cell.name]
        assert one.series["loss"] == other.series["loss"]
        assert one.metrics == other.metrics and "loss/validation" in one.metrics
    # Done is done.
    made.clear()
    run_study(settings, tmp_path / "study")
    assert not made
    # Another rate and another seed leave what there is.
    wider = study(material, axes={"start": ["lora"], "optimizer.lr": [1e-3, 1e-2, 3e-2]}, seeds=2)
    run_study(wider, tmp_path / "study")
    assert made == {"lora": 1}  # of the new seed; the old one's is kept
    assert noted_study(tmp_path / "study") == wider


@pytest.mark.parametrize("start", ["eva:samples=4,rho=2", "gora:samples=4"])
def test_ranks_that_a_start_shares_out_are_every_cells_and_of_a_run_that_goes_on(material, tmp_path, start):
    targets = ["all-linear"]
    axes = {"start": ["lora", start], "optimizer.lr": [1e-3, 1e-2], "adapter.targets": targets, "adapter.r": [4]}
    grid = run_study(study(material, axes=axes), tmp_path / "study")
    assert summarised(grid, tmp_path / "study").counted() == {"done": 4}
    cells = [cell for cell in grid.cells() if cell.run.start.method == start]
    results = Results(tmp_path / "study")
    for cell in cells:
        alone = execute(cell.run, tmp_path / cell.run.key)
        assert results.of(cell).series["loss"] == alone.series["loss"]
        patterns = [adapter_config(place)["rank_pattern"] for place in (results.place(cell), tmp_path / cell.run.key)]
        assert patterns[0] == patterns[1] and patterns[0]
        # What is left is measured of what was trained.
        (tmp_path / cell.run.key / "result.json").unlink()
        assert execute(cell.run, tmp_path / cell.run.key).metrics == alone.metrics


def adapter_config(folder):
    return json.loads((folder / "trained" / "adapter" / "adapter_config.json").read_text())


def test_a_start_that_depends_on_the_rate_is_made_for_each(material):
    cells = Grid(
        study(
            material,
            axes={"start": ["lora-sb:samples=4", "lora-sb:samples=4,lr=1e-3", "pissa"], "optimizer.lr": [1e-3, 1e-2]},
        )
    ).cells()
    keys = {start: {start_key(cell.run) for cell in cells if cell.start == start} for start in {c.start for c in cells}}
    assert {start: len(found) for start, found in keys.items()} == {
        "lora-sb:samples=4": 2,
        "lora-sb:samples=4,lr=1e-3": 1,
        "pissa": 1,
    }


def test_validation_data_are_not_trained_on_nor_reported(material, tmp_path):
    grid = run_study(study(material, axes={"start": ["lora"]}), tmp_path)
    cell = grid.cells()[0]
    data = Results(tmp_path).of(cell).data
    assert [data[name]["examples"] for name in ("train", "validation", "held_out")] == [78, 6, 6]
    assert len({data[name]["sha256"] for name in data}) == 3
    kept = json.loads((Results(tmp_path).place(cell) / "losses.json").read_text())
    assert [len(kept[name]["losses"]) for name in ("validation", "held_out")] == [6, 6]
    value = Results(tmp_path).of(cell).metrics["loss/validation"].value
    assert sum(kept["validation"]["losses"]) / sum(kept["validation"]["weights"]) == pytest.approx(value)


def test_a_best_at_the_edge_brings_further_rates(material, tmp_path):
    grid = run_study(study(material, axes={"start": ["lora"], "optimizer.lr": [1e-5, 2e-5]}), tmp_path, refine=True)
    rates = sorted(cell.rate for cell in all_cells(grid, Results(tmp_path), refine=True))
    # From so low every further rate is better, until it has added as many as it may.
    assert rates == pytest.approx([1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4])
    summary = summarised(grid, tmp_path)
    assert summary.counted() == {"done": 5} and summary.parts[0].choices["lora"].edge == "high"


def test_a_failed_cell_keeps_no_other_from_being_done_and_is_tried_again(material, tmp_path, monkeypatch):
    settings, tried = study(material), Counter()
    original = work_module.execute

    def failing(run, *arguments, **further):
        tried[run.start.method, run.optimizer.lr] += 1
        if run.start.method == "lora" and run.optimizer.lr == 1e-3:
            monkeypatch.setattr("headstart.runs.stages.make_trainer", no_trainer)
        else:
            monkeypatch.setattr("headstart.runs.stages.make_trainer", trainer)
        return original(run, *arguments, **further)

    from headstart.runs.stages import make_trainer as trainer

    def no_trainer(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(work_module, "execute", failing)
    grid = run_study(settings, tmp_path)
    summary = summarised(grid, tmp_path)
    assert summary.counted() == {"done": 3, "failed": 1}
    [(cell, result)] = [(cell, result) for cell, result in summary.cells if result.status == "failed"]
    assert (cell.start, cell.rate) == ("lora", 1e-3) and "no room" in result.reason
    assert set(tried.values()) == {1}
    monkeypatch.setattr(work_module, "execute", original)
    monkeypatch.setattr("headstart.runs.stages.make_trainer", trainer)
    time.sleep(1.1)  # a failure of the same second would count as this piece of work's
    run_study(settings, tmp_path)
    assert summarised(grid, tmp_path).counted() == {"done": 4}


def test_hopeless_rates_are_given_up_only_where_asked(material, tmp_path):
    settings = study(material, axes={"start": ["lora"], "optimizer.lr": [1e-9, 1e-7, 3e-2]})
    grid = run_study(settings, tmp_path / "whole")
    assert summarised(grid, tmp_path / "whole").counted() == {"done": 3}
    base = small_run(*material, schedule={"steps": 12}, data={"validation_examples": 6}).model_dump(mode="json")
    settings = validated_study({"base": base, "axes": {"optimizer.lr": [1e-9, 3e-2]}}, "study")
    grid = run_study(settings, tmp_path / "pruned", prune=True)
    results = {cell.rate: Results(tmp_path / "pruned").of(cell) for cell in grid.cells()}
    assert results[3e-2].status == "done" and results[1e-9].status == "pruned"
    assert "given up after 4 of 12 steps" in results[1e-9].reason
    assert len(results[1e-9].series["loss"]) == 4


def test_judging_is_by_what_the_best_rate_gained(material, tmp_path):
    grid = Grid(study(material, axes={"start": ["lora"], "optimizer.lr": [1e-4, 1e-3]}))
    low, high = sorted(grid.cells(), key=lambda cell: cell.rate)
    assert hopeless(low, grid, Results(tmp_path)) is None
    from headstart.runs.stages import _begun

    done = _begun(high.run)
    done.status, done.series = "done", {"loss": [(step, 3.0 - 0.2 * step) for step in range(1, 13)]}
    write_result(done, Results(tmp_path).place(high))
    judge = hopeless(low, grid, Results(tmp_path))
    # By step 4 the best has gained 0.5 (from step 1 to the mean of steps 3 and 4).
    falling = [(step, 3.0 - 0.052 * step) for step in range(1, 5)]
    assert judge(falling, 12) is None  # 0.13 of 0.5
    assert "0.12" in judge([(step, 3.0 - 0.048 * step) for step in range(1, 5)], 12)
    assert judge(falling[:3], 12) is None and judge([(step, 3.0) for step in range(1, 6)], 12) is None


def test_a_study_tells_what_is_left(material, tmp_path):
    settings = study(material, seeds=2)
    assert "known once the first cells are done" in estimated(Grid(settings), tmp_path)[-1]
    grid = run_study(study(material), tmp_path)
    lines = estimated(Grid(settings), tmp_path, 2)
    assert "8 cells: 2 starts, 2 seeds" in lines[0] and "4 are done, 4 are left" in lines[1]
    seconds = [sum(Results(tmp_path).of(cell).seconds.values()) for cell in grid.cells()]
    assert lines[2].startswith(f"about {sum(seconds) / 2:.0f} s ")


def test_no_cell_begins_after_the_time(material, tmp_path):
    grid = run_study(study(material), tmp_path, max_seconds=0)
    assert summarised(grid, tmp_path).counted() == {"missing": 4}


def test_starting_over_deletes_what_the_study_wrote_alone(material, tmp_path):
    grid = run_study(study(material, axes={"start": ["lora"]}), tmp_path)
    place = Results(tmp_path).place(grid.cells()[0])
    (place / "notes").write_text("mine")
    for name in ("report.html", "report.md", "notes"):
        (tmp_path / name).write_text("")
    start_over(tmp_path)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == [(place / "notes").relative_to(tmp_path).as_posix(), "notes"]
    (tmp_path / CELLS).rename(tmp_path / "other")
    with pytest.raises(RunError, match="something else than a study"):
        run_study(study(material), tmp_path)


_PROGRAM = """
import json, sys
from pathlib import Path
from headstart.study.study import run_study
from headstart.study.tree import validated_study
settings = json.loads(Path(sys.argv[1]).read_text())
run_study(validated_study(settings, "study"), Path(sys.argv[2]), show=lambda *_: print("at it", flush=True))
"""


def test_two_commands_on_one_folder_share_it_and_a_kill_loses_nothing(material, tmp_path):
    settings = study(material)
    (tmp_path / "study.json").write_text(json.dumps(settings.model_dump(mode="json")))
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, tmp_path / "study.json", tmp_path / "study"]
    one, two = (subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2))
    one.stdout.readline()
    one.kill()
    one.wait()
    assert two.communicate(timeout=200) and two.returncode == 0
    grid = Grid(settings)
    assert summarised(grid, tmp_path / "study").counted() == {"done": 4}
    assert len({path.name for path in (tmp_path / "study" / STARTS).iterdir()} - {"locks", "data"}) == 2


def test_a_reason_that_keeps_all_cells_from_beginning_ends_the_work(material, tmp_path, monkeypatch):
    grid = Grid(study(material))

    def refusing(*_, **__):
        raise HeadstartError("no cell can begin")

    monkeypatch.setattr(work_module, "execute", refusing)
    with pytest.raises(HeadstartError, match="no cell can begin"):
        Worker(grid, tmp_path, Terms(since=Terms.now())).work()
    assert read_result(Results(tmp_path).place(grid.cells()[0])) is None


def test_a_start_that_two_processes_made_is_the_first_ones(material, tmp_path):
    run = Grid(study(material)).cells()[0].run
    shared = Shared(tmp_path)

    def make(place):
        # The other one, which was not waited for, ends first.
        if not list(tmp_path.glob(f"{start_key(run)}/result.json")):
            Shared(tmp_path / "elsewhere").start(run, lambda there: result)[0].rename(tmp_path / start_key(run))
        (place / "mine").write_text("")
        return result

    result = Result(run.key, run.model_dump(mode="json"))
    place, found, _ = shared.start(run, make)
    assert found.key == result.key and not (place / "mine").exists() and read_result(place) is not None
