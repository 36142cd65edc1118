"""Putting samples of like length into one batch, so that little is computed on padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from headstart.statistics.batches import IGNORED, Batch, Samples, single_sample

# Less padding than this share of all cells isn't worth a change.
_WORTH = 0.05


def by_length(chunks: Sequence[Samples]) -> list[Samples]:
    """Return the samples in batches of like length, where they are tokens with an attention mask; else as they come.

    No batch holds more samples or more cells than the largest one given, and all keep the side on which they are
    padded. Nothing is changed where batches hold anything else than one number a sample or one a token, where a mask
    has holes, or where little padding would be saved.
    """
    chunks = list(chunks)
    if not chunks or not all(chunk.cut and _is_plain(chunk.batch) for chunk in chunks):
        return chunks
    if len({tuple(chunk.batch) for chunk in chunks}) > 1:
        return chunks
    masks = [chunk.batch["attention_mask"] for chunk in chunks]
    lengths = torch.cat([mask.sum(1) for mask in masks])
    cells = sum(mask.numel() for mask in masks)
    parts = _parts(sorted(lengths.tolist()), max(chunk.size for chunk in chunks), max(mask.numel() for mask in masks))
    if cells - sum(max(part) * len(part) for part in parts) < _WORTH * cells:
        return chunks
    left = any(bool((mask[:, 0] == 0).any()) for mask in masks)
    if left and any(bool((mask[:, -1] == 0).any()) for mask in masks):
        return chunks
    fill = _padding_id(chunks)
    alone = [(single_sample(chunk.batch, row), chunk.indices[row]) for chunk in chunks for row in range(chunk.size)]
    if any(int(sample["attention_mask"].sum()) != sample["attention_mask"].shape[1] for sample, _ in alone):
        return chunks
    alone.sort(key=lambda pair: pair[0]["attention_mask"].shape[1])
    batches, remaining = [], iter(alone)
    for part in parts:
        taken = [next(remaining) for _ in part]
        batches.append(
            Samples(_joined([sample for sample, _ in taken], left, fill), tuple(index for _, index in taken))
        )
    return batches


def _parts(lengths: Sequence[int], size: int, cells: int) -> list[list[int]]:
    """Divide ascending lengths into batches of at most ``size`` samples and ``cells`` cells."""
    parts: list[list[int]] = [[]]
    for length in lengths:
        if len(parts[-1]) == size or (parts[-1] and length * (len(parts[-1]) + 1) > cells):
            parts.append([])
        parts[-1].append(length)
    return parts


def _is_plain(batch: Batch) -> bool:
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or any(key.startswith("decoder_") for key in batch):
        return False
    return all(
        isinstance(value, Tensor) and (value.dim() == 1 or (value.dim() == 2 and value.shape == mask.shape))
        for value in batch.values()
    )


def _padding_id(chunks: Sequence[Samples]) -> int:
    for chunk in chunks:
        ids = chunk.batch.get("input_ids")
        hidden = chunk.batch["attention_mask"] == 0
        if isinstance(ids, Tensor) and bool(hidden.any()):
            return int(ids[hidden][0])
    return 0


def _joined(alone: Sequence[Batch], left: bool, fill: int) -> Batch:
    width = max(sample["attention_mask"].shape[1] for sample in alone)
    fills = {"labels": IGNORED, "input_ids": fill}

    def row(key: str, value: Tensor) -> Tensor:
        if value.dim() == 1:
            return value
        missing = width - value.shape[1]
        return functional.pad(value, (missing, 0) if left else (0, missing), value=fills.get(key, 0))

    return {key: torch.cat([row(key, sample[key]) for sample in alone]) for key in alone[0]}
