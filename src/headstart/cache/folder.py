"""Where files live that are made once and can be made again, and how large they may grow."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from headstart.errors import HeadstartError, MethodError
from headstart.statistics.plan import parse_bytes

DEFAULT_LIMIT = 10 * 2**30


def cache_folder() -> Path:
    """Return the folder for what headstart keeps between runs; it need not exist yet.

    ``HEADSTART_CACHE`` where it is set, else ``headstart`` in the platform's own place for caches:
    ``%LOCALAPPDATA%`` on Windows, ``~/Library/Caches`` on macOS, and ``XDG_CACHE_HOME`` or ``~/.cache``
    elsewhere.
    """
    chosen = os.environ.get("HEADSTART_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "headstart"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "headstart"
    # The XDG convention: a relative path there is invalid and to be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "headstart"


def factors_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the factors inside ``folder``, or inside `cache_folder` where that is None."""
    return (cache_folder() if folder is None else Path(folder).expanduser().absolute()) / "factors"


def size_limit() -> int:
    """Return the bytes that the factors may take: ``HEADSTART_CACHE_LIMIT`` (such as "20GiB"), else 10 GiB.

    0 switches the cache off.

    Raises:
        HeadstartError: the variable is not a size.
    """
    text = os.environ.get("HEADSTART_CACHE_LIMIT")
    if not text:
        return DEFAULT_LIMIT
    if text.strip() == "0":
        return 0
    try:
        return parse_bytes(text, torch.device("cpu"))
    except MethodError:
        raise HeadstartError(f'HEADSTART_CACHE_LIMIT={text!r} must be a size such as "20GiB" or "800MB".') from None
