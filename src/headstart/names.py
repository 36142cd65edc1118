"""What a layer's name says, and names for files."""

from __future__ import annotations


def plain(text: str) -> str:
    """Return a text as part of a file's or folder's name: letters, digits, ``-.=``, and ``_`` for all else."""
    return "".join(sign if sign.isalnum() or sign in "-.=" else "_" for sign in text)


def in_base(name: str) -> str:
    """Return the name that a layer has in the base model: without what PEFT puts between where it adapts twice."""
    return name.replace(".base_layer", "")


def kind_of(name: str) -> str:
    """Return a layer's name with its numbers taken out: what the layers of one kind share.

    ``encoder.layer.3.attention.output.dense`` is an ``encoder.layer.attention.output.dense``. Only parts that are
    numbers go: ``fc1`` and ``fc2`` are two kinds. A name of numbers alone is a kind of its own.
    """
    return ".".join(part for part in name.split(".") if not part.isdecimal()) or name
