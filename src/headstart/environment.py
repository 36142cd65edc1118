"""What a result was made with: versions, machine, commit."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("headstart", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "lm_eval")


def environment() -> dict[str, Any]:
    """Return the versions, the machine and the commit that a result was made with."""
    versions: dict[str, Any] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "system": platform.system(),
        "release": platform.release(),
        "kernel": platform.version(),
        "machine": platform.machine(),
        "processor": platform.processor(),
        "pytorch": torch.__config__.show(),
        "device": cuda or "cpu",
        "threads": torch.get_num_threads(),
        "git": _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the folder that the command runs in, with a sign where files are changed."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
