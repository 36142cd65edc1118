"""What a layer's factors are filed under: everything that they depend on, in one hash.

In the key: the weight's content, orientation, shape and type; the method with every setting; rank and scaling; the
moments of the kind, for methods that want them; seed and layer name, of which draws are made; the kind of device; the
release of PyTorch, its precision for matrix products and its default type; and the source of the arithmetic.

Not in the key: the number of threads, the model of processor or GPU, and which layers were decomposed together.
They change the last bits at most, and a start made on one machine is as good on another.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from headstart._version import __version__
from headstart.methods.base import ANY_LAYER, Layer, Method

# Raise where factors change for a reason that the files of `_sources` don't show.
ARITHMETIC_VERSION = 1

# The packages whose source is part of the keys.
_ARITHMETIC = ("headstart.methods.", "headstart.linalg.")


def cacheable(method: Method) -> bool:
    """Return whether a method's factors can be kept: they depend on the weight and the settings alone.

    A method from outside this package must declare a class attribute ``arithmetic_version`` and raise it whenever its
    results change; without one, factors from before a change would be believed.
    """
    wants = method.wants(ANY_LAYER)
    known = _is_ours(type(method)) or getattr(method, "arithmetic_version", None) is not None
    plain = all(value is None or isinstance(value, bool | int | float | str) for value in method.settings().values())
    return wants.weight and not wants.original and not wants.data and known and plain


def layer_key(
    method: Method,
    layer: Layer,
    digest: str,
    *,
    device: torch.device | str,
    transposed: bool = False,
) -> str:
    """Return the key of a layer's factors, 64 hexadecimal digits.

    Args:
        method: one that is `cacheable`.
        layer: what is known of the layer; its ``weight`` is not read and may be None.
        digest: `weight_digest` of the layer's weight, in whatever type it is stored in.
        device: where the factors would be computed; only its type counts.
        transposed: ``digest`` is of the weight stored as (d_in, d_out), as GPT-2's Conv1D does.
    """
    cls = type(method)
    parts: dict[str, Any] = {
        "arithmetic": [ARITHMETIC_VERSION, _source_digest(cls), getattr(method, "arithmetic_version", None)],
        # What a program allows its model (TF32, autocast) doesn't count: nothing is solved under it.
        "torch": [torch.__version__.partition("+")[0], str(torch.get_default_dtype())],
        "device": torch.device(device).type,
        "method": [cls.__module__, cls.__qualname__, method.name],
        "settings": {name: _plain(value) for name, value in method.settings().items()},
        "weight": [digest, transposed],
        "shape": [layer.d_out, layer.d_in, layer.r],
        "scaling": _plain(layer.scaling),
        "stream": [layer.seed, layer.name],
    }
    if layer.moments is not None:
        parts["moments"] = [layer.moments.mean, layer.moments.std]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def description(method: Method, layer: Layer) -> dict[str, Any]:
    """Return what ``headstart cache list`` shows of a layer's factors."""
    return {
        "method": str(method),
        "name": method.name,
        "layer": layer.name,
        "d_out": layer.d_out,
        "d_in": layer.d_in,
        "r": layer.r,
        "seed": layer.seed,
        "version": __version__,
    }


def _plain(value: object) -> object:
    """Return a number as JSON is to write it: 4.0 and 4 are the same setting."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "headstart"


@functools.cache
def _source_digest(cls: type[Method]) -> str:
    """Return a hash of the source that a method's arithmetic is in, so that no change of it can be forgotten.

    A changed comment makes new keys as well; that costs one computation. Where there is no source, the release counts.
    """
    try:
        contents = [path.read_bytes() for path in _sources(cls)]
    except (OSError, SyntaxError, ValueError):
        return __version__
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _sources(cls: type[Method]) -> list[Path]:
    """Return the files of a method's classes, and of whatever they import from ``methods`` and ``linalg``, in turn."""
    names = [each.__module__ for each in cls.__mro__ if _is_ours(each)]
    files: dict[str, Path] = {}
    while names:
        name = names.pop()
        # What packages import is not what a method imports from them.
        if name not in files and (file := _module_file(name)) is not None and file.stem != "__init__":
            files[name] = file
            names += [each for each in _imports(file.read_bytes()) if each.startswith(_ARITHMETIC)]
    return [files[name] for name in sorted(files)]


def _module_file(name: str) -> Path | None:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the name of a class or function
        return None
    return None if found is None or found.origin is None else Path(found.origin)


def _imports(source: bytes) -> Iterator[str]:
    """Yield the names that a file imports: modules, and what it takes from them, which may be modules as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
