"""Kills, full disks and damaged files: what was finished stays, and nothing is believed that is not what it says."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from conftest import tiny_llama
from headstart import files
from headstart.errors import CheckpointError, HeadstartError, LayerError, ModelError
from headstart.store import claims
from headstart.stream import load_residual, run, stream_start
from headstart.stream.tensors import TensorFile
from headstart.stream.work import Work

METHOD = "inilora:steps=30"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny_llama(num_hidden_layers=3).to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    return path


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    start(folder, out)
    return contents(out)


def start(folder, out, method=METHOD, form="residual", **options):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return stream_start(folder, method, config, out, name="tiny", form=form, progress=False, **options)


def contents(out):
    return {str(each.relative_to(out)): each.read_bytes() for each in sorted(out.rglob("*")) if each.is_file()}


def finished(out):
    """The pieces that a next run would believe: whole, digests and all."""
    found = {}
    for work in out.parent.glob(f".{out.name}.stream-*"):
        for file in work.rglob("*.safetensors"):
            found[file.name] = file.read_bytes()
    return found


def count_finished(out):
    return len(list(out.parent.glob(f".{out.name}.stream-*/**/*.safetensors")))


def run_and_kill(folder, out, arrange):
    """Run in a child, which ``arrange`` prepares; return its exit code."""
    child = multiprocessing.get_context("fork").Process(target=_child, args=(folder, out, arrange))
    child.start()
    child.join()
    return child.exitcode


def _child(folder, out, arrange):
    torch.set_num_threads(1)
    if arrange is not None:
        arrange()
    start(folder, out)


def at_each_file(happens):
    """Let something happen whenever a file has been begun, under its hidden name."""
    plain = files._hidden

    @contextlib.contextmanager
    def hidden(*place, **kind):
        with plain(*place, **kind) as path:
            happens()
            yield path

    files._hidden = hidden


def test_kills_at_random_times_lose_nothing(folder, expected, tmp_path):
    out = tmp_path / "out"
    generator = random.Random(0)
    context = multiprocessing.get_context("fork")
    kept: dict[str, bytes] = {}
    for _ in range(5):
        # So many of the 46 files and no more, however fast the machine: never the last one before the kill.
        allowed = generator.randrange(2, 10)
        gate = context.Semaphore(allowed)

        def arrange(gate=gate):
            at_each_file(gate.acquire)

        child = context.Process(target=_child, args=(folder, out, arrange))
        child.start()
        while count_finished(out) < len(kept) + allowed - 1 and child.is_alive():
            time.sleep(0.001)
        # Within the last piece that it may make, or before the next.
        time.sleep(generator.uniform(0, 0.02))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL and not out.exists()
        now = finished(out)
        assert len(now) > len(kept)
        assert all(now.get(name) == data for name, data in kept.items())
        kept = now
    start(folder, out)
    assert contents(out) == expected
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("count", [1, 2, 9, 21, 22, 40, 43, 46])
def test_kills_in_the_middle_of_a_write_lose_nothing(folder, expected, tmp_path, count):
    out = tmp_path / "out"

    def arrange():
        begun = 0

        def cut():
            nonlocal begun
            begun += 1
            if begun == count:
                next(path for path in out.parent.rglob(".*.headstart") if path.is_file()).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)

        at_each_file(cut)

    assert run_and_kill(folder, out, arrange) == -signal.SIGKILL
    assert not out.exists()
    made = []
    plain = Work.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "put", lambda self, name, *rest: (made.append(name), plain(self, name, *rest)))
        before = set(finished(out))
        start(folder, out)
    assert contents(out) == expected
    assert not {f"{name}.safetensors" for name in made} & before


def test_a_kill_between_the_two_renames_is_not_seen(folder, expected, tmp_path):
    """Killed after the folder took its place, and before the pieces were removed."""
    out = tmp_path / "out"

    def arrange():
        Work.clear = lambda self: os.kill(os.getpid(), signal.SIGKILL)

    assert run_and_kill(folder, out, arrange) == -signal.SIGKILL
    assert contents(out) == expected
    with pytest.raises(CheckpointError, match="exists"):
        start(folder, out)
    start(folder, out, force=True)
    assert contents(out) == expected
    assert not list(tmp_path.glob(".*"))


def stop_at(monkeypatch, count):
    """Let the run fail when it has put ``count`` pieces."""
    plain, put = Work.put, []

    def stopping(self, name, *rest):
        plain(self, name, *rest)
        put.append(name)
        if len(put) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(Work, "put", stopping)


def pieces(out):
    return sorted(next(out.parent.glob(f".{out.name}.stream-*")).glob("layer-*.safetensors"))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign", "swap", "folder"])
def test_damaged_pieces_are_made_again(folder, expected, tmp_path, damage):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 21 + 15)
        start(folder, out)
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
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 21 + 3)
        start(folder, out)
    file = pieces(out)[0]
    data = file.read_bytes()
    place = data.index(b"norm_A") + len(b'norm_A\\": ')
    assert data[place : place + 1].isdigit()
    file.write_bytes(data[:place] + (b"7" if data[place : place + 1] != b"7" else b"8") + data[place + 1 :])
    assert TensorFile.open(file)
    start(folder, out)
    assert contents(out) == expected


@pytest.mark.parametrize(
    "change", [dict(seed=1), dict(method="inilora:steps=31"), dict(form="anchored"), dict(method="pissa")]
)
def test_pieces_of_other_settings_are_not_used(folder, tmp_path, change):
    out, alone = tmp_path / "out", tmp_path / "alone"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 21 + 4)
        start(folder, out)
    left = pieces(out)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 1)
        start(folder, out, **change)
    # Even where they lie in the right place under the right names.
    for work in tmp_path.glob(".out.stream-*"):
        for file in left:
            if file.parent != work:
                shutil.copy(file, work)
    start(folder, out, **change)
    start(folder, alone, **change)
    assert contents(out) == contents(alone)


def test_pieces_of_another_checkpoint_are_not_used(folder, tmp_path):
    out, other = tmp_path / "out", tmp_path / "model"
    shutil.copytree(folder, other)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 21 + 6)
        start(other, out)
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


def test_a_dead_process_leaves_its_layers_to_the_others(folder, expected, tmp_path, monkeypatch):
    """The first process waits while another holds a layer, and takes it over when that one dies."""
    out = tmp_path / "out"
    held = multiprocessing.get_context("fork").Event()
    context = multiprocessing.get_context("fork")

    def hold():
        os.environ.update(RANK="1", WORLD_SIZE="2")

        def wait(self, name, *rest):
            held.set()
            time.sleep(600)

        Work.put = wait

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 1)
        start(folder, out)
    other = context.Process(target=_child, args=(folder, out, hold))
    other.start()
    assert held.wait(60)
    first = context.Process(target=_child, args=(folder, out, None))
    first.start()
    first.join(3)
    assert first.is_alive() and not out.exists()
    other.kill()
    other.join()
    first.join(60)
    assert first.exitcode == 0
    assert contents(out) == expected


def test_late_processes_find_everything_done(folder, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(run.psutil.Process, "create_time", lambda self: time.time() - 100)
    start(folder, out)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start(folder, out) is None
    assert contents(out) == expected and not list(tmp_path.glob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many KiB."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk-{size}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("mounting needs privileges")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("size", [4, 64, 160, 260])
def test_a_full_disk_is_one_sentence_and_goes_on_after_room_was_made(folder, expected, tmp_path, small_disk, size):
    place = small_disk(size)
    with pytest.raises(CheckpointError, match=r"can't be written \(No space left on device\): make room"):
        start(folder, place / "out")
    assert not (place / "out").exists()
    kept = finished(place / "out")
    subprocess.run(["mount", "-o", "remount,size=4096k", place], check=True)
    start(folder, place / "out")
    assert contents(place / "out") == expected
    assert kept or size < 100


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


@pytest.mark.parametrize("step", ["claims", "need", "put"])
def test_a_process_that_is_late_leaves_quietly(folder, tmp_path, monkeypatch, step):
    """The first process finishes, and clears the pieces away, while this one is at some step."""
    plain, out = getattr(Work, step), tmp_path / "out"
    Work(out, {}).create()

    def cleared(self, *arguments, **options):
        self.clear()
        return plain(self, *arguments, **options)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run, "_invited", lambda work, *_: work.create() or True)
    monkeypatch.setattr(Work, step, cleared)
    assert start(folder, out) is None
    assert not list(tmp_path.glob(".out.stream-*"))


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


def test_a_process_number_that_is_none_is_a_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(HeadstartError, match="RANK='first'"):
        start(folder, tmp_path / "out")


def test_a_first_process_that_doesnt_come_is_waited_for_and_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run, "_PATIENCE", 0.1)
    with pytest.raises(CheckpointError, match=r"process 1 waited .* for process 0"):
        start(folder, tmp_path / "out")


@pytest.mark.parametrize("metadata", ["abc", ["a"], {"a": 1}])
def test_metadata_that_is_none_is_damage(tmp_path, metadata):
    header = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="damaged"):
        TensorFile.open(tmp_path / "file")
