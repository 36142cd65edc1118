"""Starts from the weight against PEFT's own, on SmolLM2: seconds, and how exact the singular values are."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import headstart as hs
from bench.harness import interleave, paragraph, table, write
from headstart.layers.anchored import anchors
from headstart.layers.find import lora_layers
from headstart.linalg.product import product_svd
from headstart.training.models import resolve_model

RANK = 8


def config(start: str | bool = True) -> LoraConfig:
    return LoraConfig(
        r=RANK, lora_alpha=16, target_modules="all-linear", init_lora_weights=start, task_type="CAUSAL_LM"
    )


def with_peft(start: str | bool) -> Callable[[Any], Any]:
    return lambda base: _finished(get_peft_model(base, config(start)))


def with_headstart(method: str) -> Callable[[Any], Any]:
    return lambda base: _finished(hs.initialize_(get_peft_model(base, config()), method, cache=False))


def _finished(made: Any) -> Any:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made


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
    parser = argparse.ArgumentParser(prog="python -m bench.spectral", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2", help="SmolLM2, by its name or as a GGUF file")
    add("--device", default="cpu")
    add("--rounds", type=int, default=5)
    add("--sides", nargs="*", help="these alone, such as pissa olora (default all)")
    add("--page", default="spectral")
    chosen = parser.parse_args()
    base = resolve_model(chosen.model)[0].to(torch.device(chosen.device))
    exact = {}
    wrapped = get_peft_model(copy.deepcopy(base), config())
    for target in lora_layers(wrapped, "default"):
        weight = target.module.get_base_layer().weight.detach().double()
        exact[target.name] = torch.linalg.svdvals(weight)[:RANK]
    sides: dict[str, tuple[Any, Any]] = {
        "PEFT lora (wrapping alone)": (lambda: copy.deepcopy(base), with_peft(True)),
        "PEFT pissa": (lambda: copy.deepcopy(base), with_peft("pissa")),
        "PEFT pissa_niter_4": (lambda: copy.deepcopy(base), with_peft("pissa_niter_4")),
        "headstart pissa": (lambda: copy.deepcopy(base), with_headstart("pissa")),
        "PEFT olora": (lambda: copy.deepcopy(base), with_peft("olora")),
        "headstart olora": (lambda: copy.deepcopy(base), with_headstart("olora")),
        "headstart milora": (lambda: copy.deepcopy(base), with_headstart("milora")),
        "headstart init-ab": (lambda: copy.deepcopy(base), with_headstart("init-ab")),
    }
    if chosen.sides:
        sides = {name: side for name, side in sides.items() if name.split()[1].split("_")[0] in {"lora", *chosen.sides}}
    timings = interleave(sides, chosen.rounds, warm=True)
    errors = {}
    for name, start in (("PEFT pissa", "pissa"), ("PEFT pissa_niter_4", "pissa_niter_4")):
        errors[name] = worst_error(get_peft_model(copy.deepcopy(base), config(start)), exact)
    model = get_peft_model(copy.deepcopy(base), config())
    hs.initialize_(model, "pissa", cache=False)
    errors["headstart pissa"] = worst_error(model, exact)
    rows = [[name, str(timing), f"{errors[name]:.1e}" if name in errors else ""] for name, timing in timings.items()]
    ratios = []
    for name, goal in (("pissa", " (goal: 6)"), ("olora", "")):
        if f"PEFT {name}" in timings:
            ratio = timings[f"PEFT {name}"].median / timings[f"headstart {name}"].median
            ratios.append(f"{name}: {ratio:.1f} times faster than PEFT's `{name}`{goal}.")
    on = torch.cuda.get_device_name() if base.device.type == "cuda" else "CPU"
    write(
        chosen.page,
        "Starts from the weight",
        [
            *paragraph(
                f"{on}. SmolLM2-135M, all seven linear kinds ({len(exact)} layers), rank {RANK}. Seconds from the base "
                "model to the initialised PEFT model (wrapping included), without the cache. "
                f"Median and range of {chosen.rounds} interleaved rounds. The error is "
                "the largest relative error of any kept singular value in any layer, against float64."
            ),
            "",
            *table(["start", "seconds", "worst singular value"], rows),
            "",
            " ".join(ratios),
        ],
    )


if __name__ == "__main__":
    main()
