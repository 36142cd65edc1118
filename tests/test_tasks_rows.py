"""Reading rows: every kind of file, folders and their names, the hub, limits, and what is said of bad ones."""

from __future__ import annotations

import builtins
import gzip
import json
import warnings
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headstart.errors import DataError, HeadstartWarning
from headstart.tasks import Example, get_task, parse_task, read

TEXT = parse_task("text")
GOOD = {"prompt": "a", "completion": "b"}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(rows):
    return [(example.prompt, example.completion) for example in rows.examples]


def parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path.read_bytes()


ROWS = [{"prompt": f"p{n}", "completion": f"c, {n}"} for n in range(3)]
KINDS = {
    "train.jsonl": lines(*ROWS).encode(),
    "train.json": json.dumps(ROWS, indent=2).encode(),
    "objects.json": lines(*ROWS).encode(),
    "pretty.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "train.jsonl.gz": gzip.compress(lines(*ROWS).encode()),
    "train.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "train.csv": b'prompt,completion\r\n"p0","c, 0"\r\np1,"c, 1"\r\n\r\np2,"c, 2"\r\n',
    "train.tsv": b"prompt\tcompletion\np0\tc, 0\np1\tc, 1\np2\tc, 2\n",
    "marked.tsv": b"\xef\xbb\xbfprompt\tcompletion\np0\tc, 0\np1\tc, 1\np2\tc, 2",
}


@pytest.mark.parametrize("name", [*KINDS, "train.parquet"])
def test_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    put(path, KINDS[name] if name in KINDS else parquet(path, ROWS))
    found = read(TEXT, path)
    assert pairs(found) == [(row["prompt"], row["completion"]) for row in ROWS]
    assert found.where == str(path) and found.bad == []
    assert all(example.where.startswith(f"{path}, ") for example in found.examples)
    assert pairs(read(TEXT, str(path), limit=1, offset=1)) == [("p1", "c, 1")]


def test_places_are_lines(tmp_path):
    places = {"train.json": (2, 6, 10), "pretty.json": (1, 5, 9), "train.csv": (2, 3, 5), "train.jsonl": (1, 2, 3)}
    for name, expected in places.items():
        path = put(tmp_path / name, KINDS[name])
        assert [example.where for example in read(TEXT, path).examples] == [f"{path}, line {n}" for n in expected]


LETTERS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=5), st.booleans(), st.sampled_from([".jsonl", ".json"])
)
def test_what_is_written_is_read(tmp_path, written, ascii_only, ending):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in written]
    encode = json.JSONEncoder(ensure_ascii=ascii_only).encode
    text = "\r\n".join(map(encode, rows)) if ending == ".jsonl" else encode(rows)
    assert pairs(read(TEXT, put(tmp_path / f"x{ending}", text))) == written


def test_a_limit_saves_what_comes_after_it(tmp_path):
    path = put(tmp_path / "cut.json", '[{"prompt": "a", "completion": "b"}, {"prompt"')
    assert pairs(read(TEXT, path, limit=1)) == [("a", "b")]
    with pytest.raises(DataError, match=r"cut\.json, line 1: from here on it is not JSON"):
        read(TEXT, path)


def test_bad_rows_are_counted_and_named(tmp_path):
    rows = [
        GOOD,
        {"prompt": "a"},
        GOOD,
        {"prompt": 3, "completion": "b"},
        GOOD,
        [1],
        GOOD,
        {**GOOD, "completion": ""},
        GOOD,
    ]
    path = put(tmp_path / "data.jsonl", lines(*rows))
    with pytest.warns(HeadstartWarning) as caught:
        found = read(TEXT, path)
    assert len(found.examples) == 5
    assert found.bad == [
        f"{path}, line 2: field 'completion' is missing.",
        f"{path}, line 4: field 'prompt' must be text, but is of type int.",
        f"{path}, line 6: the row must be a JSON object such as {{…}}, but is a list.",
        f"{path}, line 8: field 'completion' is empty.",
    ]
    (warning,) = (str(each.message) for each in caught)
    assert warning.startswith(f"{path}: 4 of 9 rows are left out: {path}, line 2: ")
    assert warning.endswith("; and 1 more.") and "line 6" in warning and "line 8" not in warning
    # A limit counts rows, bad ones too: the same first rows whatever is wrong with them.
    with pytest.warns(HeadstartWarning, match="1 of 3 rows"):
        assert len(read(TEXT, path, limit=3).examples) == 2


def test_more_than_half_bad_is_refused(tmp_path):
    half = put(tmp_path / "half.jsonl", lines(GOOD, {}))
    with pytest.warns(HeadstartWarning, match="1 of 2"):
        read(TEXT, half)
    most = put(tmp_path / "most.jsonl", lines(GOOD, {}, {"question": "a"}))
    with pytest.raises(DataError, match=r"line 2: needs 'prompt'.* 2 of 3 rows can't be used as task 'text'\.$"):
        read(TEXT, most)


BAD = {
    "not_json.jsonl": ("{'prompt': 1}", "line 1: the line is not JSON .*each line must be one JSON object"),
    "deep.jsonl": ("[" * 100_000, "line 1: the line is not JSON"),
    "latin.jsonl": (b'{"prompt": "\xe9"}', "line 1: the line is not UTF-8 text"),
    "list.jsonl": ("[1]\n", "line 1: the row must be a JSON object such as .*, but is a list"),
    "empty.jsonl": ("\n\n", "there are no rows in it"),
    "empty.json": ("[]", "there are no rows in it"),
    "broken.json": ('[\n{"prompt": "a", "completion": "b"},\n{"prompt": a}]', "line 3: from here on it is not JSON"),
    "cut.json": ('[{"prompt": "a", "completion": "b"},\n', "line 2: the file is cut off, or goes on"),
    "after.json": ('[{"prompt": "a", "completion": "b"}] {}', "line 1: the file is cut off, or goes on"),
    "numbers.json": ("[1, 2]", "line 1: the row must be a JSON object .*2 of 2 rows"),
    "latin.json": (b'[{"prompt": "\xe9"}]', "byte 13 is not UTF-8 text"),
    "wide.csv": ("prompt,completion\na,b,c\n", "line 2: there are 3 columns, not 2: prompt, completion"),
    "quotes.csv": ('prompt,completion\na,"b\n', "line 2: the line is not part of a table .*unexpected end of data"),
    "headless.csv": ("a,b\nc,d\n", "line 2: needs 'prompt' and 'completion'.*but has 'a' and 'b'"),
    "latin.tsv": (b"prompt\tcompletion\na\t\xe9\n", "byte .* is not UTF-8 text"),
    "no.parquet": ("prompt", "is no Parquet file, or a damaged one"),
    "plain.jsonl.gz": (lines(GOOD), "can't be read: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(lines(*[GOOD] * 99).encode())[:40], "can't be read: Compressed file ended"),
    "data.bin": (lines(GOOD), "its ending says nothing of what it is; these are read: .jsonl, .json"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(tmp_path, name):
    content, message = BAD[name]
    path = put(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        read(TEXT, path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_broken_line_of_a_table_is_left_out_and_the_next_one_read(tmp_path):
    path = put(tmp_path / "data.csv", 'prompt,completion\na,b\nc,"d"e\nf,g\n')
    with pytest.warns(HeadstartWarning, match="line 3: the line is not part of a table"):
        assert pairs(read(TEXT, path)) == [("a", "b"), ("f", "g")]


@pytest.mark.parametrize(
    ("task", "split", "names"),
    [
        ("gsm8k", "train", ("train.jsonl", "train.json", "gsm8k/train.json", "gsm8k.train.jsonl", "gsm8k_train.json")),
        ("addsub", "test", ("AddSub/test.json", "test.json", "addsub.test.json")),
        ("cola", "test", ("dev.tsv", "CoLA/dev.tsv", "cola/validation.csv", "cola.test.tsv")),
        ("mrpc", "test", ("test.txt", "MRPC/dev.tsv")),
        ("humaneval", "test", ("HumanEval.jsonl.gz", "HumanEval.jsonl")),
        ("metamath", "train", ("MetaMathQA-395K.json", "train.json")),
        ("math", "test", ("test/algebra/1.json", "test.jsonl")),
        ("sharegpt", "train", ("ShareGPT_V3_unfiltered_cleaned_split.json",)),
    ],
)
def test_the_names_that_a_folder_may_have(tmp_path, task, split, names):
    from headstart.tasks.rows import _files_of

    for name in names:
        folder = tmp_path / name.replace("/", "-")
        path = put(folder / name, b"")
        put(folder / "README.md", b"")
        put(folder / "other.train.json", b"")
        assert _files_of(parse_task(task), folder, split) == [path]


def test_a_file_without_a_split_in_its_name_is_no_split(tmp_path):
    put(tmp_path / "gsm8k.jsonl", lines({"question": "q", "answer": "#### 1"}))
    with pytest.raises(
        DataError, match=r"no file of task 'gsm8k', split 'test' \(gsm8k\.test\.\*.*it holds gsm8k\.jsonl"
    ):
        read(parse_task("gsm8k"), tmp_path, split="test")


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no file of task 'text', split 'train' .*; it is empty"):
        read(TEXT, tmp_path)
    for absent in (tmp_path / "absent.jsonl", "data/absent.csv", "./absent", "absent.json", Path("a/b")):
        with pytest.raises(DataError, match="does not exist: give a file, a folder, or a dataset of the hub"):
            read(TEXT, absent)
    with pytest.raises(DataError, match="task 'text' has no data of its own"):
        read(TEXT)
    with pytest.raises(
        DataError, match=r"task 'gsm8k' has no split 'tests'\. Did you mean 'test'\? It has: 'train', 'test'"
    ):
        read(parse_task("gsm8k"), tmp_path, split="tests")
    with pytest.raises(DataError, match="at least 1, not 0"):
        read(TEXT, tmp_path, limit=0)
    with pytest.raises(DataError, match="must not be negative, but is -1"):
        read(TEXT, tmp_path, offset=-1)
    with pytest.raises(DataError, match="no rows in it after the first 5"):
        read(TEXT, put(tmp_path / "x.jsonl", lines(GOOD)), offset=5)


def test_the_split_chooses_the_file_and_progress_is_shown(tmp_path):
    put(tmp_path / "train.jsonl", lines(*[GOOD] * 4500))
    put(tmp_path / "test.jsonl", lines({"prompt": "c", "completion": "d"}))
    shown = []
    assert len(read(TEXT, tmp_path, show=lambda *now: shown.append(now)).examples) == 4500
    assert shown == [("reading text", 2000, 2000), ("reading text", 4000, 4000)]
    assert pairs(read(TEXT, tmp_path, split="test")) == [("c", "d")]


def test_problems_are_made():
    task = get_task("problems", size=7, seed=2)
    made = read(task)
    assert made.where == "task 'problems'" and len(made.examples) == 7
    assert read(task, limit=3, offset=2).examples == made.examples[2:5]
    assert made.examples[0].where == "problem 1" and made.examples[0].reference
    assert {e.prompt for e in made.examples}.isdisjoint(e.prompt for e in read(task, split="test").examples)
    with pytest.raises(DataError, match="has no split 'dev'"):
        read(task, split="dev")


@pytest.fixture
def hub(monkeypatch):
    asked, rows = [], [{"question": "q", "answer": "#### 1", "id": 7}, {"question": "r", "answer": "#### 2", "id": 8}]

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_dataset(hub):
    found = read(TEXT, "openai/gsm8k:main", split="test", limit=1)
    assert found.examples == [
        Example(
            "Question: q\nAnswer:", " #### 1", reference="1", where="dataset 'openai/gsm8k:main', split 'test', row 1"
        )
    ]
    assert [e.reference for e in read(parse_task("gsm8k"), split="train").examples] == ["1", "2"]
    # More rows than there are is no error, and a task's split has the hub's name there.
    assert len(read(parse_task("gsm8k"), "a/b", limit=9, offset=1).examples) == 1
    with pytest.raises(DataError, match=r"split 'validation', row 1: field 'sentence' is missing"):
        read(parse_task("cola"), split="test")
    assert hub == [
        (("openai/gsm8k", "main"), {"split": "test"}),
        (("openai/gsm8k", "main"), {"split": "train"}),
        (("a/b", None), {"split": "train"}),
        (("nyu-mll/glue", "cola"), {"split": "validation"}),
    ]


def test_a_hub_dataset_that_cannot_be_had(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise ConnectionError("no network\nlong advice")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"no file or folder 'a/b', and .*split 'train' \(no network\)\.$"):
        read(TEXT, "a/b")
    real = builtins.__import__
    path = tmp_path / "x.parquet"
    put(path, parquet(path, ROWS))
    monkeypatch.setattr("headstart.tasks.rows.import_module", lambda name: real(f"absent_{name}"))
    with pytest.raises(DataError, match=r"Hugging Face Hub needs datasets: pip install .headstart\[study\]"):
        read(TEXT, "a/b")
    with pytest.raises(DataError, match=r"x\.parquet: Parquet needs pyarrow"):
        read(TEXT, path)
