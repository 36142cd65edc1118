"""One run: a start, a fine-tune from it, and what came of it."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from headstart.files import write_json
from headstart.initialize import initialize_
from headstart.layers.checkpoint import load_checkpoint, save_checkpoint
from headstart.layers.files import ADAPTER_FOLDER
from headstart.methods import Training, parse_method
from headstart.progress import Show, silent
from headstart.report import Report
from headstart.statistics.training import TrainingData
from headstart.tasks.base import Example
from headstart.training.data import batches, collate
from headstart.training.evaluate import exact_match, held_out_loss
from headstart.training.recipe import Recipe
from headstart.training.wrap import accelerator, wrap_lora


@dataclass(frozen=True)
class Material:
    """The data of a comparison: tokenised training rows, tokenised held-out rows, and examples to grade.

    ``max_new_tokens`` caps the graded answers; ``warnings`` say what was dropped or cut.
    """

    train: Sequence[dict[str, list[int]]]
    held_out: Sequence[dict[str, list[int]]]
    graded: Sequence[Example]
    max_new_tokens: int = 64
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """What a run found. Losses are nats a completion token on the held-out rows, before and after training."""

    method: str
    start_loss: float
    final_loss: float
    trainable: int
    startup_seconds: float
    training_seconds: float
    samples: int
    losses: list[float] = field(default_factory=list)
    held_out: int = 0
    right: int = 0
    graded: int = 0
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
    goes on from its last save; what was trained is not trained again, even if grading it was cut off.
    """
    done = read_result(folder)
    if done is not None:
        return done
    show = progress or silent
    folder.mkdir(parents=True, exist_ok=True)
    trained = _read_json(folder / "trained.json")
    if trained is None:
        trained = _start_and_train(method, recipe, material, load, folder, show)
    model, tokenizer = load()
    model = load_checkpoint(model.to(accelerator()), folder / "checkpoint", trainable=False)
    content = dict(trained, final_loss=_loss(model, material, tokenizer, recipe, show, "loss at the end"))
    content["held_out"] = len(material.held_out)
    if material.graded:
        graded = exact_match(
            model,
            tokenizer,
            material.graded,
            max_new_tokens=material.max_new_tokens,
            progress=partial(show, "answers"),
        )
        content |= {"right": graded.right, "graded": graded.total}
        if graded.cut_off:
            content["warnings"] = [
                *content["warnings"],
                f"{graded.cut_off} of {graded.total} answers were cut off after {material.max_new_tokens} tokens",
            ]
    result = Result(**content)
    write_json(asdict(result), folder / "result.json")
    (folder / "trained.json").unlink()
    return result


def _start_and_train(
    method: str, recipe: Recipe, material: Material, load: LoadModel, folder: Path, show: Show
) -> dict[str, Any]:
    """Train, save the checkpoint, and return (and note) all of the result that is known by then."""
    model, tokenizer = load()
    model, report = _start(model.to(accelerator()), method, recipe, material, tokenizer, show)
    start_loss = _loss(model, material, tokenizer, recipe, show, "loss at the start")
    losses, seconds = _train(model, recipe, material, tokenizer, folder, show)
    save_checkpoint(model, folder / "checkpoint", force=True)
    trained = {
        "method": method,
        "start_loss": start_loss,
        "trainable": report.trainable,
        "startup_seconds": report.seconds,
        "training_seconds": seconds,
        "samples": report.samples,
        "losses": losses,
        "warnings": [*material.warnings, *report.warnings],
    }
    write_json(trained, folder / "trained.json")
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    return trained


def read_result(folder: Path) -> Result | None:
    """Return the result that a finished run left in its folder, None where there is none."""
    content = _read_json(folder / "result.json")
    return None if content is None else Result(**content)


def method_of(folder: Path) -> str | None:
    """Return the method whose run is in a folder and has been trained, None where there is none."""
    content = _read_json(folder / "result.json") or _read_json(folder / "trained.json") or {}
    return content.get("method")


def remove_run(folder: Path) -> None:
    """Remove what a run wrote in its folder, and the folder if nothing else is in it."""
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    owned = [folder / "checkpoint" / name for name in ADAPTER_FOLDER.owned(folder / "checkpoint")]
    for path in (*owned, folder / "trained.json", folder / "result.json"):
        path.unlink(missing_ok=True)
    for place in (folder / "checkpoint", folder):
        with suppress(OSError):
            place.rmdir()


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _start(
    model: Any, method: str, recipe: Recipe, material: Material, tokenizer: Any, progress: Show
) -> tuple[Any, Report]:
    torch.manual_seed(recipe.seed)
    wrapped = wrap_lora(
        model,
        recipe.target_modules,
        r=recipe.r,
        lora_alpha=recipe.lora_alpha,
        use_rslora=recipe.use_rslora,
        task_type="CAUSAL_LM",
    )
    parsed = parse_method(method)
    samples = parsed.sample_count(len(material.train))
    rows = sorted(material.train[:samples], key=lambda row: len(row["input_ids"]))
    report = initialize_(
        wrapped,
        parsed,
        data=TrainingData(
            batches(rows, recipe.batch_size, tokenizer.pad_token_id) if rows else None,
            training=Training(len(material.train) or None, recipe.first_lr),
        ),
        seed=recipe.seed,
        form=recipe.form,
        # A comparison tells what each start takes; one that was made before would seem free.
        cache=False,
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
    """Shows how far training is, and times it from its first step on."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._began: float | None = None
        self._first = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._began is None:
            self._began, self._first = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._show("training", state.global_step, state.max_steps)

    def seconds(self, steps: int) -> float:
        """Return the time of all steps; of a run that was cut off only the rest was timed, and is scaled to all."""
        if self._began is None:
            return 0.0
        return (time.perf_counter() - self._began) * steps / (steps - self._first)


def _train(
    model: Any, recipe: Recipe, material: Material, tokenizer: Any, folder: Path, progress: Show
) -> tuple[list[float], float]:
    output = folder / "trainer"
    steps = _Steps(progress)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        weight_decay=0.0,
        logging_steps=1,
        save_steps=max(10, math.ceil(recipe.steps / 4)),
        save_total_limit=2,
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
        callbacks=[steps],
    )
    # It prints a dictionary a step; the progress bar says the same in one line.
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=_last_save(output, recipe.steps))
    seconds = steps.seconds(recipe.steps)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], seconds


def _last_save(output: Path, steps: int) -> str | None:
    """Return the last whole save to go on from: the Trainer writes its state last, and the final step is no start."""
    saves = {int(path.name.rpartition("-")[2]): path for path in output.glob("checkpoint-*")}
    whole = [step for step, path in saves.items() if step < steps and _holds_json(path / "trainer_state.json")]
    return str(saves[max(whole)]) if whole else None


def _holds_json(path: Path) -> bool:
    """Return whether the file is there to its end: the Trainer writes it in place, so a kill may leave half of it."""
    try:
        return _read_json(path) is not None
    except ValueError:
        return False


class _Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows as a data set of PyTorch."""

    def __init__(self, rows: Sequence[dict[str, list[int]]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._rows[index]
