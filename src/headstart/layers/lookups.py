"""Embeddings: to a start, a linear layer without a bias that reads tokens as vectors of zeros and one 1.

The weight W of an embedding is (tokens, d_out), and its row of a token what comes out: so as a linear layer it is W',
(d_out, tokens), stored transposed. PEFT's adapter of it agrees: A is (r, tokens), B (d_out, r), and s (B A)' is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from headstart.layers.find import TargetLayer
from headstart.methods.base import Factors, Layer


@dataclass(frozen=True)
class Lookup:
    """What an embedding does besides looking rows up.

    Attributes:
        scale: what the rows are multiplied by.
        padding: the token whose row never trains; None for none.
    """

    scale: float = 1.0
    padding: int | None = None


@dataclass(frozen=True)
class EmbeddingLayer(TargetLayer):
    """An embedding as a linear layer.

    The row of its padding token, which never trains in the base model either, is no part of it: a method sees zeros
    there, and the token's column of A stays zero, so that whatever B becomes the row is the base model's.
    """

    def facts(self) -> Layer:
        """Return what a method may know of the layer before anything is read."""
        return replace(super().facts(), held_as="embedding", shows_inputs=False)

    def stored(self) -> Tensor:
        """Return the rows of all tokens, detached; zeros for the padding token's."""
        rows, padding = super().stored(), self.module.get_base_layer().padding_idx
        if padding is not None:
            rows = rows.clone()
            rows[padding] = 0
        return rows

    def without_padding(self, factors: Factors) -> Factors:
        """Return a start without the padding token's."""
        padding = self.module.get_base_layer().padding_idx
        if padding is None:
            return factors
        A = factors.A.clone()
        A[:, padding] = 0
        return replace(factors, A=A)


def lookup_of(module: Any) -> Lookup:
    """Return what the embedding under a layer of PEFT's does besides looking rows up."""
    scale = module._get_embed_scale()
    return Lookup(1.0 if scale is None else float(scale), module.get_base_layer().padding_idx)
