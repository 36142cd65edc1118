"""The page about the structure: as the code is, and nothing imported the wrong way."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import headstart as hs
from conftest import tiny_llama, token_batch, wrap
from headstart.methods import registry

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("house", DOCS / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_drawn_from_the_code(house):
    assert house.page() == house.PAGE.read_text(encoding="utf-8"), "run make docs"


def test_nothing_is_imported_the_wrong_way(house):
    assert house.against_the_order(house.imports()) == []
    wrong = house.imports() | {"linalg": {"cli"}}
    assert house.against_the_order(wrong) == ["linalg imports cli"]


def test_every_room_is_on_the_page(house):
    packages = {path.parent for path in house.SOURCE.glob("*/__init__.py")}
    rooms = {path.stem for path in (*packages, *house.SOURCE.glob("*.py"))}
    rooms = {room for room in rooms if not room.startswith("__") and room not in house.GROUND}
    assert rooms == house.ROOMS.keys() - {"ground"}


def test_the_start_on_the_page_works():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    block = block.replace('"steepest-rows"', '"steepest-rows-of-the-page"')
    names: dict[str, object] = {"__name__": "architecture"}
    exec(compile(block, "architecture.md", "exec", dont_inherit=True), names)
    try:
        batch, model = token_batch(), wrap(tiny_llama())
        before = float(tiny_llama()(**batch).loss)
        report = hs.initialize_(model, names["SteepestRows"](samples=4), data=[batch], progress=False)
        assert report.form == "kept" and float(model(**batch).loss) < before
    finally:
        registry._METHODS.pop("steepest-rows-of-the-page")


def test_the_demo_installs_all_that_it_uses():
    """It is tried in a new folder before the tests are, which install everything."""
    root = DOCS.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rule = (root / "Makefile").read_text(encoding="utf-8").split("$(VENV)/.demo:")[1].split("\n\n")[0]
    (named,) = re.findall(r'-e "\.\[(.*?)\]"', rule)
    packages = {re.match(r"[\w-]+", entry)[0] for extra in named.split(",") for entry in extras[extra]}
    # The model's file, the trainer and its data, statistics and the page of the comparison.
    assert {"gguf", "trl", "datasets", "scipy", "plotly"} <= packages


def test_names_say_what_a_thing_holds():
    """Words that say only how a value was come by are no names."""
    said_nothing = {"found", "each", "held", "mine", "theirs"}
    named = []
    for path in [*(DOCS.parent / "src").rglob("*.py"), *(DOCS.parent / "bench").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else None
            named += [f"{path.name}, line {node.lineno}: {name}"] if name in said_nothing else []
    assert not named
