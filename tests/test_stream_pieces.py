"""The pieces of a streamed start: believed only where they are what they say, and made again where they are not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart import files
from headstart.errors import CheckpointError
from headstart.store import claims
from headstart.stream.tensors import TensorFile
from headstart.stream.work import Work
from streamed import LAYERS, contents, save_model, start, start_and_stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    start(folder, out)
    return contents(out)


def pieces(out):
    return sorted(next(out.parent.glob(f".{out.name}.stream-*")).glob("layer-*.safetensors"))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign", "swap", "folder"])
def test_damaged_pieces_are_made_again(folder, expected, tmp_path, damage):
    out = tmp_path / "out"
    start_and_stop(folder, out, LAYERS + 15)
    found = pieces(out)
    assert len(found) == 15
    generator = random.Random(1)
    for file in found[::2]:
        if damage == "flip":
            flip(file, generator.randrange(file.stat().st_size))
        elif damage == "truncate":
            os.truncate(file, generator.randrange(file.stat().st_size))
        elif damage == "empty":
            file.write_bytes(b"")
        elif damage == "foreign":
            save_file({"a": torch.ones(3)}, file)
        elif damage == "swap":
            shutil.copy(found[1], file)
        else:
            file.with_name(f".{file.name}.{'0' * 8}-{'0' * 16}.headstart").write_bytes(b"half")
            file.unlink()
    start(folder, out)
    assert contents(out) == expected


def test_a_digit_changed_in_a_report_is_not_believed(folder, expected, tmp_path):
    out = tmp_path / "out"
    start_and_stop(folder, out, LAYERS + 3)
    file = pieces(out)[0]
    data = file.read_bytes()
    place = data.index(b"norm_A") + len(b'norm_A\\": ')
    assert data[place : place + 1].isdigit()
    file.write_bytes(data[:place] + (b"7" if data[place : place + 1] != b"7" else b"8") + data[place + 1 :])
    assert TensorFile.open(file)
    start(folder, out)
    assert contents(out) == expected


@pytest.mark.parametrize(
    "change", [dict(seed=1), dict(method="inilora:solver=adam,steps=31"), dict(form="anchored"), dict(method="pissa")]
)
def test_pieces_of_other_settings_are_not_used(folder, tmp_path, change):
    out, alone = tmp_path / "out", tmp_path / "alone"
    start_and_stop(folder, out, LAYERS + 4)
    left = pieces(out)
    start_and_stop(folder, out, 1, **change)
    # Even where they lie in the right place under the right names.
    for work in tmp_path.glob(".out.stream-*"):
        for file in left:
            if file.parent != work:
                shutil.copy(file, work)
    start(folder, out, **change)
    start(folder, alone, **change)
    assert contents(out) == contents(alone)


def test_pieces_of_other_arithmetic_are_not_used(folder, expected, tmp_path, monkeypatch):
    """The release stays while its source changes, and the cache of factors tells such a change."""
    plain, put = Work.put, []

    def counting(self, name, *rest):
        plain(self, name, *rest)
        put.append(name)

    monkeypatch.setattr(Work, "put", counting)
    for number, arithmetic in enumerate([None, lambda: "changed"]):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        start_and_stop(folder, out, LAYERS + 4)
        if arithmetic:
            monkeypatch.setattr("headstart.cache.keys._source_digest", arithmetic)
        put.clear()
        start(folder, out)
        layers = [name for name in put if name.startswith("layer-")]
        assert len(layers) == (LAYERS if arithmetic else LAYERS - 4)
        assert contents(out) == expected


def test_pieces_of_another_checkpoint_are_not_used(folder, tmp_path):
    out, other = tmp_path / "out", tmp_path / "model"
    shutil.copytree(folder, other)
    start_and_stop(other, out, LAYERS + 6)
    for file in other.glob("*.safetensors"):
        changed = {name: -each for name, each in load_file(file).items()}
        save_file(changed, file, metadata={"format": "pt"})
    start(other, out)
    start(other, tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")


def test_a_checkpoint_that_changes_under_way_is_noticed(folder, tmp_path):
    other, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder, other)
    plain, count = Work.put, 0

    def touching(self, name, *rest):
        nonlocal count
        plain(self, name, *rest)
        count += 1
        if count == 25:
            for file in other.glob("*.safetensors"):
                os.utime(file, ns=(1, 1))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="was changed while it was read"):
        patch.setattr(Work, "put", touching)
        start(other, out)
    assert not out.exists()


def test_locks_are_the_systems(tmp_path):
    work = Work(tmp_path / "out", {})
    work.create()
    with work.claims(["a"]) as first, work.claims(["a", "b"]) as second:
        assert (first, second) == (["a"], ["b"])
    with work.claims(["a"]) as again:
        assert again == ["a"]


def test_what_was_cleared_is_not_begun_anew(tmp_path):
    work, late = (Work(tmp_path / "out", {}) for _ in range(2))
    work.create()
    work.clear()
    with pytest.raises(CheckpointError, match="is gone"), late.claims(["a"]):
        pass
    assert not list(tmp_path.iterdir())


def test_a_start_that_others_work_on_is_left_alone(tmp_path):
    work, other = Work(tmp_path / "out", {"seed": 0}), Work(tmp_path / "out", {"seed": 1})
    work.create()
    other.create()
    with other.claims(["a"]):
        work.clear()
        assert other.folder.is_dir() and not work.folder.exists()
    work.create()
    work.clear()
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_locks_processes_write_to_files_of_their_own(folder, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "take_lock", lambda path: None)
    monkeypatch.setattr(files, "fcntl", None)
    out, plain, others = tmp_path / "out", files._hidden, 0

    @contextlib.contextmanager
    def beside_another(place, name, *, folder):
        nonlocal others
        with plain(place, name, folder=folder) as path:
            if not folder:
                with plain(place, name, folder=False) as other:
                    assert other != path
                    other.write_bytes(b"what another process has written so far")
                    others += 1
                    yield path
                    assert other.exists()
            else:
                yield path

    monkeypatch.setattr(files, "_hidden", beside_another)
    start(folder, out)
    assert contents(out) == expected and others > 40


def test_a_shard_may_have_a_pieces_name(folder, tmp_path):
    named, out = tmp_path / "model", tmp_path / "out"
    named.mkdir()
    found = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    shutil.copy(folder / "config.json", named)
    save_file(found, named / "layer-00000.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(found, "layer-00000.safetensors")}
    (named / "model.safetensors.index.json").write_text(json.dumps(index))
    start(named, out)
    assert load_file(out / "base" / "layer-00000.safetensors").keys() == found.keys()
