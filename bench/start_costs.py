"""What each start of a study costs on SmolLM2: seconds of one core, peak memory, and what it trains.

Each start is made once in a process of its own, forked from one that holds the model and the data.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import headstart as hs
from bench.harness import paragraph, table, write
from headstart.context import peak_resident
from headstart.study.cells import Grid
from headstart.study.tree import read_study
from headstart.tasks.registry import parse_task
from headstart.tasks.rows import read
from headstart.training.data import batches, tokenize_examples
from headstart.training.models import resolve_model


def measured(base: Any, method: str, config: LoraConfig, data: Any, preserve: Any) -> dict[str, Any]:
    """Return a start's seconds of one core, growth of the peak resident set in bytes, and trainable numbers."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        model = get_peft_model(base, config)
        before, began = peak_resident(), time.process_time()
        report = hs.initialize_(model, method, data=data, preserve=preserve, cache=False, progress=False)
        seconds = time.process_time() - began
        row = {"seconds": seconds, "bytes": peak_resident() - before, "trainable": report.trainable}
        os.write(writer, json.dumps(row).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        row = json.loads(pipe.read())
    os.waitpid(child, 0)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.start_costs", description=__doc__)
    parser.add_argument("study", type=Path, help="the study's file, whose starts, ranks, targets and data are taken")
    parser.add_argument("--page", default="start_costs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # for the forks, and for seconds that say the same beside other work
    grid = Grid(read_study(chosen.study))
    run = grid.base
    base, tokenizer, _ = resolve_model(run.model.name)
    examples = read(parse_task(run.data.task), limit=64).examples
    rows = tokenize_examples(examples, tokenizer, max_length=run.batch.max_length).rows
    data = batches(rows, run.batch.size, tokenizer.pad_token_id)
    config = LoraConfig(
        r=run.adapter.r, lora_alpha=run.adapter.alpha, use_rslora=run.adapter.rslora, target_modules="all-linear"
    )
    lines = []
    methods = {cell.start: cell.run.start.method for cell in grid.cells()}
    for start, method in methods.items():
        row = measured(base, method, config, data, data)
        lines.append([start, f"{row['seconds']:.1f}", f"{row['bytes'] / 2**20:.0f}", f"{row['trainable']:,}"])
        print(lines[-1], flush=True)
    write(
        chosen.page,
        "What starts cost",
        [
            *paragraph(
                f"SmolLM2-135M, rank {run.adapter.r}, all seven linear kinds; built-in problems, batches of "
                f"{run.batch.size}, also as what is to be preserved. Once each, in a process of its own: seconds of "
                "one core, and by how much the peak resident set grew beyond model and data, in MiB."
            ),
            "",
            *table(["start", "seconds", "MiB", "trainable"], lines),
        ],
    )


if __name__ == "__main__":
    main()
