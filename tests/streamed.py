"""Streamed starts of one small checkpoint, and the pieces that they leave where they are stopped."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from conftest import tiny_llama
from headstart.stream import stream_start
from headstart.stream.work import Work

METHOD = "inilora:solver=adam,steps=30"
# Of the checkpoint: a piece of moments for each is put first, then one of factors for each.
LAYERS = 21


def save_model(folder):
    tiny_llama(num_hidden_layers=3).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    return folder


def start(folder, out, method=METHOD, form="residual", **options):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return stream_start(folder, method, config, out, name="tiny", form=form, progress=False, **options)


def start_and_stop(folder, out, count, **options):
    """Start, and stop when ``count`` pieces have been put."""
    plain, put = Work.put, []

    def stopping(self, name, *rest):
        plain(self, name, *rest)
        put.append(name)
        if len(put) == count:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Work, "put", stopping)
        start(folder, out, **options)


def top_files(folder):
    """The files of a folder by name, without those of folders in it."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def comparable(report):
    """What a report says, without what it took."""
    lines = report.to_dict()
    for field in ("seconds", "seconds_by_step", "peak_memory"):
        del lines[field]
    for layer in lines["layers"]:
        del layer["seconds"]
    return lines


def checkpoints(tmp_path_factory, make):
    """A function of a model's name, type and shards' size that returns its checkpoint, made once by ``make``."""
    made = {}

    def get(name, dtype=torch.float32, shard_size="1GB"):
        key = (name, dtype, shard_size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoints") / f"{name}-{len(made)}"
            make(name, dtype).save_pretrained(made[key], max_shard_size=shard_size)
        return made[key]

    return get


def contents(out):
    return {str(each.relative_to(out)): each.read_bytes() for each in sorted(out.rglob("*")) if each.is_file()}


def finished(out):
    """The pieces that a next run would believe: whole, digests and all."""
    return {file.name: file.read_bytes() for file in finished_files(out)}


def finished_files(out):
    return list(out.parent.glob(f".{out.name}.stream-*/**/*.safetensors"))
