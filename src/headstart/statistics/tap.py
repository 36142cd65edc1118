"""Reading a layer's inputs and output gradients during a backward pass, one layer at a time.

The loss is scaled where float16 gradients would vanish or overflow.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import DataError
from headstart.linalg.precision import full_precision

# Called in backward with a layer's input (tokens, d_in), an embedding's (tokens,), and output gradient (tokens, d_out).
Sink = Callable[[Tensor, Tensor], None]
# Called in forward with a layer's name and its input (..., d_in); returns the sink for this call's backward.
Watch = Callable[[str, Tensor], Sink]
_START = 2.0**16
# Where the largest gradient that layers see should lie: far below float16's 65504, far above its smallest numbers.
_AIM = 8
_ATTEMPTS = 40


class LossScale:
    """The number that the loss is multiplied by before backward, and all gradients are divided by after it.

    It stays 1 until a layer's output is found to be float16. From then on every batch's backward pass is tried before
    sums see it: a gradient that overflows lowers the scale, one that is small everywhere raises it.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self.trying = False
        self._half = False
        self._largest: Tensor | None = None

    def notice(self, dtype: torch.dtype) -> None:
        """Take note of a layer's output dtype, in the forward pass."""
        if dtype is torch.float16 and not self._half:
            self._half, self.value = True, _START

    def see(self, gradient: Tensor) -> None:
        """Take note of a gradient, in a backward pass on trial."""
        if gradient.numel():
            largest = gradient.abs().max().float()
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def undone(self, gradient: Tensor) -> Tensor:
        """Return a gradient without the scale, in float32 where there is one."""
        return gradient if self.value == 1 else gradient.float() / self.value

    def backward(
        self,
        tensor: Tensor,
        gradient_at: Callable[[float], Tensor],
        agreed: Callable[[float], float] = lambda largest: largest,
    ) -> None:
        """Run backward at a scale at which no gradient overflows.

        Args:
            tensor: of the graph; backward starts there.
            gradient_at: returns the gradient to start with, of the loss times a scale.
            agreed: returns the largest of a number over the processes that run in step.

        Raises:
            DataError: there is no such scale.
        """
        gradient = gradient_at(self.value)
        if not tensor.requires_grad:  # no tapped layer took part in this batch
            return
        if self._half:
            gradient = self._settled(tensor, gradient, gradient_at, agreed)
        torch.autograd.backward([tensor], [gradient])

    def _settled(
        self,
        tensor: Tensor,
        gradient: Tensor,
        gradient_at: Callable[[float], Tensor],
        agreed: Callable[[float], float],
    ) -> Tensor:
        changed = False
        for _ in range(_ATTEMPTS):
            largest = agreed(self._tried(tensor, gradient))
            if not math.isfinite(largest):
                self.value /= 16
            elif changed or largest == 0 or largest >= 1:
                return gradient
            else:
                self.value *= 2.0 ** (_AIM - math.floor(math.log2(largest)))
            changed = True
            gradient = gradient_at(self.value)
        raise DataError(
            "the model's gradients overflow float16 whatever the loss is scaled by: load the model in bfloat16 or "
            "float32."
        )

    def _tried(self, tensor: Tensor, gradient: Tensor) -> float:
        """Run backward for the largest gradient that layers see alone; infinity where one is not finite."""
        self.trying, self._largest = True, None
        try:
            torch.autograd.backward([tensor], [gradient], retain_graph=True)
        finally:
            self.trying = False
        largest = 0.0 if self._largest is None else float(self._largest)
        return largest if math.isfinite(largest) else math.inf


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
            # Tokens that an embedding looks up are no vectors.
            vectors = inputs.is_floating_point()
            ctx.sink(inputs.reshape(-1, inputs.shape[-1]) if vectors else inputs.flatten(), flat)
        return gradient, None, None, None, None


def tap(output: Tensor, inputs: Tensor, sink: Sink, scale: LossScale) -> Tensor:
    """Return a layer's output, of which backward hands the layer's inputs and the output's gradient to a sink."""
    scale.notice(output.dtype)
    # The graph starts here where nothing before this layer is trained: the root makes the output part of it.
    root = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
    tapped_output: Tensor = _Tap.apply(output, inputs.detach(), root, sink, scale)
    return tapped_output


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
            return tap(output, args[0], watch(name, args[0]), scale)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
