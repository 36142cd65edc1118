"""What the report says of each layer's start, and of what was not as asked for."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from headstart.context import Context
from headstart.errors import LayerError, not_finite
from headstart.layers.find import TargetLayer
from headstart.layers.formats import unreadable
from headstart.layers.install import LayerForm
from headstart.linalg.norms import squared_norm
from headstart.linalg.precision import one_thread_each
from headstart.methods.base import Factors, Method
from headstart.report import LayerReport


def layer_reports(
    pairs: Sequence[tuple[TargetLayer, Factors]], methods: Sequence[tuple[Method, LayerForm]], context: Context
) -> list[LayerReport]:
    """Return the report's lines of several layers, in their order; see :func:`layer_report`."""

    def line(row: tuple[tuple[TargetLayer, Factors], tuple[Method, LayerForm]]) -> LayerReport:
        return layer_report(*row[0], *row[1], context)

    rows = list(zip(pairs, methods, strict=True))
    # What is gathered from all processes is so in one order; what is fetched or on an accelerator gains nothing.
    at_hand = all(_at_hand(layer) for layer, _ in pairs)
    return one_thread_each(line, rows) if at_hand else [line(row) for row in rows]


def _at_hand(layer: TargetLayer) -> bool:
    weights = layer.parameters()
    return bool(weights) and not layer.sharded and all(weight.device.type == "cpu" for weight in weights)


def layer_report(
    layer: TargetLayer, factors: Factors, method: Method, form: LayerForm, context: Context
) -> LayerReport:
    """Return a layer's line in the report: the norms of its start and of its weight, before that is installed."""
    unread = unreadable(layer.module.get_base_layer())
    norm_weight = None if unread else math.sqrt(squared_norm(layer.stored()))
    if norm_weight is not None and not math.isfinite(norm_weight):
        raise not_finite(layer.name)
    return LayerReport(
        name=layer.name,
        d_out=layer.d_out,
        d_in=layer.d_in,
        r=len(factors.A),
        norm_A=float(torch.linalg.matrix_norm(factors.A)),
        norm_B=float(torch.linalg.matrix_norm(factors.B)),
        norm_product=layer.start_norm(factors),
        norm_weight=norm_weight,
        seconds=context.layer_seconds.get(layer.name, 0.0),
        info=dict(factors.info),
        note=factors.note,
        repair=factors.repair,
        caution=factors.caution,
        form=form,
        method=str(method),
        history=[list(point) for point in factors.history],
    )


def fallbacks(starts: Mapping[str, Factors], strict: bool) -> list[str]:
    """Return a sentence for each way in which layers were started otherwise than asked for, with their names.

    Raises:
        LayerError: there is one, and ``strict`` forbids it.
    """
    by_note: dict[str, list[str]] = defaultdict(list)
    for name, factors in starts.items():
        if factors.note:
            by_note[factors.note].append(name)
    sentences = []
    for note, names in by_note.items():
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        sentences.append(f"{listed}: {note}")
    if strict and sentences:
        raise LayerError(sentences[0])
    return sentences
