"""Importing headstart: little is imported, nothing is printed, nobody's logging is changed, and every name is there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import headstart as hs
from fresh import Interpreter
from headstart.cli import main
from headstart.cli.app import app

# Each takes longer than headstart's own files, and some longer than torch.
HEAVY = ["peft", "transformers", "accelerate", "datasets", "trl", "plotly", "rich", "psutil", "bitsandbytes"]

LOUD = """
import sys
sys.modules["kernels"] = None  # not installed
from importlib.util import find_spec
assert find_spec("bitsandbytes")
"""
# The line comes on some processors only: here the module that asks is told that this is one.
FORCED = """
import importlib.abc, importlib.machinery
class Forced(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.backends.cpu.ops":
            return None
        sys.modules["bitsandbytes.functional"].has_avx512bf16 = lambda: True
        return None
sys.meta_path.insert(0, Forced())
"""


@pytest.fixture(scope="module")
def printed():
    """Runs a program that finds imported of torch what the others would import; returns all that it prints."""
    interpreter = Interpreter("torch._inductor.compile_fx", "torch.distributed.tensor")
    yield lambda program: "".join(interpreter.run(program))
    interpreter.close()


def test_importing_prints_nothing():
    """In a process where nothing is imported."""
    script = "import headstart, headstart.errors, headstart.cli"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout + done.stderr == ""


def test_importing_prints_nothing_where_bitsandbytes_misses_its_kernels(printed):
    pytest.importorskip("bitsandbytes")
    script = LOUD + FORCED
    # It speaks where PEFT alone is imported.
    assert "kernels-community" in printed(script + "import peft")
    assert printed(script + "import headstart, peft\nfrom headstart import initialize_") == ""


def test_loggers_are_left_as_they_were(printed):
    script = """
import logging
import headstart, peft
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
print(logger.filters, logger.level, logging.getLogger().handlers)
"""
    assert printed(script).strip() == "[] 0 []"


def test_what_is_heavy_is_imported_when_it_is_asked_for(printed):
    script = f"""
import sys
import headstart as hs
print([name for name in {HEAVY} if name in sys.modules])
hs.PiSSA(), hs.get_method("lora-one", samples=8), hs.method_names(), dir(hs), hs.__all__
print([name for name in {HEAVY} if name in sys.modules])
hs.initialize_
print("peft" in sys.modules)
"""
    assert printed(script).splitlines() == ["[]", "[]", "True"]


def test_every_public_name_is_there(printed):
    script = """
import headstart
assert set(headstart.__all__) <= set(dir(headstart))
from headstart import *
assert all(name in globals() and globals()[name] is getattr(headstart, name) for name in headstart.__all__)
from headstart import initialize_ as verb
assert verb is initialize_ and verb.__module__ == "headstart.initialize"
"""
    assert printed(script) == ""


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(hs, "initialise_")
    with pytest.raises(AttributeError, match="'headstart' has no attribute 'initialise_'"):
        hs.initialise_  # noqa: B018


def test_type_checkers_read_the_names_that_come_later():
    """From the imports that only they see, which must be those that are made."""
    tree = ast.parse(Path(hs.__file__).read_text(encoding="utf-8"))
    (seen,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(seen.test) == "TYPE_CHECKING"
    imported = {name.name: node.module for node in seen.body for name in node.names}
    assert imported == hs._LATER and imported.keys() <= set(hs.__all__)


def commands(group, path=()):
    """Yield the words of every command, groups included."""
    yield list(path)
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def test_help_of_every_command_imports_nothing_heavy(capsys, printed):
    with pytest.raises(SystemExit):
        main(["no-such-command"])  # the commands are there from now on
    capsys.readouterr()
    every = list(commands(typer.main.get_command(app)))
    assert [] in every and ["init"] in every and ["cache", "list"] in every
    heavy = [name for name in HEAVY if name not in ("rich", "psutil")]
    script = f"""
import sys
from headstart.cli import main
for words in {every}:
    main([*words, "--help"])
    print("imported:", [name for name in {heavy} if name in sys.modules])
"""
    text = printed(script)
    assert text.count("imported:") == text.count("imported: []") == len(every)
    assert text.count("Usage: ") == len(every)
    # Options whose defaults are those of a comparison.
    for option in ("--stream", "--graded-examples", "--max-new-tokens", "lora-one:samples=64"):
        assert option in text, option


@pytest.mark.parametrize("words", [["methods"], ["methods", "pissa"], ["cache", "list"]])
def test_what_needs_no_model_imports_nothing_heavy(words, printed):
    heavy = [name for name in HEAVY if name not in ("rich", "psutil")]
    script = f"""
import sys
from headstart.cli import main
main({words})
print("imported:", [name for name in {heavy} if name in sys.modules])
"""
    assert printed(script).endswith("imported: []\n")
