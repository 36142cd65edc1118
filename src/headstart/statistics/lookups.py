"""Summing the gradients of embeddings: of as many rows as tokens were looked up, and never of the whole weight."""

from __future__ import annotations

import torch
from torch import Tensor

from headstart.layers.lookups import Lookup


def add_rows(total: Tensor, tokens: Tensor, gradients: Tensor, lookup: Lookup) -> None:
    """Add the gradient of an embedding's weight to a float32 sum (d_out, tokens of the vocabulary), in float32.

    That is, for each token, the sum of the gradients where it was looked up. The parameter's own gradient would be as
    large as the weight, in its precision, and where that is tied to a head, of both.

    Args:
        total: the sum.
        tokens: (rows,), what was looked up.
        gradients: (rows, d_out), of what came out.
        lookup: what the embedding does besides.
    """
    if lookup.padding is not None:
        counts = (tokens != lookup.padding).nonzero().flatten()
        tokens, gradients = tokens[counts], gradients[counts]
    if not len(tokens):
        return
    distinct, places = tokens.unique(return_inverse=True)
    # Sums in one order on any device, which adding to an index on a GPU doesn't.
    rows = torch.ops.aten.embedding_dense_backward(gradients.float(), places, len(distinct), -1, False)
    total.index_add_(1, distinct.to(total.device), rows.T.to(total.device), alpha=lookup.scale)
