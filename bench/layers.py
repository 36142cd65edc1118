"""What the kinds of layers cost on SmolLM2: a training step's time and memory, and multiply-adds and time of inference.

``python -m bench.layers 2`` takes two rounds of each timing instead of the usual number.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import headstart as hs
from bench.harness import Timing, interleave, paired_ratio, paragraph, shared_copy, table, token_batches, write
from headstart.context import peak_resident
from headstart.training.models import resolve_model

RANK, LARGER, SAMPLES, ROUNDS = 8, 32, 4, 8
MIB = 2**20
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Layers:
    """One kind of layers: the start that makes them, None for PEFT's own, and the rank."""

    kind: str
    method: str | None
    r: int = RANK
    lora_fa: bool = False

    @property
    def name(self) -> str:
        """The row's title."""
        return f"{self.kind}, r = {self.r}"

    def on(self, base: Any) -> Any:
        """Return the base model with such layers; its frozen weights are the base model's own."""
        config = LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(shared_copy(base), config)
        if self.method is not None:
            hs.initialize_(model, self.method, progress=False)
        if self.lora_fa:
            hs.lora_fa_(model)
        return model


LORA, ANCHORED, CORE = Layers("PEFT LoRA", None), Layers("anchored", "init-ab"), Layers("core", "lora-xs")
LARGER_LORA, LARGER_CORE = Layers("PEFT LoRA", None, LARGER), Layers("core", "lora-xs", LARGER)
LORA_FA = Layers("LoRA-FA", None, lora_fa=True)
TIMED = (LORA, ANCHORED, CORE, LORA_FA, LARGER_LORA, LARGER_CORE)
WEIGHED = (LORA, ANCHORED, CORE, LORA_FA, Layers("anchored LoRA-FA", "init-ab", lora_fa=True), LARGER_LORA, LARGER_CORE)


def baseline(layers: Layers) -> Layers:
    """Return PEFT's plain LoRA of the same rank."""
    return LORA if layers.r == RANK else LARGER_LORA


# Training.


class Training:
    """A model in training mode, and its optimizer."""

    def __init__(self, base: Any, layers: Layers) -> None:
        self.model = layers.on(base).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(self, batch: Batch) -> None:
        """Forward, backward, update."""
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes that one forward pass keeps for backward: every storage once, the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # kept alive, so that no other tensor gets its address

    def unpack(_: None) -> Tensor:
        raise RuntimeError("this forward pass is only counted, and has no backward.")

    # What pack returns is all that the graph keeps: the tensors themselves would hold the graph, in a ring.
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        model(**batch)
    return sum(storage.nbytes() for storage in storages.values())


@dataclass(frozen=True)
class Saved:
    """What a forward pass keeps for backward: bytes in all, bytes a token, and bytes whatever the tokens."""

    total: int
    token: float
    fixed: int


def saved(base: Any, layers: Layers, batch: Batch) -> Saved:
    """Count what is kept, at the whole batch and at half of its rows, which tells the two kinds apart."""
    model = layers.on(base).train()
    rows = len(batch["input_ids"]) // 2
    whole, half = saved_bytes(model, batch), saved_bytes(model, {key: value[:rows] for key, value in batch.items()})
    return Saved(whole, (whole - half) / batch["input_ids"][rows:].numel(), 2 * half - whole)


def peak(name: str) -> None:
    """Train two steps in this process and print the peak resident set above that of the loaded model, in bytes."""
    base, tokenizer, _ = resolve_model("smollm2")
    batch = token_batches(SAMPLES, SAMPLES, tokenizer)[0][0]
    for parameter in base.parameters():
        parameter.sum()  # what is only mapped from the file is read now, and not in the step
    before = psutil.Process().memory_info().rss
    training = Training(base, next(layers for layers in WEIGHED if layers.name == name))
    for _ in range(2):  # the second with the optimizer's state
        training.step(batch)
    print(peak_resident() - before)


def peaks() -> dict[Layers, int]:
    """Return the peak of each kind of layers, from a process of its own."""
    # Blocks of 64 KiB and more go back to the system when they are freed, so that the peak is of what was in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    by_layers = {}
    for layers in WEIGHED:
        command = [sys.executable, "-m", "bench.layers", "peak", layers.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        by_layers[layers] = int(done.stdout.strip().splitlines()[-1])
    return by_layers


def step_lines(base: Any, batch: Batch, what: str, rounds: int) -> list[str]:
    """Return the tables of a training step's time and memory, and whether they reach the goals."""
    timings, ratios = step_times(base, batch, rounds)
    counted = {layers: saved(base, layers, batch) for layers in WEIGHED}
    resident = peaks()
    padded = batch["input_ids"].numel()
    rows = [[layers.name, str(timings[layers.name]), f"{ratios[layers]:.3f}"] for layers in TIMED]
    lines = ["## A training step", ""]
    lines += paragraph(
        f"One batch of {what}: forward, backward, AdamW. Median of {rounds} interleaved steps with the range; the "
        "ratio is the median of the rounds' ratios to PEFT's plain LoRA of the same rank."
    )
    lines += ["", *table(["layers", "seconds", "over PEFT LoRA"], rows), ""]
    lines += paragraph(
        f"Memory, on the same batch ({padded} tokens with padding). Saved: the bytes that forward keeps for backward, "
        "every storage counted once, parameters left out; they are so many for each token, and so many whatever the "
        "tokens. Peak: resident set of a process of its own (Linux) above the loaded model's, two steps, one run, with "
        "an allocator that gives back what is freed; it holds gradients, optimizer and anchors too."
    )
    rows = [
        [
            layers.name,
            f"{kept.total / MIB:.1f}",
            f"{kept.total / counted[baseline(layers)].total:.3f}",
            f"{kept.token:,.0f}",
            f"{kept.fixed / MIB:.1f}",
            f"{resident[layers] / MIB:.0f}",
            f"{resident[layers] / resident[baseline(layers)]:.3f}",
        ]
        for layers, kept in counted.items()
    ]
    titles = ["layers", "saved MiB", "over PEFT LoRA", "bytes a token", "MiB beside", "peak MiB", "over PEFT LoRA"]
    lines += ["", *table(titles, rows), ""]
    for layers, goal in ((ANCHORED, 1.08), (CORE, 1.0), (LARGER_CORE, 1.0)):
        more = counted[layers].total / counted[baseline(layers)].total
        above = resident[layers] / resident[baseline(layers)]
        lines += paragraph(
            f"- {layers.name}: step {ratios[layers]:.3f} times PEFT's, goal at most {goal:g}: "
            f"{verdict(ratios[layers] <= goal)}. Memory no higher: saved {more:.4f} times, {verdict(more <= 1)}; peak "
            f"{above:.4f} times, {verdict(above <= 1)}."
        )
    return [*lines, ""]


def step_times(base: Any, batch: Batch, rounds: int) -> tuple[Mapping[str, Timing], dict[Layers, float]]:
    """Return the timings of the steps, and the ratio of each to plain LoRA of its rank."""
    trainings = {layers: Training(base, layers) for layers in TIMED}
    sides = {
        layers.name: (lambda state=state: state, lambda state: state.step(batch)) for layers, state in trainings.items()
    }
    timings = interleave(sides, rounds, warm=True)
    return timings, {layers: paired_ratio(timings, layers.name, baseline(layers).name) for layers in TIMED}


def verdict(reached: bool) -> str:
    """Return a goal's outcome in a word."""
    return "reached" if reached else "missed"


# Inference.


def trained(base: Any, layers: Layers) -> Any:
    """Return a model whose adapter is away from its start, as after training."""
    model = layers.on(base).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
    return model


def exported(base: Any, layers: Layers) -> Any:
    """Return the same adapter as a plain one, loaded by PEFT."""
    with tempfile.TemporaryDirectory() as folder:
        hs.save_lora(trained(base, layers), Path(folder) / "adapter")
        return PeftModel.from_pretrained(shared_copy(base), Path(folder) / "adapter").eval()


def merged(base: Any) -> Any:
    """Return a model with the adapter in weights of its own."""
    model = trained(base, ANCHORED)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            weight.data = weight.data.clone()
    return model.merge_and_unload()


SERVED: dict[str, Callable[[Any], Any]] = {
    "base model": shared_copy,
    "merged": merged,
    f"{LORA.name}, unmerged": lambda base: trained(base, LORA),
    f"{ANCHORED.name}, unmerged": lambda base: trained(base, ANCHORED),
    f"{ANCHORED.name}, exported (plain, r = {2 * RANK})": lambda base: exported(base, ANCHORED),
    f"{CORE.name}, unmerged": lambda base: trained(base, CORE),
    f"{CORE.name}, exported (plain, r = {RANK})": lambda base: exported(base, CORE),
    f"{LARGER_LORA.name}, unmerged": lambda base: trained(base, LARGER_LORA),
    f"{LARGER_CORE.name}, unmerged": lambda base: trained(base, LARGER_CORE),
    f"{LARGER_CORE.name}, exported (plain, r = {LARGER})": lambda base: exported(base, LARGER_CORE),
}


def forward(model: Any, batch: Batch) -> None:
    """Compute the logits of a batch."""
    with torch.inference_mode():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def multiply_adds(model: Any, batch: Batch) -> float:
    """Return the multiply-adds a token of all products with a matrix of weights, as PyTorch's own counter sees them."""
    with FlopCounterMode(display=False) as counter:
        forward(model, batch)
    counts = counter.get_flop_counts()["Global"]
    flops = sum(count for op, count in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return flops / 2 / batch["input_ids"].numel()


def entries(model: nn.Module) -> int:
    """Return the same from the shapes: a token meets every entry of every matrix that is multiplied with once."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def inference_lines(base: Any, batch: Batch, what: str, rounds: int) -> list[str]:
    """Return the table of inference.

    Raises:
        RuntimeError: the counted multiply-adds aren't those that the shapes give.
    """
    models = {name: make(base) for name, make in SERVED.items()}
    counted = {name: multiply_adds(model, batch) for name, model in models.items()}
    for name, model in models.items():
        if counted[name] != entries(model):
            raise RuntimeError(f"{name}: {counted[name]:,} multiply-adds a token counted, {entries(model):,} expected.")
    sides = {name: (lambda model=model: model, lambda model: forward(model, batch)) for name, model in models.items()}
    timings = interleave(sides, rounds, warm=True)
    first = next(iter(SERVED))
    rows = [
        [
            name,
            f"{count / 1e6:.3f}",
            f"{100 * (count / counted[first] - 1):+.2f}",
            str(timings[name]),
            f"{paired_ratio(timings, name, first):.3f}",
        ]
        for name, count in counted.items()
    ]
    lines = ["## Inference", ""]
    lines += paragraph(
        f"Logits of one batch of {what}. Multiply-adds are those of products with a matrix of weights, counted by "
        "PyTorch's FLOP counter and equal to what the shapes give; attention's own are the same for all and left out "
        f"(LoRA-SB, Table 6, asks the same). Median of {rounds} interleaved passes with the range; the ratio is the "
        "median of the rounds' ratios to the base model."
    )
    titles = ["model", "million multiply-adds a token", "% more", "seconds", "over the base model"]
    return [*lines, "", *table(titles, rows)]


def main(rounds: int = ROUNDS) -> None:
    base, tokenizer, _ = resolve_model("smollm2")
    data, what = token_batches(SAMPLES, SAMPLES, tokenizer)
    lines = paragraph(
        "SmolLM2-135M, all seven linear kinds. Anchored layers start from init-ab, core layers from lora-xs."
    )
    lines += ["", *step_lines(base, data[0], what, rounds), *inference_lines(base, data[0], what, rounds)]
    write("layers", "What layers cost", lines)


if __name__ == "__main__":
    peak(sys.argv[2]) if sys.argv[1:2] == ["peak"] else main(*map(int, sys.argv[1:]))
