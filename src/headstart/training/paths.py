"""Where files live that are made once and can be made again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


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
