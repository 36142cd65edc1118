"""The commands that list, verify and clear the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import headstart as hs
from cached import Maker, age, key_of, known
from headstart.cache import FactorCache, description
from headstart.cache.eviction import entry_path, list_entries
from headstart.cli import main
from headstart.cli.cache import human_age, human_bytes, parse_age

KEYS = [key_of(number) for number in range(8)]


@pytest.fixture(autouse=True)
def default_limit(monkeypatch):
    monkeypatch.delenv("HEADSTART_CACHE_LIMIT")


def run(capsys, *arguments):
    capsys.readouterr()
    try:
        main(["cache", *map(str, arguments)])
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    return code, captured.out if code == 0 else captured.out + captured.err


@pytest.fixture
def filled(tmp_path):
    """A cache with three entries of PiSSA and one of LoRA-XS, used at different times."""
    methods = [hs.PiSSA(), hs.PiSSA(), hs.PiSSA(), hs.LoRAXS(std=0.5)]
    layers = [known(name=f"layer{number}", r=4 if number == 2 else 2) for number in range(4)]
    folder = tmp_path / "factors"
    FactorCache(folder, 2**30).fetch(
        KEYS[:4], Maker(KEYS[:4]), describe=lambda position: description(methods[position], layers[position])
    )
    for number, days in enumerate((40, 3, 1, 2)):
        age(folder, KEYS[number], 86_400 * days)
    return tmp_path


def test_list_shows_what_is_kept(filled, capsys, monkeypatch):
    code, out = run(capsys, "list", "--folder", filled)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert [line[:4] for line in lines[1:4]] == [
        ["pissa", "6x5", "4", "1"],
        ["lora-xs:std=0.5", "6x5", "2", "1"],
        ["pissa", "6x5", "2", "2"],
    ]
    assert [line[-3:] for line in lines[2:4]] == [["2", "days", "ago"], ["3", "days", "ago"]]
    assert lines[4][:2] == ["4", "entries,"]
    assert "of at most 10.0 GiB" in out
    monkeypatch.setenv("HEADSTART_CACHE", str(filled))
    code, out = run(capsys, "list", "--json")
    shown = json.loads(out)
    assert [entry["layer"] for entry in shown["entries"]] == ["layer2", "layer3", "layer1", "layer0"]
    assert shown["bytes"] == sum(entry["bytes"] for entry in shown["entries"])


def test_list_and_verify_show_damage(filled, capsys):
    path = entry_path(filled / "factors", KEYS[0])
    path.write_bytes(path.read_bytes()[:-1])
    assert "pissa" in run(capsys, "list", "--folder", filled)[1]
    entry_path(filled / "factors", KEYS[1]).write_bytes(b"foreign")
    code, out = run(capsys, "list", "--folder", filled)
    assert (code, "(damaged)" in out) == (0, True)
    code, out = run(capsys, "verify", "--folder", filled)
    assert code == 1
    assert KEYS[0] in out
    assert KEYS[1] in out
    assert "4 entries" in out
    assert "2 damaged" in out
    code, out = run(capsys, "verify", "--folder", filled, "--remove")
    assert (code, "2 damaged, 2 removed" in out) == (0, True)
    code, out = run(capsys, "verify", "--folder", filled)
    assert (code, "2 entries" in out, "all sound" in out) == (0, True, True)


def test_clear_removes_what_is_asked_for(filled, capsys):
    def left():
        return {entry.key for entry in list_entries(filled / "factors")}

    code, out = run(capsys, "clear", "--folder", filled, "--older-than", "30d")
    assert (code, left()) == (0, set(KEYS[1:4]))
    assert out.startswith("removed 1 entry, ")
    assert run(capsys, "clear", "--folder", filled, "--method", "pissa", "--older-than", "2d")[0] == 0
    assert left() == {KEYS[2], KEYS[3]}
    run(capsys, "clear", "--folder", filled, "--method", "lora-xs")
    assert left() == {KEYS[2]}
    assert run(capsys, "clear", "--folder", filled)[0] == 0
    assert left() == set()
    assert run(capsys, "clear", "--folder", filled / "nothing")[0] == 0
    assert run(capsys, "clear", "--folder", filled, "--older-than", "soon")[0] == 2
    code, out = run(capsys, "clear", "--folder", filled, "--method", "pisa")
    assert (code, "Did you mean 'pissa'" in out) == (1, True)


@pytest.mark.parametrize("command", ["list", "verify", "clear"])
def test_a_folder_that_is_a_file_is_a_sentence(command, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, out = run(capsys, command, "--folder", tmp_path / "file")
    assert (code, "is a file: name another" in " ".join(out.split())) == (1, True)


def test_clear_leaves_what_is_not_asked_for_whatever_the_limit(filled, capsys, monkeypatch):
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "1KB")
    run(capsys, "clear", "--folder", filled, "--older-than", "30d")
    assert len(list_entries(filled / "factors")) == 3


def test_units_are_human():
    assert [human_bytes(size) for size in (0, 1023, 1024, 1536 * 2**20, 10 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 GiB",
        "10240.0 GiB",
    ]
    assert [human_age(seconds) for seconds in (0, 600, 7200 * 3, 86_400 * 30)] == [
        "just now",
        "10 minutes ago",
        "6 hours ago",
        "30 days ago",
    ]
    assert [parse_age(text) for text in ("30d", "1.5h", "2w")] == [30 * 86_400, 5400, 14 * 86_400]


def test_the_commands_leave_other_files_alone(filled, capsys):
    foreign = Path(filled) / "factors" / "ab" / "thesis.safetensors"
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(b"mine")
    run(capsys, "clear", "--folder", filled)
    assert foreign.read_bytes() == b"mine"
