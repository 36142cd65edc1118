"""What each start of a study costs: seconds of one core, peak memory, and what it trains.

Each start is made once in a process of its own, forked from one that holds the model and the data.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import headstart as hs
from bench.harness import paragraph, table, write
from headstart.context import peak_resident
from headstart.runs.tree import Run
from headstart.study.cells import Grid
from headstart.study.tree import read_study
from headstart.tasks.registry import parse_task
from headstart.tasks.rows import read
from headstart.training.data import batches, tokenize_examples
from headstart.training.models import resolve_model
from headstart.training.wrap import wrap_lora


def start(base: Any, run: Run, data: hs.TrainingData) -> dict[str, Any]:
    """Return a start's seconds of one core, growth of the peak resident set in bytes, and trainable numbers."""
    adapter = run.adapter
    model = wrap_lora(base, adapter.targets, r=adapter.r, lora_alpha=adapter.alpha, use_rslora=adapter.rslora)
    before, began = peak_resident(), time.process_time()
    report = hs.initialize_(model, run.start.method, data=data, preserve=data, cache=False, progress=False)
    seconds = time.process_time() - began
    return {"seconds": seconds, "bytes": peak_resident() - before, "trainable": report.trainable}


def forked(base: Any, run: Run, data: hs.TrainingData) -> dict[str, Any]:
    """Return the same of a start in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(start(base, run, data)).encode())
        except Exception:  # told here, as nothing else of the child goes on
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        written = pipe.read()
    os.waitpid(child, 0)
    if not written:
        raise SystemExit(f"the start {run.start.method} could not be made")
    row: dict[str, Any] = json.loads(written)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.start_costs", description=__doc__)
    parser.add_argument("study", type=Path, help="the study's file: its starts, adapter, model, task and batches")
    parser.add_argument("--page", default="start_costs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # for the forks, and for seconds that say the same beside other work
    grid = Grid(read_study(chosen.study))
    run = grid.base
    base, tokenizer, _ = resolve_model(run.model.name)
    examples = read(parse_task(run.data.task), limit=64).examples
    rows = tokenize_examples(examples, tokenizer, max_length=run.batch.max_length).rows
    read_in = batches(rows, run.batch.size, tokenizer.pad_token_id)
    data = hs.TrainingData(read_in, training=hs.Training(run.data.train_examples, run.optimizer.lr))
    lines = []
    for name, of_start in {cell.start: cell.run for cell in grid.cells()}.items():
        row = forked(base, of_start, data)
        lines.append([name, f"{row['seconds']:.1f}", f"{row['bytes'] / 2**20:.0f}", f"{row['trainable']:,}"])
        print(lines[-1], flush=True)
    write(
        chosen.page,
        "What starts cost",
        [
            *paragraph(
                f"The starts of `{chosen.study.name}` on {run.model.name}: rank {run.adapter.r}, targets "
                f"{run.adapter.targets}; task {run.data.task}, batches of {run.batch.size}, also as what is to be "
                "preserved. Once each, in a process of its own: seconds of one core, and by how much the peak resident "
                "set grew beyond model and data, in MiB."
            ),
            "",
            *table(["start", "seconds", "MiB", "trainable"], lines),
        ],
    )


if __name__ == "__main__":
    main()
