"""Sketched gradients on SmolLM2: the memory they take, and the angle between their subspaces and the exact ones."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from peft import get_peft_model

from bench.gradient import RANK, config
from bench.harness import paragraph, table, token_batches, write
from headstart.layers.find import TargetLayer, lora_layers
from headstart.linalg.svd import truncated_svd
from headstart.methods import parse_method
from headstart.statistics.prepare import prepare
from headstart.training.models import resolve_model

PASSES = (1, 2, 3)
WIDTH = 2 * RANK + 4
SAMPLES = 16


def statistics_of(model: Any, targets: list[TargetLayer], data: list[dict[str, torch.Tensor]], method: str) -> Any:
    """Return the method's statistics of all layers, and the seconds that reading took."""
    made = parse_method(method)
    asked = {target.name: made.wants(target.facts()) for target in targets}
    layers = {target.name: target.module for target in targets}
    began = time.perf_counter()
    (found,) = prepare(model, layers, asked, data, SAMPLES).passes()
    return found, time.perf_counter() - began


def sine(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the sine of the largest angle between two spaces of orthonormal columns."""
    missed = found.double() - exact.double() @ (exact.double().T @ found.double())
    return float(torch.linalg.matrix_norm(missed, 2))


def main() -> None:
    base, tokenizer, _ = resolve_model("smollm2")
    data, what = token_batches(SAMPLES, 8, tokenizer)
    model = get_peft_model(base, config())
    targets = list(lora_layers(model, "default"))
    exact, seconds = statistics_of(model, targets, data, f"lora-one:samples={SAMPLES}")
    size = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    held = sum(gradient.numel() * 4 for gradient in exact.gradients.values())
    rows = [["exact", f"{held / size:.1%}", "0", "0", "", f"{seconds:.0f}"]]
    decompositions = {name: truncated_svd(gradient, RANK) for name, gradient in exact.gradients.items()}
    for passes in PASSES:
        method = f"lora-one:samples={SAMPLES},gradients=sketch,passes={passes}"
        found, seconds = statistics_of(model, targets, data, method)
        left, right, estimated = [], [], []
        held = sum(sketch.bytes_held for sketch in found.sketches.values())
        # Random matrices are shared by layers of one size; they are gone after the first of several passes.
        shared = {sketch.shape: sketch.bytes_shared for sketch in found.sketches.values()}
        held += sum(shared.values())
        for name, sketch in found.sketches.items():
            svd = sketch.finish(RANK)
            left.append(sine(svd.U, decompositions[name].U))
            right.append(sine(svd.V, decompositions[name].V))
            estimated.append(max(svd.angle_left, svd.angle_right))
        middle = [f"{statistics.median(each):.3f} (at most {max(each):.3f})" for each in (left, right, estimated)]
        rows.append([f"sketch, {passes} passes", f"{held / size:.1%}", *middle, f"{seconds:.0f}"])
    write(
        "sketch",
        "Sketched gradients",
        [
            *paragraph(
                f"SmolLM2-135M, all seven linear kinds, rank {RANK}, {what}, width {WIDTH}. Memory is what the "
                "statistics hold, relative to the model's own bytes. Angles are sines of the largest angle between the "
                f"space of the {RANK} leading singular vectors and the exact one, left and right, and what the report "
                "estimates for the larger of the two without knowing the exact one: median over the layers and the "
                "largest. One run each."
            ),
            "",
            *table(["gradients", "memory", "left sine", "right sine", "estimated", "seconds"], rows),
        ],
    )


if __name__ == "__main__":
    main()
