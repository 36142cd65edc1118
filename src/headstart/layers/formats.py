"""What a base layer's weight is held in, and whether its numbers can be read from that.

Only what is known to be plain numbers (16 bits or more, in PyTorch's own tensors, with no scale beside them) or in a
format that :mod:`headstart.layers.quantised` reads is read. Everything else is refused by the methods that need the
weight: codes taken for numbers would give factors of another matrix, without an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

from headstart.errors import LayerError
from headstart.layers.quantised import quantised_format

NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Names of what quantisers keep beside a weight, or in place of it: weight_scale_inv, qweight, W_q, codebooks, ...
_BESIDE = re.compile(r"scale|zero|quant|qweight|W_q|code|packed|absmax|g_idx|tables|qbias|lut", re.IGNORECASE)
# What stands beside plain numbers: the last is what some embeddings multiply their output by.
_NO_CODES = ("weight", "bias", "embed_scale")
# Layers that round their weight when they run, or hold it rounded.
_CLASSES = re.compile(r"fp[48]|int[48]|bitlinear|quant|eetq|hqq|awq|gptq|aqlm|higgs|vptq|spqr|metal", re.IGNORECASE)
# What switches a format off while the model is loaded, by the file of Transformers that the layer comes from.
_OFF = {
    "finegrained_fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "metal_quantization": "MetalConfig(dequantize=True)",
}


def unreadable(base: nn.Module) -> str:
    """Return why a base layer's weight can't be read and what to do, to follow the layer's name; empty where it can."""
    weight = _weight(base)
    if words := format_of(base):
        return (
            f"holds its weight in {words}, which can't be read as numbers: {how_to_load(base)}, or use a method that "
            "doesn't read the weight, such as lora."
        )
    return _no_values(base, weight)


def how_to_load(base: nn.Module) -> str:
    """Return what to do about a base layer in a format that can't be read, by the switch that Transformers has."""
    switch = _OFF.get(type(base).__module__.rpartition(".")[2])
    return f"load the base model unquantised{f' ({switch})' if switch else ''}"


def check_readable(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise LayerError, naming the layer, where the weight of a base layer can't be read.

    Args:
        layers: names and base layers.
    """
    for name, base in layers:
        if why := unreadable(base):
            raise LayerError(f"layer {name!r} {why}")


def home(base: nn.Module) -> torch.device:
    """Return the device that a base layer computes on: its weight's, or that to which accelerate brings the weight."""
    if has_offloaded_params(base):
        hook: Any = base._hf_hook
        return torch.device(hook.execution_device)
    return next((tensor.device for tensor in _tensors(base).values()), torch.device("cpu"))


def check_not_tensor_parallel(model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise LayerError where weights are split over processes in another way than FSDP2's, which gathers them.

    Args:
        model: the PEFT model.
        layers: names and base layers.
    """
    size = getattr(model, "tp_size", None)
    split = isinstance(size, int) and size > 1
    fully_sharded: set[int] | None = None
    for name, base in layers:
        weight = _weight(base)
        if isinstance(weight, DTensor) and not split:
            if fully_sharded is None:
                roots = [module for module in model.modules() if isinstance(module, FSDPModule)]
                fully_sharded = {id(module) for root in roots for module in root.modules()}
            split = id(base) not in fully_sharded or _splits_further(weight)
        if split or getattr(base, "_hf_tp_plan", None) is not None:
            raise LayerError(
                f"layer {name!r}: the model is split by tensor parallelism (tp_plan, a mesh with 'tp'), where every "
                "process computes a part of each layer and no start can be made: load it without tp_plan, in one "
                "process, under DistributedDataParallel, or sharded by FSDP2."
            )


def _splits_further(weight: DTensor) -> bool:
    """Return whether a tensor is split along a dimension of the mesh that is not FSDP2's."""
    names = weight.device_mesh.mesh_dim_names or ()
    if "tp" in names and weight.device_mesh.size(names.index("tp")) > 1:
        return True
    # FSDP2 splits along one dimension of the mesh, and copies along the other of HSDP's.
    return sum(isinstance(placement, Shard) for placement in weight.placements) > 1


def _weight(base: nn.Module) -> Tensor | None:
    weight = getattr(base, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _tensors(base: nn.Module) -> dict[str, Tensor]:
    """Return a layer's own parameters and buffers, the weight first."""
    own = dict(base.named_parameters(recurse=False)) | dict(base.named_buffers(recurse=False))
    return dict(sorted(own.items(), key=lambda item: item[0] != "weight"))


def format_of(base: nn.Module) -> str:
    """Return in words what a base layer's weight is held in; empty where it can be read."""
    weight, layer = _weight(base), type(base).__name__
    if quantised_format(base) is not None:
        return ""
    if weight is not None and (words := codes_of(weight, layer)):
        return words
    beside = next((name for name in _tensors(base) if name not in _NO_CODES and _BESIDE.search(name)), None)
    if beside is None:
        beside = next((name for name in vars(base) if name == "W_q" or name.startswith("quantization_sch")), None)
    if beside is not None:
        return f"a quantised format ({layer}, with {beside} {'beside it' if weight is not None else 'in its place'})"
    if _CLASSES.search(layer) and not type(base).__module__.startswith("torch.nn."):
        return f"a quantised format ({layer})"
    return ""


def codes_of(tensor: Tensor, layer: str) -> str:
    """Return in words what a tensor in a layer of some class is of; empty where it is of plain numbers."""
    numbers: Tensor = tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor
    if str(tensor.dtype).startswith("torch.float8"):
        return f"FP8 ({layer}, {_plain(tensor.dtype)})"
    if type(numbers) not in (Tensor, nn.Parameter):
        return f"a {type(numbers).__name__} of {type(numbers).__module__.partition('.')[0]}"
    return "" if tensor.dtype in NUMBERS else f"{_plain(tensor.dtype)} codes ({layer})"


def _no_values(base: nn.Module, weight: Tensor | None) -> str:
    if weight is None or weight.device.type != "meta" or has_offloaded_params(base):
        return ""
    return (
        "has its weight on the meta device, where there are no values: load the model's weights first, and if a "
        "device_map or accelerate's hooks keep them elsewhere, load this layer onto a device."
    )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
