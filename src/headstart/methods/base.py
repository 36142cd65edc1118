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
            return Wants(gradient="exact")

        def factors(self, layer: Layer) -> Factors:
            ...
"""

from __future__ import annotations

import dataclasses
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

# How a start lives in its layer: "kept", a plain LoRA at W + s B A; "anchored", at W, because what s B A adds is taken
# out again; "core", W + s B R A with A and B frozen.
Form = Literal["kept", "anchored", "core"]


@dataclass(frozen=True)
class Wants:
    """What a method must be given about a layer, beyond its shape.

    Data are read where ``inputs``, ``gradient`` or ``outputs`` ask for it; a backward pass, and so labels, are needed
    for the last two only.

    Attributes:
        weight: W itself.
        moments: mean and standard deviation of the weights of the layer's kind.
        inputs: Z, the mean of x x' over tokens, and the mean of x.
        gradient: the mean gradient whole ("exact"), its leading singular triplets only ("sketch"), or not ("no").
        outputs: Y, the mean of g g' over tokens: its diagonal or all of it, with the mean of g; brings ``inputs``
            along.
        tokens: which tokens Z and Y are means over: those of the attention mask, or those whose output predicts a
            label.
        population: the size of the training set.
        original: the weight as it was before the base model was quantised, from the model's files.
        model_path: where these lie: a folder, a safetensors file, or a name on the hub; None for where the model came
            from.
        vectors, width, passes: of the sketch: singular vectors needed, thin columns held in all, passes over the data.
    """

    weight: bool = False
    moments: bool = False
    inputs: bool = False
    gradient: Literal["exact", "sketch", "no"] = "no"
    outputs: Literal["diagonal", "full"] | None = None
    tokens: Literal["attention", "labels"] = "attention"
    population: bool = False
    original: bool = False
    model_path: str | None = None
    vectors: int = 0
    width: int = 0
    passes: int = 1

    @property
    def backward(self) -> bool:
        """Whether a backward pass is needed."""
        return self.gradient != "no" or self.outputs is not None

    @property
    def input_moments(self) -> bool:
        """Whether Z is collected."""
        return self.inputs or self.outputs is not None

    @property
    def reads_weight(self) -> bool:
        """Whether W is read."""
        return self.weight or self.moments

    @property
    def data(self) -> bool:
        """Whether data are read."""
        return self.backward or self.input_moments

    def __str__(self) -> str:
        words = {
            "weight": self.weight,
            "unquantised weight": self.original,
            "moments": self.moments,
            "gradient": self.gradient != "no",
            "Fisher factors": self.outputs is not None,
            "inputs": self.inputs and self.outputs is None,
        }
        return " + ".join(word for word, wanted in words.items() if wanted) or "shapes"


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
            (d_out,) where only its diagonal was asked for. None where output gradients weren't asked for.
        mean_input: (d_in,), the mean of x.
        mean_output: (d_out,), the mean of g; None likewise.
        tokens: how many were averaged over.
    """

    inputs: Tensor
    outputs: Tensor | None
    mean_input: Tensor
    mean_output: Tensor | None
    tokens: int


@dataclass(frozen=True)
class Training:
    """What is known of the fine-tuning to come.

    Attributes:
        population: N, how many samples the training set holds.
        first_lr: the rate of the first optimizer step.
    """

    population: int | None = None
    first_lr: float | None = None


@dataclass(frozen=True)
class Layer:
    """What is known of one layer: for ``check`` all but statistics, for ``factors`` those that the method wants too.

    Attributes:
        name: the layer's name in the base model, as errors give it.
        d_out, d_in: the shape of its weight W; ``y = W x``.
        r: the adapter's rank there.
        scaling: s, the factor in front of ``B A``.
        dora: the layer splits its weight into magnitude and direction.
        frozen: which of "lora_A" and "lora_B" don't train (LoRA-FA).
        quantised: "4-bit" or "8-bit" where bitsandbytes holds the weight, else None.
        seed: the user's seed; :meth:`generator` derives the layer's own stream from it and the name.
        training: what is known of the fine-tuning to come.
        weight: W (d_out, d_in) in float32; dequantised where it has to be.
        original: W before it was quantised (d_out, d_in), in float32.
        moments: of the weights of this layer's kind.
        gradient: the mean gradient G of the loss (d_out, d_in) in float32.
        sketch: thin products of G, where those were asked for instead.
        kronecker: the second moments of inputs and output gradients.
        samples: how many samples were read.
    """

    name: str
    d_out: int
    d_in: int
    r: int
    scaling: float
    dora: bool = False
    frozen: tuple[str, ...] = ()
    quantised: str | None = None
    seed: int = 0
    training: Training = field(default_factory=Training)
    weight: Tensor | None = None
    original: Tensor | None = None
    moments: Moments | None = None
    gradient: Tensor | None = None
    sketch: GradientSketch | None = None
    kronecker: Kronecker | None = None
    samples: int | None = None

    def generator(self) -> torch.Generator:
        """Return a fresh CPU generator; the same seed and name give the same draws in any process, in any order."""
        digest = hashlib.blake2b(f"{self.seed}:{self.name}".encode(), digest_size=8).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)

    def require_weight(self) -> Tensor:
        """Return the weight, which the method must want."""
        if self.weight is None:
            raise LayerError(f"layer {self.name!r}: this method needs the layer's weight, which was not collected")
        return self.weight

    def require_original(self) -> Tensor:
        """Return the weight as it was before it was quantised, which the method must want."""
        if self.original is None:
            raise LayerError(
                f"layer {self.name!r}: this method needs the weight before it was quantised, which was not read"
            )
        return self.original

    def require_gradient(self) -> Tensor:
        """Return the mean gradient, which the method must want."""
        if self.gradient is None:
            raise LayerError(f"layer {self.name!r}: this method needs the mean gradient, which was not collected")
        return self.gradient

    def require_kronecker(self) -> Kronecker:
        """Return the second moments, which the method must want."""
        if self.kronecker is None:
            raise LayerError(
                f"layer {self.name!r}: this method needs the moments of its inputs, which were not collected"
            )
        return self.kronecker


# Any layer will do to ask a method what it wants in general, as tables do.
ANY_LAYER = Layer("model.layers.0.self_attn.q_proj", 64, 64, 2, 1.0)


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
        frozen: which of "lora_A" and "lora_B" must not train.
        history: of a descent, (step, mean squared error) on the way; empty for all else.
        spare: (more, d_in), of a method that shares ranks out among layers: what A could go on with, for
            :meth:`Method.settle`; B is zero there.
        worth: what each row of A, and then of ``spare``, is worth to the layer, in descending order; empty where the
            layer keeps its rank.
        keeps: what stays where the rank becomes another one, the scaling s or lora_alpha.
    """

    A: Tensor
    B: Tensor
    core: Tensor | None = None
    info: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    repair: str = ""
    frozen: tuple[str, ...] = ()
    history: Sequence[Sequence[float]] = ()
    spare: Tensor | None = None
    worth: Sequence[float] = ()
    keeps: Literal["scaling", "alpha"] = "scaling"


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
        starts_A: A is not zero at the start; a frozen A (LoRA-FA) that is zero would keep B from mattering.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    cost: ClassVar[str] = "a draw"
    form: ClassVar[Form] = "anchored"
    keep: ClassVar[bool] = False
    starts_A: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check that every setting has the type that its field declares; subclasses go on to check ranges."""
        hints = get_type_hints(type(self))
        for setting in dataclasses.fields(self):
            _check_type(self.name, setting.name, getattr(self, setting.name), hints[setting.name])

    def wants(self, layer: Layer) -> Wants:
        """Return what the method must be given about a layer; by default its shape alone."""
        return Wants()

    def check(self, layer: Layer) -> None:
        """Refuse a layer that the method can't start, before any data are read; subclasses go on with this one.

        Raises:
            LayerError: the start's form doesn't go with what the layer is, or a sketch would be too narrow.
            MethodError: a setting is missing.
        """
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
        wanted = self.wants(layer)
        if wanted.gradient == "sketch":
            _check_sketch(layer, wanted)

    @abstractmethod
    def factors(self, layer: Layer) -> Factors:
        """Return the start of one layer."""

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Return the starts of several layers; the same as one at a time.

        A method that overrides this is given layers of one shape and rank together, or, where it wants their inputs,
        those that read the same input. One that takes its time calls ``show`` with (what it does, how much is done, how
        much there is).
        """
        return [self.factors(layer) for layer in layers]

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
        fields = [field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        changed = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields)
        return f"{self.name}:{changed}" if changed else self.name


def _check_sketch(layer: Layer, wanted: Wants) -> None:
    """Raise LayerError where a sketch would be too narrow."""
    try:
        limit = GradientSketch(layer.d_out, layer.d_in, wanted.width, wanted.passes).rank_limit
    except ValueError as error:
        raise LayerError(f"layer {layer.name!r}: {error}; raise width.") from error
    if limit < wanted.vectors:
        raise LayerError(
            f"layer {layer.name!r}: a sketch of width {wanted.width} gives {limit} singular vectors at most, and "
            f"{wanted.vectors} are needed; raise width."
        )


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
