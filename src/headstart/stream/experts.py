"""A parameter's matrices, streamed one by one: each in a layer of PEFT's that holds no other, then put together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from headstart.layers.experts import ExpertLayer, agreed_frozen
from headstart.layers.find import TargetLayer
from headstart.layers.install import start_note
from headstart.layers.stacks import columns_together, rows_together
from headstart.layers.weights import adapted_parameter, sample_places
from headstart.stream.skeleton import ADAPTER
from headstart.stream.tensors import Planned, tensor_bytes


def narrowed(layer: ExpertLayer, weight: Tensor) -> ExpertLayer:
    """Return a layer like the skeleton's whose parameter holds its own matrix alone, with zeros for its factors.

    Args:
        layer: the skeleton's; it stays as it is.
        weight: what the parameter is to hold, (1, rows, columns), or (d_out, d_in) of one that stacks nothing.
    """
    whole: Any = layer.module
    A, B = whole.lora_A[ADAPTER].weight, whole.lora_B[ADAPTER].weight
    # A copy for each expert is to cost nothing: it shares the model's config, and whatever all experts are held in.
    shared: dict[int, Any] = {id(parameter): parameter for parameter in whole.parameters()}
    settings = [value for module in whole.modules() for value in vars(module).values()]
    shared |= {id(value): value for value in settings if isinstance(value, PreTrainedConfig)}
    for factor, shape in ((A, (layer.r, layer.d_in)), (B, (layer.d_out, layer.r))):
        shared[id(factor)] = nn.Parameter(torch.zeros(shape, dtype=factor.dtype, device=weight.device))
    shared[id(whole.get_param())] = nn.Parameter(weight, requires_grad=False)
    module: Any = copy.deepcopy(whole, shared)
    module.num_experts = 1
    base = module.get_base_layer()
    for name in [name for name, _ in base.named_parameters(recurse=False) if name != adapted_parameter(module)]:
        delattr(base, name)
    return replace(layer, module=module, stack=replace(layer.stack, module=module), expert=0)


def sampled(layer: ExpertLayer, weight: Tensor) -> list[float]:
    """Return those values of a parameter's sample (see :func:`headstart.layers.weights.fingerprint`) in one matrix.

    Args:
        layer: the skeleton's, of the matrix.
        weight: the matrix, in the parameter's own storage order.
    """
    size = weight.numel()
    places = sample_places(size * int(layer.module.num_experts)) - size * layer.expert
    own = places[(places >= 0) & (places < size)]
    return [float(value) for value in weight.reshape(-1)[own.to(weight.device)].float()]


@dataclass(frozen=True)
class Saved:
    """One of PEFT's layers as it is to be saved.

    Attributes:
        pieces: the names of its matrices' finished pieces.
        record: how its start was made.
        trainable: the numbers of it that train.
    """

    pieces: list[str]
    record: dict[str, Any]
    trainable: int


def saved_stack(layers: Sequence[ExpertLayer], pieces: Mapping[str, dict[str, Any]], seed: int) -> Saved:
    """Return a parameter's layer, from the facts of its matrices' pieces by the pieces' names, both in their order.

    Raises:
        LayerError: the matrices differ in which of their factors train.
    """
    reports = [facts["report"] for facts in pieces.values()]
    records = [facts["record"] for facts in pieces.values()]
    frozen = agreed_frozen(
        [
            (layer.name, tuple(record.get("frozen", ())), report["note"])
            for layer, record, report in zip(layers, records, reports, strict=True)
        ]
    )
    methods = dict.fromkeys(record["method"] for record in records)
    record = {name: value for name, value in records[0].items() if name not in ("frozen", "stack")}
    record |= start_note(" and ".join(methods), seed)
    record |= {"weight": [value for facts in pieces.values() for value in facts["sample"]]}
    record |= {"frozen": list(frozen)} if frozen else {}
    stack = layers[0]
    record |= {"stack": [int(stack.module.num_experts), adapted_parameter(stack.module)]}
    sides = {"lora_A": stack.d_in, "lora_B": stack.d_out}
    trainable = stack.r * sum(side for name, side in sides.items() if name not in frozen) * len(layers)
    return Saved(list(pieces), record, trainable)


def planned_stack(pieces: Sequence[str], tensors_of: Callable[[str], dict[str, Tensor]]) -> dict[str, Planned]:
    """Plan the tensors of a parameter's layer, in PEFT's layout, each put together when its turn has come.

    Args:
        pieces: the names of its matrices' finished pieces, in their order.
        tensors_of: returns a piece's tensors.
    """
    planned = {}
    for key, first in tensors_of(pieces[0]).items():
        # lora_A, lora_start_A and lora_residual_A have r rows for each matrix, the others r columns.
        by_rows = key.split(".")[-2].endswith("_A")
        rows, columns = first.shape
        shape = (rows * len(pieces), columns) if by_rows else (rows, columns * len(pieces))

        def data(key: str = key, by_rows: bool = by_rows) -> Iterator[bytes]:
            parts = [tensors_of(piece)[key] for piece in pieces]
            yield tensor_bytes(rows_together(parts) if by_rows else columns_together(parts))

        planned[key] = Planned(first.dtype, shape, data)
    return planned


def targets_of(layers: Sequence[TargetLayer]) -> dict[str, list[int]]:
    """Return the places of the matrices of each of PEFT's layers, by its name."""
    places: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        places.setdefault(layer.stack.name if isinstance(layer, ExpertLayer) else layer.name, []).append(place)
    return places
