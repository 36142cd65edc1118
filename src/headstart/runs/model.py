"""The model of a run: loaded, and made ready for what is to train."""

from __future__ import annotations

from typing import Any

from peft import VeraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from headstart.errors import LayerError, RunError
from headstart.runs.tree import Run
from headstart.tasks.base import Task
from headstart.training.models import Head
from headstart.training.wrap import load_placed, wrap_lora


def head_of(task: Task) -> Head:
    """Return the head that a task's model has; a regression is a classification with one output."""
    return "text" if task.kind == "text" else "classification"


def _task_type(model: Any, task: Task) -> str:
    """Return PEFT's word for what a model does: of text tasks, what its config says."""
    if task.kind != "text":
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def load_base(run: Run, task: Task, *, progress: bool = True) -> tuple[Any, Any]:
    """Return the pretrained model on the device that it trains on, and its tokenizer.

    A classifier's own head is drawn from the run's seed.

    Raises:
        ModelError: see :func:`headstart.training.models.resolve_model`; or bitsandbytes is needed and not installed.
    """
    options: dict[str, Any] = {}
    if task.kind != "text":
        options["num_labels"] = 1 if task.kind == "regression" else len(task.labels)
        options["problem_type"] = "regression" if task.kind == "regression" else "single_label_classification"
    model = run.model.model_dump(exclude={"name"})
    return load_placed(
        run.model.name,
        **model,
        compute=run.precision,
        head=head_of(task),
        seed=run.seed,
        progress=progress,
        **options,
    )


def made_ready(model: Any, run: Run, task: Task) -> Any:
    """Return the model with what is to train, and nothing else, trainable: an adapter's layers, biases, or all of it.

    Raises:
        LayerError: the adapter's targets aren't there, or there is no bias.
        RunError: samples are to be packed, which an encoder-decoder can't tell apart.
    """
    if run.batch.packing and model.config.is_encoder_decoder:
        raise RunError(f"batch.packing is for causal language models, and {run.model.name} is an encoder-decoder.")
    if run.trains == "full":
        return model.requires_grad_(True)
    if run.trains == "bitfit":
        model.requires_grad_(False)
        biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
        if not biases:
            raise LayerError("trains=bitfit: the model has no bias.")
        for parameter in [*biases, *_head_parameters(model, task).values()]:
            parameter.requires_grad_(True)
        return model
    if run.model.bits != 16:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=run.gradient_checkpointing)
    settings = run.adapter
    common: dict[str, Any] = {"r": settings.r, "task_type": _task_type(model, task)}
    # Of heads, PEFT knows but the commonest names, which T5's and BART's have not.
    saved = {*settings.modules_to_save, *(name.partition(".")[0] for name in _head_parameters(model, task))}
    if saved:
        common["modules_to_save"] = sorted(saved)
    if settings.kind == "vera":
        targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
        try:
            return get_peft_model(model, VeraConfig(target_modules=targets, vera_dropout=settings.dropout, **common))
        except ValueError as error:
            raise LayerError(f"PEFT can't put VeRA layers on {targets!r}: {error}") from error
    return wrap_lora(
        model,
        settings.targets,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        target_parameters=list(settings.parameters) or None,
        **common,
    )


def _head_parameters(model: nn.Module, task: Task) -> dict[str, nn.Parameter]:
    """Return the parameters of a classifier's head, which was never trained, by name."""
    if task.kind == "text":
        return {}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(prefix)}
