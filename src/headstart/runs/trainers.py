"""The trainer of a run: TRL's SFTTrainer for causal models of text, Transformers' Trainer for all others."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from headstart.errors import DataError, RunError
from headstart.evaluation.answers import prompt_ids
from headstart.methods import Method
from headstart.monitor import Monitor
from headstart.runs.tree import Run
from headstart.runs.watch import Watch
from headstart.statistics.batches import IGNORED
from headstart.tasks.base import Example, Task
from headstart.training.data import token_ids
from headstart.training.wrap import accelerator

# Tokens, more than any example has.
_ALL = 2**30


def make_trainer(
    run: Run,
    task: Task,
    model: Any,
    tokenizer: Any,
    examples: Mapping[str, Sequence[Example]],
    folder: Path,
    watch: Watch,
    known: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Return the trainer of a run, as a script of one's own would make it, and its data; the start comes after.

    Args:
        run, task: what to do.
        model: with what is to train trainable.
        tokenizer: the model's.
        examples: by name: "train", and of "validation" and "held_out" those that are measured; in training the first
            of these is.
        folder: for the saves that training goes on from.
        watch: draws the bar.
        known: what an earlier call returned for the same examples; they aren't prepared again then.

    Returns:
        the trainer, and the datasets that it has prepared by the names of the examples.

    Raises:
        RunError: TRL is needed and not installed.
        DataError: nothing is left to learn.
    """
    settings = _arguments(run, task, folder)
    if task.kind == "text" and tokenizer.eos_token is None:
        raise DataError("the tokenizer has no eos_token; set one, or the model never learns where an answer ends.")
    length, known = run.batch.max_length, known or {}
    if task.kind == "text" and model.config.is_encoder_decoder:
        data: dict[str, Any] = dict(known) or {
            name: _two_sided(part, tokenizer, length) for name, part in examples.items()
        }
        trainer: Any = WeightedTrainer(
            model,
            TrainingArguments(**settings),
            train_dataset=data["train"],
            eval_dataset=_measured(data),
            # Without the model, which makes the decoder's input of the labels itself.
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            processing_class=tokenizer,
        )
    elif task.kind == "text":
        trainer, data = _text_trainer(run, model, tokenizer, examples, settings, known)
    else:
        data = dict(known) or {name: _labelled(part, tokenizer, task, length) for name, part in examples.items()}
        trainer = WeightedTrainer(
            model,
            TrainingArguments(**settings),
            train_dataset=data["train"],
            eval_dataset=_measured(data),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=lambda made: task.score(_predictions(made.predictions, task), made.label_ids),
        )
    # It prints a dictionary a step; the bar says the same in one line.
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    if run.monitor:
        trainer.add_callback(Monitor(layers=run.monitor))
    return trainer, data


def _measured(data: Mapping[str, Any]) -> Any:
    """Return what is measured during training."""
    return data.get("validation", data.get("held_out"))


def check_launcher() -> None:
    """Check how ``accelerate launch`` was told to divide the model, before anything is loaded; have all of it loaded.

    Raises:
        RunError: DeepSpeed or FSDP1, whose parts can't be read layer by layer.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    fsdp1 = os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION", "1") != "2"
    if deepspeed or fsdp1:
        raise RunError(
            f"a run doesn't train under {'DeepSpeed' if deepspeed else 'FSDP1'}, whose parts can't be read layer by "
            "layer: take FSDP2 (fsdp_version: 2) in the config of accelerate, or --multi_gpu."
        )
    # It would leave the weights of all processes but one on the meta device, and a start reads them in each.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def check_optimizer(run: Run, method: Method) -> None:
    """Raise RunError where an optimizer's setting would do nothing."""
    if run.optimizer.lora_plus is not None and all(one.form == "core" for one in method.methods):
        raise RunError(
            f"optimizer.lora_plus: {run.start.method} trains a matrix between A and B, and neither of the two: leave "
            "it out."
        )


def set_optimizer(trainer: Any, run: Run) -> None:
    """Give a trainer the optimizer that its arguments can't say: LoRA+'s, of two rates; once the start is made.

    B learns at ``lora_plus`` times the rate and all else at the rate itself (Hayou, Ghosh and Yu, 2024). PEFT's own
    function raises heads' biases and DoRA's magnitudes as well, and gives embeddings a rate of its own.
    """
    if run.optimizer.lora_plus is None:
        return
    raised = {
        id(parameter)
        for name, parameter in trainer.model.named_parameters()
        if ".lora_B." in name or ".lora_embedding_B." in name
    }
    optimizer = trainer.create_optimizer()
    for group in list(optimizer.param_groups):
        parts = [[one for one in group["params"] if (id(one) in raised) == is_raised] for is_raised in (False, True)]
        group["params"] = parts[0]
        if parts[1]:
            optimizer.add_param_group({**group, "params": parts[1], "lr": run.optimizer.lr * run.optimizer.lora_plus})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def too_long(examples: Sequence[Example], tokenizer: Any, model: Any, run: Run) -> tuple[int, int]:
    """Return how many examples lose their end, being longer than ``batch.max_length`` tokens, and how many are dropped.

    Of an encoder-decoder either side counts. A text is dropped where nothing of its completion is left; packed ones go
    on in the next row.
    """
    limit = run.batch.max_length
    if model.config.is_encoder_decoder and examples[0].completion:
        sides = [(prompt_ids(one, tokenizer, encoder=_ALL), _target_ids(one, tokenizer)) for one in examples]
        return sum(max(map(len, both)) > limit for both in sides), 0
    # Of each: the tokens before what is learned, and all of them.
    lengths = []
    texts = [example for example in examples if example.messages is not None or example.completion]
    for example in texts:
        if example.messages is None:
            prompt, completion = token_ids(example, tokenizer)
            lengths.append((len(prompt), len(prompt) + len(completion)))
        else:
            parts = [(example.chat[:-1], True), (example.chat, False)]
            before, whole = (
                len(tokenizer.apply_chat_template(part, tokenize=True, add_generation_prompt=asks)["input_ids"])
                for part, asks in parts
            )
            lengths.append((before, whole))
    if labelled := [example for example in examples if example.messages is None and not example.completion]:
        pairs = [example.pair for example in labelled] if labelled[0].pair is not None else None
        ids = tokenizer([example.prompt for example in labelled], pairs, add_special_tokens=True)["input_ids"]
        lengths += [(0, len(row)) for row in ids]
    dropped = 0 if run.batch.packing else sum(before >= limit for before, _ in lengths)
    return sum(whole > limit for _, whole in lengths) - dropped, dropped


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


def _text_trainer(
    run: Run,
    model: Any,
    tokenizer: Any,
    examples: Mapping[str, Sequence[Example]],
    settings: dict[str, Any],
    known: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise RunError('training on text needs TRL: pip install "headstart[train]".') from error
    if known and "labels" not in known["train"].column_names:
        known = {}  # of a release that makes the labels at each batch
    arguments = SFTConfig(
        **settings,
        max_length=run.batch.max_length,
        packing=run.batch.packing,
        eval_packing=False,
        completion_only_loss=True,
        eos_token=tokenizer.eos_token,
        # TRL takes prepared rows as they are where they say which tokens count.
        dataset_kwargs={"skip_prepare_dataset": True} if known else None,
    )
    data = dict(known) or {
        name: Dataset.from_list([_text_row(example, tokenizer) for example in part]) for name, part in examples.items()
    }
    train = data.pop("train")
    bars = are_progress_bars_disabled()
    disable_progress_bars()  # six short ones, which say nothing that a user waits for
    try:
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=data or None,  # it prepares each, and would measure each during training
            processing_class=tokenizer,
        )
    except StopIteration:  # TRL looks at the first row of what it has dropped all rows of
        trainer = None
    finally:
        if not bars:
            enable_progress_bars()
    data = {"train": trainer.train_dataset, **(trainer.eval_dataset or {})} if trainer is not None else {}
    if empty := next((name for name in ("train", *examples) if not len(data.get(name, ()))), None):
        lacks = "to learn" if empty == "train" else f"to measure of the {empty.replace('_', ' ')} data"
        raise DataError(
            f"nothing is left {lacks} within batch.max_length={run.batch.max_length} tokens: the prompts alone are "
            "longer."
        )
    trainer.eval_dataset = _measured(data)
    return trainer, data


def _text_row(example: Example, tokenizer: Any) -> dict[str, Any]:
    """Return a row as TRL takes it: a chat in its messages, all else in tokens.

    TRL tokenises prompt and completion as one text, where tokens may merge across the border, and learns to go on from
    less than the prompt that is asked later.
    """
    if example.messages is None:
        prompt, completion = token_ids(example, tokenizer)
        return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}
    return {"prompt": example.chat[:-1], "completion": example.chat[-1:]}


def _two_sided(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Dataset:
    """Return what an encoder reads and what its decoder is to write, each of at most ``max_length`` tokens."""
    sources = [prompt_ids(example, tokenizer, encoder=max_length) for example in examples]
    targets = [_target_ids(example, tokenizer)[:max_length] for example in examples]
    masks = [[1] * len(source) for source in sources]
    return Dataset.from_dict({"input_ids": sources, "attention_mask": masks, "labels": targets})


def _target_ids(example: Example, tokenizer: Any) -> list[int]:
    """Return a decoder's tokens: the completion without the blank before it, which nothing precedes, and its end."""
    ids = list(tokenizer(text_target=example.completion.lstrip())["input_ids"])
    return ids if tokenizer.eos_token_id in ids else [*ids, tokenizer.eos_token_id]


def _labelled(examples: Sequence[Example], tokenizer: Any, task: Task, max_length: int) -> Dataset:
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
    # Of epochs, whose steps the trainer counts later, the share.
    saves: dict[str, Any] = {"save_steps": max(10, math.ceil(schedule.steps / 10)) if schedule.steps else 0.1}
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
        "per_device_eval_batch_size": evaluation.batch_size or run.batch.size,
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
        # The default, but the losses of several processes rest on it: a step's loss is divided by all their tokens.
        "average_tokens_across_devices": True,
        "seed": run.seed,
        "data_seed": run.seed,
        "report_to": list(run.report_to),
        "logging_steps": 1,
        # A loss that is no number must not be logged as the last one that was.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
