"""The adapter to start: its layers, behind one protocol, and how their starts are installed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from headstart.layers.experts import ExpertLayer, joined
from headstart.layers.find import TargetLayer, find_layers, resolve_adapter
from headstart.layers.install import Subtracting, install, start_note
from headstart.layers.matrices import matrices_of
from headstart.layers.parts import Part, by_layer
from headstart.layers.ranks import Starts, set_ranks
from headstart.layers.vera import find_vera_layers, install_dictionary, vera_adapter


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of a PEFT model.

    Attributes:
        model: the PEFT model.
        name: the adapter's name.
        layers: its layers, checked, in the model's order.
        form: what its starts are whatever the method's form, None where that decides.
    """

    model: Any
    name: str
    layers: list[TargetLayer]
    form: str | None = None

    def install(self, starts: Starts, parts: Sequence[Part], subtracting: Subtracting, seed: int) -> None:
        """Put the starts into the layers, and give these the starts' ranks: all of them, or none."""
        part_of = by_layer(parts)
        forms = {name: part.form(subtracting) for name, part in part_of.items()}
        methods = {name: {str(part.method): None} for name, part in part_of.items()}
        for layer, _ in starts:
            if isinstance(layer, ExpertLayer):
                forms[layer.stack.name] = forms[layer.name]
                methods.setdefault(layer.stack.name, {}).update(methods[layer.name])
        notes = {name: start_note(" and ".join(own), seed) for name, own in methods.items()}
        with ExitStack() as undo:
            starts = set_ranks(self.model, self.name, starts, undo)
            install(self.model, joined(starts), forms, notes)
            undo.pop_all()


@dataclass(frozen=True)
class VeraAdapter(Adapter):
    """A VeRA adapter, whose layers share one dictionary."""

    form: str | None = "shared dictionary"

    def install(self, starts: Starts, parts: Sequence[Part], subtracting: Subtracting, seed: int) -> None:
        """Put the principal directions of all starts into the dictionary."""
        install_dictionary(starts)


def find(model: nn.Module, adapter: str | None) -> Adapter:
    """Return the adapter to start, its layers checked; the active one by default.

    Raises:
        LayerError: see :func:`headstart.layers.find.find_layers` and :func:`headstart.layers.vera.find_vera_layers`.
    """
    vera = vera_adapter(model, adapter)
    if vera is not None:
        return VeraAdapter(model, vera, find_vera_layers(model, vera))
    name = resolve_adapter(model, adapter)
    return Adapter(model, name, matrices_of(find_layers(model, name)))
