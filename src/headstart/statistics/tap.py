"""Reading a linear layer's inputs and output gradients during a backward pass, one layer at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headstart.linalg.precision import full_precision
from headstart.statistics.scale import LossScale

# Called in backward with a layer's input (tokens, d_in) and output gradient (tokens, d_out).
Sink = Callable[[Tensor, Tensor], None]
# Called in forward with a layer's name and its input (..., d_in); returns the sink for this call's backward.
Watch = Callable[[str, Tensor], Sink]


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; in backward, hands the layer's input and output gradient to a sink.

    The input is kept by ``save_for_backward``, which shares it with autograd's own copy and lets activation
    checkpointing drop and recompute it; it is freed as soon as the sink has seen it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, root: Tensor, sink: Sink, scale: LossScale) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.sink, ctx.scale = sink, scale
        # Not a view: some models overwrite a layer's output in place, which autograd forbids for views made here.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = grads
        if ctx.scale.trying:
            ctx.scale.see(gradient)
            return gradient, None, None, None, None
        (inputs,) = ctx.saved_tensors
        with full_precision([gradient.device]):
            flat = ctx.scale.undone(gradient.reshape(-1, gradient.shape[-1]))
            ctx.sink(inputs.reshape(-1, inputs.shape[-1]), flat)
        return gradient, None, None, None, None


@contextlib.contextmanager
def tapped(modules: Mapping[str, nn.Module], watch: Watch, scale: LossScale) -> Iterator[None]:
    """Within the block, ``watch`` sees every forward call of the modules, and the sinks it returns see the backward.

    The modules need no trainable parameter: the taps themselves start the graph. An exception in ``watch`` ends the
    forward pass before any sink was called. Sinks compute in full precision, whatever autocast and TF32 say outside.

    Args:
        modules: by name.
        watch: see above.
        scale: by which the loss is multiplied; gradients are divided by it before a sink sees them.
    """

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            scale.notice(output.dtype)
            sink = watch(name, args[0])
            # The graph starts here where nothing before this layer is trained: the root makes the output part of it.
            root = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            return _Tap.apply(output, args[0].detach(), root, sink, scale)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
