"""Which tokens of the batch that a model is being called with are padding, for who reads layers from outside."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from headstart.statistics.masks import Rows, TokenMasks


class Padding:
    """Keeps the masks of the last call of a model, by a hook.

    Args:
        model: what programs call, but for wrappers around it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        wanted = ("attention_mask", "decoder_attention_mask")
        # An encoder-decoder's own mask may be left to its labels.
        self._wanted = (*wanted, "labels") if self._encoder_decoder else wanted
        # PEFT's own model hands on what it is given without names.
        inside = model.get_base_model() if isinstance(model, PeftModel) else model
        self._names = list(inspect.signature(inside.forward).parameters)
        self._batch: dict[str, Tensor] = {}
        self._masks: TokenMasks | None = None
        self._hook = model.register_forward_pre_hook(self._called, with_kwargs=True)

    def shown(self, inputs: Tensor) -> Rows:
        """Return which rows of what a layer reads (..., d_in) are no padding."""
        if self._masks is None:
            # Made where it is needed: it waits for the device.
            self._masks = TokenMasks(
                self._batch, 0, "attention", encoder_decoder=self._encoder_decoder, alone=False, shifted=False
            )
        return self._masks.guessed(inputs)

    def remove(self) -> None:
        """Take the hook away."""
        self._hook.remove()
        self._batch, self._masks = {}, None

    def _called(self, module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        given = dict(zip(self._names, arguments, strict=False)) | dict(named)
        self._batch = {name: given[name] for name in self._wanted if isinstance(given.get(name), Tensor)}
        self._masks = None
