"""One run: a start, a fine-tune from it, and what came of it."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from headstart.initialize import initialize_
from headstart.layers.checkpoint import save_checkpoint
from headstart.layers.install import Base
from headstart.methods import parse_method
from headstart.progress import Show, silent
from headstart.report import Report
from headstart.training.data import Example, batches, collate
from headstart.training.evaluate import exact_match, held_out_loss


@dataclass(frozen=True)
class Recipe:
    """How every run of a comparison is trained.

    Attributes:
        steps, batch_size, lr: of AdamW, without weight decay; the rate falls along a cosine after ``warmup`` of the
            steps.
        seed: for the factors, the data order and dropout.
        r, lora_alpha, use_rslora, target_modules: as PEFT has them.
        base: "anchored" or "residual".
        max_length: longer rows are cut.
        max_new_tokens: for the answers that are graded.
    """

    steps: int = 20
    batch_size: int = 8
    lr: float = 1e-3
    warmup: float = 0.1
    seed: int = 0
    r: int = 8
    lora_alpha: int = 16
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    base: Base = "anchored"
    max_length: int = 512
    max_new_tokens: int = 48


@dataclass(frozen=True)
class Material:
    """The data of a comparison: tokenised training rows, tokenised held-out rows, and examples to grade."""

    train: Sequence[dict[str, list[int]]]
    held_out: Sequence[dict[str, list[int]]]
    graded: Sequence[Example]


@dataclass(frozen=True)
class Result:
    """What a run found. Losses are nats a completion token on the held-out rows, before and after training."""

    method: str
    start_loss: float
    final_loss: float
    right: int
    graded: int
    trainable: int
    startup_seconds: float
    training_seconds: float
    samples: int
    losses: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> float | None:
        """The share of right answers; None where nothing was graded."""
        return self.right / self.graded if self.graded else None


class LoadModel(Protocol):
    """Loads the base model afresh and its tokenizer."""

    def __call__(self) -> tuple[Any, Any]:
        """Return (model, tokenizer)."""
        ...


def run(
    method: str, recipe: Recipe, material: Material, load: LoadModel, folder: Path, progress: Show | None = None
) -> Result:
    """Run one method in ``folder``, or read its result there if it is already done.

    The folder gets ``result.json`` and ``checkpoint/`` (see ``headstart.load_checkpoint``). Training that was cut off
    goes on from its last save.
    """
    done = read_result(folder)
    if done is not None:
        return done
    report_progress = progress or silent
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load()
    model, report = _start(model, method, recipe, material, tokenizer, report_progress)
    start_loss = _loss(model, material, tokenizer, recipe, report_progress, "loss at the start")
    losses, seconds = _train(model, recipe, material, tokenizer, folder, report_progress)
    final_loss = _loss(model, material, tokenizer, recipe, report_progress, "loss at the end")
    graded = None
    if material.graded:
        graded = exact_match(
            model,
            tokenizer,
            material.graded,
            max_new_tokens=recipe.max_new_tokens,
            progress=lambda count, total: report_progress("answers", count, total),
        )
    result = Result(
        method=method,
        start_loss=start_loss,
        final_loss=final_loss,
        right=graded.right if graded else 0,
        graded=graded.total if graded else 0,
        trainable=report.trainable,
        startup_seconds=report.seconds,
        training_seconds=seconds,
        samples=report.samples,
        losses=losses,
        warnings=report.warnings,
    )
    save_checkpoint(model, folder / "checkpoint", force=True)
    _write_result(result, folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    return result


def read_result(folder: Path) -> Result | None:
    """Return the result that a finished run left in its folder, None where there is none."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    return Result(**json.loads(path.read_text(encoding="utf-8")))


def _write_result(result: Result, folder: Path) -> None:
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "result.json")


def _start(
    model: Any, method: str, recipe: Recipe, material: Material, tokenizer: Any, progress: Show
) -> tuple[Any, Report]:
    targets = recipe.target_modules
    config = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.lora_alpha,
        use_rslora=recipe.use_rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(recipe.seed)
    wrapped = get_peft_model(model, config)
    made = parse_method(method)
    samples = int(str(made.settings().get("samples", 0)))
    rows = sorted(material.train[:samples], key=lambda row: len(row["input_ids"]))
    report = initialize_(
        wrapped,
        made,
        data=batches(rows, recipe.batch_size, tokenizer.pad_token_id) if rows else None,
        seed=recipe.seed,
        base=recipe.base,
        progress=progress,
    )
    return wrapped, report


def _loss(model: Any, material: Material, tokenizer: Any, recipe: Recipe, progress: Show, what: str) -> float:
    return held_out_loss(
        model,
        material.held_out,
        tokenizer.pad_token_id,
        batch_size=2 * recipe.batch_size,
        progress=lambda count, total: progress(what, count, total),
    )


class _Steps(TrainerCallback):
    """Notes the loss of every step and shows how far training is."""

    def __init__(self, progress: Show) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress("training", state.global_step, state.max_steps)


def _train(
    model: Any, recipe: Recipe, material: Material, tokenizer: Any, folder: Path, progress: Show
) -> tuple[list[float], float]:
    output = folder / "trainer"
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup * recipe.steps),
        weight_decay=0.0,
        logging_steps=1,
        save_steps=max(10, math.ceil(recipe.steps / 4)),
        save_total_limit=1,
        seed=recipe.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_strategy="steps",
        # The counts that Transformers would divide by are those of one batch here: there is no accumulation.
        average_tokens_across_devices=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=_Rows(material.train),
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
        callbacks=[_Steps(progress)],
    )
    # It prints a dictionary a step; the progress bar says the same in one line.
    trainer.remove_callback(PrinterCallback)
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    steps_before = int(Path(last).name.rpartition("-")[2]) if last else 0
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=last)
    # Of a run that was cut off, only the rest was timed: scale it to all steps.
    seconds = (time.perf_counter() - began) * recipe.steps / max(1, recipe.steps - steps_before)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], seconds


class _Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows as a data set of PyTorch."""

    def __init__(self, rows: Sequence[dict[str, list[int]]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._rows[index]
