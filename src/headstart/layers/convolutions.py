"""Convolutions: to a start, a matrix of one row an output channel and one column a number of the kernel.

PEFT's adapter of a convolution is two of them: r kernels as large as the base layer's, then kernels of size one. So
what it adds to the base layer's kernels, (d_out, channels, k, ...), is B A with A and B as matrices, (r, d_in) and
(d_out, r), where d_in = channels k ....
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, LoraLayer
from torch import Tensor

from headstart.layers.find import TargetLayer
from headstart.methods.base import Layer

KINDS = (Conv1d, Conv2d, Conv3d)


@dataclass(frozen=True)
class ConvLayer(TargetLayer):
    """A convolution as a matrix."""

    @property
    def d_in(self) -> int:
        """The numbers of a kernel."""
        weight: Tensor = self.module.get_base_layer().weight
        return weight[0].numel()

    @property
    def transposed(self) -> bool:
        """Never: a kernel's numbers are a row."""
        return False

    def facts(self) -> Layer:
        """Return what a method may know of the layer before anything is read."""
        return replace(super().facts(), held_as="convolution", shows_inputs=False)

    def stored(self) -> Tensor:
        """Return the kernels as rows, detached."""
        return super().stored().flatten(1)


def is_convolution(module: LoraLayer) -> bool:
    """Return whether a layer of PEFT's adapts a convolution."""
    return isinstance(module, KINDS)
