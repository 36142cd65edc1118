"""Reading and writing the weight under a LoRA layer, in the orientation (d_out, d_in)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

from headstart.errors import LayerError
from headstart.layers.factors import FACTORS, attribute_of, is_embedding
from headstart.layers.formats import home, unreadable
from headstart.layers.quantised import quantised_format
from headstart.linalg import precision
from headstart.processes import split_by_deepspeed

# Rows are hashed in parts of about this size, on as many threads as torch has. Part of every digest: a change of it
# makes new digests.
_PART_BYTES = 16 * 2**20


def is_transposed(layer: LoraLayer) -> bool:
    """Return whether the base layer stores its weight as (d_in, d_out), as GPT-2's Conv1D and embeddings do."""
    return is_embedding(layer) or bool(getattr(layer, "fan_in_fan_out", False))


def base_weight(layer: LoraLayer, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W (d_out, d_in), detached, in ``dtype``, where the layer's factors are solved for (:func:`place`).

    A view of the parameter where nothing had to be converted.

    Raises:
        LayerError: see :func:`dense`.
    """
    return oriented(layer, dense(layer.get_base_layer())).to(place(layer)).to(dtype)


def place(layer: LoraLayer) -> torch.device:
    """Return the device on which a layer's factors are solved for: its own, or the CPU where that has no float64."""
    return precision.solving_device(home(layer.get_base_layer()))


def adapted_parameter(layer: LoraLayer) -> str:
    """Return the name that the parameter which a LoRA layer adapts has in its base layer."""
    return layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"


def dense(base: nn.Module, parameter: str = "weight") -> Tensor:
    """Return a base layer's weight, detached and in its own storage order; whole, and dequantised where it has to be.

    One that DeepSpeed's ZeRO-3 has split is gathered, and copied: all processes must call. One that accelerate keeps
    elsewhere is brought in for the moment.

    Raises:
        LayerError: it can't be read (see :func:`headstart.layers.formats.unreadable`, whose caller knows the layer).
    """
    if why := unreadable(base):
        raise LayerError(f"a layer {why}")
    with align_module_device(base), gathered(base.parameters(recurse=False)) as split:
        quantised = quantised_format(base) if parameter == "weight" else None
        held_in = base.get_parameter(parameter) if quantised is None else quantised.dequantise(base)
        weight = whole(held_in.detach())
        return weight.clone() if split else weight  # what is gathered is given back at the block's end


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that FSDP2 has sharded, gathered from all processes (all must call); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[bool]:
    """Hold those parameters whole within the block that DeepSpeed's ZeRO-3 has split; all processes must enter it.

    The block is told whether there are any: what it keeps of them it has to copy.
    """
    split = [parameter for parameter in parameters if split_by_deepspeed(parameter)]
    if not split:
        yield False
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield True


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter, each process its own part of one that is sharded."""
    parameter.copy_(laid_out(value, parameter))


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole value on the device, in the dtype and, where that is one of FSDP2's, sharded as ``like`` is."""
    value = value.to(device=like.device, dtype=like.dtype)
    if isinstance(like, DTensor):
        value = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def oriented(layer: LoraLayer, matrix: Tensor) -> Tensor:
    """Turn a matrix in the base layer's storage order into (d_out, d_in) order, or back; the map is its own inverse."""
    return matrix.T if is_transposed(layer) else matrix


def full_precision(layers: Iterable[LoraLayer]) -> AbstractContextManager[None]:
    """Keep autocast, TF32 and the like off within the block: :func:`headstart.linalg.precision.full_precision`."""
    return precision.full_precision([home(layer.get_base_layer()) for layer in layers])


def give_values(layer: LoraLayer, adapter: str, undo: ExitStack) -> None:
    """Give factors that are on the meta device, where they have no values, zeros on the device of the layer.

    PEFT makes such factors for a layer whose weight accelerate keeps elsewhere.
    """
    for name in (*(attribute_of(layer, name) for name in FACTORS), "lora_magnitude_vector"):
        part: Any = getattr(layer, name, {})
        if adapter not in part:
            continue
        bare = isinstance(part[adapter], Tensor)  # as an embedding's factors are
        empty: Tensor = part[adapter] if bare else part[adapter].weight
        if empty.device.type != "meta":
            continue
        owner, key = (part, adapter) if bare else (part[adapter], "weight")
        undo.callback(setattr, owner, key, empty)
        values = torch.zeros_like(empty, device=home(layer.get_base_layer()))
        setattr(owner, key, nn.Parameter(values, requires_grad=empty.requires_grad))


def model_device(model: nn.Module) -> torch.device:
    """Return the device of a model's inputs: of its first parameter that has values, or will have when it is run."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            device = home(module) if parameter.device.type == "meta" else parameter.device
            if device.type != "meta":
                return device
    raise LayerError("the model is on the meta device, where there are no values: load its weights first.")


def product(B: Tensor, A: Tensor) -> Tensor:
    """Return B A, computed in float32 on the CPU for half precisions (whose matrix products are slow there)."""
    if A.device.type == "cpu" and A.dtype in (torch.float16, torch.bfloat16):
        return B.float() @ A.float()
    return B @ A


def fitted(x: Tensor, weight: Tensor) -> Tensor:
    """Return x in the dtype of the weight that it is multiplied by, where autocast doesn't see to that."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def linear_shape(base: nn.Module) -> tuple[int, int]:
    """Return (d_out, d_in) of a linear layer, a Conv1D, an embedding, or a convolution whose kernels are rows."""
    if isinstance(base, nn.Linear) or quantised_format(base) is not None:
        shape: Any = base
        return shape.out_features, shape.in_features  # a quantised weight has another shape, or isn't there
    weight: Any = base.get_parameter("weight")
    rows, *others = getattr(weight, "ds_shape", weight.shape)
    columns = math.prod(others)
    return (columns, rows) if isinstance(base, Conv1D | nn.Embedding) else (rows, columns)


def fingerprint(base: nn.Module, parameter: str = "weight", values: int = 8) -> list[float] | None:
    """Return a few of a base layer's weights, evenly spread over it: enough to tell one base model from another.

    None where they can't be read.
    """
    if unreadable(base):
        return None
    flat = dense(base, parameter).reshape(-1)
    return [float(value) for value in flat[sample_places(flat.numel(), values).to(flat.device)].float()]


def sample_places(count: int, values: int = 8) -> Tensor:
    """Return the places of a :func:`fingerprint` among ``count`` weights, ascending."""
    return torch.linspace(0, count - 1, values, dtype=torch.float64, device="cpu").long()


def weight_digest(tensor: Tensor) -> str:
    """Return the digest of a tensor's type, shape and content, 64 hexadecimal digits.

    SHA-256 over the SHA-256 of parts, each some rows: the same on any device, for any strides, and for any number of
    threads. A contiguous tensor on a processor is not copied; of others, one part at a time is.

    Args:
        tensor: of any shape and type, on any device but "meta". A sharded one must be gathered first.
    """
    rows = tensor.detach().unsqueeze(0) if tensor.ndim == 0 else tensor.detach()
    row_bytes = rows.element_size() * max(1, rows[:1].numel())
    step = max(1, _PART_BYTES // row_bytes)

    def digest_from(start: int) -> bytes:
        part = rows[start : start + step].cpu().contiguous().reshape(-1)
        return hashlib.sha256(part.view(torch.uint8).numpy().data).digest()

    starts = range(0, len(rows) if rows.numel() else 0, step)
    # On an accelerator the copies take turns anyway, and more of them at once need more memory.
    workers = min(torch.get_num_threads(), len(starts)) if rows.device.type == "cpu" else 1
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(digest_from, starts))
    else:
        parts = [digest_from(start) for start in starts]
    head = json.dumps([str(tensor.dtype), list(tensor.shape), _PART_BYTES])
    return hashlib.sha256(head.encode() + b"\0" + b"".join(parts)).hexdigest()
