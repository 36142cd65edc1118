"""What a layer's name says."""

from __future__ import annotations


def kind_of(name: str) -> str:
    """Return a layer's name with its numbers taken out: what the layers of one kind share.

    ``encoder.layer.3.attention.output.dense`` is an ``encoder.layer.attention.output.dense``. Only parts that are
    numbers go: ``fc1`` and ``fc2`` are two kinds. A name of numbers alone is a kind of its own.
    """
    return ".".join(part for part in name.split(".") if not part.isdecimal()) or name
