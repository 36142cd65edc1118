"""What a start sees of an adapter's layers: one matrix each."""

from __future__ import annotations

from collections.abc import Iterable

from headstart.layers.convolutions import ConvLayer, is_convolution
from headstart.layers.experts import experts_of, is_stack
from headstart.layers.factors import is_embedding
from headstart.layers.find import TargetLayer
from headstart.layers.lookups import EmbeddingLayer


def matrices_of(targets: Iterable[TargetLayer]) -> list[TargetLayer]:
    """Return layers with a parameter's experts in its layer's place, and convolutions and embeddings as matrices."""
    layers: list[TargetLayer] = []
    for target in targets:
        if is_stack(target.module):
            layers += experts_of(target)
        elif is_convolution(target.module):
            layers.append(ConvLayer(target.name, target.module, target.adapter))
        elif is_embedding(target.module):
            layers.append(EmbeddingLayer(target.name, target.module, target.adapter))
        else:
            layers.append(target)
    return layers
