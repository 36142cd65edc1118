"""What a layer's name says, and names for files."""

from __future__ import annotations

import re

# What holds queries, keys and values in one matrix is called so by itself, or, by other names, in attention alone.
_FUSED = re.compile(r"(^|\.)([^.]*qkv[^.]*|query_key_value|W_pack)$", re.IGNORECASE)
_FUSED_IN_ATTENTION = re.compile(r"(^|\.)(?!cross)[^.]*att[^.]*\.(c_attn|in_proj)$", re.IGNORECASE)


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


def kind_in_words(name: str) -> str:
    """Return the kind of a layer as tables show it: with the fact that it is a fused q, k and v where its name says so.

    An adapter of such a layer has one A for all three, and its rank is theirs together.
    """
    kind = kind_of(name)
    fused = _FUSED.search(kind) or _FUSED_IN_ATTENTION.search(kind)
    return f"{kind} (q, k, v fused)" if fused else kind
