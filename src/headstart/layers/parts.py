"""Which method starts which layers, and in which form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headstart.errors import LayerError
from headstart.layers.experts import ExpertLayer, differing
from headstart.layers.find import TargetLayer
from headstart.layers.install import LayerForm, Subtracting
from headstart.methods.base import Method


@dataclass(frozen=True)
class Part:
    """Layers that one method starts, as if the adapter had no others.

    Attributes:
        method: the method.
        layers: its layers, in the model's order.
    """

    method: Method
    layers: list[TargetLayer]

    def form(self, subtracting: Subtracting) -> LayerForm:
        """Return how its starts live in their layers, where those that must not change the model do it so."""
        return subtracting if self.method.form == "anchored" else self.method.form


def divide(method: Method, layers: Sequence[TargetLayer]) -> list[Part]:
    """Return the parts of an adapter's layers: one, unless the method holds several.

    Raises:
        LayerError, MethodError: see :meth:`headstart.PerLayer.divided`.
    """
    by_name = {layer.name: layer for layer in layers}
    return [Part(own, [by_name[name] for name in names]) for own, names in method.divided(list(by_name))]


def check_stacks(parts: Sequence[Part], subtracting: Subtracting) -> None:
    """Refuse experts of one parameter that start in several forms, or of which other factors train: it has one.

    Raises:
        LayerError: names two of them.
    """
    first: dict[str, tuple[str, LayerForm, Method]] = {}
    for part in parts:
        form = part.form(subtracting)
        for layer in part.layers:
            if not isinstance(layer, ExpertLayer):
                continue
            name, other, method = first.setdefault(layer.stack.name, (layer.name, form, part.method))
            if other != form:
                raise LayerError(
                    f"layers {name!r} and {layer.name!r} are matrices of one parameter, which is {other} or {form} as "
                    f"a whole, and methods {method.name!r} and {part.method.name!r} differ in that: give them methods "
                    "of one form."
                )
            if set(part.method.freezes) != set(method.freezes):
                raise LayerError(differing(name, layer.name))


def by_layer(parts: Sequence[Part]) -> dict[str, Part]:
    """Return each layer's part, by the layer's name."""
    return {layer.name: part for part in parts for layer in part.layers}
