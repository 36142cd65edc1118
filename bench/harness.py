"""Interleaving two or more sides, repeating, and writing tables."""

from __future__ import annotations

import copy
import gc
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headstart.tasks.base import Example
from headstart.tasks.registry import parse_task
from headstart.tasks.rows import read
from headstart.tasks.text import Text
from headstart.training.data import batches, tokenize_examples

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"

# (prepare, run): what prepare returns is handed to run, and only run is timed.
Side = tuple[Callable[[], Any], Callable[[Any], Any]]


@dataclass(frozen=True)
class Timing:
    """The seconds of one side, one a round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return f"{self.median:.2f} s ({min(self.seconds):.2f} to {max(self.seconds):.2f})"


def interleave(sides: Mapping[str, Side], rounds: int, *, warm: bool = False) -> dict[str, Timing]:
    """Run every side once a round, in turn, ``rounds`` times; with ``warm``, one more round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + warm):
        for name, (prepare, run) in sides.items():
            prepared = prepare()
            gc.collect()
            began = time.perf_counter()
            run(prepared)
            if number >= warm:
                seconds[name].append(time.perf_counter() - began)
            del prepared
    return {name: Timing(values) for name, values in seconds.items()}


def paired_ratio(timings: Mapping[str, Timing], name: str, baseline: str) -> float:
    """Return the median over rounds of one side's time over the baseline's in the same round."""
    pairs = zip(timings[name].seconds, timings[baseline].seconds, strict=True)
    return statistics.median(own / base for own, base in pairs)


def shared_copy(model: Any) -> Any:
    """Return a copy of a model whose parameters are the model's own, for sides that leave them alone."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def write(name: str, title: str, lines: Sequence[str], *, precision: str = "float32") -> None:
    """Write a result page, and print it."""
    text = "\n".join([f"# {title}", "", machine(precision), "", *lines, ""])
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def paragraph(text: str) -> list[str]:
    """Return a text broken into lines."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    head = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return head + ["| " + " | ".join(row) + " |" for row in rows]


def machine(precision: str = "float32") -> str:
    """Return what the figures were measured on."""
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "transformers"))
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"
    return f"{cores}, {precision}; {packages}."


def gsm8k_or_problems(count: int) -> tuple[list[Example], str]:
    """Return training examples: GSM8K where the data folder is beside the checkout, else the built-in problems."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "gsm8k"
    if folder.is_dir():
        return read(Text(), folder, limit=count).examples, "GSM8K"
    return read(parse_task(f"problems:size={count}")).examples, "built-in problems"


def token_batches(count: int, batch_size: int, tokenizer: Any) -> tuple[list[dict[str, torch.Tensor]], str]:
    """Return batches of like length of the first ``count`` training examples, and what they are."""
    examples, name = gsm8k_or_problems(count)
    rows = tokenize_examples(examples, tokenizer, max_length=512).rows
    rows.sort(key=lambda row: len(row["input_ids"]))
    data = batches(rows, batch_size, tokenizer.pad_token_id)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in data)
    return data, f"{count} samples of {name} ({tokens:,} tokens, batches of {batch_size})"
