"""Weight decay towards the start and not towards zero, for layers whose start is subtracted again.

Decoupled weight decay pulls A and B towards zero. In a layer that computes W x + s (B A - B0 A0) x, that is a pull
towards W - s B0 A0: away from the base model. Pulled towards A0 and B0 instead, it goes back to W. Layers that keep
their start, cores among them, need none of this: there s B A = 0 is the base model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from headstart.errors import LayerError, MethodError
from headstart.layers.anchored import anchors
from headstart.layers.find import lora_layers, resolve_adapter
from headstart.layers.weights import laid_out

# Besides those that say it of themselves: torch's own whose step multiplies weights by 1 - lr * weight_decay.
_DECOUPLED = ("AdamW", "Adafactor", "Muon")


def decay_to_anchor_(optimizer: Any, model: nn.Module, adapter: str | None = None) -> RemovableHandle:
    """Let an optimizer's weight decay pull A and B towards their start A0 and B0, and so the layer towards W.

    After every step, lr * weight_decay * A0 is added to A, and likewise for B, with its group's rate of that step. With
    what the optimizer takes off, that is a decay of A - A0, the update; what trains beside the factors (heads, layers
    that keep their start) decays towards zero as before. A parameter without gradient, or a step that a GradScaler
    skips, is left alone.

    Args:
        optimizer: made already, with its ``weight_decay``: AdamW, Adafactor or Muon of torch.optim, or one of its
            others with ``decoupled_weight_decay=True``; it may be wrapped by Accelerate, and have groups of its own, as
            LoRA+ does.
        model: the PEFT model, initialised or loaded.
        adapter: the adapter's name; the active one by default.

    Returns:
        A handle; ``handle.remove()`` gives the optimizer's own decay back. It isn't part of the optimizer's state: call
        this again after a restart.

    Raises:
        LayerError: the model has no such adapter, or the adapter has no anchor.
        MethodError: the optimizer does not hold the factors, does not decay them, mixes the decay into the gradient, or
            is pulled to this adapter's anchors already.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    pull = _Pull(model, resolve_adapter(model, adapter))
    held = pull.anchors()
    if not held:
        raise LayerError(
            f"adapter {pull.adapter!r} has no anchor: it keeps its start, so ordinary weight decay already leads to "
            "the base model; leave this call out."
        )
    inner: Optimizer = _unwrapped(optimizer)
    name = type(inner).__name__
    if any(
        isinstance(hook, _Pull) and hook.adapter == pull.adapter for hook in inner._optimizer_step_post_hooks.values()
    ):
        raise MethodError(f"{name} is already pulled to the anchors of adapter {pull.adapter!r}; call this once.")
    groups = [group for group in inner.param_groups if any(id(parameter) in held for parameter in group["params"])]
    if not groups:
        raise MethodError(
            f"{name} holds no factor of adapter {pull.adapter!r}: make the optimizer from the model's trainable "
            "parameters, after initialising it."
        )
    if not all(_is_decoupled(inner, group) for group in groups):
        raise MethodError(
            f"{name} mixes weight decay into the gradient, or how it decays isn't known here, so it can't be turned "
            "towards the anchors: use torch.optim.AdamW."
        )
    if not any(group["weight_decay"] for group in groups):
        raise MethodError(f"{name} has weight_decay=0 for the factors, so that nothing is pulled: set weight_decay.")
    return inner.register_step_post_hook(pull)


class _Pull:
    """The hook. Anchors are looked up at every step, because loading a checkpoint replaces them."""

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self.adapter = adapter
        self._layers = [target.module for target in lora_layers(model, adapter)]

    def anchors(self) -> dict[int, Tensor]:
        """Return the anchors by the identity of the parameter that started there."""
        found: dict[int, Tensor] = {}
        for module in self._layers:
            held = anchors(module, self.adapter)
            if held is not None:
                found[id(module.lora_A[self.adapter].weight)] = held[0]
                found[id(module.lora_B[self.adapter].weight)] = held[1]
        return found

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = self.anchors()
        # A fused optimizer is called although the gradients overflowed, and left to see for itself that it must not
        # step; all others are not called then.
        overflow = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            rate = group["lr"] * group["weight_decay"]
            if overflow is not None:
                rate = rate * (1 - overflow)
            for parameter in group["params"]:
                anchor = held.get(id(parameter))
                if anchor is not None and parameter.grad is not None:
                    _add(parameter, laid_out(anchor, parameter), rate)


def _add(parameter: Tensor, anchor: Tensor, rate: float | Tensor) -> None:
    if isinstance(rate, Tensor):
        parameter.add_(anchor * rate.to(anchor.device))
    else:
        # In half precision the product is rounded once with the sum, and not by itself.
        parameter.add_(anchor, alpha=rate)


def _unwrapped(optimizer: Any) -> Any:
    """Return torch's optimizer from inside what Accelerate or a like wrapper made of it."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise MethodError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer; give the one that steps.")
    return optimizer


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    known = tuple(getattr(torch.optim, name) for name in _DECOUPLED if hasattr(torch.optim, name))
    return isinstance(optimizer, known) or bool(group.get("decoupled_weight_decay"))
