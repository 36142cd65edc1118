"""Methods on GSM8K with SmolLM2-135M, several seeds.

``python -m bench.study_gsm8k --study lora_da``; cut off, the same command goes on where it was, in the middle
of a run too.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from headstart.training.recipe import Recipe
from headstart.training.run import Material
from headstart.training.run import run as run_method
from transformers.utils import logging

import headstart as hs
from bench.harness import table, write
from bench.study_claims import claims
from bench.study_tables import TITLES, Run, arguments, measured, paragraphs, path_of, pooled, run_all, spelled, summary
from headstart.evaluation.answers import evaluating
from headstart.methods import parse_method
from headstart.statistics.batches import IGNORED
from headstart.tasks.base import Example
from headstart.training.data import batches, load_examples, tokenize_examples
from headstart.training.models import resolve_model
from headstart.training.wrap import accelerator

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "gsm8k"
RECIPE = Recipe(batch_size=4, warmup=0.03, use_rslora=True)


@torch.no_grad()
def token_scores(model: Any, rows: Sequence[dict[str, list[int]]], padding: int) -> tuple[float, int, int]:
    """Return the mean loss a completion token, how many of those are predicted right after the true ones, and of how
    many.
    """
    device = next(model.parameters()).device
    loss, right, total = 0.0, 0, 0
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    with evaluating(model):
        for batch in batches(ordered, 2 * RECIPE.batch_size, padding):
            moved = {key: value.to(device) for key, value in batch.items()}
            labels = moved["labels"][:, 1:]
            used = labels != IGNORED
            output = model(**moved)
            loss += float(output.loss) * int(used.sum())
            right += int(((output.logits[:, :-1].argmax(-1) == labels) & used).sum())
            total += int(used.sum())
    return loss / total, right, total


class Study:
    """The model and the data, read once, and the runs on them."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._out: Path = chosen.out
        self._targets = ("q_proj", "v_proj") if chosen.study == "inilora" else RECIPE.target_modules
        logging.set_verbosity_error()
        self._base, self._tokenizer, _ = resolve_model("smollm2")
        self._examples = load_examples(DATA)
        held_out = load_examples(DATA, split="test", limit=max(chosen.held_out, chosen.graded))
        self._held_out = self._tokenized(held_out[: chosen.held_out])
        self._started = self._held_out[: chosen.start_examples]
        self._graded = held_out[: chosen.graded]

    def run(self, settings: Run) -> Run:
        """Start, train and measure with headstart's own runner; then count the tokens that are predicted right."""
        seed, steps = settings["seed"], settings["steps"]
        method, changes = spelled(settings["method"])
        count = max(steps * RECIPE.batch_size, parse_method(method).sample_count())
        # The seed's own examples: those that are trained on, the first of them the samples of the start.
        train = self._tokenized(random.Random(seed).sample(self._examples, count))
        recipe = Recipe(
            **{
                **vars(RECIPE),
                "target_modules": self._targets,
                "steps": steps,
                "lr": settings["lr"],
                "seed": seed,
                **changes,
            }
        )
        material = Material(train=train, held_out=self._started, graded=self._graded, max_new_tokens=192)
        folder = path_of(self._out / "unfinished", settings).with_suffix("")
        result = run_method(method, recipe, material, self._load, folder)
        model = hs.load_checkpoint(self._load()[0].to(accelerator()), folder / "checkpoint", trainable=False)
        loss, right, total = token_scores(model, self._held_out, self._tokenizer.pad_token_id)
        shutil.rmtree(folder)
        return {
            "start_loss": result.start_loss,
            "final_loss": loss,
            "final_loss_of_started": result.final_loss,
            "right": right,
            "total": total,
            "accuracy": right / total,
            "training_loss": sum(result.losses) / len(result.losses),
            "losses": result.losses,
            "trainable": result.trainable,
            "startup_seconds": result.startup_seconds,
            "training_seconds": result.training_seconds,
            "answers_right": result.right,
            "answers": result.graded,
            "warnings": result.warnings,
            "device": str(accelerator()),
        }

    def _load(self) -> tuple[Any, Any]:
        return copy.deepcopy(self._base), self._tokenizer

    def _tokenized(self, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        return tokenize_examples(examples, self._tokenizer, max_length=RECIPE.max_length).rows


def graded(runs: Sequence[Run], methods: Sequence[str]) -> list[str]:
    """Return the table of graded answers, all seeds together; nothing where none were graded."""
    rows = []
    for method, rate in itertools.product(methods, sorted({run["lr"] for run in runs})):
        at_rate = [run for run in runs if run["method"] == method and run["lr"] == rate]
        right, total = (sum(run[key] for run in at_rate) for key in ("answers_right", "answers"))
        if total:
            rows.append([method, f"{rate:g}", f"{right}/{total}", pooled(at_rate, "answers_right", "answers")])
    titles = ["method", "rate", "right answers", "pooled (Wilson)"]
    return ["", "Answers graded by exact match, all seeds together:", "", *table(titles, rows)] if rows else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.study_gsm8k", description=__doc__)
    parser.add_argument("--held-out", type=int, default=48, help="test examples that are measured on (default 48)")
    parser.add_argument("--start-examples", type=int, default=16, help="of those, for the start loss (default 16)")
    parser.add_argument(
        "--graded", type=int, default=0, help="answers to generate and grade a run (default none: slow)"
    )
    chosen = arguments(parser, data="gsm8k", steps=20, samples=32, rates=(3e-4,))
    if not DATA.is_dir():
        sys.exit(f"there is no {DATA}")
    plan: list[Run] = [
        {"method": method, "seed": seed, "lr": rate, "steps": chosen.steps}
        for seed, method, rate in itertools.product(chosen.seeds, chosen.methods, chosen.rates)
    ]
    if chosen.graded:
        plan = [{**settings, "graded": chosen.graded} for settings in plan]
    runs = run_all(plan, chosen.out, chosen.limit_minutes, Study(chosen).run)
    rates = (
        "A method's best rate is that of its least mean final loss, chosen on these same examples for each alike."
        if len(chosen.rates) > 1
        else "There is one rate for all methods, which was tuned for none of them."
    )
    lines = paragraphs(
        f"SmolLM2-135M-Instruct, {'q_proj and v_proj' if chosen.study == 'inilora' else 'all seven linear kinds'}, "
        f"rank {RECIPE.r}, alpha {RECIPE.lora_alpha}, rsLoRA (core "
        f"layers: their rank as named, s = 1), no dropout. GSM8K: {chosen.steps} steps of {RECIPE.batch_size} training "
        f"examples, AdamW without weight decay, cosine with {100 * RECIPE.warmup:g} % warm-up. A seed sets the "
        "factors, which examples are trained on, their order, and the samples of the gradient methods, which are among "
        "them, alike for every method.",
        f"Final loss (nats a completion token) and accuracy are of the first {chosen.held_out} test examples; start "
        f"loss is of the first {chosen.start_examples} of them: compare it between methods, not with the final loss. "
        "Accuracy is of tokens: the share of completion tokens that the model ranks first, given the true ones before "
        "them; it isn't that of answers. Training loss is the mean over all steps: the lower, the faster. ± is half of "
        "the 95 % interval over seeds (Student); it says nothing of other test examples. Wilson's takes all seeds' "
        f"tokens for independent, which they aren't, so it is too narrow. {rates}",
    )
    lines += [measured(runs, len(plan)), ""]
    lines += [*summary(runs, chosen.methods), *graded(runs, chosen.methods)] if runs else []
    lines += ["", *claims(runs, chosen.methods)] if chosen.study == "core" else []
    write(chosen.page, f"{TITLES[chosen.study]} on GSM8K", lines)


if __name__ == "__main__":
    main()
