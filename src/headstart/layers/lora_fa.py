"""LoRA-FA: A stays frozen where it started, and only B trains (Zhang et al. 2023)."""

from __future__ import annotations

from torch import nn

from headstart.errors import LayerError
from headstart.layers.anchored import current_factors
from headstart.layers.core import core_of
from headstart.layers.find import lora_layers, resolve_adapter
from headstart.layers.frozen import freeze_factors, frozen_factors
from headstart.layers.unwrap import looks_through


@looks_through
def lora_fa_(model: nn.Module, adapter: str | None = None) -> int:
    """Freeze every layer's A, for good: PEFT keeps it frozen whatever adapter is switched on or off.

    It goes with any start whose B can train from where it is; call it after ``initialize_`` or ``load_checkpoint``,
    and before the optimizer is made. Activations of width d_in need not be kept then, only those of width r.

    Args:
        model: the PEFT model.
        adapter: the adapter's name; the active one by default.

    Returns:
        How many numbers still train in the adapter's layers.

    Raises:
        LayerError: the model has no such adapter, a layer has a core between frozen factors already, or an A is zero,
            so that nothing could ever be learned.
    """
    adapter = resolve_adapter(model, adapter)
    targets = list(lora_layers(model, adapter))
    for target in targets:
        if core_of(target.module, adapter) is not None:
            raise LayerError(
                f"layer {target.name!r} trains a core alone, between an A and a B that are both frozen: LoRA-FA, which "
                "trains B, means nothing there."
            )
        if "lora_B" in frozen_factors(target.module, adapter):
            raise LayerError(f"layer {target.name!r}: its B is frozen by its start already, so nothing would train.")
        if not bool(current_factors(target.module, adapter)[0].count_nonzero()):
            raise LayerError(f"layer {target.name!r}: its A is zero, and frozen it would keep B from mattering.")
    for target in targets:
        freeze_factors(target.module, adapter, ("lora_A",))
    return sum(target.r * target.d_out for target in targets)
