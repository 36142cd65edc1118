"""Starts from the weight against PEFT's own, on SmolLM2: seconds, and how exact the singular values are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import headstart as hs
from bench.harness import interleave, table, write
from headstart.layers.anchored import anchors
from headstart.layers.find import lora_layers
from headstart.linalg.product import product_svd
from headstart.training.models import resolve_model

RANK = 8


def config(start: str | bool = True) -> LoraConfig:
    return LoraConfig(
        r=RANK, lora_alpha=16, target_modules="all-linear", init_lora_weights=start, task_type="CAUSAL_LM"
    )


def with_peft(start: str) -> Any:
    return lambda base: get_peft_model(base, config(start))


def with_headstart(method: str) -> Any:
    return lambda base: hs.initialize_(get_peft_model(base, config()), method)


def worst_error(model: Any, exact: dict[str, torch.Tensor]) -> float:
    """Return the largest relative error of the kept singular values, over all layers, against float64."""
    worst = 0.0
    for target in lora_layers(model, "default"):
        start = anchors(target.module, "default")
        A, B = start if start else (target.module.lora_A["default"].weight, target.module.lora_B["default"].weight)
        values = target.scaling * product_svd(B.detach().double(), A.detach().double())[1]
        expected = exact[target.name]
        worst = max(worst, float(((values - expected).abs() / expected).max()))
    return worst


def main() -> None:
    base, _, _ = resolve_model("smollm2")
    exact = {}
    wrapped = get_peft_model(copy.deepcopy(base), config())
    for target in lora_layers(wrapped, "default"):
        weight = target.module.get_base_layer().weight.detach().double()
        exact[target.name] = torch.linalg.svdvals(weight)[:RANK]
    sides: dict[str, tuple[Any, Any]] = {
        "PEFT lora (wrapping alone)": (lambda: copy.deepcopy(base), with_peft(True)),  # type: ignore[arg-type]
        "PEFT pissa": (lambda: copy.deepcopy(base), with_peft("pissa")),
        "PEFT pissa_niter_4": (lambda: copy.deepcopy(base), with_peft("pissa_niter_4")),
        "headstart pissa": (lambda: copy.deepcopy(base), with_headstart("pissa")),
        "PEFT olora": (lambda: copy.deepcopy(base), with_peft("olora")),
        "headstart olora": (lambda: copy.deepcopy(base), with_headstart("olora")),
        "headstart milora": (lambda: copy.deepcopy(base), with_headstart("milora")),
        "headstart init-ab": (lambda: copy.deepcopy(base), with_headstart("init-ab")),
    }
    timings = interleave(sides, 5, warm=True)
    errors = {}
    for name, start in (("PEFT pissa", "pissa"), ("PEFT pissa_niter_4", "pissa_niter_4")):
        errors[name] = worst_error(get_peft_model(copy.deepcopy(base), config(start)), exact)
    model = get_peft_model(copy.deepcopy(base), config())
    hs.initialize_(model, "pissa", cache=False)
    errors["headstart pissa"] = worst_error(model, exact)
    rows = [[name, str(timing), f"{errors[name]:.1e}" if name in errors else ""] for name, timing in timings.items()]
    speed = timings["PEFT pissa"].median / timings["headstart pissa"].median
    qr = timings["PEFT olora"].median / timings["headstart olora"].median
    write(
        "spectral",
        "Starts from the weight",
        [
            f"SmolLM2-135M, all seven linear kinds ({len(exact)} layers), rank {RANK}. Seconds from the base model",
            "to the initialised PEFT model (wrapping included), as the verb is called by default: the cache is on, and",
            "keeps none of these. Median and range of 5 interleaved rounds. The error is the largest relative error of",
            "any kept singular value in any layer, against float64.",
            "",
            *table(["start", "seconds", "worst singular value"], rows),
            "",
            f"pissa: {speed:.1f} times faster than PEFT's `pissa` (goal: 6). olora: {qr:.1f} times faster than PEFT's.",
        ],
    )


if __name__ == "__main__":
    main()
