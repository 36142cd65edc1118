"""What several starts want of the same data: read once, and each start is what it is alone."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import pytest
import torch

import headstart as hs
from conftest import all_factors, tiny_llama, token_batch, wrap
from headstart.methods import method_names, parse_method
from headstart.methods.given import ANY_LAYER
from headstart.reports.sheets import cost_sheet
from headstart.runs import stages
from headstart.runs.shared import STATISTICS, Shared
from headstart.statistics import collect as collect_module
from headstart.statistics import kept as kept_module
from headstart.statistics.kept import KeptStatistics
from headstart.statistics.training import Training, TrainingData
from headstart.study.cells import Grid
from headstart.study.results import STARTS, Results
from headstart.study.study import run_study
from headstart.study.summary import summarised
from headstart.study.tree import validated_study
from running import llama_folder, small_run, sums

BATCH = token_batch(8, 14, padded=False)
TASK = [name for name in method_names() if parse_method(name).reads_task and name != "per-layer"]


def methods_of(names, samples=6):
    return [parse_method(f"{name}:samples={samples}") for name in names]


@pytest.fixture
def readings(monkeypatch):
    """What each reading of data was for."""
    read = []
    original = collect_module.prepare

    def counting(model, layers, wants, *further, **settings):
        read.append(next(iter(wants.values())))
        return original(model, layers, wants, *further, **settings)

    monkeypatch.setattr(collect_module, "prepare", counting)
    return read


def factors(method, kept=None):
    model = wrap(tiny_llama(), r=2)
    data = TrainingData([BATCH], training=Training(100, 1e-3), kept=kept)
    report = hs.initialize_(model, method, data=data, preserve=[BATCH], progress=False)
    return all_factors(model), report


@pytest.mark.filterwarnings("ignore::headstart.errors.HeadstartWarning")
def test_every_start_is_what_it_is_alone(tmp_path, readings):
    methods = methods_of(TASK)
    assert len(methods) > 8
    alone = {str(method): factors(method) for method in methods}
    readings.clear()
    for method in methods:
        kept = KeptStatistics(tmp_path, methods)
        together, report = factors(method, kept)
        expected, single = alone[str(method)]
        assert together.keys() == expected.keys()
        for name, (A, B) in expected.items():
            size = float((B @ A).norm())
            difference = float((together[name][1] @ together[name][0] - B @ A).norm())
            assert difference <= 1e-4 * size, (str(method), name)
        assert method in kept.served and set(kept.served) <= set(methods)
        assert "read once for" in report.plan and str(method) in report.plan
        assert (report.samples, report.tokens) == (single.samples, single.tokens)
        assert report.warnings == single.warnings
    # Means of inputs over all tokens, and over those that predict a label.
    to_learn = [wants for wants in readings if wants.backward]
    assert {wants.tokens for wants in to_learn} == {"attention", "labels"} and len(to_learn) == 2


def test_a_start_costs_its_reading_whichever_it_was_read_for(tmp_path):
    methods = methods_of(["lora-one", "lora-da"])
    seconds = [factors(method, KeptStatistics(tmp_path, methods))[1].seconds_by_step["collect"] for method in methods]
    (about,) = tmp_path.glob("*/about.json")
    assert min(seconds) >= sum(one["seconds"] for one in json.loads(about.read_text())["passes"]) > 0


def test_only_those_that_read_the_same_are_read_for_together(tmp_path):
    one, da, other, labels = map(
        parse_method, ("lora-one:samples=4", "lora-da:samples=4", "lora-one:samples=5", "kfac-newton:samples=4")
    )
    labels = type(labels)(samples=4, tokens="labels" if da.tokens == "attention" else "attention")

    def together(method, *methods):
        common = KeptStatistics(tmp_path, methods).common(method, [ANY_LAYER], 100)
        return common and set(common.methods)

    assert together(one, one, da, other) == {one, da} == together(da, one, da, other)
    assert together(other, one, da, other) is None and together(one, one) is None
    # Of other ranks or rates the same method has further starts.
    assert together(other, one, da, other, other) == {other}
    # Means over other tokens are other means; a method without inputs goes with the first that has some.
    assert together(da, one, da, labels) == {one, da} == together(one, one, da, labels)
    assert together(labels, one, da, labels) is None
    assert together(one, labels, one, da) == {labels, one} and together(da, labels, one, da) is None
    # One that would refuse is no reason for others to.
    whole = parse_method("lora-da")
    assert together(one, one, da, whole) == {one, da}


@pytest.mark.parametrize("why", ["little room", "slow disk", "full disk"])
def test_what_the_disk_can_not_take_is_read_for_each_alone(why, tmp_path, monkeypatch, readings):
    methods = methods_of(["lora-one", "lora-da"])
    if why == "little room":
        monkeypatch.setattr(kept_module, "_SHARE_OF_DISK", 0.0)
    else:
        original, now = kept_module.save_file, [0.0]

        def slow(*given):
            now[0] += 1.0
            original(*given)
            if why == "full disk":
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(kept_module, "save_file", slow)
        monkeypatch.setattr(kept_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for method in methods:
        kept = KeptStatistics(tmp_path, methods)
        together, report = factors(method, kept)
        assert kept.served == () and "once" not in report.plan
        for name, (A, B) in factors(method)[0].items():
            torch.testing.assert_close(together[name][1] @ together[name][0], B @ A)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_data_that_can_not_be_read_are_no_full_disk(tmp_path):
    began = []

    class Broken:
        def __iter__(self):
            began.append(1)
            raise OSError(errno.EIO, "Input/output error")

    methods = methods_of(["lora-one", "lora-da"])
    data = TrainingData(Broken(), training=Training(100, 1e-3), kept=KeptStatistics(tmp_path, methods))
    with pytest.raises(OSError, match="Input/output error"):
        hs.initialize_(wrap(tiny_llama(), r=2), methods[0], data=data, progress=False)
    assert len(began) == 1
    assert not list(tmp_path.glob("*/about.json"))


def test_nothing_is_read_that_is_not_asked_for(tmp_path, monkeypatch):
    methods = methods_of(["lora-one", "lora-da"])
    factors(methods[1], KeptStatistics(tmp_path, methods))
    read, original = [], kept_module.safe_open

    class Watched:
        def __init__(self, *given):
            self._file = original(*given)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *given):
            self._file.__exit__(*given)

        def keys(self):
            return self._file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self._file.get_tensor(name)

    monkeypatch.setattr(kept_module, "safe_open", Watched)
    found, _ = factors(methods[0], KeptStatistics(tmp_path, methods))
    assert sorted(read) == sorted(f"gradient/{name}" for name in found)


def test_files_that_go_while_they_are_read_are_read_to_the_end(tmp_path, monkeypatch):
    """As those do that another process needs no more."""
    methods = methods_of(["lora-one", "lora-da"])
    expected, _ = factors(methods[1])
    factors(methods[0], KeptStatistics(tmp_path, methods))
    original = kept_module._read_back

    def reading(*given):
        for path in tmp_path.glob("*/*"):
            path.unlink()
        return original(*given)

    monkeypatch.setattr(kept_module, "_read_back", reading)
    found, report = factors(methods[1], KeptStatistics(tmp_path, methods))
    assert "read once" in report.plan
    for name, (A, B) in expected.items():
        torch.testing.assert_close(found[name][1] @ found[name][0], B @ A)


def test_a_studys_starts_read_their_data_once(tmp_path, readings):
    base = small_run(llama_folder(tmp_path / "model"), sums(tmp_path / "sums.jsonl", 90), schedule={"steps": 2})
    settings = {
        "base": base.model_dump(mode="json"),
        "axes": {
            "start": ["lora", "lora-one:samples=4", "lora-da:samples=4", "lora-sb:samples=4"],
            "adapter.r": [2, 3],
        },
    }
    study = validated_study(settings, "study")
    grid = run_study(study, tmp_path / "study")
    assert len(readings) == 1
    assert not (tmp_path / "study" / STARTS / STATISTICS).exists()
    results = Results(tmp_path / "study")
    ranks = {**settings, "axes": {"start": ["lora-one:samples=4"], "adapter.r": [2, 3, 4]}}
    readings.clear()
    run_study(validated_study(ranks, "study"), tmp_path / "of ranks")
    assert len(readings) == 1
    for cell in grid.cells():
        alone = stages.execute(cell.run, tmp_path / cell.run.key)
        shared = results.of(cell)
        losses = [dict(result.series["loss"]) for result in (shared, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        reads = cell.run.start.method != "lora"
        assert len(shared.start["read_for"]) == 3 * reads and not alone.start["read_for"]
    summary = summarised(grid, tmp_path / "study")
    for part in summary.parts:
        sheet = cost_sheet(summary, part)
        assert [row[0] for row in sheet.rows if "(read together)" not in row[2]] == ["lora"]
        assert "each is charged with the whole of it" in sheet.caption


def test_statistics_that_nobody_else_wants_are_not_kept(tmp_path):
    base = small_run(tmp_path / "model", tmp_path / "sums.jsonl")

    def kept(*starts, of, **changes):
        axes = {"start": list(starts), **changes}
        study = validated_study({"base": base.model_dump(mode="json"), "axes": axes, "seeds": 2}, "study")
        runs = [cell.run for cell in Grid(study).cells()]
        return Shared(tmp_path / "starts", runs).statistics(next(run for run in runs if run.start.method == of))

    assert kept("lora", "lora-one", of="lora-one") is None
    assert kept("lora", "lora-one", "lora-da", of="lora") is None
    assert kept("lora", "lora-one", "lora-da", of="lora-da") is not None
    # Rates don't matter to the start, but to lora-sb's, and never to what it reads.
    assert kept("lora-one", of="lora-one", **{"optimizer.lr": [1e-3, 1e-2]}) is None
    assert kept("lora-sb", of="lora-sb", **{"optimizer.lr": [1e-3, 1e-2]}) is not None
    assert kept("lora-one", of="lora-one", **{"batch.max_length": [32, 64]}) is None
