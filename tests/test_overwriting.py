"""Starts that are made again replace what they wrote before, and nothing else."""

from __future__ import annotations

import pytest
from peft import LoraConfig

from conftest import logits, tiny_llama
from headstart.stream import load_residual, stream_start


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
