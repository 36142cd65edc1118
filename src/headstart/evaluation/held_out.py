"""Measuring a trainer's model on its held-out data: the loss of each sample, and a classifier's predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headstart.evaluation.answers import evaluating
from headstart.processes import Processes, together
from headstart.progress import Show, silent
from headstart.statistics.batches import IGNORED
from headstart.statistics.losses import predicted
from headstart.statistics.packing import unpacked


@dataclass(frozen=True)
class HeldOut:
    """What held-out samples gave, one row each.

    Attributes:
        losses: the sum of a sample's losses, in nats; of a text over its completion's tokens.
        weights: how many tokens that was; 1 where samples have one label.
        logits, labels: of classifiers; empty for texts.
    """

    losses: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]
    logits: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]

    @property
    def loss(self) -> float:
        """Nats a token, or a sample."""
        return mean_loss(self.losses, self.weights)


def mean_loss(losses: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> float:
    """Return nats a token."""
    return float(losses.sum() / weights.sum())


@torch.no_grad()
def held_out(
    trainer: Any,
    dataset: Any = None,
    *,
    regression: bool = False,
    progress: Show = silent,
    step: str = "held-out loss",
) -> HeldOut:
    """Measure a trainer's model on data that the trainer has prepared, through the trainer's own collator.

    Samples that the collator puts into one row are measured one by one.

    Processes that train together share the batches, and all get what all of them found.

    Args:
        trainer: whose model it is.
        dataset: None for its eval_dataset.
        regression: the labels are numbers.
        progress: called with (step, samples done, samples).
        step: see there.
    """
    model, device, processes = trainer.model, next(trainer.model.parameters()).device, Processes.joined()
    encoder_decoder = model.config.is_encoder_decoder
    losses: list[Tensor] = []
    weights: list[Tensor] = []
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    dataset = trainer.eval_dataset if dataset is None else dataset
    total, done = len(dataset), 0
    with together(processes), evaluating(model):
        for batch in _batches(trainer, dataset, processes):
            moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            wanted = moved.pop("labels")
            # An encoder-decoder makes its decoder's input of the labels.
            given = moved | ({"labels": wanted} if encoder_decoder else {})
            with trainer.accelerator.autocast():
                outputs = model(**given).logits
            if outputs.dim() == 3:
                targets = predicted(wanted, shifted=not encoder_decoder)
                losses.append(torch.stack(list(map(_token_losses, outputs, targets))).cpu())
                weights.append((targets != IGNORED).sum(1).cpu())
            else:
                outputs = outputs.float()
                losses.append(_labelled_losses(outputs, wanted, regression).cpu())
                weights.append(torch.ones(len(wanted), dtype=torch.long, device="cpu"))
                logits.append(outputs.cpu())
                labels.append(wanted.cpu())
            done = min(total, done + processes.count * len(wanted))
            progress(step, done, total)
    empty = [torch.zeros(0, dtype=torch.float32, device="cpu")]
    shares = processes.gather([losses, weights, logits, labels])
    every = [_in_turn([share[part] for share in shares]) for part in range(4)]
    return HeldOut(*(torch.cat(rows or empty).double().numpy() for rows in every))


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of one sample's losses: the logits of a batch, over a large vocabulary, are large in float32."""
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def _labelled_losses(outputs: Tensor, wanted: Tensor, regression: bool) -> Tensor:
    if regression:
        return (outputs.reshape(len(wanted)) - wanted.float()).square()
    return functional.cross_entropy(outputs, wanted, reduction="none")


def _in_turn(shares: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the processes' batches in the order of the data."""
    return [rows for batch in zip_longest(*shares) for rows in batch if rows is not None]


def _batches(trainer: Any, dataset: Any, processes: Processes) -> Iterator[dict[str, Any]]:
    """Yield this process's share of the data, in the trainer's batches."""
    rows = trainer._remove_unused_columns(dataset, description="evaluation")
    size = trainer.args.per_device_eval_batch_size
    for start in processes.share(range(0, len(rows), size)):
        batch = dict(trainer.data_collator([rows[place] for place in range(start, min(start + size, len(rows)))]))
        # A collator for packed training puts all samples of a batch into one row.
        yield unpacked(batch) or batch
