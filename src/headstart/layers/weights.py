"""Reading and writing the weight under a LoRA layer, in the orientation (d_out, d_in)."""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D


def is_transposed(layer: LoraLayer) -> bool:
    """Return whether the base layer stores its weight as (d_in, d_out), as GPT-2's Conv1D does."""
    return bool(getattr(layer, "fan_in_fan_out", False))


def base_weight(layer: LoraLayer, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W (d_out, d_in), detached, in ``dtype``; a view of the parameter where nothing had to be converted."""
    weight = whole(dequantize_module_weight(layer.get_base_layer()).detach())
    return oriented(layer, weight).to(dtype)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that FSDP2 has sharded, gathered from all processes (all must call); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter, each process its own part of one that is sharded."""
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def oriented(layer: LoraLayer, matrix: Tensor) -> Tensor:
    """Turn a matrix in the base layer's storage order into (d_out, d_in) order, or back; the map is its own inverse."""
    return matrix.T if is_transposed(layer) else matrix


def product(B: Tensor, A: Tensor) -> Tensor:
    """Return B A, computed in float32 on the CPU for half precisions (whose matrix products are slow there)."""
    if A.device.type == "cpu" and A.dtype in (torch.float16, torch.bfloat16):
        return B.float() @ A.float()
    return B @ A


def linear_shape(base: nn.Module) -> tuple[int, int]:
    """Return (d_out, d_in) of an nn.Linear or a Conv1D."""
    weight: Tensor = base.get_parameter("weight")
    rows, columns = weight.shape
    return (columns, rows) if isinstance(base, Conv1D) else (rows, columns)


def fingerprint(base: nn.Module, values: int = 8) -> list[float]:
    """Return a few of a base layer's weights, evenly spread over it: enough to tell one base model from another."""
    flat = whole(dequantize_module_weight(base).detach()).reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, values, dtype=torch.float64).long()
    return [float(value) for value in flat[places.to(flat.device)].float()]
