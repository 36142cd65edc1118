"""What a method is: settings, what it needs, and one pure function from a layer's statistics to its factors."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from headstart.errors import LayerError, MethodError
from headstart.linalg.sketch import GradientSketch
from headstart.progress import Show, silent

Offset = Literal["subtract", "keep"]


class Needs(enum.Flag):
    """What a method must be given about a layer, beyond its shape."""

    NOTHING = 0
    WEIGHT = enum.auto()
    MOMENTS = enum.auto()
    GRADIENT = enum.auto()
    FISHER = enum.auto()
    INPUTS = enum.auto()

    def __str__(self) -> str:
        names = {
            Needs.WEIGHT: "weight",
            Needs.MOMENTS: "moments",
            Needs.GRADIENT: "gradient",
            Needs.FISHER: "Fisher factors",
            Needs.INPUTS: "inputs",
        }
        return " + ".join(text for flag, text in names.items() if flag in self) or "shapes"


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a kind's weights, each averaged over the layers of that kind."""

    mean: float
    std: float


@dataclass(frozen=True)
class Kronecker:
    """A layer's two Kronecker factors (K-FAC) and the moments that come with them, undamped, in float32.

    Attributes:
        inputs: Z (d_in, d_in), the mean of x x' over tokens; layers that read the same input share the tensor.
        outputs: Y, the mean of g g' over tokens, g the gradient of the token's own sample's loss: (d_out, d_out), or
            (d_out,) where only its diagonal was asked for.
        mean_input: (d_in,), the mean of x.
        mean_output: (d_out,), the mean of g.
        tokens: how many were averaged over.
    """

    inputs: Tensor
    outputs: Tensor
    mean_input: Tensor
    mean_output: Tensor
    tokens: int


@dataclass(frozen=True)
class Wanted:
    """What a pass over data is to collect for the layers that ask.

    Attributes:
        gradient: the mean gradient whole ("exact"), its leading singular triplets only ("sketch"), or not ("no").
        outputs: the diagonal of Y or all of it, with Z and the moments; None for no Kronecker factors.
        tokens: which tokens Z and Y are means over: those of the attention mask, or those with a label.
        vectors, width, passes: of the sketch: singular vectors needed, thin columns held in all, passes over the data.
    """

    gradient: Literal["exact", "sketch", "no"] = "exact"
    outputs: Literal["diagonal", "full"] | None = None
    tokens: Literal["attention", "labels"] = "attention"
    vectors: int = 0
    width: int = 0
    passes: int = 1


@dataclass(frozen=True)
class LayerInputs:
    """What is known of one layer when its factors are made.

    Attributes:
        name: the layer's name in the base model, as errors give it.
        d_out, d_in: the shape of its weight W; ``y = W x``.
        r: the adapter's rank there.
        scaling: s, the factor in front of ``B A``.
        seed: the user's seed; :meth:`generator` derives the layer's own stream from it and the name.
        weight: W (d_out, d_in) in float32, for methods that need it.
        moments: of the weights of this layer's kind, for methods that need them.
        gradient: the mean gradient G of the loss (d_out, d_in) in float32, for methods that need it.
        sketch: thin products of the same mean gradient, where those were asked for instead.
        kronecker: the Fisher information's two factors, for methods that need them.
        population: N, how many samples the training set holds, as far as that is known.
        samples: how many samples were read.
        first_lr: the rate of the first optimizer step of the fine-tuning to come, as far as that is known.
    """

    name: str
    d_out: int
    d_in: int
    r: int
    scaling: float
    seed: int = 0
    weight: Tensor | None = None
    moments: Moments | None = None
    gradient: Tensor | None = None
    sketch: GradientSketch | None = None
    kronecker: Kronecker | None = None
    population: int | None = None
    samples: int | None = None
    first_lr: float | None = None

    def generator(self) -> torch.Generator:
        """Return a fresh CPU generator; the same seed and name give the same draws in any process, in any order."""
        digest = hashlib.blake2b(f"{self.seed}:{self.name}".encode(), digest_size=8).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)

    def require_weight(self) -> Tensor:
        """Return the weight, which the caller must have collected."""
        if self.weight is None:
            raise LayerError(f"layer {self.name!r}: this method needs the layer's weight, which was not collected")
        return self.weight

    def require_gradient(self) -> Tensor:
        """Return the mean gradient, which the caller must have collected."""
        if self.gradient is None:
            raise LayerError(f"layer {self.name!r}: this method needs the mean gradient, which was not collected")
        return self.gradient

    def require_kronecker(self) -> Kronecker:
        """Return the Kronecker factors, which the caller must have collected."""
        if self.kronecker is None:
            raise LayerError(f"layer {self.name!r}: this method needs the Fisher factors, which were not collected")
        return self.kronecker


@dataclass(frozen=True)
class Factors:
    """A layer's start.

    Attributes:
        A: (r, d_in), float32.
        B: (d_out, r), float32.
        core: (r, r) of methods that train only that, else None.
        offset: "subtract" if the layer must start where the base model is (the product s B A is taken out again),
            "keep" if it starts at W + s B A.
        info: numbers for the report, such as ``error``, ``bound``, ``steps``.
        note: one sentence for the report where something had to be done differently, else empty.
        repair: one sentence for the report where arithmetic had to be made safer (damping raised), else empty.
        frozen: which of "lora_A" and "lora_B" must not train.
        history: of a descent, (step, mean squared error) on the way; empty for all else.
    """

    A: Tensor
    B: Tensor
    core: Tensor | None = None
    offset: Offset = "subtract"
    info: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    repair: str = ""
    frozen: tuple[str, ...] = ()
    history: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods: a frozen dataclass whose fields are the paper's settings with the paper's defaults.

    Class attributes:
        name: the command-line name.
        needs: what :class:`LayerInputs` must hold.
        source: paper and section.
        cost: a few words on what the start costs, for the tables.
        together: which layers are worth handing over together: none, those of one shape and rank, or those that read
            the same input.
        asks_population: the size of the training set matters.
        trains_core: its layers get a parameter of their own, R.
        draws: the factors depend on the seed and the layer's name.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs.NOTHING
    source: ClassVar[str] = ""
    cost: ClassVar[str] = "a draw"
    together: ClassVar[Literal["none", "shape", "input"]] = "none"
    asks_population: ClassVar[bool] = False
    trains_core: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check that every setting has the type that its field declares; subclasses go on to check ranges."""
        hints = get_type_hints(type(self))
        for each in dataclasses.fields(self):
            _check_type(self.name, each.name, getattr(self, each.name), hints[each.name])

    @abstractmethod
    def factors(self, layer: LayerInputs) -> Factors:
        """Return the start of one layer."""

    def factors_batch(self, layers: Sequence[LayerInputs], show: Show = silent) -> list[Factors]:
        """Return the starts of several layers (see ``together``); the same as one at a time.

        A method that takes its time calls ``show`` with (what it does, how much is done, how much there is).
        """
        return [self.factors(layer) for layer in layers]

    def wanted(self, layer: str, rank: int) -> Wanted | None:
        """Return what the pass over the data must collect for the layer of this name and rank; None for nothing."""
        return Wanted() if Needs.GRADIENT in self.needs else None

    def sample_count(self, population: int | None = None) -> int:
        """Return how many samples of the data the method reads: its setting ``samples``, 0 where it has none.

        ``population`` is the size of the training set, as far as that is known.
        """
        return int(getattr(self, "samples", 0))

    def missing(self, first_lr: float | None) -> str:
        """Return a sentence about what the method lacks to begin with; empty where it lacks nothing."""
        return ""

    def settings(self) -> dict[str, object]:
        """Return the settings by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        """Return the name and the settings that differ from their defaults, as ``parse_method`` reads them."""
        fields = [field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        changed = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields)
        return f"{self.name}:{changed}" if changed else self.name


def check_positive(method: str, **settings: float | None) -> None:
    """Raise MethodError for a setting that is not a positive finite number (None passes)."""
    for setting, value in settings.items():
        if value is not None and not 0 < value < math.inf:
            raise MethodError(f"method {method!r}: {setting}={value!r} must be a positive number.")


def _check_type(method: str, setting: str, value: object, hint: Any) -> None:
    """Raise MethodError unless a value is what its field's annotation says: a number, a whole one, or a word."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in options:
        return
    hint = next(option for option in options if option is not NoneType)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(repr(choice) for choice in get_args(hint))
            raise MethodError(f"method {method!r}: {setting}={value!r} is not one of {choices}.")
        return
    if hint is bool and not isinstance(value, bool):
        raise MethodError(f"method {method!r}: {setting}={value!r} must be true or false.")
    numbers = {int: (int,), float: (int, float)}
    if hint in numbers and (isinstance(value, bool) or not isinstance(value, numbers[hint])):
        what = "a whole number" if hint is int else "a number"
        raise MethodError(f"method {method!r}: {setting}={value!r} must be {what}.")
