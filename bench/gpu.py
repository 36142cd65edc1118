"""Starts and training steps on a GPU: random models of Llama's shapes in bfloat16 and NF4, beside PEFT's own.

Sections are measured in the order of :data:`SECTIONS` until the seconds are up; what was not reached is said.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.util
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import get_peft_model

from bench.gpu_models import (
    RANK,
    Batch,
    batches,
    build,
    config,
    in_four_bits,
    on_device,
    plain_pass,
    with_headstart,
    with_peft,
)
from bench.harness import Timing, interleave, paired_ratio, paragraph, shared_copy, table, write
from bench.inilora import on_device as inilora_on_device

SECTIONS = ("steps", "pairs", "starts 1B", "starts 8B", "inilora")
# Ours, and PEFT's of the same name.
PAIRS = {
    "pissa": ("pissa", "pissa_niter_4"),
    "olora": ("olora",),
    "lora-ga": ("lora_ga",),
    "eva": ("eva",),
    "corda": ("corda",),
}
ALONE = ("lora-one", "lora-da", "lora-sb:lr=1e-4", "inilora")
# Of whole models, those that aren't minutes.
WHOLE = {
    "1B": ("pissa", "olora", "lora-ga", "lora-one", "lora-sb:lr=1e-4", "lora-da"),
    "8B": ("pissa", "lora-one", "lora-ga"),
    "tiny": ("pissa", "lora-one"),
}
STEPS = {"PEFT's LoRA": None, "anchored (pissa)": "pissa", "core (lora-xs)": "lora-xs"}
ROUNDS = 15


class Clock:
    """How much time is left."""

    def __init__(self, seconds: float, limit: float) -> None:
        self._until, self.limit = time.monotonic() + seconds, limit

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self._until - time.monotonic()


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError once so many seconds have passed, as soon as Python is heard again."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(run: Callable[[], Any], clock: Clock) -> tuple[str, str, Any]:
    """Return the seconds of a run, its peak memory in GiB over what was held, and what it returns; or why not."""
    gc.collect()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated() if on_gpu else 0
    limit = min(clock.limit, clock.left)
    if limit <= 0:
        return "not reached", "", None
    print(f"  {clock.left:.0f} s left", flush=True)
    began = time.perf_counter()
    try:
        with at_most(limit):
            made = run()
            if on_gpu:
                torch.cuda.synchronize()
    except TimeoutError:
        return f"more than {limit:.0f}", "", None
    except Exception as error:  # one side's fault is its own row
        return f"failed: {type(error).__name__} {str(error).splitlines()[0][:80] if str(error) else ''}", "", None
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() - loaded if on_gpu else 0
    return f"{seconds:.2f}", f"{peak / 2**30:.2f}", made


def pairs(shape: str, device: torch.device, clock: Clock) -> list[str]:
    """Measure starts against PEFT's own on one decoder layer, whose seven matrices are enough for minutes of SVD."""
    base = build(shape, device, layers=1)
    data = on_device(batches(shape, *((64, 512, 4) if shape != "tiny" else (8, 16, 4))), device)
    rows = []
    for method, others in {**PAIRS, **dict.fromkeys(ALONE, ())}.items():
        ours = measured(partial(_started, method, base, data), clock)
        rows.append([method, "headstart", *ours[:2], ""])
        for other in others:
            model = copy.deepcopy(base)
            pefts = measured(partial(with_peft(other), model, data), clock)
            ratio = ""
            with contextlib.suppress(ValueError):
                ratio = f"{float(pefts[0]) / float(ours[0]):.1f}"
            rows.append([method, f"PEFT `{other}`", *pefts[:2], ratio])
            del model
        print(*rows[-1 - len(others) :], sep="\n", flush=True)
    what = f"{len(data)} batches of {tuple(data[0]['labels'].shape)} random tokens for those that read data"
    return [
        f"## Against PEFT's own: one decoder layer of {shape}'s shapes",
        "",
        *paragraph(
            f"Seconds from the base model to the started one (wrapping included), and the peak over the loaded model; "
            f"once each, after all was run on a tiny model; {what}. Of PEFT's `eva` and `corda` what they do is not "
            "quite the same: see docs/methods.md."
        ),
        "",
        *table(["start", "by", "seconds", "peak GiB", "times ours"], rows),
        "",
    ]


def _started(method: str, base: Any, data: list[Batch]) -> Any:
    return with_headstart(method)(shared_copy(base), data)


def starts(shape: str, device: torch.device, clock: Clock) -> list[str]:
    """Measure starts of a whole model, beside a plain gradient pass over the same data."""
    base = build(shape, device)
    samples, length = {"1B": (128, 512), "8B": (64, 512)}.get(shape, (8, 16))
    data = on_device(batches(shape, samples, length, 4), device)

    def plain(part: list[Batch]) -> Callable[[], None]:
        model = shared_copy(base)
        return lambda: plain_pass(model, part)

    plain(data[:1])()
    base.zero_grad(set_to_none=True)
    passed = measured(plain(data), clock)
    base.zero_grad(set_to_none=True)
    base.requires_grad_(True)
    rows, notes = [["plain gradient pass", *passed[:2], "1"]], []
    for method in WHOLE[shape]:
        seconds, peak, made = measured(partial(_started, method, base, data), clock)
        ratio = f"{float(seconds) / float(passed[0]):.2f}" if made is not None else ""
        rows.append([method, seconds, peak, ratio])
        if made is not None:
            report = made[1]
            del made
            took = ", ".join(f"{step} {spent:.2f} s" for step, spent in report.seconds_by_step.items() if spent > 0.01)
            notes.append(f"- {method}: {took}.")
        print(rows[-1], *notes[-1:], flush=True)
    return [
        f"## A whole model of {shape}'s shapes",
        "",
        f"{samples} samples of {length} random tokens, batches of 4, all linear layers, once each.",
        "",
        *table(["side", "seconds", "peak GiB", "over the plain pass"], rows),
        "",
        *notes,
        "",
    ]


def steps(shape: str, device: torch.device, clock: Clock) -> list[str]:
    """Measure training steps on anchored and core layers against PEFT's own LoRA, on bfloat16 and on NF4."""
    size = (4, 512) if shape != "tiny" else (2, 16)
    batch = on_device(batches(shape, size[0], size[1], size[0]), device)[0]
    lines = [f"## Training steps, {shape}'s shapes", ""]
    bases = ["bfloat16"] + ["NF4"] * (importlib.util.find_spec("bitsandbytes") is not None)
    rows = []
    for kind in bases:
        if clock.left <= 0:
            break
        base = build(shape, device)
        if kind == "NF4":
            base = in_four_bits(base, device)
        sides: dict[str, Any] = {}
        for label, method in STEPS.items():
            model = shared_copy(base)
            wrapped = get_peft_model(model, config()) if method is None else with_headstart(method)(model, [])[0]
            sides[label] = _stepping(wrapped, batch)
        timings = interleave(sides, ROUNDS, warm=True)
        for label in STEPS:
            ratio = paired_ratio(timings, label, "PEFT's LoRA")
            milli = Timing([1e3 * seconds for seconds in timings[label].seconds])
            spread = f"{milli.median:.1f} ({min(milli.seconds):.1f} to {max(milli.seconds):.1f})"
            rows.append([kind, label, spread, f"{ratio:.3f}"])
            print(rows[-1], flush=True)
        del sides, base
        gc.collect()
    what = f"Forward, backward and AdamW on {size[0]} rows of {size[1]} tokens, median of {ROUNDS} interleaved steps."
    return [*lines, what, "", *table(["base", "layers", "ms a step", "over PEFT's LoRA"], rows), ""]


def _stepping(model: Any, batch: Batch) -> tuple[Callable[[], None], Callable[[Any], None]]:
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(_: None) -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return (lambda: None), step


def warm_up(device: torch.device) -> None:
    """Run all that is measured on a tiny model, so that libraries are loaded and kernels chosen."""
    base, data = build("tiny", device), on_device(batches("tiny", 8, 16, 4), device)
    for method in (*PAIRS, *ALONE):
        began = time.perf_counter()
        with_headstart(method)(shared_copy(base), data)
        print(f"  warmed up {method}: {time.perf_counter() - began:.1f} s", flush=True)
    for other in (name for names in PAIRS.values() for name in names):
        with contextlib.suppress(Exception):  # said where it is measured
            with_peft(other)(copy.deepcopy(base), data)
    plain_pass(copy.deepcopy(base), data)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--seconds", type=float, default=400, help="nothing begins after so long")
    parser.add_argument("--limit", type=float, default=40, help="seconds of one start")
    parser.add_argument("--anywhere", action="store_true", help="try it on a tiny model, without a GPU; writes nothing")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.anywhere:
        sys.exit("no GPU here: nothing is measured, nothing is written")
    device = torch.device("cuda" if on_gpu else "cpu")
    clock = Clock(arguments.seconds, arguments.limit)

    def of(shape: str) -> str:
        return shape if on_gpu else "tiny"

    makers: dict[str, Callable[[], list[str]]] = {
        "steps": lambda: steps(of("1B"), device, clock),
        "pairs": lambda: pairs(of("8B"), device, clock),
        "starts 1B": lambda: starts(of("1B"), device, clock),
        "starts 8B": lambda: starts(of("8B"), device, clock),
        "inilora": lambda: [
            "## IniLoRA",
            "",
            *inilora_on_device(device, *((4096, 64, 20_000) if on_gpu else (64, 4, 300))),
        ],
    }
    warm_up(device)
    lines: list[str] = []
    missed = []
    for section in arguments.sections:
        if clock.left <= 0:
            missed.append(section)
            continue
        began = time.perf_counter()
        lines += makers[section]()
        print(f"-- {section}: {time.perf_counter() - began:.0f} s", flush=True)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            _page(lines, [])
    if on_gpu:
        _page(lines, missed)
    else:
        print(*lines, sep="\n")


def _page(lines: list[str], missed: list[str]) -> None:
    head = paragraph(
        f"{torch.cuda.get_device_name()}. Random models of Llama's shapes in bfloat16, all seven linear kinds, rank "
        f"{RANK}; one process (`bench/gpu.sh`). Peak memory is what PyTorch allocated beyond the loaded model."
    )
    late = [f"Not reached in the time given: {', '.join(missed)}.", ""] if missed else []
    write("gpu", "Start-up and steps on a GPU", [*head, "", *lines, *late], precision="bfloat16")


if __name__ == "__main__":
    main()
