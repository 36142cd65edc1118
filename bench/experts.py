"""Starts of experts: layers of Qwen3-30B-A3B's shapes, by how many experts and layers there are; and a step on one."""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import headstart as hs
from bench.harness import Side, interleave, paired_ratio, paragraph, shared_copy, table, write
from headstart.context import Memory
from headstart.layers.adapters import find
from headstart.layers.experts import ExpertLayer
from headstart.linalg.svd import truncated_svd

RANK, ROUNDS = 8, 5
PLAIN = "PEFT's LoRA"
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
# By start, how many experts in how many layers; the last of each is about what 24 GiB and a few minutes allow.
STARTS = {
    "pissa": ((32, 1), (64, 1), (128, 1), (128, 8)),
    "lora-one": ((32, 1), (64, 1), (128, 1), (128, 3)),
    "lora-da": ((8, 1), (16, 1), (32, 1), (32, 2)),
}
Batch = dict[str, torch.Tensor]


def build(experts: int, chosen: argparse.Namespace, layers: int = 1) -> Any:
    """Return a random model whose experts have the true shapes."""
    torch.manual_seed(0)
    # From the first, as many layers would not fit in float32 while they are made.
    torch.set_default_dtype(getattr(torch, chosen.precision))
    config = Qwen3MoeConfig(
        hidden_size=chosen.hidden,
        moe_intermediate_size=chosen.inner,
        num_experts=experts,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=1024,
        max_position_embeddings=1024,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 3:  # Transformers leaves them as they were allocated
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def wrapped(base: Any) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=[], target_parameters=PARAMETERS, task_type="CAUSAL_LM")
    return get_peft_model(shared_copy(base), config)


def batches(samples: int, length: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1024, (samples, length), generator=generator)
    parts = [ids[start : start + 2] for start in range(0, samples, 2)]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in parts]


def loop(model: Any) -> None:
    """Decompose one expert after another, as a loop over the parameter would."""
    for layer in find(model, None).layers:
        if isinstance(layer, ExpertLayer):
            truncated_svd(layer.weight(), RANK)


def stepping(model: Any, batch: Batch) -> Side:
    """Return a side that makes training steps."""
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)

    def step(_: None) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return (lambda: None), step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experts", description=__doc__)
    add = parser.add_argument
    add("--hidden", type=int, default=2048)
    add("--inner", type=int, default=768)
    add("--share", type=float, default=1.0, help="of the numbers of experts, to try it")
    add("--starts", nargs="*", default=list(STARTS))
    add("--precision", default="bfloat16", help="float32 where a processor has no arithmetic in bfloat16")
    add("--page", default="experts")
    chosen = parser.parse_args()
    data = batches(8, 256)
    rows = []
    for method in chosen.starts:
        for experts, layers in STARTS[method]:
            count = max(8, int(experts * chosen.share))
            model = wrapped(build(count, chosen, layers))
            reads = method != "pissa"
            name = f"{method}:samples=8" if reads else method
            given = hs.TrainingData(data, training=hs.Training(100_000)) if reads else None
            memory, began = Memory(torch.device("cpu")), time.perf_counter()
            report = hs.initialize_(model, name, data=given, cache=False, progress=False)
            seconds = time.perf_counter() - began
            steps = ", ".join(f"{step} {spent:.1f}" for step, spent in report.seconds_by_step.items() if spent > 0.05)
            peak = f"{memory.peak() / 2**30:.1f}"
            per_expert = f"{1e3 * seconds / (count * layers):.0f}"
            rows.append([method, str(count), str(layers), f"{seconds:.1f}", per_expert, peak, steps])
            print(rows[-1], flush=True)
            del model, report
            gc.collect()
    count = max(8, int(32 * chosen.share))
    base = build(count, chosen)
    by_loop: dict[str, Side] = {
        "one after another": (lambda: wrapped(base), loop),
        "headstart pissa": (
            lambda: wrapped(base),
            lambda model: hs.initialize_(model, "pissa", cache=False, progress=False),
        ),
    }
    decomposed = interleave(by_loop, ROUNDS, warm=True)
    anchored = wrapped(base)
    hs.initialize_(anchored, "pissa", cache=False, progress=False)
    sides = {PLAIN: stepping(wrapped(base), data[0]), "anchored": stepping(anchored, data[0])}
    steps_taken = interleave(sides, ROUNDS, warm=True)
    write(
        chosen.page,
        "Starts of a mixture's experts",
        [
            *paragraph(
                f"Layers of Qwen3-30B-A3B's shapes (hidden {chosen.hidden}, experts' inner size {chosen.inner}, 8 "
                f"experts a token), random weights in {chosen.precision}, both parameters of the experts adapted "
                f"at rank {RANK}; "
                "8 samples of 256 tokens for starts that read data. Once each, in one process: peak memory is the "
                "resident set's highest growth so far, and says something of a row only where it rises."
            ),
            "",
            *table(["start", "experts", "layers", "seconds", "ms an expert", "peak GiB", "seconds by step"], rows),
            "",
            *paragraph(
                f"One layer of {count} experts, median and range of {ROUNDS} interleaved rounds: pissa takes "
                f"{decomposed['headstart pissa']}, and one matrix after another {decomposed['one after another']} "
                f"(without what is installed and reported), "
                f"{1 / paired_ratio(decomposed, 'headstart pissa', 'one after another'):.2f} times as long. A training "
                f"step on 2 rows of 256 tokens takes {steps_taken['anchored']} anchored and "
                f"{steps_taken[PLAIN]} as PEFT's own LoRA of the same rank: "
                f"{paired_ratio(steps_taken, 'anchored', PLAIN):.3f} times."
            ),
        ],
        precision=chosen.precision,
    )


if __name__ == "__main__":
    main()
