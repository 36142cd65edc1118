"""Forward passes of a model, and what is known of its loss: what they leave to a backward pass.

Where a language model's head is a plain linear layer, its states go in, and the logits never have to exist at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from headstart.errors import DataError
from headstart.statistics.batches import IGNORED, Batch, token_labels
from headstart.statistics.losses import OwnLoss, find_own_loss, logits_of, loss_of, predicted, predicts_next
from headstart.statistics.trial import Run

# (model, batch) -> loss, a scalar.
Loss = Callable[[nn.Module, Batch], Tensor]


class Runs:
    """Runs a model with its own loss, or for its samples' own losses once it is known how to compute them.

    Args:
        model: called with each batch as keyword arguments.
        modules: the base layers that are tapped.
        loss: computes a batch's loss in place of the model.
        in_step: other processes run the model in step: then its losses are all that is asked for.

    Attributes:
        own: how samples' own losses follow from the logits; None where they don't, for all that is known.
        classes: how many there are where each token has a label.
        shifted: whether positions predict the label of the next token; None where that can't be told.
        with_labels: whether the model is given its labels where only its outputs are asked for.
        encoder_decoder: whether labels lie along a decoder.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], *, loss: Loss | None, in_step: bool) -> None:
        self._model = model
        self._loss = loss
        self._in_step = in_step
        self._head = _plain_head(model, set(modules.values())) if not in_step and loss is None else None
        config = getattr(model, "config", None)
        self._longest = getattr(config, "max_position_embeddings", None) or math.inf
        self.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.own: OwnLoss | None = None
        self.classes = 0
        self.shifted: bool | None = None
        self.with_labels = True

    def layers(self, batch: Batch) -> None:
        """Run the model for what its layers see, up to its head where it has a plain one."""
        batch = self.given(batch)
        if self._loss is not None:
            self._loss_given(batch)
        elif self._head is not None:
            _states_of(self._model, self._head, batch)
        else:
            self._model(**batch)

    def whole(self, batch: Batch, size: int, first: int = 0) -> Run:
        """Run for a batch's loss, times ``size``; ``first`` is the place of its first sample, for errors."""
        if self._loss is not None:
            return _of_loss(self._loss_given(batch), size)
        return _of_loss(loss_of(self._model(**self.given(batch)), first), size)

    def examined(self, batch: Batch) -> Run:
        """Run for a batch's loss, and find out what it is."""
        if self._loss is not None:
            return self.whole(batch, 1)
        batch = self.given(batch)
        with _head_watched(self._head) as call:
            outputs = self._model(**batch)
        loss, logits, labels = loss_of(outputs, 0), logits_of(outputs), batch.get("labels")
        if not isinstance(labels, Tensor) or logits is None or not logits.requires_grad:
            return _of_loss(loss, 1)
        tokens = token_labels(batch)
        if self._in_step:
            # A backward pass through the outputs alone would put the processes out of step.
            if tokens is not None:
                logits.register_hook(lambda gradient: self._notice_shift(gradient, tokens))
            return _of_loss(loss, 1)
        (gradient,) = torch.autograd.grad(loss, [logits], retain_graph=True, allow_unused=True)
        if gradient is not None:
            self.own = find_own_loss(loss.detach(), logits.detach(), gradient, labels)
            self.classes = logits.shape[-1]
            if tokens is not None:
                self._notice_shift(gradient, tokens)
        if self.own is None or not self.own.of_tokens or not _makes(self._head, call, logits, labels):
            self._head = None
        self.with_labels = self.encoder_decoder or self.own is None
        return _of_loss(loss, 1)

    def agrees(self, batch: Batch) -> bool:
        """Return whether the model's loss of a batch is the one that was found, of the same logits."""
        batch = self.given(batch)
        with torch.no_grad():
            outputs = self._model(**batch)
        logits = logits_of(outputs)
        return (
            self.own is not None and logits is not None and self.own.is_of(loss_of(outputs, 0), logits, batch["labels"])
        )

    def forget(self) -> None:
        """Take the model's loss as unknown."""
        self.own, self.with_labels = None, True

    def apart(self, batch: Batch, size: int) -> Run:
        """Run for the sum of the own losses of a batch's ``size`` samples."""
        batch = self.given(batch)
        states, labels, own = self.states(batch), batch["labels"], self.own
        assert own is not None

        def at(scale: float) -> tuple[Tensor, Tensor]:
            # A batch that can't be cut may count as one.
            losses, gradient = own.gradient(states, labels, scale * size / len(states), head=self._head)
            return losses.mean(), gradient

        return Run(states, at)

    def states(self, batch: Batch) -> Tensor:
        """Return what the own losses are computed of: the head's input, or the logits."""
        if self._head is not None:
            states = _states_of(self._model, self._head, batch)
        else:
            given = batch if self.with_labels else {key: value for key, value in batch.items() if key != "labels"}
            states = logits_of(self._model(**given))
        # Both were there when the loss was found out.
        assert states is not None
        return states

    def given(self, batch: Batch) -> Batch:
        """Return a batch as the model is given it."""
        return _told_apart(batch, self._longest) if self.encoder_decoder else batch

    def compared(self, states: Tensor, batch: Batch, row: int) -> Tensor:
        """Return what counts of a sample's states."""
        if self.own is None or not self.own.of_tokens:
            return states[row].float()
        targets = predicted(batch["labels"], shifted=self.own.kind == "next token")
        return states[row][targets[row] != IGNORED].float()

    def _loss_given(self, batch: Batch) -> Tensor:
        assert self._loss is not None
        loss = self._loss(self._model, batch)
        if not isinstance(loss, Tensor):
            raise DataError(f"loss= returned {type(loss).__name__}: it must return the loss as a tensor.")
        return loss

    def _notice_shift(self, gradient: Tensor, labels: Tensor) -> None:
        self.shifted = predicts_next(gradient, labels)


def _of_loss(loss: Tensor, size: int) -> Run:
    loss = loss if loss.dim() == 0 else loss.mean()
    return Run(loss, lambda scale: (loss.detach(), torch.full_like(loss, size * scale)))


def _told_apart(batch: Batch, longest: float) -> Batch:
    """Give a decoder's labels another length where they are as long as the encoder's input: layers are told by length.

    Padding at the end, which no loss and no other token sees, is added or left out. Where neither can be, samples have
    to be read one at a time.

    Args:
        batch: of an encoder-decoder.
        longest: how many positions the model knows.
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if not isinstance(labels, Tensor) or not isinstance(mask, Tensor) or labels.shape != mask.shape:
        return batch
    if any(key.startswith("decoder_") for key in batch):
        return batch
    if bool((labels[:, -1] == IGNORED).all()):
        return batch | {"labels": labels[:, :-1]}
    if labels.shape[1] >= longest:
        return batch
    return batch | {"labels": functional.pad(labels, (0, 1), value=IGNORED)}


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass
    """The head was called; holds its input."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _HeadCall:
    """What a head was given and what it returned, in the last forward pass."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None


def _plain_head(model: nn.Module, tapped: set[nn.Module]) -> nn.Linear | None:
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


def _states_of(model: nn.Module, head: nn.Linear, batch: Batch) -> Tensor | None:
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
def _head_watched(head: nn.Linear | None) -> Iterator[_HeadCall]:
    """Within the block, keep what the head sees and returns."""
    call = _HeadCall()

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        call.inputs, call.outputs = args[0], output

    handle = head.register_forward_hook(keep) if head is not None else None
    try:
        yield call
    finally:
        if handle is not None:
            handle.remove()


def _makes(head: nn.Linear | None, call: _HeadCall, logits: Tensor | None, labels: Tensor) -> bool:
    """Return whether the logits are just what the head returned, one row a label."""
    if head is None or call.inputs is None or call.outputs is None or logits is None:
        return False
    if call.inputs.shape[:-1] != labels.shape or call.outputs.shape != logits.shape:
        return False
    return torch.equal(call.outputs.detach().to(logits.dtype), logits.detach())
