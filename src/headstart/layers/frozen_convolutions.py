"""Convolutions that never train: the starts of anchored ones."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from headstart.layers.weights import fitted


def frozen_copy(convolution: Any, value: Tensor) -> nn.Module:
    """Return a convolution that computes as this one does, with frozen kernels of these values, of any shape.

    They stay as they are even where a program unfreezes them.
    """
    made: Any = copy.copy(convolution)
    made._parameters = dict.fromkeys(convolution._parameters)
    made.weight = nn.Parameter(value.reshape(convolution.weight.shape), requires_grad=False)
    made.__class__ = next(frozen for plain, frozen in _CLASSES.items() if isinstance(convolution, plain))
    result: nn.Module = made
    return result


class _Frozen:
    """What frozen convolutions have before their own class."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Convolve in the kernels' own precision; under autocast, in that one's."""
        convolved: Tensor = self._conv_forward(fitted(x, self.weight), self.weight.detach(), None)
        return convolved

    def reset_parameters(self) -> None:
        """Leave the kernels as they are: there is nothing to draw."""


class FrozenConv1d(_Frozen, nn.Conv1d):
    """A frozen convolution."""


class FrozenConv2d(_Frozen, nn.Conv2d):
    """A frozen convolution."""


class FrozenConv3d(_Frozen, nn.Conv3d):
    """A frozen convolution."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: FrozenConv1d,
    nn.Conv2d: FrozenConv2d,
    nn.Conv3d: FrozenConv3d,
}
