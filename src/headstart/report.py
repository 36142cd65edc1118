"""What a start did, layer by layer and in all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from headstart.names import kind_in_words


@dataclass(frozen=True)
class LayerReport:
    """One layer's start.

    Attributes:
        name: the layer's name in the base model.
        d_out, d_in, r: its shape and the adapter's rank.
        norm_A, norm_B: Frobenius norms of the factors.
        norm_product: Frobenius norm of s B A; of a core layer, of s B R A; 0 in a VeRA layer, which adds nothing yet.
        norm_weight: Frobenius norm of W; None where W can't be read (a quantised format, or weights kept elsewhere).
        seconds: time spent on its factors (a batch's time is divided evenly among its layers).
        info: the method's own numbers, such as ``error`` and ``bound`` (squared Frobenius), ``steps``, ``residual``.
        note: what had to be done differently, else empty.
        repair: what was done to make its arithmetic safe, else empty.
        caution: how noise may decide it, else empty.
        form: how the start lives in the layer: "kept", "anchored", "residual" or "core".
        history: of a descent, [step, mean squared error] on the way; empty for all else.
        method: the method that started it, with the settings that differ from its defaults.
    """

    name: str
    d_out: int
    d_in: int
    r: int
    norm_A: float
    norm_B: float
    norm_product: float
    norm_weight: float | None
    seconds: float
    info: dict[str, float] = field(default_factory=dict)
    note: str = ""
    repair: str = ""
    caution: str = ""
    form: str = "kept"
    history: list[list[float]] = field(default_factory=list)
    method: str = ""

    @property
    def relative_product(self) -> float:
        """The norm of s B A over the norm of W; NaN where that isn't known."""
        if self.norm_weight is None:
            return math.nan
        return self.norm_product / self.norm_weight if self.norm_weight else math.inf


@dataclass(frozen=True)
class LeftOut:
    """What of a model an adapter doesn't reach.

    Attributes:
        parameters: how many lie in no layer of the adapter, and don't train beside it.
        total: how many the model has, without the adapter.
        experts: by kind of layer, how many of ``parameters`` are those of experts.
        routers: likewise, of what sends tokens to experts.
    """

    parameters: int
    total: int
    experts: dict[str, int] = field(default_factory=dict)
    routers: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"the adapter leaves out {self.parameters:,} of the model's {self.total:,} parameters"
        parts = [
            f"{sum(sizes.values()):,} of {what} ({', '.join(sizes)})"
            for what, sizes in (("experts", self.experts), ("routers", self.routers))
            if sizes
        ]
        return f"{text}, among them {' and '.join(parts)}" if parts else text


@dataclass(frozen=True)
class Searched:
    """What a search for a start's scale came to (:mod:`headstart.statistics.search`).

    Attributes:
        multiple: of the published product; 1 where no multiple lowers the loss.
        before, after: the loss at the base model and with that multiple.
        losses: by multiple, all that were tried; 0 is the base model.
        samples: how many it was measured on.
    """

    multiple: float
    before: float
    after: float
    losses: dict[float, float]
    samples: int

    def __str__(self) -> str:
        return (
            f"{self.multiple:.3g} times the published scale, by a search on {self.samples} samples: loss "
            f"{self.before:.4f} before, {self.after:.4f} with it"
        )


@dataclass(frozen=True)
class Report:
    """What :func:`headstart.initialize_` returns.

    Attributes:
        method: the method with the settings that differ from its defaults.
        form: how the starts live in their layers: "kept" (plain LoRA), "anchored", "residual" or "core", or several of
            these, as "anchored and kept"; of a VeRA adapter "shared dictionary".
        adapter: the adapter's name.
        seed: as given.
        layers: one report a layer, in the model's order.
        seconds: in all; ``seconds_by_step`` splits them.
        peak_memory: bytes; on an accelerator the most that was allocated there, else the process's peak resident set.
        samples, tokens: read from the data, of several methods the most that one of them read; padding is not counted.
        plan: passes over the data, the bytes that they held and the seconds that were expected, in words; of several
            methods that read them, one plan each.
        cached: layers whose factors were found in the cache.
        trainable: parameters of the adapter's layers that train; heads beside it (modules_to_save) are not counted.
        left_out: what of the model the adapter doesn't reach.
        lower_ranks: of a mixture whose experts train, a ``rank_pattern`` with r/E for r, for E experts of a parameter
            train E times as much as one matrix of their size; empty where that is 1 already, or there are none.
        searched: by method, of those whose scale was searched, what that came to.
        warnings: sentences about what was not as asked for.
    """

    method: str
    form: str
    adapter: str
    seed: int
    layers: list[LayerReport]
    seconds: float
    seconds_by_step: dict[str, float]
    peak_memory: int
    samples: int = 0
    tokens: int = 0
    plan: str = ""
    cached: int = 0
    trainable: int = 0
    left_out: LeftOut | None = None
    lower_ranks: dict[str, int] = field(default_factory=dict)
    searched: dict[str, Searched] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types, ready for JSON."""
        return asdict(self)

    def repairs(self) -> list[str]:
        """Return what was done to make the arithmetic safe, a sentence a kind of repair, with its layers."""
        return _by_sentence((layer.name, layer.repair) for layer in self.layers)

    def cautions(self) -> list[str]:
        """Return how noise may decide starts, a sentence a kind of noise, with its layers."""
        return _by_sentence(((layer.name, layer.caution) for layer in self.layers), most=3)

    def summary(self) -> str:
        """Return one sentence."""
        data = f", {self.samples} samples ({self.tokens:,} tokens)" if self.samples else ""
        data += f", {self.cached} layers from the cache" if self.cached else ""
        return (
            f"{self.method}: {len(self.layers)} layers, {self.trainable:,} trainable parameters, "
            f"{self.form}, {self.seconds:.2f} s{data}, peak memory {self.peak_memory / 2**30:.2f} GiB"
        )

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Show the summary, a table with a row a kind of layer, repairs, cautions and the warnings."""
        yield self.summary()
        if self.plan:
            yield f"data: {self.plan}"
        yield self._table()
        if worst := self._worst():
            yield worst
        for method, searched in self.searched.items():
            yield f"scale of {method}: {searched}"
        if self.left_out:
            yield str(self.left_out)
        if self.lower_ranks:
            yield (
                "each expert has the adapter's rank; all of a parameter's would train about as much as one matrix of "
                f"their size with rank_pattern={self.lower_ranks}"
            )
        for repair in self.repairs():
            yield f"repaired: {repair}"
        for caution in self.cautions():
            yield f"caution: {caution}"
        for warning in self.warnings:
            yield f"warning: {warning}"

    def _worst(self) -> str:
        """Return the largest of the errors that layers report, in one line; empty where there are none."""
        errors = [layer.info["objective_error"] for layer in self.layers if "objective_error" in layer.info]
        if not errors:
            return ""
        return f"largest over the layers: relative error of an eigenproblem's objective {max(errors):.1e}"

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        several = len({layer.method for layer in self.layers}) > 1
        titles = ["kind", "layers", "shape", "r", "|A|", "|B|", "|sBA|/|W|", "error/bound", "seconds"]
        for title in [*titles, "method"] if several else titles:
            table.add_column(title, justify="left" if title in ("kind", "method") else "right")
        kinds: dict[tuple[str, int, int, int, str], list[LayerReport]] = {}
        for layer in self.layers:
            key = (kind_in_words(layer.name), layer.d_out, layer.d_in, layer.r, layer.method)
            kinds.setdefault(key, []).append(layer)
        for (kind, d_out, d_in, r, method), group in kinds.items():
            ratios = [layer.info["error"] / layer.info["bound"] for layer in group if layer.info.get("bound", 0) > 0]
            table.add_row(
                kind,
                str(len(group)),
                f"{d_out}x{d_in}",
                str(r),
                f"{fmean([layer.norm_A for layer in group]):.3g}",
                f"{fmean([layer.norm_B for layer in group]):.3g}",
                _known(fmean([layer.relative_product for layer in group])),
                f"{max(ratios):.6f}" if ratios else "",
                f"{sum(layer.seconds for layer in group):.2f}",
                *([method] if several else []),
            )
        return table


def _by_sentence(said: Iterable[tuple[str, str]], most: int | None = None) -> list[str]:
    """Return each sentence once, behind the names (or the first of them) of its layers; nothing of empty ones."""
    names: dict[str, list[str]] = {}
    for name, sentence in said:
        if sentence:
            names.setdefault(sentence, []).append(name)
    sentences = []
    for sentence, layers in names.items():
        shown = layers[:most]
        rest = f" and {len(layers) - len(shown)} more" if len(shown) < len(layers) else ""
        sentences.append(f"{', '.join(shown)}{rest}: {sentence}")
    return sentences


def _known(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"
