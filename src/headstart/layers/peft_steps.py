"""The steps of PEFT that headstart extends; what they then do, in ``peft_hooks``, is imported when one is taken."""

from __future__ import annotations

from typing import Any

from headstart import compat
from headstart.layers.mark import is_mark


def extend_peft() -> None:
    """Extend PEFT's steps, once; one that this PEFT has otherwise is left alone, with a warning."""
    for step, before in (
        (compat.RESETTING, _build),
        (compat.LOADING, _load),
        (compat.COMBINING, _combine),
        (compat.SWAPPING, _swap),
        (compat.MERGING, _merge),
    ):
        compat.extend(step, before)


def _build(arguments: dict[str, Any]) -> None:
    if is_mark(arguments["init_lora_weights"]):
        from headstart.layers import peft_hooks

        peft_hooks.build(arguments)


def _load(arguments: dict[str, Any]) -> None:
    from headstart.layers import peft_hooks

    peft_hooks.load(arguments)


def _combine(arguments: dict[str, Any]) -> None:
    from headstart.layers import peft_hooks

    peft_hooks.combine(arguments)


def _swap(arguments: dict[str, Any]) -> None:
    from headstart.layers import peft_hooks

    peft_hooks.swap(arguments)


def _merge(arguments: dict[str, Any]) -> None:
    from headstart.layers import peft_hooks

    peft_hooks.merge(arguments)
