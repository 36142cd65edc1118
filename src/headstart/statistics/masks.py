"""Which of a layer's rows are tokens that count: padding must not leak into any statistic."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.errors import DataError
from headstart.statistics.batches import IGNORED, Batch, token_labels
from headstart.statistics.losses import predicted

Tokens = Literal["attention", "labels"]
# How a layer's rows lie: (samples, tokens), (tokens, samples), all tokens of all samples in a row, one row a sample, or
# otherwise, as for the experts of a mixture, which see some tokens each.
Layout = Literal["tokens", "tokens first", "flat", "samples", "other"]

# Those that a mask's shape can tell, the likeliest first.
_BY_SHAPE: tuple[Layout, ...] = ("tokens", "tokens first", "flat")


class Unmatched(Exception):  # noqa: N818 - not an error: it is answered
    """A layer's rows can't be told apart into tokens and padding; without padding they needn't be."""


@dataclass(frozen=True)
class Rows:
    """Which rows of a layer's input, flattened to (rows, d_in), count.

    Attributes:
        index: (count,) of the rows that do, None for all of them.
        count: how many do.
    """

    index: Tensor | None
    count: int

    def of(self, values: Tensor) -> Tensor:
        """Return the rows that count."""
        return values if self.index is None else values.index_select(0, self.index)

    def among(self, chosen: Tensor) -> Rows:
        """Return which of some chosen rows count, as rows of those."""
        if self.index is None:
            return Rows(None, len(chosen))
        index = torch.isin(chosen, self.index).nonzero().flatten()
        return Rows(index, len(index))


class TokenMasks:
    """The masks of one batch, matched to layers by the shapes of their inputs.

    Args:
        batch: on the model's device.
        size: samples in it.
        tokens: "attention" counts what the attention mask shows, "labels" what predicts a label.
        encoder_decoder: the model's labels lie along its decoder, not along its input.
        alone: the batch is one sample without padding, or can't be cut, so that rows of unknown kind all count.
        shifted: each position predicts the label of the next one, as in causal language models.

    Raises:
        DataError: ``tokens`` is "labels", and the batch has no label a token.
    """

    def __init__(
        self,
        batch: Batch,
        size: int,
        tokens: Tokens,
        *,
        encoder_decoder: bool,
        alone: bool,
        shifted: bool = False,
    ) -> None:
        self._size = size
        self._alone = alone
        self._masks: dict[tuple[int, ...], Rows] = {}
        self._padded = False
        self.unmatched = False
        attention = _mask(batch.get("attention_mask"))
        decoder = _mask(batch.get("decoder_attention_mask"))
        labels = token_labels(batch)
        learned = None if labels is None else predicted(labels, shifted=shifted) != IGNORED
        if tokens == "labels" and learned is None:
            raise DataError(
                "tokens='labels' counts tokens that have a label, but these data have none a token: use "
                "tokens='attention'."
            )
        if encoder_decoder:
            along_decoder = learned if tokens == "labels" or decoder is None else decoder
            masks = [attention, along_decoder]
        else:
            masks = [learned if tokens == "labels" else attention]
        for mask in masks:
            if mask is not None:
                self._add(mask)

    def _add(self, mask: Tensor) -> None:
        count = int(mask.sum())
        whole = count == mask.numel()
        self._padded |= not whole
        rows = Rows(None if whole else mask.flatten().nonzero().flatten(), count)
        shape = tuple(mask.shape)
        before = self._masks.get(shape)
        if before is None or (before.index is None and whole):
            self._masks[shape] = rows
        elif before.index is None or rows.index is None or not torch.equal(before.index, rows.index):
            # Encoder and decoder of one length, padded differently: which of them a layer sees, its shape can't say.
            self._masks[shape] = Rows(None, -1)

    def match(self, inputs: Tensor, layout: Layout) -> Rows:
        """Return which rows of a layer's input (..., d_in) count, the layer having the layout that one sample showed.

        Raises:
            Unmatched: the batch is padded and the input's shape is no mask's; read the samples one at a time.
        """
        shape = tuple(inputs.shape[:-1])
        every = Rows(None, inputs.shape[:-1].numel())
        rows = None
        if layout == "tokens":
            rows = self._masks.get(shape)
        elif layout == "tokens first" and len(shape) == 2:
            rows = self._turned(self._masks.get(shape[::-1]), shape)
        elif layout == "flat" and len(shape) == 1:
            flat = [rows for size, rows in self._masks.items() if size[0] * size[1] == shape[0]]
            rows = flat[0] if len(flat) == 1 else None
        elif layout == "samples" and shape == (self._size,):
            rows = every
        if rows is not None and rows.count >= 0:
            return rows
        if not self._padded:
            return every
        if self._alone:
            self.unmatched = True
            return every
        raise Unmatched

    def guessed(self, inputs: Tensor) -> Rows:
        """Return which rows of a layer's input (..., d_in) count where no sample has shown the layout.

        What fits no mask counts whole.
        """
        for layout in _BY_SHAPE:
            with suppress(Unmatched):
                return self.match(inputs, layout)
        return Rows(None, inputs.shape[:-1].numel())

    def _turned(self, rows: Rows | None, shape: tuple[int, ...]) -> Rows | None:
        if rows is None or rows.index is None:
            return rows
        length, size = shape
        return Rows((rows.index % length) * size + rows.index // length, rows.count)


def layout_of(inputs: tuple[int, ...] | None, tokens: int) -> Layout:
    """Return how a layer lays out its rows, from the shape of what it reads of one sample of ``tokens`` tokens."""
    shape = () if inputs is None else tuple(inputs[:-1])
    if len(shape) == 2:
        return "tokens first" if shape[0] > 1 and shape[1] == 1 else "tokens"
    if len(shape) == 1 and shape[0] == 1 != tokens:
        return "samples"
    return "flat" if len(shape) == 1 and shape[0] == tokens else "other"


def _mask(value: object) -> Tensor | None:
    return value != 0 if isinstance(value, Tensor) and value.dim() == 2 else None
