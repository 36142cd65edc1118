"""What a batch holds: any iterable of batches becomes batches of exactly the samples asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.errors import DataError
from headstart.statistics.packing import unpacked

# The label of a token that isn't learned, as PyTorch's cross entropy and Transformers have it.
IGNORED = -100
Batch = dict[str, Any]
Collator = Callable[[list[Any]], Mapping[str, Any]]

# Tensors of tokens, whose first dimension is the sample whatever else a batch holds.
_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "labels")


@dataclass(frozen=True)
class Samples:
    """A batch of samples and the place of each in the data.

    Attributes:
        batch: what the model takes.
        indices: one a sample; of a batch whose samples can't even be counted, one for all of it.
        cut: whether single samples can be taken out of the batch.
    """

    batch: Batch
    indices: tuple[int, ...]
    cut: bool = True

    @property
    def first(self) -> int:
        """The place of the first one."""
        return self.indices[0]

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.indices)


def iterate_samples(
    data: Iterable[Any],
    samples: int,
    *,
    collator: Collator | None = None,
    batch_size: int = 8,
    single: bool = False,
) -> Iterator[Samples]:
    """Yield batches that hold the first ``samples`` samples of ``data`` in all; the last one is cut to fit.

    A batch of sequences that were packed into rows (positions that begin anew, or ``cu_seq_lens_q``) becomes a padded
    batch of these sequences: each is a sample. A batch that can't be cut is given whole; where it doesn't even tell how
    many samples it holds, it counts as one.

    Args:
        data: an iterable of batches (mappings of what the model takes: tensors whose first dimension is the sample,
            lists of one entry a sample, mappings of these, and settings), or, with ``collator``, a dataset of single
            samples, ``datasets.Dataset`` among them.
        samples: how many samples to read; fewer are read if the data end before.
        collator: makes a batch of a list of samples.
        batch_size: samples a batch, where a collator is given.
        single: each batch is one sample, whatever its tensors hold.

    Raises:
        DataError: the data hold no sample, or something that is not a batch.
    """
    first = 0
    for item in _collated(data, collator, batch_size) if collator is not None else data:
        batch = _as_batch(item, first)
        if single:
            yield Samples(batch, (first,), cut=False)
            first += 1
            if first >= samples:
                return
            continue
        batch = unpacked(batch) or batch
        size, cut = _size(batch)
        if size is None:
            raise DataError(
                f"the batch after sample {first} holds no tensor: collate the samples first, or give a collator."
            )
        if cut and first + size > samples:
            size = samples - first
            batch = take(batch, list(range(size)))
        if size:
            yield Samples(batch, tuple(range(first, first + size)), cut)
        first += size
        if first >= samples:
            return
    if first == 0:
        raise DataError("data holds no sample: give at least one batch with labels.")


def label_counts(batch: Batch) -> Tensor | None:
    """Return each sample's number of labels that count, two columns: all of them, and without the first position.

    A causal language model predicts the next token, so that a label in first place is never used; other models use
    it. None where labels are not one integer a token (classes, scores).
    """
    labels = token_labels(batch)
    if labels is None:
        return None
    used = labels != IGNORED
    return torch.stack((used.sum(1), used[:, 1:].sum(1)), dim=1).cpu()


def token_labels(batch: Batch) -> Tensor | None:
    """Return the labels (samples, tokens) where they are one integer a token, else None."""
    labels = batch.get("labels")
    return labels if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point() else None


def is_padded(batch: Batch) -> bool:
    """Return whether the attention mask hides a token."""
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and mask.dim() == 2 and not bool((mask != 0).all())


def most_padded(batch: Batch) -> int:
    """Return the row of the sample with the fewest tokens; the first where there is no attention mask."""
    mask = batch.get("attention_mask")
    return int((mask != 0).sum(1).argmin()) if isinstance(mask, Tensor) and mask.dim() == 2 else 0


def single_sample(batch: Batch, index: int, *, encoder_decoder: bool = False) -> Batch:
    """Return one sample of a batch, without its padding where ``attention_mask`` tells what that is.

    The padding stays where the batch holds other numbers than token ids, masks and embeddings that are as wide as the
    tokens: an image's, for all that is known.

    With ``encoder_decoder``, labels and all that begins with ``decoder_`` lie along a decoder's tokens, and end where
    the last label or the decoder's own mask does.
    """
    sample = take(batch, [index])
    along_decoder = tuple(key for key in sample if key.startswith("decoder_") or key == "labels")
    along_input = tuple(key for key in sample if key not in along_decoder)
    if not encoder_decoder:
        _trim(sample, "attention_mask", along_input, with_labels=True)
        return sample
    _trim(sample, "attention_mask", along_input, with_labels=False)
    labels = sample.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        mask = sample.get("decoder_attention_mask")
        used = labels[0] != IGNORED
        used = used | (mask[0] != 0) if isinstance(mask, Tensor) and mask.shape == labels.shape else used
        end = int(used.nonzero().flatten()[-1]) + 1 if bool(used.any()) else labels.shape[1]
        width = labels.shape[1]
        for key in along_decoder:
            if isinstance(sample[key], Tensor) and sample[key].dim() >= 2 and sample[key].shape[1] == width:
                sample[key] = sample[key][:, :end]
    return sample


def take(batch: Batch, indices: list[int]) -> Batch:
    """Return some samples of a batch, padding and all."""
    return {key: _rows(value, indices) for key, value in batch.items()}


def moved(value: Any, device: torch.device) -> Any:
    """Return a batch, or a part of one, with all its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [moved(part, device) for part in value]
    return value


def size_of(batch: object) -> int:
    """Return how many samples a batch holds, 0 for what is no batch."""
    if not isinstance(batch, Mapping):
        return 0
    given = dict(batch)
    return _size(unpacked(given) or given)[0] or 0


def _size(batch: Batch) -> tuple[int | None, bool]:
    """Return how many samples a batch holds, and whether they can be told apart; (None, False) where it holds none.

    They can where all that the batch holds has as many entries.
    """
    lengths = set(_lengths(batch))
    if len(lengths) <= 1:
        return next(iter(lengths), None), True
    for name in _TOKENS:
        value = batch.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return int(value.shape[0]), False
    return 1, False


def _lengths(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor):
        if value.dim() > 0:
            yield int(value.shape[0])
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _lengths(part)
    elif isinstance(value, list | tuple):
        yield len(value)


def _rows(value: Any, indices: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[indices] if value.dim() > 0 else value
    if isinstance(value, Mapping):
        return {key: _rows(part, indices) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [value[index] for index in indices]
    return value


def _trim(batch: Batch, mask_name: str, names: tuple[str, ...], *, with_labels: bool) -> None:
    mask = batch.get(mask_name)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.any()):
        return
    width = mask.shape[1]
    used = mask[0].nonzero().flatten()
    low, high = int(used[0]), int(used[-1]) + 1
    labels = batch.get("labels")
    if with_labels and isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == width:
        names = (*names, "labels")
        kept = (labels[0] != IGNORED).nonzero().flatten()
        if len(kept):
            low, high = min(low, int(kept[0])), max(high, int(kept[-1]) + 1)
    along = [name for name in names if isinstance(batch[name], Tensor) and batch[name].shape[1:2] == (width,)]
    if any(batch[name].is_floating_point() and not _is_of_tokens(name) for name in along):
        # As wide as the tokens by chance, or along them: as it may be either, nothing is cut.
        return
    for name in along:
        batch[name] = batch[name][:, low:high]


def _is_of_tokens(name: str) -> bool:
    return name.endswith(("mask", "inputs_embeds", "labels"))


def _collated(data: Iterable[Any], collator: Collator, batch_size: int) -> Iterator[Mapping[str, Any]]:
    rows = iter(data)
    while chunk := list(itertools.islice(rows, batch_size)):
        yield collator(chunk)


def _as_batch(item: Any, first: int) -> Batch:
    if not isinstance(item, Mapping) and not hasattr(item, "keys"):
        raise DataError(
            f"data must yield batches that the model accepts as keyword arguments (mappings); after sample {first} "
            f"came a {type(item).__name__}. For a dataset of single samples give a collator as well."
        )
    ids = item.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() < 2:
        raise DataError(
            f"after sample {first}, input_ids has shape {tuple(ids.shape)}: that is a single sample, not a batch; give "
            "a collator as well."
        )
    return {key: item[key] for key in item.keys()}  # noqa: SIM118 - a BatchEncoding iterates over its values


def token_width(batch: Batch) -> int:
    """Return how many tokens the longest sample has, padding and all; 0 for what isn't tokens."""
    widths = (batch.get(name) for name in ("input_ids", "inputs_embeds", "labels"))
    return max((value.shape[1] for value in widths if isinstance(value, Tensor) and value.dim() > 1), default=0)
