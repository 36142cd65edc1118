"""The trainer of a run: TRL's SFTTrainer for causal models of text, Transformers' Trainer for all others."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from headstart.errors import DataError, RunError
from headstart.evaluation.answers import prompt_ids
from headstart.progress import Show
from headstart.runs.tree import Run
from headstart.statistics.batches import IGNORED
from headstart.tasks.base import Example, Task
from headstart.training.wrap import accelerator

# Tokens, more than any example has.
_ALL = 2**30


def make_trainer(
    run: Run,
    task: Task,
    model: Any,
    tokenizer: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    folder: Path,
    show: Show,
) -> Any:
    """Return the trainer of a run, as a script of one's own would make it; the start comes after.

    Args:
        run, task: what to do.
        model: with what is to train trainable.
        tokenizer: the model's.
        train, held_out: the examples.
        folder: for the saves that training goes on from.
        show: draws the bar.

    Raises:
        RunError: TRL is needed and not installed.
        DataError: nothing is left to learn.
    """
    settings = _arguments(run, task, folder)
    if task.kind == "text" and tokenizer.eos_token is None:
        raise DataError("the tokenizer has no eos_token; set one, or the model never learns where an answer ends.")
    if task.kind == "text" and model.config.is_encoder_decoder:
        trainer: Any = WeightedTrainer(
            model,
            TrainingArguments(**settings),
            train_dataset=_two_sided(train, tokenizer, run.batch.max_length),
            eval_dataset=_two_sided(held_out, tokenizer, run.batch.max_length),
            # Without the model, which makes the decoder's input of the labels itself.
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            processing_class=tokenizer,
        )
    elif task.kind == "text":
        trainer = _text_trainer(run, model, tokenizer, train, held_out, settings)
    else:
        trainer = WeightedTrainer(
            model,
            TrainingArguments(**settings),
            train_dataset=_labelled(train, tokenizer, task, run.batch.max_length),
            eval_dataset=_labelled(held_out, tokenizer, task, run.batch.max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=lambda made: task.score(_predictions(made.predictions, task), made.label_ids),
        )
    # It prints a dictionary a step; the bar says the same in one line.
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch(show))
    return trainer


def set_optimizer(trainer: Any, run: Run) -> None:
    """Give a trainer the optimizer that its arguments can't say: LoRA+'s, of two rates; once the start is made."""
    if run.optimizer.lora_plus is None:
        return
    from peft.optimizers import create_loraplus_optimizer

    settings = run.optimizer
    trainer.optimizer = create_loraplus_optimizer(
        model=trainer.model,
        optimizer_cls=torch.optim.AdamW,
        lr=settings.lr,
        loraplus_lr_ratio=settings.lora_plus,
        loraplus_weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )


def truncated(examples: Sequence[Example], tokenizer: Any, model: Any, max_length: int) -> int:
    """Return how many examples are longer than ``max_length`` tokens, of an encoder-decoder on either side."""
    if model.config.is_encoder_decoder and examples[0].completion:
        sides = [(prompt_ids(one, tokenizer, encoder=_ALL), _target_ids(one, tokenizer)) for one in examples]
        return sum(max(map(len, both)) > max_length for both in sides)
    chats = [example for example in examples if example.messages is not None]
    plain = [example for example in examples if example.messages is None]
    lengths = [len(tokenizer.apply_chat_template(_chat(example), tokenize=True)["input_ids"]) for example in chats]
    if plain:
        texts = [example.prompt + example.completion for example in plain]
        pairs = [example.pair for example in plain] if plain[0].pair is not None else None
        ids = tokenizer(texts, pairs, add_special_tokens=True)["input_ids"]
        # The end of the sequence is a token, too.
        lengths += [len(row) + bool(example.completion) for row, example in zip(ids, plain, strict=True)]
    return sum(length > max_length for length in lengths)


class WeightedTrainer(Trainer):
    """Weights each batch's mean loss by its share of the labels that a step sees, in all batches and processes.

    Transformers leaves that to the model wherever its forward takes further arguments; encoder-decoders and
    classifiers take them and return the batch's own mean nevertheless, whose sum would count as the step's loss.

    Attributes:
        loss_of_the_model: the model's own loss is what is weighted, so that starts may read it as the model's.
    """

    loss_of_the_model = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.model_accepts_loss_kwargs = True  # so that the labels are counted, whatever the model takes

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the batch's share of the step's mean; its own mean where ``num_items_in_batch`` is None."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, each of which has counted the labels of all.
            own = (inputs["labels"] != IGNORED).sum() * self.accelerator.num_processes
            loss = loss * (own / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class Watch(TrainerCallback):
    """Shows how far training is, times it, and ends it where the loss is no number.

    Each step's row in the trainer's history, which its saves keep, gets ``step_seconds`` (without measurements and
    saves), of texts ``step_tokens``, and of CUDA ``allocated`` and ``reserved``, in bytes.

    Attributes:
        diverged: the step at which the loss was no number, None where it always was one.
        seconds: since training began; of a run that goes on, of its rest.
        first: the step that it went on from.
    """

    def __init__(self, show: Show) -> None:
        self.diverged: int | None = None
        self.first = 0
        self._show = show
        self._began = self._step_began = time.perf_counter()
        self._tokens = 0
        self._detail = ""

    @property
    def seconds(self) -> float:
        """Seconds since training began, or went on."""
        return time.perf_counter() - self._began

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the time, and the step that training goes on from."""
        self._began, self.first = time.perf_counter(), state.global_step
        self._step_began = self._began

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the step."""
        self._show(f"training\t{self._detail}", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Note the loss; end training where it is no number."""
        if logs is None or "loss" not in logs:
            return
        state.log_history[-1].update(self._costs(logs))
        self._detail = f"loss {logs['loss']:.4g}, rate {logs.get('learning_rate', 0.0):.2g}"
        if not math.isfinite(float(logs["loss"])) and self.diverged is None:
            self.diverged = state.global_step
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the next step begin now."""
        self._step_began = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the next step begin now."""
        self._step_began = time.perf_counter()

    def _costs(self, logs: dict[str, Any]) -> dict[str, float]:
        """Return what a step took; its loss has been read, so an accelerator has done it."""
        began, self._step_began = self._step_began, time.perf_counter()
        costs: dict[str, float] = {"step_seconds": self._step_began - began}
        if "num_tokens" in logs:  # TRL's, which each process counts from its own beginning
            costs["step_tokens"], self._tokens = int(logs["num_tokens"]) - self._tokens, int(logs["num_tokens"])
        if torch.cuda.is_available():
            costs |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        return costs


def windows(history: Sequence[dict[str, Any]], samples: int) -> list[dict[str, float]]:
    """Return what training was from one held-out measurement to the next, and to the end.

    Args:
        history: a trainer's, with :class:`Watch`'s additions.
        samples: of a step, over all processes.

    Returns:
        For each: ``step``, its last; ``loss``, the mean of its steps'; ``samples``; ``seconds`` of its steps;
        ``evaluation_seconds`` of the measurement after it, where there was one; ``tokens``, of texts; and the means of
        ``allocated`` and ``reserved`` bytes, of CUDA.
    """
    rows: list[dict[str, float]] = []
    steps: list[dict[str, Any]] = []
    for row in [*history, {"eval_runtime": None}]:
        if "loss" in row:
            steps.append(row)
        elif "eval_runtime" in row and steps:
            count = len(steps)
            window = {"step": steps[-1]["step"], "loss": sum(step["loss"] for step in steps) / count}
            window |= {"samples": samples * count, "seconds": sum(step["step_seconds"] for step in steps)}
            if row["eval_runtime"] is not None:
                window["evaluation_seconds"] = row["eval_runtime"]
            if "step_tokens" in steps[-1]:
                window["tokens"] = sum(step["step_tokens"] for step in steps)
            for name in ("allocated", "reserved"):
                if name in steps[-1]:
                    window[name] = sum(step[name] for step in steps) / count
            rows.append(window)
            steps = []
    return rows


def reserved(history: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the mean and the 99th percentile, over the steps, of the bytes that CUDA's allocator had reserved."""
    steps = [row["reserved"] for row in history if "reserved" in row]
    if not steps:
        return {}
    return {"reserved_mean": int(np.mean(steps)), "reserved_99th": int(np.percentile(steps, 99))}


def _text_trainer(
    run: Run,
    model: Any,
    tokenizer: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    settings: dict[str, Any],
) -> Any:
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise RunError('training on text needs TRL: pip install "headstart[train]".') from error
    arguments = SFTConfig(
        **settings,
        max_length=run.batch.max_length,
        packing=run.batch.packing,
        eval_packing=False,
        completion_only_loss=True,
        eos_token=tokenizer.eos_token,
    )
    bars = are_progress_bars_disabled()
    disable_progress_bars()  # six short ones, which say nothing that a user waits for
    try:
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list([_text_row(example) for example in train]),
            eval_dataset=Dataset.from_list([_text_row(example) for example in held_out]) if held_out else None,
            processing_class=tokenizer,
        )
    except StopIteration:  # TRL looks at the first row of what it has dropped all rows of
        trainer = None
    finally:
        if not bars:
            enable_progress_bars()
    if trainer is None or not len(trainer.train_dataset):
        raise DataError(
            f"nothing is left to learn within batch.max_length={run.batch.max_length} tokens: the prompts alone are "
            "longer."
        )
    return trainer


def _text_row(example: Example) -> dict[str, Any]:
    if example.messages is None:
        return {"prompt": example.prompt, "completion": example.completion}
    chat = _chat(example)
    return {"prompt": chat[:-1], "completion": chat[-1:]}


def _chat(example: Example) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in example.messages or ()]


def _two_sided(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Dataset | None:
    """Return what an encoder reads and what its decoder is to write, each of at most ``max_length`` tokens."""
    if not examples:
        return None
    sources = [prompt_ids(example, tokenizer, encoder=max_length) for example in examples]
    targets = [_target_ids(example, tokenizer)[:max_length] for example in examples]
    masks = [[1] * len(source) for source in sources]
    return Dataset.from_dict({"input_ids": sources, "attention_mask": masks, "labels": targets})


def _target_ids(example: Example, tokenizer: Any) -> list[int]:
    """Return a decoder's tokens: the completion without the blank before it, which nothing precedes, and its end."""
    ids = list(tokenizer(text_target=example.completion.lstrip())["input_ids"])
    return ids if tokenizer.eos_token_id in ids else [*ids, tokenizer.eos_token_id]


def _labelled(examples: Sequence[Example], tokenizer: Any, task: Task, max_length: int) -> Dataset | None:
    if not examples:
        return None
    pairs = [example.pair for example in examples] if examples[0].pair is not None else None
    tokens = tokenizer([example.prompt for example in examples], pairs, truncation=True, max_length=max_length)
    kind = float if task.kind == "regression" else int
    return Dataset.from_dict({**tokens, "labels": [kind(example.label or 0) for example in examples]})


def _predictions(outputs: Any, task: Task) -> Any:
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits.reshape(len(logits)) if task.kind == "regression" else logits.argmax(-1)


def _arguments(run: Run, task: Task, folder: Path) -> dict[str, Any]:
    """Return what TrainingArguments and SFTConfig have in common."""
    optimizer, schedule, evaluation = run.optimizer, run.schedule, run.evaluation
    length: dict[str, Any] = {"num_train_epochs": schedule.epochs or 1.0}
    if schedule.steps is not None:
        length = {"max_steps": schedule.steps}
    measured: dict[str, Any] = {"eval_strategy": "no"}
    saves: dict[str, Any] = {"save_steps": max(10, math.ceil(schedule.steps / 10)) if schedule.steps else 200}
    if evaluation.every == "epoch":
        measured = {"eval_strategy": "epoch"}
        # The best state can only be told where each that is measured is saved, and Transformers wants no others.
        saves = {"save_strategy": "epoch"} if evaluation.keep == "best" else saves
    elif evaluation.every is not None:
        measured = {"eval_strategy": "steps", "eval_steps": evaluation.every}
        saves = {"save_steps": evaluation.every}
    checkpointing: dict[str, Any] = {}
    if run.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    best: dict[str, Any] = {}
    if evaluation.keep == "best":
        loss = not task.together or task.kind == "text"
        best = {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss" if loss else f"eval_{task.metrics[0]}",
            "greater_is_better": not loss,
        }
    return {
        "output_dir": str(folder),
        **length,
        **measured,
        **best,
        **saves,
        "save_total_limit": 2,
        "per_device_train_batch_size": run.batch.size,
        "per_device_eval_batch_size": run.batch.size,
        "gradient_accumulation_steps": run.batch.accumulation,
        **checkpointing,
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": schedule.kind if schedule.kind != "constant" else "constant_with_warmup",
        "warmup_steps": schedule.warmup,
        "optim": "adamw_torch" if optimizer.name == "adamw" else "sgd",
        "optim_args": f"momentum={optimizer.momentum}" if optimizer.name == "sgd" and optimizer.momentum else None,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": optimizer.max_grad_norm,
        # Transformers takes a CPU's bfloat16 only where the CPU is asked for by name.
        "use_cpu": accelerator().type == "cpu",
        "bf16": run.precision == "bfloat16",
        "fp16": run.precision == "float16",
        "seed": run.seed,
        "data_seed": run.seed,
        "report_to": list(run.report_to),
        "logging_steps": 1,
        # A loss that is no number must not be logged as the last one that was.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
