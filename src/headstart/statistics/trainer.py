"""A trainer as data: its own training set, collator, loss and schedule, as its training will use them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset
from transformers import Trainer

from headstart.errors import DataError
from headstart.methods.base import Training
from headstart.statistics.quiet import drawn_from
from headstart.statistics.runs import Loss
from headstart.statistics.training import TrainingData

# Whose data loaders are made of train_dataset, sampler and collator.
_KNOWN = ("transformers", "trl")
# Losses of SFTTrainer that are the model's own.
_PLAIN_LOSSES = ("nll", "chunked_nll")


def from_trainer(trainer: Trainer, samples: int, seed: int, *, rate: bool = True) -> TrainingData:
    """Return what a trainer trains on, as a start reads it.

    Samples are drawn from the training set by ``seed``, whatever sampler the trainer has (an iterable data set gives
    its first ones), and go through the trainer's own collator. Where its loss is the model's own, whole batches are
    read; else ``compute_loss`` is called on one sample at a time, as collated, so that a sample is what the trainer
    takes for one: a pair of answers of DPO's or a reward model's. What is read is kept where the trainer's attribute
    ``kept_statistics`` says so (:class:`headstart.statistics.kept.KeptStatistics`), as those of a study's runs do.

    Args:
        trainer: of Transformers or TRL, before it trains. Its metrics are left as they are.
        samples: how many the method reads; 0 for none.
        seed: see above.
        rate: whether the first rate of its schedule is asked for.

    Raises:
        DataError: it has no training data, makes its data while it trains, or makes its batches in a way of its own.
    """
    dataset: Any = trainer.train_dataset
    training = known_training(trainer, rate=rate)
    if samples == 0:
        return TrainingData(training=training)
    if hasattr(trainer, "_generate_and_score_completions"):
        raise DataError(
            f"{type(trainer).__name__} makes its data while it trains, so there is nothing to read: give batches and "
            "loss= instead."
        )
    if dataset is None:
        raise DataError(f"{type(trainer).__name__} has no train_dataset: give it one, or give batches as data=.")
    override = next(cls for cls in type(trainer).__mro__ if "get_train_dataloader" in vars(cls))
    if override.__module__.partition(".")[0] not in _KNOWN:
        raise DataError(
            f"{override.__name__} has a get_train_dataloader of its own, whose batches are not those of its "
            "train_dataset: give data=trainer.get_train_dataloader(), and its loss as loss= if it has one of its own."
        )
    loss = _loss(trainer)
    batch_size = trainer.args.per_device_train_batch_size if loss is None else 1
    return TrainingData(
        _chosen(dataset, samples, seed),
        trainer._get_collator_with_removed_columns(trainer.data_collator),
        batch_size,
        loss=loss,
        single=loss is not None,
        training=training,
        kept=getattr(trainer, "kept_statistics", None),
    )


def known_training(trainer: Any, *, rate: bool = True) -> Training:
    """Return what a trainer tells of its training: the size of its data set, and the first rate of its schedule.

    Of a warm-up that is the first rate above 0: that of the very first step is 0 there.

    Args:
        trainer: as :func:`from_trainer` takes it; stays as it is.
        rate: ask for the rate, for which the trainer makes a data loader.
    """
    dataset: Any = trainer.train_dataset
    size = len(dataset) if isinstance(dataset, Sized) else None
    return Training(_population(trainer, size), _first_rate(trainer) if rate and dataset is not None else None)


def _first_rate(trainer: Any) -> float | None:
    """Return the first rate above 0 that the trainer's own scheduler will give; None where the length isn't known."""
    # What these functions note of themselves, they note on the copy.
    trainer = copy.copy(trainer)
    try:
        steps = _steps(trainer)
    except ValueError:  # Transformers' own for a data set without a length, of which it must be told the steps
        return None
    weight = nn.Parameter(torch.zeros((), dtype=torch.float32, device="cpu"))
    optimizer = torch.optim.SGD([weight], lr=float(trainer.args.learning_rate))
    trainer.lr_scheduler = None
    scheduler = trainer.create_scheduler(steps, optimizer=optimizer)
    for _ in range(max(1, steps)):
        first = float(optimizer.param_groups[0]["lr"])
        if first > 0:
            return first
        optimizer.step()
        scheduler.step()
    return None


def _steps(trainer: Any) -> int:
    """Return how many steps the trainer will take, as it counts them itself.

    Raises:
        ValueError: neither its arguments nor its data tell.
    """
    kept = getattr(trainer.accelerator, "_dataloaders", None)
    before = list(kept or ())
    try:
        with drawn_from(0):
            loader = trainer.get_train_dataloader()
    finally:
        if kept is not None:  # those that training will prepare are all that the accelerator is to know of
            kept[:] = before
    steps: int = trainer.set_initial_training_values(trainer.args, loader)[-1]
    return steps


def _population(trainer: Any, rows: int | None) -> int | None:
    """Return how many samples the training set holds: of rows that TRL has packed, the sequences, where those are."""
    packed = rows is not None and "seq_lengths" in (getattr(trainer.train_dataset, "column_names", None) or ())
    return sum(map(len, trainer.train_dataset["seq_lengths"])) if packed and _loss(trainer) is None else rows


def _chosen(dataset: Any, samples: int, seed: int) -> Iterable[Any]:
    """Return single samples, drawn by the seed where the data set has places."""
    if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
        return islice(iter(dataset), samples)
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator, dtype=torch.int64, device="cpu")[:samples].tolist()
    # Of several methods each reads them from the beginning.
    places: Any = dataset
    chosen: Any = Subset(places, order)
    return cast("Iterable[Any]", chosen)


def _loss(trainer: Any) -> Loss | None:
    """Return the trainer's loss, None where that is the model's own."""
    custom = trainer.compute_loss_func is not None or trainer.label_smoother is not None
    plain = getattr(trainer, "loss_of_the_model", type(trainer).compute_loss is Trainer.compute_loss)
    if plain and not custom:
        return None
    sft = any(cls.__name__ == "SFTTrainer" for cls in type(trainer).__mro__)
    own_compute = next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    plain_sft = sft and own_compute.__name__ == "SFTTrainer" and not custom
    if plain_sft and trainer.args.loss_type in _PLAIN_LOSSES and not getattr(trainer, "aux_loss_enabled", False):
        return None

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with _kept(trainer), _adapters_stay_off(model), _by_itself(trainer.accelerator):
            value = trainer.compute_loss(model, dict(batch))
        return value[0] if isinstance(value, tuple) else value

    return loss


@contextlib.contextmanager
def _kept(trainer: Any) -> Iterator[None]:
    """Put back what a trainer notes of the batches that it has seen."""
    names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(trainer, name)]
    before = {name: copy.deepcopy(getattr(trainer, name)) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def _adapters_stay_off(model: Any) -> AbstractContextManager[None]:
    """Let a loss that switches adapters, as those with a reference do, leave all of them off: that is the start."""
    return _replaced(model, disable_adapter=contextlib.nullcontext, set_adapter=lambda *_, **__: None)


def _by_itself(accelerator: Any) -> AbstractContextManager[None]:
    """Let a loss that gathers its metrics do so alone: other processes read other samples, and may have fewer."""
    return _replaced(
        accelerator, **dict.fromkeys(("gather", "gather_for_metrics", "reduce"), lambda value, *_, **__: value)
    )


@contextlib.contextmanager
def _replaced(holder: Any, **parts: Any) -> Iterator[None]:
    """Put other parts in the place of an object's own, as far as it has them, within the block."""
    before = dict(vars(holder))
    present = [name for name in parts if hasattr(holder, name)]
    try:
        for name in present:
            vars(holder)[name] = parts[name]
        yield
    finally:
        for name in present:
            if name in before:
                vars(holder)[name] = before[name]
            else:
                vars(holder).pop(name, None)
