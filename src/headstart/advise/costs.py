"""What a start costs, predicted from shapes, one measured pass and one measured decomposition of each shape."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headstart.layers.find import lora_layers
from headstart.layers.matrices import matrices_of
from headstart.linalg.svd import truncated_svd
from headstart.methods import Method
from headstart.methods.given import BOTH_KINDS

# A backward pass costs two forward passes, so reading forward only costs a third.
_FORWARD = 1 / 3


@dataclass(frozen=True)
class Machine:
    """What was measured of this model on this machine.

    Attributes:
        pass_seconds: of forward and backward for one sample.
        svd_seconds: of a truncated decomposition, by (d_out, d_in).
        shapes: how many layers have a start, by (d_out, d_in).
        rank: of the adapter.
    """

    pass_seconds: float
    svd_seconds: dict[tuple[int, int], float]
    shapes: dict[tuple[int, int], int]
    rank: int


@dataclass(frozen=True)
class Cost:
    """What a start costs, about.

    Attributes:
        seconds: of the start, without loading.
        memory: bytes that it holds beside the model.
    """

    seconds: float
    memory: int


def measured(model: Any, batches: Sequence[dict[str, Any]]) -> Machine:
    """Measure a PEFT model: one pass over each batch, and one decomposition of each shape."""
    layers = matrices_of(lora_layers(model, "default"))
    shapes = Counter((layer.d_out, layer.d_in) for layer in layers)
    rank = max(layer.r for layer in layers)
    device = next(model.parameters()).device
    samples, began = 0, _now(device)
    for batch in batches:
        model(**batch).loss.backward()
        samples += len(batch["input_ids"])
    model.zero_grad()
    sample_seconds = (_now(device) - began) / max(1, samples)
    svd = {}
    for shape in shapes:
        weight = torch.randn(shape, device=device, dtype=torch.float32)
        began = _now(device)
        truncated_svd(weight, min(rank, *shape))
        svd[shape] = _now(device) - began
    return Machine(sample_seconds, svd, dict(shapes), rank)


def predicted(method: Method, machine: Machine, population: int | None) -> Cost:
    """Return what a method's start costs, about: its samples, its decompositions, and what a pass sums."""
    wants = [method.wants(layer) for layer in BOTH_KINDS]
    backward, data = any(want.backward for want in wants), method.reads_data
    samples = method.sample_count(population) if data else 0
    seconds = samples * machine.pass_seconds * (1.0 if backward else _FORWARD)
    memory = 0
    for (d_out, d_in), count in machine.shapes.items():
        if any(want.weight or want.gradient or want.inputs for want in wants):
            seconds += count * machine.svd_seconds[d_out, d_in]
        memory += count * 4 * machine.rank * (d_out + d_in) * 2
        memory += count * 4 * d_out * d_in * any(want.gradient for want in wants)
        memory += count * 4 * d_in * d_in * any(want.input_moments for want in wants)
        outputs = next((want.outputs for want in wants if want.outputs is not None), None)
        memory += count * 4 * (d_out * d_out if outputs == "full" else d_out if outputs else 0)
    return Cost(seconds, memory)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
