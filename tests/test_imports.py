"""Importing headstart: nothing is printed, and nobody's logging is changed."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def printed(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("module", ["headstart", "headstart.errors", "headstart.cli"])
def test_importing_prints_nothing(module):
    assert printed(f"import {module}") == ""


def test_importing_prints_nothing_where_bitsandbytes_misses_its_kernels():
    pytest.importorskip("bitsandbytes")
    script = LOUD + FORCED
    # It speaks where PEFT alone is imported.
    assert "kernels-community" in printed(script + "import peft")
    assert printed(script + "import headstart") == ""


def test_loggers_are_left_as_they_were():
    script = """
import logging
import headstart
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
print(logger.filters, logger.level, logging.getLogger().handlers)
"""
    assert printed(script).strip() == "[] 0 []"
