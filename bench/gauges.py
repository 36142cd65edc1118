"""What the gauge of IniLoRA's closed form leaves alone and what it changes, on SmolLM2's q and v.

A start's product is what it approximates the weight with; its gauge is how that is divided between B and A.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import headstart as hs
from bench.harness import paragraph, table, write
from headstart.layers.find import lora_layers
from headstart.layers.weights import base_weight
from headstart.training.models import resolve_model
from headstart.training.wrap import wrap_lora

PATH = "inilora"
CLOSED = "inilora:solver=svd,gauge=aligned"
METHODS = (
    PATH,
    "inilora:solver=adam,tolerance=0.001",
    CLOSED,
    "inilora:solver=svd,gauge=flow",
    "inilora:solver=svd,gauge=random",
    "pissa",
)
RANK, ALPHA = 8, 16
SAME = 1e-3
Pair = tuple[Tensor, Tensor]  # B (d_out, r) and A (r, d_in) in float64


def factors(base: Any, method: str) -> tuple[dict[str, Pair], float]:
    """Return a start's factors by layer, and the scaling."""
    model = wrap_lora(
        copy.deepcopy(base), ["q_proj", "v_proj"], r=RANK, lora_alpha=ALPHA, use_rslora=True, task_type="CAUSAL_LM"
    )
    hs.initialize_(model, method, cache=False, progress=False)
    pairs = {}
    for target in lora_layers(model, "default"):
        B, A = (part["default"].weight.detach().double() for part in (target.module.lora_B, target.module.lora_A))
        pairs[target.name] = (B, A)
    return pairs, ALPHA / math.sqrt(RANK)


def weights(base: Any) -> dict[str, Tensor]:
    """Return the weights by layer, in float64."""
    model = wrap_lora(copy.deepcopy(base), ["q_proj", "v_proj"], r=RANK, task_type="CAUSAL_LM")
    return {target.name: base_weight(target.module).double() for target in lora_layers(model, "default")}


def apart(factor: Tensor, reference: Tensor) -> float:
    """Return the Frobenius norm of a difference over that of the second."""
    return float((factor - reference).norm() / reference.norm())


@dataclass(frozen=True)
class Layer:
    """How one layer's start compares with the path's: differences relative, in Frobenius norm."""

    product: float
    factors: float
    excess: float
    norms: tuple[float, float]
    spread: float
    gap: float


def compared(start: dict[str, Pair], path: dict[str, Pair], matrices: dict[str, Tensor], s: float) -> list[Layer]:
    """Return every layer's figures."""
    layers = []
    for name, (B, A) in start.items():
        B0, A0 = path[name]
        values, values_A = torch.linalg.svdvals(matrices[name]), torch.linalg.svdvals(A)
        bound = float(values[RANK:].square().sum())
        layers.append(
            Layer(
                product=apart(B @ A, B0 @ A0),
                factors=apart(torch.cat([B, A.T]), torch.cat([B0, A0.T])),
                excess=float((matrices[name] - s * B @ A).square().sum()) / bound - 1,
                norms=(float(A.norm()), float(B.norm())),
                spread=float(values_A[0] / values_A[-1]),
                gap=float(values[RANK - 1] / values[RANK]) - 1,
            )
        )
    return layers


def row(method: str, layers: list[Layer]) -> list[str]:
    """Return one method's figures over all layers."""

    def middle(values: Iterable[float]) -> float:
        return statistics.median(values)

    products, excess = ([getattr(layer, name) for layer in layers] for name in ("product", "excess"))
    same = method == PATH
    return [
        method,
        "" if same else f"{middle(products):.1e} ({max(products):.1e})",
        f"{middle(excess):.1e} ({max(excess):.1e})",
        "" if same else f"{middle(layer.factors for layer in layers):.2f}",
        f"{middle(layer.norms[0] for layer in layers):.2f}",
        f"{middle(layer.norms[1] for layer in layers):.2f}",
        f"{middle(layer.spread for layer in layers):.1f}",
    ]


def main() -> None:
    base, _, _ = resolve_model("smollm2")
    matrices = weights(base)
    starts = {}
    for method in METHODS:
        starts[method], s = factors(base, method)
    figures = {method: compared(start, starts[PATH], matrices, s) for method, start in starts.items()}
    rows = [row(method, layers) for method, layers in figures.items()]
    titles = ["start", "product from path's", "error over the bound", "factors from path's", "norm of A", "norm of B"]
    lines = paragraph(
        f"SmolLM2-135M's q and v ({len(matrices)} matrices), rank {RANK}, seed 0, in float64. The path is IniLoRA's "
        "20,000 steps of Adam; the closed forms divide the same best approximation between B and A in other ways. "
        "Differences are relative, in Frobenius norm; error is the squared residual over the Eckart-Young bound, less "
        "one; spread is A's largest singular value over its least. Medians of all matrices, with the largest in "
        "brackets."
    )
    lines += ["", *table([*titles, "spread of A"], rows), ""]
    apart_ones = [layer for layer in figures[CLOSED] if layer.product > SAME]
    others = [100 * layer.gap for layer in figures[CLOSED] if layer.product <= SAME]
    text = (
        f"So product and residual are the same in {len(others)} of {len(matrices)} matrices (within {SAME:g}), and the "
        "factors are not."
    )
    if apart_ones:
        gaps = [100 * layer.gap for layer in apart_ones]
        text += (
            f" In the rest the path has not arrived after 20,000 steps: singular values {RANK} and {RANK + 1} lie "
            f"{min(gaps):.2f} to {max(gaps):.2f} % apart there (elsewhere {statistics.median(others):.1f} % in the "
            "median), so that another direction does nearly as well."
        )
    lines += paragraph(text)
    lines.append("")
    lines += paragraph(
        "AdamW moves every entry by about the rate whatever the gradient, so that the larger a start's factors, the "
        "further a step moves the product, and the lower the rate that they want. What fine-tuning makes of it: "
        "[SST-2](inilora_glue.md), [GSM8K](inilora_gsm8k.md)."
    )
    write("inilora_gauges", "What IniLoRA's gauge changes", lines)


if __name__ == "__main__":
    main()
