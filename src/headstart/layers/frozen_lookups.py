"""Looking tokens up in A, as an embedding does in its weight; and in A0, which never trains."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def looked_up(tokens: Tensor, A: Tensor, base: Any) -> Tensor:
    """Return the columns of A (r, tokens) that belong to tokens, (..., r), with gradients as the base layer's."""
    return functional.embedding(tokens, A.T, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)


class FrozenLookup(nn.Module):
    """A frozen A0 of shape (r, tokens); it stays as it is even where a program unfreezes it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value, requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the columns that belong to tokens, (..., r)."""
        return functional.embedding(tokens, self.weight.detach().T)
