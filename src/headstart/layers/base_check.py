"""Whether a checkpoint and a base model belong together: by the layers' shapes, and by a sample of their weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headstart.errors import CheckpointError, HeadstartWarning
from headstart.layers.adapter import AdapterLayer
from headstart.layers.files import RESIDUAL_MARK
from headstart.layers.find import TargetLayer, base_of, lora_layers, residual_owner
from headstart.layers.mark import StackOf
from headstart.layers.quantised import quantisation
from headstart.layers.weights import fingerprint, linear_shape
from headstart.names import in_base

# A layer of the base model, and the name of the parameter in it that is adapted.
Holder = tuple[Any, str]


def check_shapes(model: Any, layers: dict[str, AdapterLayer], folder: Path, adapter: str) -> dict[str, Holder]:
    """Compare a checkpoint with the model's own layers, before anything is changed; return where their weights are."""
    base, adapted = base_of(model), _adapted(model, adapter)
    holders: dict[str, Holder] = {}
    for name, layer in layers.items():
        try:
            module: Any = base.get_submodule(in_base(name))
        except AttributeError:
            raise CheckpointError(f"{folder} belongs to another base model: this one has no layer {name!r}.") from None
        plain = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        holders[name] = plain, "weight" if layer.stack is None else layer.stack.parameter
        saved_shape = layer.B.shape[0], layer.A[0].numel()
        shape = linear_shape(plain) if layer.stack is None else _matrix_shape(plain, layer.stack)
        if shape != saved_shape:
            raise CheckpointError(
                f"{folder} belongs to another base model: layer {name!r} is {_times(shape)} here, and "
                f"{_times(saved_shape)} there."
            )
        if name not in adapted:
            continue
        r, s = adapted[name].r, adapted[name].scaling
        if r != layer.r:
            raise CheckpointError(f"{folder} has another rank: layer {name!r} has r = {r} here, and {layer.r} there.")
        if not math.isclose(s, layer.scaling, rel_tol=1e-6):
            raise CheckpointError(
                f"{folder} has another scaling: layer {name!r} has s = {s:g} here, and {layer.scaling:g} there; wrap "
                "the model with the same lora_alpha."
            )
    return holders


def _matrix_shape(module: Any, stack: StackOf) -> tuple[int, ...]:
    """Return (d_out, d_in) of the matrices in a parameter; all it has where it isn't as many matrices."""
    parameter = getattr(module, stack.parameter, None)
    if parameter is None or parameter.ndim < 2:
        return ()
    if parameter.ndim == 2:
        return tuple(parameter.shape)
    experts, rows, columns = parameter.shape
    if experts != stack.experts:
        return tuple(parameter.shape)
    return (columns, rows) if getattr(module, "is_transposed", False) else (rows, columns)


def check_weights(
    model: Any,
    holders: Mapping[str, Holder],
    records: dict[str, Any],
    folder: Path,
    adapter: str,
) -> None:
    """Compare a sample of the weights of each layer with that of the base model that a checkpoint was made on."""
    base, adapted = base_of(model), _adapted(model, adapter)
    differing: set[tuple[str, str]] = set()
    for name, content in records.items():
        if name in adapted and residual_owner(adapted[name].module) is not None:
            continue  # its weight is not the base model's any more; its anchors are compared instead
        expected = (content or {}).get("weight")
        if expected is None:
            continue
        plain, parameter = holders[name]
        bits, saved_bits = quantisation(plain), content.get("quantised")
        sample = fingerprint(plain, parameter)
        exact = bits is None and getattr(plain, parameter).dtype in (torch.float32, torch.float64)
        if sample is None or _alike(sample, expected, exact):
            continue
        if (bits or saved_bits) and _near(sample, expected):
            differing.add((_words(bits), _words(saved_bits)))
        else:
            where = Path(getattr(base, "name_or_path", None) or "", RESIDUAL_MARK)
            hint = " (This is a residual model: headstart.stream.load_residual loads both.)" if where.is_file() else ""
            if bits or saved_bits:
                hint += (
                    f" (It was made on one that is {_words(saved_bits)}, and this one is {_words(bits)}: if they are "
                    "copies of one model, check_base=False loads it.)"
                )
            raise CheckpointError(
                f"{folder} belongs to another base model: layer {name!r} has the same shape here, but other "
                f"weights.{hint}"
            )
    for bits, saved_bits in sorted(differing):
        warnings.warn(
            f"{folder} was made on a base model that is {saved_bits}, and this one is {bits}: the adapter meets "
            "weights that differ by the quantisation error (check_base=False says that this is meant).",
            HeadstartWarning,
            stacklevel=4,  # over load_checkpoint and looks_through
        )


def _adapted(model: Any, adapter: str) -> dict[str, TargetLayer]:
    """Return the layers that hold the adapter already, by name."""
    return {target.name: target for target in lora_layers(model, adapter)} if hasattr(model, "peft_config") else {}


def _words(quantised: str | None) -> str:
    return f"held in {quantised.replace('-bit', ' bits')}" if quantised else "not quantised"


def _near(sample: list[float], expected: list[float]) -> bool:
    """Compare fingerprints of a weight and its quantised copy, which differ by a tenth, and others by more than all."""
    apart = math.hypot(*(a - b for a, b in zip(sample, expected, strict=True)))
    return apart <= 0.4 * max(math.hypot(*sample), math.hypot(*expected))


def _alike(sample: list[float], expected: list[float], exact: bool) -> bool:
    """Compare fingerprints; a base loaded in half precision differs from itself by rounding, no more."""
    tolerance = 0.0 if exact else 2 * torch.finfo(torch.bfloat16).eps
    # The checkpoint may have come from a rounded base as well, which float32 then doesn't match to the bit.
    rounded = [float(torch.tensor(value, dtype=torch.float32, device="cpu").bfloat16()) for value in sample]
    half = [float(torch.tensor(value, dtype=torch.float32, device="cpu").half()) for value in sample]
    return any(
        all(math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12) for a, b in zip(values, expected, strict=True))
        for values in (sample, rounded, half)
    )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "no matrix"
