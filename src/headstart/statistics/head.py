"""A language model's head: its states go in, and the logits never have to exist at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headstart.statistics.batches import Batch


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass
    """The head was called; holds its input."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class HeadCall:
    """What a head was given and what it returned, in the last forward pass."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None


def plain_head(model: nn.Module, tapped: set[nn.Module]) -> nn.Linear | None:
    """Return the linear layer that makes the model's logits, None where there is none or it can't be run by itself.

    It can where it is a plain layer whose weight is there: not one of the layers that statistics are collected of
    (``tapped``), nor one that an adapter trains a copy of, nor offloaded or sharded; and the model is not compiled.
    """
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        return None
    outputs: Any = getattr(model, "get_output_embeddings", None)
    try:
        head = None if outputs is None else outputs()
    except NotImplementedError:  # Transformers' own for a model without one
        return None
    if type(head) is not nn.Linear or head in tapped or hasattr(head, "_hf_hook"):
        return None
    return None if head.weight.is_meta or isinstance(head.weight, DTensor) else head


def states_of(model: nn.Module, head: nn.Linear, batch: Batch) -> Tensor | None:
    """Run a model up to its head, and return what the head would see; None where the model doesn't call it."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0])

    handle = head.register_forward_pre_hook(stop)
    try:
        model(**batch)
    except _Reached as reached:
        return reached.states
    finally:
        handle.remove()
    return None


@contextlib.contextmanager
def watched(head: nn.Linear | None) -> Iterator[HeadCall]:
    """Within the block, keep what the head sees and returns."""
    call = HeadCall()

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        call.inputs, call.outputs = args[0], output

    handle = head.register_forward_hook(keep) if head is not None else None
    try:
        yield call
    finally:
        if handle is not None:
            handle.remove()


def makes(head: nn.Linear | None, call: HeadCall, logits: Tensor | None, labels: Tensor) -> bool:
    """Return whether the logits are just what the head returned, one row a label."""
    if head is None or call.inputs is None or call.outputs is None or logits is None:
        return False
    if call.inputs.shape[:-1] != labels.shape or call.outputs.shape != logits.shape:
        return False
    return torch.equal(call.outputs.detach().to(logits.dtype), logits.detach())
