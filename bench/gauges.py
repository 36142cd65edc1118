"""What the gauge of IniLoRA's closed form leaves alone and what it changes, on SmolLM2's q and v.

A start's product is what it approximates the weight with; its gauge is how that is divided between B and A.
"""

from __future__ import annotations

import copy
import math
import statistics
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
METHODS = (
    PATH,
    "inilora:tolerance=0.001",
    "inilora:solver=svd,gauge=aligned",
    "inilora:solver=svd,gauge=flow",
    "inilora:solver=svd,gauge=random",
    "pissa",
)
RANK, ALPHA = 8, 16
Pair = tuple[Tensor, Tensor]  # B (d_out, r) and A (r, d_in) in float64


def factors(base: Any, method: str) -> tuple[dict[str, Pair], float]:
    """Return a start's factors by layer, and the scaling."""
    model = wrap_lora(
        copy.deepcopy(base), ["q_proj", "v_proj"], r=RANK, lora_alpha=ALPHA, use_rslora=True, task_type="CAUSAL_LM"
    )
    hs.initialize_(model, method, cache=False, progress=False)
    found = {}
    for target in lora_layers(model, "default"):
        B, A = (part["default"].weight.detach().double() for part in (target.module.lora_B, target.module.lora_A))
        found[target.name] = (B, A)
    return found, ALPHA / math.sqrt(RANK)


def weights(base: Any) -> dict[str, Tensor]:
    """Return the weights by layer, in float64."""
    model = wrap_lora(copy.deepcopy(base), ["q_proj", "v_proj"], r=RANK, task_type="CAUSAL_LM")
    return {target.name: base_weight(target.module).double() for target in lora_layers(model, "default")}


def apart(mine: Tensor, theirs: Tensor) -> float:
    """Return the Frobenius norm of a difference over that of the second."""
    return float((mine - theirs).norm() / theirs.norm())


def row(method: str, start: dict[str, Pair], path: dict[str, Pair], held: dict[str, Tensor], s: float) -> list[str]:
    """Return one method's figures over all layers."""
    products, factor, excess, norms, spread = [], [], [], [], []
    for name, (B, A) in start.items():
        B0, A0 = path[name]
        products.append(apart(B @ A, B0 @ A0))
        factor.append(apart(torch.cat([B, A.T]), torch.cat([B0, A0.T])))
        values = torch.linalg.svdvals(held[name])
        bound = float(values[RANK:].square().sum())
        excess.append(float((held[name] - s * B @ A).square().sum()) / bound - 1)
        norms.append((float(A.norm()), float(B.norm())))
        mine = torch.linalg.svdvals(A)
        spread.append(float(mine[0] / mine[-1]))
    middle = [statistics.median(each) for each in zip(*norms, strict=True)]
    return [
        method,
        f"{max(products):.1e}" if start is not path else "",
        f"{max(excess):.1e}",
        f"{statistics.median(factor):.2f}" if start is not path else "",
        f"{middle[0]:.2f}",
        f"{middle[1]:.2f}",
        f"{statistics.median(spread):.1f}",
    ]


def main() -> None:
    base, _, _ = resolve_model("smollm2")
    held = weights(base)
    starts = {}
    for method in METHODS:
        starts[method], s = factors(base, method)
    rows = [row(method, start, starts[PATH], held, s) for method, start in starts.items()]
    titles = ["start", "product from path's", "error over the bound", "factors from path's", "norm of A", "norm of B"]
    lines = paragraph(
        f"SmolLM2-135M's q and v ({len(held)} matrices), rank {RANK}, seed 0, in float64. The path is IniLoRA's 20,000 "
        "steps of Adam; the closed forms divide the same best approximation between B and A in other ways. Of product "
        "and error (the squared residual over the Eckart-Young bound, less one) the largest of all matrices; of "
        "factors (B and A together, Frobenius), norms, and A's largest singular value over its least the median."
    )
    lines += ["", *table([*titles, "spread of A"], rows), ""]
    lines += paragraph(
        "So product and residual are the same, and the factors are not. AdamW moves every entry by about the rate "
        "whatever the gradient, so that the larger a start's factors, the further a step moves the product: the larger "
        "they are, the lower the rate that they want. What fine-tuning makes of it: [SST-2](inilora_glue.md), "
        "[GSM8K](inilora_gsm8k.md)."
    )
    write("inilora_gauges", "What IniLoRA's gauge changes", lines)


if __name__ == "__main__":
    main()
