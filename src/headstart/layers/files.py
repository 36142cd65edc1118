"""Adapter folders on disk: written whole or not at all, read with every damage named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RECORD = "headstart.json"
# In the folder of a model whose weights lack a start that is in the adapter beside it.
RESIDUAL_MARK = "headstart_residual.json"


@contextlib.contextmanager
def whole_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``path`` when the block ends well, and vanishes when not.

    Raises:
        CheckpointError: the path exists and ``force`` is not set.
    """
    target = Path(path)
    check_free(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        put_in_place(work, target)
    finally:
        if work.exists():
            shutil.rmtree(work, ignore_errors=True)


def check_free(target: Path, force: bool) -> None:
    """Raise CheckpointError where ``target`` exists and must not be replaced.

    With ``force`` it may be replaced if it is empty or was written by this function's users: an adapter or a model.
    """
    if target.resolve() == Path.cwd():
        raise CheckpointError(f"{target} is the folder that the command runs in: name a folder to write in it.")
    if target.is_symlink() and not target.exists():
        raise CheckpointError(f"{target} is a link to something that doesn't exist: remove it, or choose another path.")
    if not target.exists():
        return
    ours = target.is_dir() and (
        not any(target.iterdir()) or any((target / name).is_file() for name in (CONFIG, "config.json"))
    )
    if not ours:
        raise CheckpointError(
            f"{target} exists and is neither an adapter's folder nor a model's, so it is not overwritten: choose "
            "another path."
        )
    if not force:
        raise CheckpointError(f"{target} exists: choose another path, or overwrite it with force=True (--force).")


def put_in_place(work: Path, target: Path) -> None:
    """Give a finished folder its name, in place of what :func:`check_free` lets go, and the modes of a user's own."""
    # Temporary folders, and safetensors' files, are made private.
    mask = os.umask(0o077)  # for a moment, in all threads
    os.umask(mask)
    for each in (work, *work.rglob("*")):
        each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)
    if not target.exists():
        work.rename(target)
        return
    # A folder that has something in it can't be renamed over: step aside first, and step back if that fails.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / target.name
    try:
        target.rename(aside)
        work.rename(target)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        aside.parent.rmdir()
        raise
    shutil.rmtree(aside.parent, ignore_errors=True)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> str:
    """Write tensors to a safetensors file; return the file's SHA-256."""
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
    return sha256(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} holds no {path.name}: it is not an adapter, or was not written to the end."
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): restore it from a copy, or save the adapter again."
        ) from error
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}: it is not an adapter folder.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): restore it, or save the adapter again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, and holds a {type(content).__name__}.")
    return content


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON object, readable."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
