"""What a method is: a frozen dataclass of settings that says what it wants and in which form its start lives.

A method lives in a file of its own. It says what it wants of a layer (:class:`Wants`), refuses what it can't start
before any data are read (``check``), and gives factors (``factors``)::

    @register("signs")
    @dataclass(frozen=True)
    class Signs(Method):
        source: ClassVar[str] = "an example"
        form: ClassVar[Form] = "kept"
        samples: int = 64

        def wants(self, layer: Layer) -> Wants:
            return Wants(gradient=True)

        def factors(self, layer: Layer) -> Factors:
            ...
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from headstart.errors import LayerError, MethodError
from headstart.methods.given import ANY_LAYER, BOTH_KINDS, Half, Kronecker, Layer, Moments, Training, Wants
from headstart.progress import Show, silent
from headstart.settings import check_types, spell

__all__ = [
    "ANY_LAYER",
    "Factors",
    "Form",
    "Half",
    "Kronecker",
    "Layer",
    "Method",
    "Moments",
    "Training",
    "Wants",
    "check_positive",
]

# How a start lives in its layer: "kept", a plain LoRA at W + s B A; "anchored", at W, because what s B A adds is taken
# out again; "core", W + s B R A with A and B frozen.
Form = Literal["kept", "anchored", "core"]


@dataclass(frozen=True)
class Factors:
    """A layer's start.

    Attributes:
        A: (r, d_in), float32.
        B: (d_out, r), float32.
        core: (r, r) of methods of the form "core", else None.
        info: numbers for the report, such as ``error``, ``bound``, ``steps``.
        note: one sentence for the report where something had to be done differently, else empty.
        repair: one sentence for the report where arithmetic had to be made safer (damping raised), else empty.
        caution: one sentence for the report where noise may decide the start, done as asked for, else empty.
        frozen: which of "lora_A" and "lora_B" must not train; a method declares it before (:attr:`Method.freezes`).
        history: of a descent, (step, mean squared error) on the way; empty for all else.
        spare: (more, d_in), of a method that shares ranks out among layers: what A could go on with, for
            :meth:`Method.settle`.
        spare_B: (d_out, more), what B could go on with there; None where B is zero.
        worth: what each row of A, and then of ``spare``, is worth to the layer, in the order in which they are taken;
            empty where the layer keeps its rank.
        keeps: what stays where the rank becomes another one, the scaling s or lora_alpha.
    """

    A: Tensor
    B: Tensor
    core: Tensor | None = None
    info: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    repair: str = ""
    caution: str = ""
    frozen: tuple[str, ...] = ()
    history: Sequence[Sequence[float]] = ()
    spare: Tensor | None = None
    spare_B: Tensor | None = None
    worth: Sequence[float] = ()
    keeps: Literal["scaling", "alpha"] = "scaling"


# What holds a layer's matrix where no linear layer does, a pattern for such layers, and where they are named.
_HELD_AS = {
    "stack": ("a matrix in a parameter that PEFT adapts as a whole", "experts.*", "target_parameters"),
    "convolution": ("a convolution", "conv.*", "target_modules"),
    "embedding": ("an embedding", ".*embed.*", "target_modules"),
}


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods: a frozen dataclass whose fields are the paper's settings with the paper's defaults.

    Class attributes:
        name: the command-line name.
        source: paper and section.
        cost: a few words on what the start costs, for the tables.
        form: how its start lives in a layer.
        keep: its factors depend on weights and settings alone, and cost more than hashing the weight, so that the cache
            holds them by default.
        rate: its best learning rate over plain LoRA's, as published (arXiv 2602.04998, table of Qwen3-0.6B at rank 128,
            s = 1); None where it isn't among these. On Gemma-3-1B pissa's was a half to a third instead of a tenth.
        starts_A: A is not zero at the start; a frozen A (LoRA-FA) that is zero would keep B from mattering.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    cost: ClassVar[str] = "a draw"
    form: ClassVar[Form] = "anchored"
    keep: ClassVar[bool] = False
    rate: ClassVar[float | None] = None
    starts_A: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check that every setting has the type that its field declares; subclasses go on to check ranges."""
        check_types(f"method {self.name!r}", self, MethodError)

    def wants(self, layer: Layer) -> Wants:
        """Return what the method must be given about a layer; by default its shape alone."""
        return Wants()

    @property
    def reads_data(self) -> bool:
        """Whether it wants data in general, be it for some kinds of layers alone."""
        return any(self.wants(layer).data for layer in BOTH_KINDS)

    @property
    def reads_task(self) -> bool:
        """Whether it wants the data to learn, be it for some kinds of layers alone."""
        return any(self.wants(layer).task for layer in BOTH_KINDS)

    @property
    def reads_preserved(self) -> bool:
        """Whether it wants data whose ability is to stay, be it for some kinds of layers alone."""
        return any(self.wants(layer).preserved for layer in BOTH_KINDS)

    @property
    def reads_rate(self) -> bool:
        """Whether the start depends on the rate that it will be trained at."""
        return any(self.wants(layer).rate for layer in BOTH_KINDS)

    def check(self, layer: Layer) -> None:
        """Refuse a layer that the method can't start, before any data are read; subclasses go on with this one.

        Raises:
            LayerError: the start's form doesn't go with what the layer is.
            MethodError: a setting is missing.
        """
        if layer.held_as != "linear" and (why := self._not_without_linear(layer)):
            what, use, leave = _HELD_AS[layer.held_as]
            raise LayerError(
                f"layer {layer.name!r} is {what}, which method {self.name!r} can't start: it {why}. Use another method "
                f"for such layers, as in hs.PerLayer({{{use!r}: hs.PiSSA(), '*': ...}}), or leave them out of {leave}."
            )
        if layer.dora and self.form == "anchored":
            raise LayerError(
                f"layer {layer.name!r} uses DoRA, whose norms leave no place for a start that is subtracted again; use "
                "a method that keeps it, such as lora-da or lora-one."
            )
        if layer.dora and self.form == "core":
            raise LayerError(
                f"layer {layer.name!r} uses DoRA, which trains A and B, and a core layer freezes them; use one of the "
                "two."
            )
        if "lora_A" in layer.frozen and (self.form == "core" or not self.starts_A):
            raise LayerError(
                f"layer {layer.name!r}: LoRA-FA has frozen its A and trains B, but method {self.name!r} "
                + ("freezes B as well, for a core." if self.form == "core" else "starts A at zero, so B can't matter.")
                + " Use another method, or one without lora_fa_."
            )

    def _not_without_linear(self, layer: Layer) -> str:
        """Return what the method needs that nothing but a linear layer has; empty where it needs no such thing."""
        wants = self.wants(layer)
        needs = {
            "puts a core between A and B": self.form == "core",
            "shares ranks out among layers": self.shares_ranks,
            "searches the scale of its start in each layer's output": self.searches_scale,
            "reads the layer's inputs": (wants.input_moments or wants.preserved) and not layer.shows_inputs,
            "reads the weights before their quantisation": wants.original,
        }
        return next((words for words, needed in needs.items() if needed), "")

    def checks_weight(self, layer: Layer) -> bool:
        """Whether :meth:`check` can tell no sooner than with the weight; it is asked again with it then, for one read.

        ``layer`` has no weight yet.
        """
        return False

    @abstractmethod
    def factors(self, layer: Layer) -> Factors:
        """Return the start of one layer.

        Directions in which both factors are zero would never train: they start as 'lora' does, and a core there is
        refused (:mod:`headstart.methods.alive`).
        """

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Return the starts of several layers; the same as one at a time.

        A method that overrides this is given layers of one shape and rank together, or, where it wants their inputs,
        those that read the same input. One that takes its time calls ``show`` with (what it does, how much is done, how
        much there is).
        """
        return [self.factors(layer) for layer in layers]

    @property
    def searches_scale(self) -> bool:
        """Whether its product is to be multiplied by what lowers the loss most: its setting ``scale`` is "search"."""
        return getattr(self, "scale", None) == "search"

    @property
    def freezes(self) -> tuple[str, ...]:
        """Which of "lora_A" and "lora_B" don't train in its starts, as their ``frozen`` says once they are made."""
        return ()

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that start layers: itself, unless it holds others (:class:`headstart.PerLayer`)."""
        return (self,)

    def divided(self, names: Sequence[str]) -> list[tuple[Method, list[str]]]:
        """Return which of ``methods`` starts which of an adapter's layers: itself all of them, by default."""
        return [(self, list(names))]

    @property
    def shares_ranks(self) -> bool:
        """Whether :meth:`settle` may give layers other ranks than they have."""
        return False

    def settle(self, starts: Mapping[str, Factors], ranks: Mapping[str, int]) -> dict[str, Factors]:
        """Return the starts to install, once those of all layers are known: by default the same.

        A method that shares ranks out among layers gives them here, as factors with more or fewer rows and columns. A
        layer of rank 0 loses its adapter.

        Args:
            starts: of all layers, by name, in no particular order.
            ranks: the layers' ranks, by name, in the model's order.
        """
        return dict(starts)

    def sample_count(self, population: int | None = None) -> int:
        """Return how many samples of the data the method reads: its setting ``samples``, 0 where it has none.

        ``population`` is the size of the training set, as far as that is known.
        """
        return int(getattr(self, "samples", 0))

    def settings(self) -> dict[str, object]:
        """Return the settings by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        """Return the name and the settings that differ from their defaults, as ``parse_method`` reads them."""
        return spell(self.name, self)


def check_positive(method: str, **settings: float | None) -> None:
    """Raise MethodError for a setting that is not a positive finite number (None passes)."""
    for setting, value in settings.items():
        if value is not None and not 0 < value < math.inf:
            raise MethodError(f"method {method!r}: {setting}={value!r} must be a positive number.")
