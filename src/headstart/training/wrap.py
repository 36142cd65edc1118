"""A pretrained model on its device, and LoRA layers on it, with PEFT's refusals in words that name the modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from headstart.errors import LayerError, nearest
from headstart.training.models import Head, quantisation, resolve_model


def accelerator() -> torch.device:
    """Return the device to compute on: the accelerator where there is one, else the CPU."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


def load_placed(
    name: str,
    *,
    dtype: str,
    bits: int = 16,
    compute: str | None = None,
    revision: str | None = None,
    head: Head = "text",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> tuple[Any, Any]:
    """Return a pretrained model on the device that it computes on, with a token to pad with, and its tokenizer.

    Args:
        name, head, progress, options: see :func:`headstart.training.models.resolve_model`.
        dtype: of the weights in memory.
        bits: 4 or 8 quantise them.
        compute: in what quantised weights compute; None for ``dtype``.
        revision: of the hub.
        seed: of a head that the model lacks.

    Raises:
        ModelError: see :func:`headstart.training.models.resolve_model`; or bitsandbytes is needed and not installed.
    """
    if revision is not None:
        options["revision"] = revision
    if bits != 16:
        options |= {"quantization_config": quantisation(bits, compute or dtype), "device_map": {"": accelerator()}}
    torch.manual_seed(seed)
    model: Any
    model, tokenizer, _ = resolve_model(name, dtype=getattr(torch, dtype), progress=progress, head=head, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model if bits != 16 else model.to(accelerator()), tokenizer


def wrap_lora(
    model: nn.Module,
    target_modules: str | Sequence[str],
    *,
    target_parameters: Sequence[str] | None = None,
    **settings: Any,
) -> Any:
    """Return the PEFT model; ``settings`` are LoraConfig's.

    Args:
        model: the pretrained one.
        target_modules: "all-linear", a regular expression, or names.
        target_parameters: of parameters that are no linear layer's, such as the experts of a mixture.

    Raises:
        LayerError: a target is not in the model; the message gives the nearest names.
    """
    for target in target_parameters or ():
        parameters = [name for name, _ in model.named_parameters()]
        if not any(name == target or name.endswith(f".{target}") for name in parameters):
            known = {".".join(name.split(".")[-2:]) for name in parameters}
            raise LayerError(f"target parameter {target!r} is not in the model.{nearest(target, known)}")
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    if not target_modules and not target_parameters:
        raise LayerError(f"no target modules are named; the model's linear layers are: {', '.join(sorted(linear))}.")
    if not isinstance(target_modules, str):
        names = [name for name, _ in model.named_modules()]
        for target in target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise LayerError(
                    f"target module {target!r} is not in the model.{nearest(target, linear)} Its linear layers are: "
                    f"{', '.join(sorted(linear))}."
                )
        target_modules = list(target_modules)
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise LayerError(f"target modules {target_modules!r} are no regular expression: {error}.") from error
    try:
        config = LoraConfig(target_modules=target_modules, target_parameters=target_parameters, **settings)
        return get_peft_model(model, config)
    except ValueError as error:
        raise LayerError(
            f"PEFT can't put LoRA layers on {target_modules!r} ({str(error).rstrip('.')}); its linear layers are: "
            f"{', '.join(sorted(linear))}."
        ) from error
