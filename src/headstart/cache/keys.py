"""What a layer's factors are filed under: everything that they depend on, in one hash.

In the key: the weight's content, orientation, shape and type; the method with every setting; rank and scaling; the
moments of the kind, for methods that want them; seed and layer name, of which draws are made; the kind of device; the
release of PyTorch, its precision for matrix products and its default type; and the source of the arithmetic.

Not in the key: the number of threads, the model of processor or GPU, and which layers were decomposed together.
They change the last bits at most, and a start made on one machine is as good on another.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from headstart._version import __version__
from headstart.methods.base import ANY_LAYER, Layer, Method

# Raise where factors change for a reason that the source of these packages doesn't show.
ARITHMETIC_VERSION = 1
_ARITHMETIC = ("methods", "linalg")


def cacheable(method: Method) -> bool:
    """Return whether a method's factors can be kept: they depend on the weight and the settings alone.

    A method from outside this package must declare a class attribute ``arithmetic_version`` and raise it whenever its
    results change; without one, factors from before a change would be believed.
    """
    wants = method.wants(ANY_LAYER)
    versioned = _is_ours(type(method)) or getattr(method, "arithmetic_version", None) is not None
    plain = all(value is None or isinstance(value, bool | int | float | str) for value in method.settings().values())
    return wants.weight and not wants.original and not method.reads_data and versioned and plain


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
        "arithmetic": arithmetic(method),
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


def arithmetic(method: Method) -> list[Any]:
    """Return what tells the arithmetic of a method's factors from that of any other time, as plain types."""
    return [ARITHMETIC_VERSION, _source_digest(), getattr(method, "arithmetic_version", None)]


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
def _source_digest() -> str:
    """Return a hash of the source that the arithmetic is in, so that no change of it can be forgotten.

    A changed comment makes new keys as well; that costs one computation. Where there is no source, the release counts.
    """
    folder = Path(__file__).parent.parent
    try:
        contents = [path.read_bytes() for room in _ARITHMETIC for path in sorted((folder / room).glob("*.py"))]
    except OSError:
        contents = []
    if not contents:
        return __version__
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
