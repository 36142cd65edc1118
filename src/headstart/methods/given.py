"""What a method can be told of a layer: what it may want, and what it is given."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from headstart.errors import LayerError

T = TypeVar("T")


@dataclass(frozen=True)
class Wants:
    """What a method must be given about a layer, beyond its shape.

    The data to learn are read where ``inputs``, ``gradient`` or ``outputs`` ask for it; a backward pass, and so labels,
    are needed for the last two only. Data whose ability is to stay are read for ``preserved``.

    Attributes:
        weight: W itself.
        moments: mean and standard deviation of the weights of the layer's kind.
        inputs: Z, the mean of x x' over tokens, and the mean of x.
        gradient: G, the mean gradient.
        halves: and that of every second sample, so that two halves can be compared; one more d_out x d_in buffer.
        outputs: Y, the mean of g g' over tokens: its diagonal or all of it, with the mean of g; brings ``inputs``
            along.
        preserved: Z and the mean of x over the data whose ability is to stay (the verb's ``preserve=``).
        tokens: which tokens Z and Y are means over: those of the attention mask, or those whose output predicts a
            label.
        population: the size of the training set.
        rate: that of the first step, on which the start depends then.
        original: the weight as it was before the base model was quantised, from the model's files.
        model_path: where these lie: a folder, a safetensors file, or a name on the hub; None for where the model came
            from.
    """

    weight: bool = False
    moments: bool = False
    inputs: bool = False
    gradient: bool = False
    halves: bool = False
    outputs: Literal["diagonal", "full"] | None = None
    preserved: bool = False
    tokens: Literal["attention", "labels"] = "attention"
    population: bool = False
    rate: bool = False
    original: bool = False
    model_path: str | None = None

    @property
    def backward(self) -> bool:
        """Whether a backward pass is needed."""
        return self.gradient or self.outputs is not None

    @property
    def input_moments(self) -> bool:
        """Whether Z is collected."""
        return self.inputs or self.outputs is not None

    @property
    def reads_weight(self) -> bool:
        """Whether W is read."""
        return self.weight or self.moments

    @property
    def task(self) -> bool:
        """Whether the data to learn are read."""
        return self.backward or self.input_moments

    @property
    def data(self) -> bool:
        """Whether any data are read."""
        return self.task or self.preserved

    def __str__(self) -> str:
        words = {
            "weight": self.weight,
            "unquantised weight": self.original,
            "moments": self.moments,
            "gradient": self.gradient,
            "Fisher factors": self.outputs is not None,
            "inputs": self.inputs and self.outputs is None,
            "inputs to preserve": self.preserved,
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
class Half:
    """The mean gradient of every second sample; that of the others follows from the mean of all.

    Attributes:
        gradient: (d_out, d_in) in float32.
        share: how many of all samples these are, above 0 and below 1; a half but for odd numbers of them.
    """

    gradient: Tensor
    share: float


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
        held_as: "linear" for a linear layer's weight; "stack" for a matrix in a parameter that PEFT adapts as a whole,
            such as one of a mixture's experts; "convolution" for a convolution's kernels as rows; "embedding" for
            an embedding, which reads tokens as vectors of zeros and one 1.
        shows_inputs: what reaches the layer can be read.
        quantised: what a quantised weight is held in, such as "4-bit" (bitsandbytes') or "FP8"; None for plain numbers.
        seed: the user's seed; :meth:`generator` derives the layer's own stream from it and the name.
        training: what is known of the fine-tuning to come.
        weight: W (d_out, d_in) in float32; dequantised where it has to be.
        original: W before it was quantised (d_out, d_in), in float32.
        moments: of the weights of this layer's kind.
        gradient: the mean gradient G of the loss (d_out, d_in) in float32.
        half: the mean gradient of every second sample, where there are two; None without.
        kronecker: the second moments of inputs and output gradients.
        preserved: the second moment of the inputs over data whose ability is to stay; no ``outputs``.
        samples: how many samples were read.
    """

    name: str
    d_out: int
    d_in: int
    r: int
    scaling: float
    dora: bool = False
    frozen: tuple[str, ...] = ()
    held_as: Literal["linear", "stack", "convolution", "embedding"] = "linear"
    shows_inputs: bool = True
    quantised: str | None = None
    seed: int = 0
    training: Training = field(default_factory=Training)
    weight: Tensor | None = None
    original: Tensor | None = None
    moments: Moments | None = None
    gradient: Tensor | None = None
    half: Half | None = None
    kronecker: Kronecker | None = None
    preserved: Kronecker | None = None
    samples: int | None = None

    def generator(self) -> torch.Generator:
        """Return a fresh CPU generator; the same seed and name give the same draws in any process, in any order."""
        digest = hashlib.blake2b(f"{self.seed}:{self.name}".encode(), digest_size=8).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)

    def require_weight(self) -> Tensor:
        """Return the weight, which the method must want."""
        return self._required(self.weight, "the layer's weight")

    def require_original(self) -> Tensor:
        """Return the weight as it was before it was quantised, which the method must want."""
        return self._required(self.original, "the weight before it was quantised")

    def require_gradient(self) -> Tensor:
        """Return the mean gradient, which the method must want."""
        return self._required(self.gradient, "the mean gradient")

    def require_kronecker(self) -> Kronecker:
        """Return the second moments, which the method must want."""
        return self._required(self.kronecker, "the second moments of its inputs")

    def require_preserved(self) -> Kronecker:
        """Return the second moment of the inputs over data to preserve, which the method must want."""
        return self._required(self.preserved, "the second moment of its inputs over data to preserve")

    def require_moments(self) -> Moments:
        """Return the moments of its kind's weights, which the method must want."""
        return self._required(self.moments, "the moments of its kind's weights")

    def _required(self, value: T | None, what: str) -> T:
        if value is None:
            raise LayerError(f"layer {self.name!r}: this method needs {what}, which was not collected")
        return value


# Any layer will do to ask a method what it wants in general, as tables do.
ANY_LAYER = Layer("model.layers.0.self_attn.q_proj", 64, 64, 2, 1.0)
# A method may be for layers of attention, or for the others, alone.
BOTH_KINDS = (ANY_LAYER, replace(ANY_LAYER, name="model.layers.0.mlp.up_proj"))
