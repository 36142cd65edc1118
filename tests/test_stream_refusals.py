"""What a streamed start refuses in a sentence: broken checkpoints, other starts, places that it can't take."""

from __future__ import annotations

import json
import os
import random
import re
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from conftest import tiny_llama
from headstart.errors import CheckpointError, HeadstartError, LayerError, ModelError
from headstart.stream import load_residual, stream_start
from headstart.stream.tensors import TensorFile
from streamed import contents, save_model, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    start(folder, out)
    return contents(out)


BROKEN = {
    "cut": (lambda data, header: data[: len(data) - 10], "truncated"),
    "cut in header": (lambda data, header: data[: header // 2], "header is longer than the file"),
    "empty": (lambda data, header: b"", "header is longer"),
    "longer": (lambda data, header: data + b"\0" * 8, "goes on after the last tensor"),
    "a picture": (lambda data, header: b"\x89PNG\r\n\x1a\n" + b"\0" * 5000, "header is longer"),
    "html": (lambda data, header: b"<!DOCTYPE html>" * 400, "header is longer"),
    "garbled header": (
        lambda data, header: data[:8] + b"{" + b"x" * (header - 1) + data[8 + header :],
        "can't be read",
    ),
    "a pickle": (lambda data, header: b"PK\x03\x04" + b"\0" * 5000, "header"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_shards_are_named(folder, tmp_path, kind):
    other, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder, other)
    file = sorted(other.glob("*.safetensors"))[1]
    data = file.read_bytes()
    damage, words = BROKEN[kind]
    file.write_bytes(damage(data, int.from_bytes(data[:8], "little")))
    with pytest.raises(CheckpointError, match=f"{file.name}.*{words}"):
        start(other, out)
    assert not list(tmp_path.glob("*out*"))


def test_broken_folders_are_named(folder, tmp_path):
    def copy():
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        return shutil.copytree(folder, tmp_path / "model")

    def refused(error, match):
        with pytest.raises(error, match=match):
            start(tmp_path / "model", tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))

    index = copy() / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text("{")
    refused(CheckpointError, "index of safetensors")
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "model.ghost": "model-9.safetensors"}}))
    refused(CheckpointError, "lacks the shard 'model-9")
    shard = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "model.ghost": shard}}))
    refused(CheckpointError, "no tensor 'model.ghost'")
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    refused(CheckpointError, "outside its own folder")
    index.unlink()
    refused(ModelError, "neither model.safetensors nor")
    (copy() / "config.json").write_text("{")
    refused(ModelError, "can't be read")
    settings = json.loads((folder / "config.json").read_text())
    (copy() / "config.json").write_text(json.dumps({**settings, "hidden_size": 64}))
    refused(CheckpointError, r"has shape \(32, 32\)")
    (copy() / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "fp8"}}))
    refused(CheckpointError, "quantised")
    (copy() / "config.json").write_text(json.dumps({**settings, "architectures": ["OwnModel"]}))
    refused(ModelError, "is a OwnModel")
    (copy() / "adapter_config.json").write_text("{}")
    refused(ModelError, "holds an adapter")
    for file in copy().glob("*.safetensors"):
        found = load_file(file)
        save_file({name: each.to(torch.float8_e4m3fn) for name, each in found.items()}, file)
    refused(CheckpointError, "F8_E4M3")
    for file in copy().glob("*.safetensors"):
        found = load_file(file)
        for name in found:
            if "layers.1.mlp.up_proj" in name:
                found[name][3, 5] = float("nan")
        save_file(found, file)
    with pytest.raises(LayerError, match=r"'model.layers.1.mlp.up_proj'.*NaN"):
        start(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_header_makes_anything_but_a_sentence(folder, tmp_path):
    data = next(iter(sorted(folder.glob("*.safetensors")))).read_bytes()
    length = int.from_bytes(data[:8], "little")
    generator = random.Random(2)
    file = tmp_path / "file"
    refused = 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(generator.randrange(1, 4)):
            broken[generator.randrange(8 + length)] = generator.randrange(256)
        file.write_bytes(broken)
        try:
            found = TensorFile.open(file)
            for name in found.entries:
                found.read(name)
        except HeadstartError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("damage", ["untouched", "cut", "missing", "config"])
def test_a_damaged_residual_model_is_a_sentence(folder, expected, tmp_path, damage):
    out = tmp_path / "out"
    start(folder, out)
    shard = next(
        file for file in sorted((out / "base").glob("*.safetensors")) if "q_proj" in str(load_file(file).keys())
    )
    if damage == "untouched":
        shutil.copy(folder / shard.name, shard)
    elif damage == "cut":
        os.truncate(shard, shard.stat().st_size - 3)
    elif damage == "missing":
        shard.unlink()
    else:
        (out / "base" / "config.json").write_text("{")
    with pytest.raises(ModelError if damage == "config" else CheckpointError, match=re.escape(str(out / "base"))):
        load_residual(out)


def test_a_head_that_is_not_the_models_is_refused(tmp_path):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 101}))
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(CheckpointError, match=r"lm_head.*has shape \(97, 32\)"):
        stream_start(folder, "pissa", lora, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["pissa", "olora", False, "eva"])
def test_a_start_of_pefts_own_beside_ours_is_refused(folder, tmp_path, init):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    with pytest.raises(LayerError, match="init_lora_weights"):
        stream_start(folder, "init-a", lora, tmp_path / "out", progress=False)


def test_places_that_cant_be_replaced_are_refused_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (".", tmp_path):
        with pytest.raises(CheckpointError, match="the folder that the command runs in"):
            start(folder, place, force=True)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="a link to something that doesn't exist"):
        start(folder, tmp_path / "link")
    assert [each.name for each in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("metadata", ["abc", ["a"], {"a": 1}])
def test_metadata_that_is_none_is_damage(tmp_path, metadata):
    header = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="damaged"):
        TensorFile.open(tmp_path / "file")


def test_a_process_number_that_is_none_is_a_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(HeadstartError, match="RANK='first'"):
        start(folder, tmp_path / "out")
