"""Start-up on a GPU: lora-da and lora-one against a plain gradient pass, on random Llama models; IniLoRA's solvers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import headstart as hs
from bench.harness import paragraph, table, write
from bench.inilora import on_device

RANK = 8
LIMIT = 180  # seconds of a side, its warm-up too
SHAPES: dict[str, dict[str, int]] = {
    "1B": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    ),
    "7B": dict(
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32_000,
    ),
    # Small enough to try this script on a processor.
    "tiny": dict(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
}
# Size and count of q and v, and the steps of IniLoRA.
INILORA = {"1B": (2048, 32, 20_000), "7B": (4096, 64, 20_000), "tiny": (64, 4, 300)}
SIDES = ("plain gradient pass", "lora-one", "lora-da")


def build(shape: str, length: int, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=length, tie_word_embeddings=shape == "1B")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def batches(shape: str, samples: int, length: int, size: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (samples, length), generator=generator)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in torch.split(ids, size)
    ]


def plain_pass(model: Any, data: list[dict[str, torch.Tensor]], device: torch.device) -> None:
    """Forward, backward, ``.grad`` of the target weights."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.requires_grad_(True)
    for batch in data:
        model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).loss.backward()


def run_side(side: str, shape: str, samples: int, length: int, size: int) -> dict[str, Any]:
    """Run one side once to warm up on two batches and once for the record."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = batches(shape, samples, length, size)
    figures: dict[str, Any] = {}
    for chosen in (data[:2], data):
        model = build(shape, length, device)
        loaded = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        _synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        if side == "plain gradient pass":
            plain_pass(model, chosen, device)
        else:
            config = LoraConfig(
                r=RANK, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            method = f"{side}:samples={sum(len(batch['labels']) for batch in chosen)}"
            report = hs.initialize_(
                get_peft_model(model, config),
                method,
                data=hs.TrainingData(chosen, training=hs.Training(100_000)),
                progress=False,
            )
            figures |= {"plan": report.plan, "steps": report.seconds_by_step, "repaired": len(report.repairs())}
        _synchronize(device)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        figures |= {"seconds": time.perf_counter() - began, "loaded": loaded, "peak": peak}
        del model
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=["1B", "7B"], choices=list(SHAPES))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", choices=SIDES, help="run this one alone and print its figures")
    parser.add_argument(
        "--anywhere", action="store_true", help="run without a GPU too, to try the script; writes nothing"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.anywhere:
        sys.exit("no GPU here: nothing is measured, nothing is written")
    if arguments.side:
        print(
            json.dumps(
                run_side(arguments.side, arguments.shapes[0], arguments.samples, arguments.length, arguments.batch)
            )
        )
        return
    rows: list[list[str]] = []
    notes: list[str] = []
    for shape in arguments.shapes:
        base = 0.0
        for side in SIDES:
            figures = _in_a_process(side, shape, arguments)
            if figures is None:
                rows.append([shape, side, f"more than {LIMIT}", "", "", ""])
                continue
            base = figures["seconds"] if side == SIDES[0] else base
            ratio = f"{figures['seconds'] / base:.2f}" if base else ""
            gib = f"{figures['peak'] / 2**30:.1f}", f"{(figures['peak'] - figures['loaded']) / 2**30:.1f}"
            rows.append([shape, side, f"{figures['seconds']:.1f}", ratio, *gib])
            if "plan" in figures:
                steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in figures["steps"].items())
                notes.append(f"- {shape}, {side}: planned {figures['plan']}; {steps}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = [line for shape in arguments.shapes for line in ("", *on_device(device, *INILORA[shape]))]
    if arguments.anywhere:
        print(
            *table(["model", "side", "seconds", "over the plain pass", "peak GiB", "over the model"], rows),
            *notes,
            *weights,
            sep="\n",
        )
        return
    tokens = f"{arguments.samples} samples of {arguments.length} random tokens, batches of {arguments.batch}"
    write(
        "gpu",
        "Start-up on a GPU",
        [
            *paragraph(
                f"{torch.cuda.get_device_name()}. Random models of Llama's shapes in bfloat16, {tokens}, all "
                f"linear layers, rank {RANK}. Each side in a process of its own, once after a warm-up on two batches. "
                "Peak memory is what PyTorch allocated on the device."
            ),
            "",
            *table(["model", "side", "seconds", "over the plain pass", "peak GiB", "over the model"], rows),
            "",
            *notes,
            *weights,
        ],
    )


def _in_a_process(side: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return a side's figures; None where it takes too long."""
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--side",
        side,
        "--shapes",
        shape,
        "--samples",
        str(arguments.samples),
    ]
    command += ["--length", str(arguments.length), "--batch", str(arguments.batch)]
    command += ["--anywhere"] if arguments.anywhere else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        print(shape, side, f"more than {LIMIT} s", flush=True)
        return None
    if done.returncode:
        sys.exit(f"{side} on {shape} failed:\n{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(shape, side, f"{figures['seconds']:.1f} s", flush=True)
    return figures


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
