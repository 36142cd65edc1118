"""Packed batches: rows that hold several sequences one after the other become padded batches of these sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

# What only says where sequences begin; a padded batch says it by its mask.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_FILL = {"labels": -100}


def unpacked(batch: dict[str, Any]) -> dict[str, Any] | None:
    """Return a batch of sequences packed into rows as a padded batch with an attention mask; None where it isn't one.

    Sequences are told by ``cu_seq_lens_q``, or by ``position_ids`` that begin anew at 0 where there is no attention
    mask: so read the models that take packed batches. Nothing is cut where the batch holds a tensor that is neither
    one number a token nor one number for all. Padding at the end of a row, in sequences of one token without a label,
    is left out.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    starts = _starts(batch, ids)
    if starts is None or int(starts.sum()) == len(ids):
        return None
    content = {key: value for key, value in batch.items() if key not in (*_BOUNDARIES, "attention_mask")}
    along_tokens = {key: value for key, value in content.items() if isinstance(value, Tensor) and value.dim() > 0}
    if any(value.shape != ids.shape for value in along_tokens.values()):
        return None
    if any(not isinstance(value, bool | int | float | str | Tensor | None) for value in content.values()):
        return None
    places = starts.flatten().nonzero().flatten().tolist()
    spans = list(zip(places, [*places[1:], ids.numel()], strict=True))
    labels = along_tokens.get("labels")
    if labels is not None:
        flat = labels.reshape(-1)
        spans = [(low, high) for low, high in spans if high - low > 1 or int(flat[low]) != _FILL["labels"]]
    parts = {
        key: pad_sequence(
            [value.reshape(-1)[low:high] for low, high in spans], batch_first=True, padding_value=_FILL.get(key, 0)
        )
        for key, value in along_tokens.items()
    }
    mask = pad_sequence([ids.new_ones(high - low) for low, high in spans], batch_first=True)
    return content | parts | {"attention_mask": mask}


def _starts(batch: dict[str, Any], ids: Tensor) -> Tensor | None:
    """Return where sequences begin (rows, tokens), None where that isn't told."""
    offsets = batch.get("cu_seq_lens_q")
    if isinstance(offsets, Tensor) and len(ids) == 1 and _divides(offsets, ids.shape[1]):
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[0, offsets.reshape(-1)[:-1].long()] = True
        return starts
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape != ids.shape or "attention_mask" in batch:
        return None
    starts = positions == 0
    steps = positions[:, 1:] == positions[:, :-1] + 1
    return starts if bool(starts[:, 0].all()) and bool((functional.pad(steps, (1, 0)) | starts).all()) else None


def _divides(offsets: Tensor, length: int) -> bool:
    flat = offsets.reshape(-1)
    return len(flat) > 1 and int(flat[0]) == 0 and int(flat[-1]) == length and bool((flat.diff() > 0).all())
