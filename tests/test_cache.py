"""The cache of factors: keys, digests, what is kept and what goes, and the commands that show it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from cached import Maker, content, contents, decoded, encoded, factors_of, fetch, key_of
from headstart.cache import FactorCache, cacheable, description, keys, layer_key, open_cache
from headstart.cache.eviction import entry_path, evict, list_entries
from headstart.cache.keys import _source_digest
from headstart.cli import main
from headstart.cli.cache import human_age, human_bytes, parse_age
from headstart.errors import HeadstartError, HeadstartWarning
from headstart.files import is_hidden
from headstart.layers import weights
from headstart.layers.weights import weight_digest
from headstart.methods import Moments, get_method, method_class, method_names, parse_method
from headstart.methods.base import ANY_LAYER, Layer, Method, Wants

KEYS = [key_of(number) for number in range(8)]


@pytest.fixture(autouse=True)
def default_limit(monkeypatch):
    monkeypatch.delenv("HEADSTART_CACHE_LIMIT")


def known(**changes):
    fields = dict(name="q", d_out=6, d_in=5, r=2, scaling=2.0, seed=0, moments=Moments(0.0, 0.02))
    return Layer(**(fields | changes))


# Digests.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn])
def test_the_digest_is_of_content_type_and_shape(dtype):
    W = torch.randn(6, 8).to(dtype)
    assert weight_digest(W) == weight_digest(W.clone()) == weight_digest(W.T.contiguous().T)
    changed = W.clone()
    changed.view(torch.uint8)[5, -1] ^= 1
    others = [changed, W.T, W.reshape(-1), W.reshape(8, 6), W[:0], torch.zeros_like(W), W.view(torch.uint8)]
    assert weight_digest(W) not in [weight_digest(other) for other in others]
    assert weight_digest(torch.tensor(1.0)) != weight_digest(torch.tensor(2.0))


@pytest.mark.parametrize("rows", [1, 7, 64, 65, 1000])
def test_large_tensors_are_hashed_in_parts(rows, monkeypatch):
    monkeypatch.setattr(weights, "_PART_BYTES", 1024)
    W = torch.randn(rows, 16)
    digest = weight_digest(W)
    assert weight_digest(torch.randn(16, rows).T.copy_(W)) == digest
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert weight_digest(W) == digest
    last = W.clone()
    last[-1, -1] += 1
    assert weight_digest(last) != digest
    if rows > 64:
        swapped = torch.cat([W[16:32], W[:16], W[32:]])
        assert weight_digest(swapped) != digest


# Keys.


def test_which_methods_can_be_kept():
    kept = {name for name in method_names() if cacheable(get_method(name))}
    assert {"inilora", "pissa", "milora", "olora", "lora-xs"} <= kept
    needs = {str(method_class(name)().wants(ANY_LAYER)) for name in kept}
    assert needs == {"weight", "weight + moments"}


def test_a_method_from_elsewhere_must_declare_its_version():
    @dataclass(frozen=True)
    class Mine(Method):
        name = "mine"
        extra: object = None

        def wants(self, layer):
            return Wants(weight=True)

        def factors(self, layer):
            raise NotImplementedError

    class Versioned(Mine):
        arithmetic_version = 1

    class Next(Mine):
        arithmetic_version = 2

    Next.__qualname__ = Versioned.__qualname__
    assert not cacheable(Mine())
    assert cacheable(Versioned())
    assert not cacheable(Versioned(extra=torch.zeros(1)))
    assert layer_key(Versioned(), known(), "0", device="cpu") != layer_key(Next(), known(), "0", device="cpu")


def test_whatever_the_factors_depend_on_changes_the_key(monkeypatch):
    method = hs.IniLoRA()
    first = layer_key(method, known(), "0", device="cpu")
    assert layer_key(method, known(weight=torch.zeros(6, 5)), "0", device=torch.device("cpu")) == first
    assert layer_key(hs.IniLoRA(lr=5e-4), known(scaling=2), "0", device="cpu") == first
    others = [
        layer_key(method, known(**change), "0", device="cpu")
        for change in (
            dict(name="k"),
            dict(seed=1),
            dict(r=3),
            dict(scaling=1.0),
            dict(d_out=5, d_in=6),
            dict(moments=Moments(0.0, 0.03)),
        )
    ]
    others += [
        layer_key(method, known(), "1", device="cpu"),
        layer_key(method, known(), "0", device="cuda:1"),
        layer_key(method, known(), "0", device="cpu", transposed=True),
        *(layer_key(hs.get_method(name), known(), "0", device="cpu") for name in ("pissa", "milora", "olora")),
    ]
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        words = dict(solver="svd", gauge="random", tolerance=0.1, std=0.1, decay=0.5)
        changed = dataclasses.replace(method, **{field.name: words.get(field.name, value if value is None else 7)})
        others.append(layer_key(changed, known(), "0", device="cpu"))
    monkeypatch.setattr(torch, "__version__", "9.9.9+cpu")
    others.append(layer_key(method, known(), "0", device="cpu"))
    monkeypatch.undo()
    monkeypatch.setattr("headstart.cache.keys.ARITHMETIC_VERSION", -1)
    others.append(layer_key(method, known(), "0", device="cpu"))
    assert len({first, *others}) == 1 + len(others)


def test_a_changed_source_changes_the_key(tmp_path, monkeypatch):
    package = Path(keys.__file__).parent.parent
    for room in ("methods", "linalg"):
        shutil.copytree(package / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    first = _source_digest.__wrapped__()
    monkeypatch.setattr(keys, "__file__", str(tmp_path / "cache" / "keys.py"))
    assert _source_digest.__wrapped__() == first
    source = tmp_path / "linalg" / "svd.py"
    source.write_bytes(source.read_bytes() + b"\n# changed\n")
    assert _source_digest.__wrapped__() != first
    shutil.rmtree(tmp_path / "linalg")
    shutil.rmtree(tmp_path / "methods")
    assert _source_digest.__wrapped__() == hs.__version__


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "lora-xs", "inilora"])
def test_seed_and_name_count(name):
    method = get_method(name, **(dict(steps=3) if name == "inilora" else {}))
    W = torch.randn(6, 5)
    layers = [known(weight=W), known(weight=W, seed=1), known(weight=W, name="other")]
    keys = {layer_key(method, layer, weight_digest(W), device="cpu") for layer in layers}
    different = {str(content(method.factors(layer))) for layer in layers}
    assert len(keys) == 3 >= len(different)


@pytest.mark.parametrize("text", ["pissa", "milora", "olora", "lora-xs", "inilora:steps=3", "inilora:solver=svd"])
def test_a_methods_factors_are_served_again(text, tmp_path):
    method = parse_method(text)
    layers = [known(name=f"layer{number}", weight=torch.randn(6, 5)) for number in range(3)]
    keys = [layer_key(method, layer, weight_digest(layer.require_weight()), device="cpu") for layer in layers]
    made = method.factors_batch(layers)
    results = [
        FactorCache(tmp_path, 2**30).fetch(
            keys, compute, describe=lambda position: description(method, layers[position])
        )
        for compute in (lambda positions: [made[position] for position in positions], pytest.fail)
    ]
    for found in results:
        assert [content(each) for each in found] == [content(each) for each in made]


# The store.


@pytest.mark.parametrize("number", range(6))
def test_an_entry_is_read_bit_for_bit(number):
    factors = factors_of(key_of(number))
    assert content(decoded(KEYS[0], encoded(KEYS[0], factors))) == content(factors)


def test_what_is_read_can_be_written_to(tmp_path):
    fetch(tmp_path, KEYS[:1])
    (factors,) = FactorCache(tmp_path, 2**30).fetch(KEYS[:1], pytest.fail)
    factors.A.zero_()
    assert fetch(tmp_path, KEYS[:1])[0] == contents(KEYS[:1])


def test_views_and_shared_memory_can_be_kept(tmp_path):
    def views(key):
        whole = torch.arange(40.0)
        return dataclasses.replace(factors_of(key), A=whole[:20].view(5, 4).T, B=whole[10:30].view(5, 4), core=None)

    assert fetch(tmp_path, KEYS[:1], make=views)[0] == fetch(tmp_path, KEYS[:1])[0] == contents(KEYS[:1], views)


def test_each_key_is_computed_once(tmp_path):
    keys = [KEYS[0], KEYS[1], KEYS[0], KEYS[2], KEYS[1]]
    assert fetch(tmp_path, keys) == (contents(keys), KEYS[:3], [])
    assert fetch(tmp_path, KEYS[:4][::-1]) == (contents(KEYS[:4][::-1]), [KEYS[3]], [])
    assert fetch(tmp_path, []) == ([], [], [])


def test_groups_are_computed_together_and_kept_one_by_one(tmp_path):
    fetch(tmp_path, [KEYS[1]])
    maker = Maker(KEYS[:6])
    FactorCache(tmp_path, 2**30).fetch(KEYS[:6], maker, groups=[[0, 1, 5], [4], [2, 3]])
    assert maker.calls == [[KEYS[0], KEYS[5]], [KEYS[4]], [KEYS[2], KEYS[3]]]

    def fails(positions):
        if positions != [6]:
            raise RuntimeError("no")
        return [factors_of(KEYS[6])]

    with pytest.raises(RuntimeError):
        FactorCache(tmp_path, 2**30).fetch(KEYS, fails, groups=[[0, 1, 2, 3, 4, 5, 6], [7]])
    assert fetch(tmp_path, KEYS)[1] == [KEYS[7]]
    with pytest.raises(ValueError, match="each position once"):
        FactorCache(tmp_path, 2**30).fetch(KEYS[:2], fails, groups=[[0], [0, 1]])
    with pytest.raises(ValueError, match="is not a key"):
        FactorCache(tmp_path, 2**30).fetch(["../../somewhere"], fails)


def test_many_keys_are_handed_over_in_pieces(tmp_path):
    keys = [key_of(number) for number in range(150)]
    maker = Maker(keys)
    FactorCache(tmp_path, 2**30).fetch(keys, maker)
    assert [len(call) for call in maker.calls] == [64, 64, 22]
    assert maker.asked == keys


def test_threads_share_the_work(tmp_path):
    calls, results = [], []
    barrier = threading.Barrier(4)

    def slow(key):
        calls.append(key)
        time.sleep(0.02)
        return factors_of(key)

    def work():
        barrier.wait()
        results.append(fetch(tmp_path, KEYS, make=slow, groups=[[i] for i in range(8)])[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == sorted(KEYS)
    assert results == [contents(KEYS)] * 4


def test_nothing_but_entries_is_left(tmp_path):
    fetch(tmp_path, KEYS)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {entry_path(tmp_path, key) for key in KEYS}


def test_what_cannot_be_kept_is_used(tmp_path):
    def odd(key):
        return dataclasses.replace(factors_of(key), info={"error": object()})

    found, asked, sentences = fetch(tmp_path, KEYS[:2], make=odd)
    assert len(found) == len(asked) == 2
    assert len(sentences) == 1
    assert "is used, and not kept" in sentences[0]


def test_warnings_are_headstarts_by_default(tmp_path):
    fetch(tmp_path, KEYS[:1])
    entry_path(tmp_path, KEYS[0]).write_bytes(b"not an entry")
    with pytest.warns(HeadstartWarning, match="is damaged .*truncated.* computed again"):
        FactorCache(tmp_path, 2**30).fetch(KEYS[:1], Maker(KEYS[:1]))


# What goes.


def age(folder, key, seconds):
    then = time.time() - seconds
    os.utime(entry_path(folder, key), (then, then))


def test_the_least_recently_used_go_first(tmp_path):
    fetch(tmp_path, KEYS[:5])
    sizes = {entry.key: entry.bytes for entry in list_entries(tmp_path)}
    entry_path(tmp_path, KEYS[4]).unlink()
    for number, key in enumerate(KEYS[:4]):
        age(tmp_path, key, 1000 - number)
    fetch(tmp_path, [KEYS[0]])  # used: now the newest
    fetch(tmp_path, [KEYS[4]], limit=sizes[KEYS[0]] + sizes[KEYS[3]] + sizes[KEYS[4]])
    assert {entry.key for entry in list_entries(tmp_path)} == {KEYS[0], KEYS[3], KEYS[4]}


def test_what_a_call_asked_for_stays(tmp_path):
    fetch(tmp_path, KEYS[:3], limit=1)
    assert len(list_entries(tmp_path)) == 3
    fetch(tmp_path, KEYS[2:4], limit=1)
    assert {entry.key for entry in list_entries(tmp_path)} == {KEYS[2], KEYS[3]}


def test_reading_evicts_nothing(tmp_path):
    fetch(tmp_path, KEYS)
    fetch(tmp_path, KEYS[:1], limit=1)
    assert len(list_entries(tmp_path)) == len(KEYS)


def test_an_entry_used_since_it_was_listed_stays(tmp_path):
    fetch(tmp_path, KEYS[:1])
    age(tmp_path, KEYS[0], 100)
    store = FactorCache(tmp_path, 2**30)
    (entry,) = store.entries()
    fetch(tmp_path, KEYS[:1])
    assert not entry.remove()
    (entry,) = store.entries()
    assert entry.remove()
    assert entry.remove()


def test_what_killed_processes_left_goes(tmp_path):
    fetch(tmp_path, KEYS[:2])
    shard = entry_path(tmp_path, KEYS[0]).parent
    (tmp_path / "locks").mkdir(exist_ok=True)
    # Another machine's locks may not be seen here, so that time has to tell.
    elsewhere = f"00000000-{'0' * 16}.headstart"
    assert is_hidden(f".a.{elsewhere}")
    old = [shard / f".a.{elsewhere}", tmp_path / f".b.{elsewhere}", tmp_path / "locks" / f"{KEYS[0]}.lock"]
    young = [shard / f".c.{elsewhere}", tmp_path / "locks" / f"{KEYS[1]}.lock"]
    foreign = [tmp_path / "notes.txt", shard / "notes.safetensors", tmp_path / "models" / "x.tmp"]
    foreign[2].parent.mkdir()
    for path in old + young + foreign:
        path.write_bytes(b"")
    for path in old + foreign:
        os.utime(path, (0, 0))
    evict(tmp_path, 2**30)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in young + foreign)
    evict(tmp_path, 0)
    assert list_entries(tmp_path) == []
    assert all(path.exists() for path in foreign)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("fetch"), st.lists(st.integers(0, 4), max_size=5), st.integers(0, 4000)),
            st.tuples(st.just("flip"), st.integers(0, 4), st.integers(0, 10**6)),
            st.tuples(st.just("cut"), st.integers(0, 4), st.integers(0, 10**6)),
            st.tuples(st.just("copy"), st.integers(0, 4), st.integers(0, 4)),
            st.tuples(st.just("evict"), st.integers(0, 4000), st.just(0)),
        ),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_to_the_files_the_factors_are_those_computed(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("cache")
    written = {}

    def sound(key):
        path = entry_path(folder, key)
        return path.exists() and path.read_bytes() == written.get(key)

    for what, first, second in steps:
        if what == "fetch":
            keys = [KEYS[number] for number in first]
            missing = [key for key in dict.fromkeys(keys) if not sound(key)]
            damaged = [key for key in missing if entry_path(folder, key).exists()]
            found, asked, sentences = fetch(folder, keys, limit=second)
            assert found == contents(keys)
            # A flip in the header's padding may change nothing that is read.
            assert set(asked) <= set(missing)
            assert {key for key in missing if key not in damaged} <= set(asked)
            assert len(sentences) == len(set(asked) & set(damaged))
            written |= {key: entry_path(folder, key).read_bytes() for key in keys}
            others = sum(entry.bytes for entry in list_entries(folder) if entry.key not in keys)
            assert not asked or not others or sum(entry.bytes for entry in list_entries(folder)) <= second
        elif what == "evict":
            assert evict(folder, first) == sum(entry.bytes for entry in list_entries(folder)) <= first
        elif (path := entry_path(folder, KEYS[first])).exists():
            data = bytearray(path.read_bytes())
            if what == "flip" and data:
                data[second // 8 % len(data)] ^= 1 << second % 8
            elif what == "cut":
                data = data[: second % (len(data) + 1)]
            elif what == "copy" and (other := entry_path(folder, KEYS[second])).exists():
                data = other.read_bytes()
            path.write_bytes(bytes(data))


# Where it is, and how it is chosen.


def test_which_store_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "20GiB")
    assert open_cache(False) is None
    assert open_cache(True).folder == tmp_path / "home" / "factors"
    assert open_cache(tmp_path).folder == open_cache(str(tmp_path)).folder == tmp_path / "factors"
    assert open_cache(True).limit_bytes == 20 * 2**30
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "")
    assert open_cache(True).limit_bytes == 10 * 2**30
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "0")
    assert open_cache(True) is None
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "plenty")
    with pytest.raises(HeadstartError, match="HEADSTART_CACHE_LIMIT='plenty'"):
        open_cache(True)


# The commands.


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


@pytest.mark.parametrize("backend", [torch.backends.cuda, torch.backends.mkldnn])
def test_precision_that_a_program_allows_its_model_makes_no_other_key(backend):
    if not hasattr(getattr(backend, "matmul", None), "fp32_precision"):
        pytest.skip("this torch has no such setting")
    method, layer = get_method("pissa"), known()
    before, held = layer_key(method, layer, "0" * 64, device="cpu"), backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "tf32"
    try:
        assert layer_key(method, layer, "0" * 64, device="cpu") == before
    finally:
        backend.matmul.fp32_precision = held
