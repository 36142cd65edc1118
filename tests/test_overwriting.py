"""Starts and comparisons that are made again replace what they wrote before, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from peft import LoraConfig

from conftest import logits, tiny_llama
from headstart.errors import HeadstartError
from headstart.stream import load_residual, stream_start
from headstart.study.compare import compare, start_over
from headstart.study.comparison import Comparison
from headstart.training.run import Result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path, max_shard_size="30KB")
    return path


def start(folder, out, base):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    stream_start(folder, "pissa", config, out, form=base, force=True, progress=False)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("others", [False, True])
def test_a_streamed_start_replaces_a_streamed_start(others, folder, tmp_path, batch):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    start(folder, fresh, "residual")
    start(folder, out, "residual")
    if others:
        (out / "notes").write_text("mine")
        (out / "base" / "notes").write_text("mine")
        (out / "base" / "model-00009-of-00009.safetensors").write_text("mine")
    stay = ["base/model-00009-of-00009.safetensors", "base/notes", "notes"] if others else []
    start(folder, out, "residual")
    assert names(out) == sorted([*names(fresh), *stay])
    wanted = logits(load_residual(fresh), batch)
    assert (logits(load_residual(out), batch) - wanted).norm() == 0
    # A residual model that belongs to no adapter any more would be read as one that does.
    start(folder, out, "anchored")
    assert names(out) == sorted(["adapter_config.json", "adapter_model.safetensors", "headstart.json", *stay])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]


def result(folder, method):
    folder.mkdir(parents=True)
    found = Result(method, 1.0, 0.5, 10, 0.1, 0.2, 0)
    (folder / "result.json").write_text(json.dumps(asdict(found)))
    return found


def test_a_comparison_that_starts_over_deletes_its_runs_alone(tmp_path):
    earlier = Comparison(model="a", methods=("lora", "pissa"))
    (tmp_path / "comparison.json").write_text(json.dumps(asdict(earlier)))
    for method in earlier.methods:
        result(tmp_path / method, method)
    result(tmp_path / "olora", "olora")  # of a comparison before that one
    result(tmp_path / "another", "lora")  # of no comparison here: it has another name than its method
    (tmp_path / "milora").mkdir()
    (tmp_path / "lora" / "checkpoint").mkdir()
    (tmp_path / "lora" / "checkpoint" / "adapter_config.json").write_text("{}")
    (tmp_path / "pissa" / "checkpoint").mkdir()
    (tmp_path / "pissa" / "checkpoint" / "notes").write_text("mine")
    (tmp_path / "pissa" / "trainer" / "checkpoint-10").mkdir(parents=True)
    for name in ("table.md", "report.html", "notes"):
        (tmp_path / name).write_text("")
    later = Comparison(model="b", methods=("milora",))
    with pytest.raises(HeadstartError, match="other settings"):
        compare(later, tmp_path, lambda: pytest.fail("it is refused"))
    start_over(tmp_path, later)
    assert names(tmp_path) == ["another/result.json", "comparison.json", "notes", "pissa/checkpoint/notes"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["another", "milora", "pissa"]
    assert json.loads((tmp_path / "comparison.json").read_text())["model"] == "b"
    (tmp_path / "milora").rmdir()
    found = result(tmp_path / "milora", "milora")
    assert compare(later, tmp_path, lambda: pytest.fail("all is done")) == [found]
