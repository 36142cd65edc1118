"""Reading the gradients of parameters that stack matrices, such as a mixture's experts, or are kernels, layer by layer.

What reaches each of their matrices can't be seen from outside: the module routes tokens to them. So the parameter
itself is made to require a gradient, and that is handed on as soon as backward has it, and freed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.layers.convolutions import ConvLayer
from headstart.layers.experts import ExpertLayer
from headstart.layers.find import TargetLayer
from headstart.statistics.tap import LossScale


@dataclass(frozen=True)
class Stack:
    """A parameter of several matrices.

    Attributes:
        parameter: (E, d_out, d_in), (E, d_in, d_out) where it is ``transposed``, or one matrix.
        names: of its matrices' layers, in their order.
        transposed: how its matrices are stored.
        kernels: it is a convolution's, one matrix of a kernel a row.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    transposed: bool
    kernels: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(d_out, d_in) of each matrix."""
        if self.kernels:
            return len(self.parameter), self.parameter[0].numel()
        rows, columns = self.parameter.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def matrices(self, gradient: Tensor) -> Tensor:
        """Return a gradient of the parameter as (E, d_out, d_in)."""
        if self.kernels:
            return gradient.flatten(1)[None]
        gradient = gradient.mT if self.transposed else gradient
        return gradient if gradient.ndim == 3 else gradient[None]


def stacks_of(layers: Sequence[TargetLayer]) -> list[Stack]:
    """Return the parameters whose matrices are among the layers, in the layers' order."""
    experts: dict[str, list[ExpertLayer]] = {}
    stacks = []
    for layer in layers:
        if isinstance(layer, ExpertLayer):
            experts.setdefault(layer.stack.name, []).append(layer)
        elif isinstance(layer, ConvLayer):
            stacks.append(Stack(layer.module.get_base_layer().weight, (layer.name,), False, kernels=True))
    for own in experts.values():
        by_place = {layer.expert: layer.name for layer in own}
        module = own[0].module
        names = tuple(by_place.get(place, "") for place in range(module.num_experts))
        stacks.append(Stack(module.get_param(), names, own[0].transposed))
    return stacks


@contextlib.contextmanager
def parameters_tapped(
    stacks: Sequence[Stack], sink: Callable[[Stack, Tensor], None], scale: LossScale
) -> Iterator[None]:
    """Within the block, ``sink`` is given the gradient of each parameter in each backward pass, unscaled.

    What lay in the parameters' ``.grad`` is there again after it.
    """
    kept = [(stack.parameter, stack.parameter.grad, stack.parameter.requires_grad) for stack in stacks]

    def hook_for(stack: Stack) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return
            if scale.trying:
                scale.see(gradient)
            else:
                sink(stack, scale.undone(gradient))

        return hook

    handles = []
    try:
        for stack in stacks:
            scale.notice(stack.parameter.dtype)
            stack.parameter.grad = None
            stack.parameter.requires_grad_(True)
            handles.append(stack.parameter.register_post_accumulate_grad_hook(hook_for(stack)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient, required in kept:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def squared_norm(gradient: Tensor) -> Tensor:
    """Return the squared norm of a gradient, in float32."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
