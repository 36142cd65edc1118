"""Files and folders that appear whole or not at all; what isn't ours stays; what a killed process left goes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import time

import pytest

from children import forked, killed
from headstart import files
from headstart.errors import CheckpointError
from headstart.files import (
    Kind,
    check_free,
    put_in_place,
    whole_file,
    whole_folder,
    work_folder,
    write_json,
    write_whole,
)

KIND = Kind(lambda folder: ("weights", "config", "record"), key="config")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes of these tests are forks")


def fill(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None for path in folder.rglob("*")
    }


def write(folder, *, force=True, **new):
    with whole_folder(folder, KIND, force=force) as work:
        fill(work, **new)


@pytest.fixture(params=["exchange", "no exchange"])
def exchange(request, monkeypatch):
    """With the system's exchange of two folders, and on a system that has none."""
    if request.param == "no exchange":
        monkeypatch.setattr(files, "_renameat2", lambda: None)
    elif files._renameat2() is None:
        pytest.skip("this system can't exchange two folders")
    return request.param


def test_a_new_folder_is_there_at_the_end(tmp_path):
    with whole_folder(tmp_path / "a" / "out", KIND) as work:
        fill(work, weights="1", config="1")
        assert not (tmp_path / "a" / "out").exists()
    assert contents(tmp_path / "a") == {"out": None, "out/weights": "1", "out/config": "1"}


def test_a_folder_of_ours_is_replaced_with_all_that_is_in_it(tmp_path, exchange):
    fill(tmp_path / "out", weights="0", config="0", record="0")
    before = (tmp_path / "out").stat().st_ino
    write(tmp_path / "out", weights="1", config="1")
    assert contents(tmp_path) == {"out": None, "out/weights": "1", "out/config": "1"}
    assert ((tmp_path / "out").stat().st_ino != before) == (exchange == "exchange")


def test_what_is_not_ours_stays(tmp_path, exchange):
    out = tmp_path / "out"
    fill(out, weights="0", config="0", record="0", notes="mine")
    fill(out / "checkpoint-1", weights="another's", state="mine")
    (out / "empty").mkdir()
    (out / "link").symlink_to("notes")
    write(out, weights="1", config="1")
    assert contents(tmp_path) == {
        "out": None,
        "out/weights": "1",
        "out/config": "1",
        "out/notes": "mine",
        "out/checkpoint-1": None,
        "out/checkpoint-1/weights": "another's",
        "out/checkpoint-1/state": "mine",
        "out/empty": None,
        "out/link": "mine",
    }
    assert (out / "link").is_symlink()


def test_what_comes_at_the_last_moment_stays_too(tmp_path, exchange, monkeypatch):
    out = tmp_path / "out"
    fill(out, weights="0", config="0")
    plain = files._exchanged

    def late(work, target):
        fill(target, notes="mine")
        return plain(work, target)

    monkeypatch.setattr(files, "_exchanged", late)
    write(out, weights="1", config="1")
    assert contents(tmp_path) == {"out": None, "out/weights": "1", "out/config": "1", "out/notes": "mine"}


def test_without_force_the_sentence_says_what_would_be_replaced_and_what_stays(tmp_path):
    out = tmp_path / "out"
    fill(out, weights="0", config="0", notes="mine")
    for step in (1, 2, 3, 4):
        (out / f"checkpoint-{step}").mkdir()
    with pytest.raises(
        CheckpointError,
        match=r"replaces config and weights there, and leaves checkpoint-1, checkpoint-2, checkpoint-3, checkpoint-4 "
        r"and 1 more as they are",
    ):
        write(out, force=False, weights="1")
    fill(tmp_path / "other", notes="mine")
    with pytest.raises(CheckpointError, match="replaces nothing that is there, and leaves notes as it is"):
        write(tmp_path / "other", force=False, weights="1")
    assert contents(tmp_path / "other") == {"notes": "mine"}


def test_a_file_the_current_folder_and_a_dead_link_are_refused_whatever_is_said(tmp_path, monkeypatch):
    fill(tmp_path, file="x")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, reason in (("file", "is no folder"), ("here", "runs in"), ("dead", "doesn't exist")):
        with pytest.raises(CheckpointError, match=reason):
            check_free(tmp_path / name, KIND, True)


def test_a_folder_that_came_into_being_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(CheckpointError, match="exists"), whole_folder(tmp_path / "out", KIND) as work:
        fill(work, weights="1")
        fill(tmp_path / "out", weights="another's")
    assert contents(tmp_path) == {"out": None, "out/weights": "another's"}


@pytest.mark.parametrize("there", ["nothing", "ours", "others"])
def test_a_failure_leaves_everything_as_it_was(there, tmp_path):
    out = tmp_path / "out"
    if there != "nothing":
        fill(out, weights="0", config="0")
    if there == "others":
        fill(out, notes="mine")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), whole_folder(out, KIND, force=True) as work:
        fill(work, weights="1")
        raise KeyboardInterrupt
    assert contents(tmp_path) == before


def test_a_linked_folder_stays_a_link(tmp_path, exchange):
    fill(tmp_path / "real", weights="0")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", weights="1")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"weights": "1"}


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_a_folders_modes_stay_as_its_owner_set_them(tmp_path, exchange):
    fill(tmp_path / "out", weights="0")
    (tmp_path / "out").chmod(0o2770)
    write(tmp_path / "out", weights="1")
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o2770


@pytest.mark.parametrize("written", [("weights", "config"), ("weights", "config", "record")])
def test_cut_off_between_two_files_nobody_reads_a_mixture(written, tmp_path, monkeypatch):
    """Whatever call is the last one, the folder is the old one, the new one, or lacks what every program asks for."""
    states = set()
    for last in itertools.count():
        out = tmp_path / str(last)
        fill(out, weights="0", config="0", record="0", notes="mine")
        calls = itertools.count()

        def counted(call, calls=calls, last=last):
            def instead(*arguments, **options):
                if next(calls) == last:
                    raise KeyboardInterrupt
                return call(*arguments, **options)

            return instead

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", counted(os.replace))
            patch.setattr(files.Path, "unlink", counted(files.Path.unlink))
            with work_folder(tmp_path, "work") as work:
                fill(work, **dict.fromkeys(written, "1"))
                try:
                    put_in_place(work, out, KIND, force=True)
                    done = True
                except KeyboardInterrupt:
                    done = False
        found = contents(out)
        assert found.pop("notes") == "mine"
        states.add(tuple(sorted(found.items())))
        if done:
            assert found == dict.fromkeys(written, "1")
            break
        assert "config" not in found or found == dict.fromkeys(("weights", "config", "record"), "0")
    assert len(states) > 3


def test_one_file_that_changes_is_replaced_in_one_step(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fill(out, weights="0", config="0", notes="mine")
    seen = []
    plain = os.replace

    def watched(*paths):
        seen.append(contents(out))
        plain(*paths)

    monkeypatch.setattr(files.os, "replace", watched)
    with work_folder(tmp_path, "work") as work:
        fill(work, weights="1", config="0")
        put_in_place(work, out, KIND, force=True)
    assert seen == [{"weights": "0", "config": "0", "notes": "mine"}]
    assert contents(out) == {"weights": "1", "config": "0", "notes": "mine"}


def test_files_are_whole_or_not_there(tmp_path):
    write_whole(tmp_path / "new" / "a", "é")
    write_json({"b": [1]}, tmp_path / "b")
    assert (tmp_path / "new" / "a").read_bytes() == "é".encode()
    assert json.loads((tmp_path / "b").read_text()) == {"b": [1]}
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "b") as work:
        work.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "nowhere" / "a"):
        pytest.fail("there is no such folder")
    assert sorted(contents(tmp_path)) == ["b", "new", "new/a"]
    write_whole(tmp_path / ("n" * 250), b"a long name")
    assert (tmp_path / ("n" * 250)).read_bytes() == b"a long name"


# Processes that are killed.


def wait_in_a_folder(place, ready):
    with work_folder(place, "out") as work, whole_file(place / "file") as file:
        fill(work, weights="half")
        file.write_text("half")
        ready.set()
        time.sleep(600)


def hidden(place):
    return [path for path in place.iterdir() if files.is_hidden(path.name)]


@needs_fork
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    context = multiprocessing.get_context("fork")
    living, dead = context.Event(), context.Event()
    survivor, victim = (forked(wait_in_a_folder, tmp_path, event) for event in (living, dead))
    assert living.wait(60) and dead.wait(60)
    assert len(hidden(tmp_path)) == 4
    killed(victim)
    write(tmp_path / "another", weights="1")
    assert len(hidden(tmp_path)) == 2
    killed(survivor)
    write_whole(tmp_path / "file", b"")
    assert sorted(contents(tmp_path)) == ["another", "another/weights", "file"]


@pytest.mark.parametrize("why", ["another machine", "no locks"])
def test_where_no_lock_tells_a_day_does(why, tmp_path, monkeypatch):
    if why == "no locks":
        monkeypatch.setattr(files, "fcntl", None)
    host = "0" * 8 if why == "another machine" else files._HOST
    young, old = (tmp_path / f".out.{host}-{digit * 16}.headstart" for digit in "ab")
    for folder in (young, old):
        fill(folder, weights="half")
    os.utime(old, (time.time() - 90_000,) * 2)
    write(tmp_path / "out", weights="1")
    assert young.exists()
    assert not old.exists()


def test_files_that_are_called_alike_are_not_taken_for_leftovers(tmp_path):
    names = (
        ".out.headstart",
        ".out.0123abcd-0123456789abcdef.headstart.txt",
        "out.0123abcd-0123456789abcdef.headstart",
    )
    fill(tmp_path, **dict.fromkeys(names, "mine"))
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    write(tmp_path / "out", weights="1")
    assert set(names) < set(contents(tmp_path))


def write_for_ever(out, started):
    for number in itertools.count(1):
        with whole_folder(out, KIND, force=True) as work:
            fill(work, weights=f"{number} " * 2000, config=str(number), record=str(number))
        started.set()


@needs_fork
@pytest.mark.parametrize("others", [False, True])
def test_killed_at_any_moment_the_folder_is_whole_or_refused(others, tmp_path):
    out, draw = tmp_path / "out", random.Random(3)
    refused = 0
    for _ in range(40):
        if others:
            fill(out, notes="mine")
        started = multiprocessing.get_context("fork").Event()
        process = forked(write_for_ever, out, started)
        assert started.wait(60)
        time.sleep(draw.uniform(0, 0.01))
        killed(process)
        found = contents(out)
        assert others == ("notes" in found)
        if "config" in found:
            assert found["weights"].split() == [found["config"]] * 2000
            assert found["record"] == found["config"]
        else:
            refused += 1
            assert others  # there was always an old or a new one where the system can exchange them
        write(out, weights="1", config="1")
        assert contents(tmp_path).keys() == {"out", "out/weights", "out/config", *(["out/notes"] if others else [])}
    assert refused < 40  # some were whole, however the machine is loaded
