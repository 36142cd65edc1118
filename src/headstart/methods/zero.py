"""Starts whose product is zero: one factor is drawn, the other is zero (or orthogonal to it).

Since B A = 0 the model starts at the base model by itself, and there is nothing to subtract.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from headstart.errors import LayerError
from headstart.methods.base import Factors, Form, Layer, Method, check_positive
from headstart.methods.draws import draw, empty
from headstart.methods.registry import register


@register("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """Init[A], the start of LoRA: A Kaiming-uniform with a = sqrt(5) (variance 1/(3 d_in)), B = 0.

    Of an embedding it is B that is drawn, normal with variance 1, and A = 0, as loralib and PEFT have it: there A's
    columns are tokens, and d_in is how many there are.

    Source: Hu et al. 2022 (LoRA), section 4.1; the distributions are those of Microsoft's loralib and PEFT.
    """

    source: ClassVar[str] = "LoRA (Hu et al. 2022)"
    rate: ClassVar[float | None] = 1.0
    form: ClassVar[Form] = "kept"

    def factors(self, layer: Layer) -> Factors:
        """Draw A, leave B zero; of an embedding the other way round."""
        if layer.held_as == "embedding":
            B = draw((layer.d_out, layer.r), "normal", 1.0, layer.generator())
            return Factors(empty(layer.r, layer.d_in).zero_(), B)
        bound = 1 / math.sqrt(layer.d_in)
        A = empty(layer.r, layer.d_in).uniform_(-bound, bound, generator=layer.generator())
        return Factors(A, empty(layer.d_out, layer.r).zero_())


def as_lora(layer: Layer, note: str = "") -> Factors:
    """Return the start of 'lora', for a layer that a method leaves out or learned nothing of."""
    return replace(LoRA().factors(layer), note=note)


@register("init-a")
@dataclass(frozen=True)
class InitA(Method):
    """Init[A](beta): A drawn with standard deviation beta / sqrt(d_in), B = 0.

    The scale of ``init-ab`` on A alone: the other side of the paper's heat maps.

    Source: Li et al. 2025, section 4 (Figure 4).

    Settings:
        beta: scale; the paper uses 0.25 to 16. 1 is Kaiming's scale.
        distribution: "normal" or "uniform" of the same variance.
    """

    source: ClassVar[str] = "non-zero initialisation (Li et al. 2025), section 4"
    form: ClassVar[Form] = "kept"

    beta: float = 1.0
    distribution: Literal["normal", "uniform"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, beta=self.beta)

    def factors(self, layer: Layer) -> Factors:
        """Draw A, leave B zero."""
        A = draw((layer.r, layer.d_in), self.distribution, self.beta / math.sqrt(layer.d_in), layer.generator())
        return Factors(A, empty(layer.d_out, layer.r).zero_())


@register("init-b")
@dataclass(frozen=True)
class InitB(Method):
    """Init[B]: B drawn with variance 1/r, A = 0.

    Source: Li et al. 2025, section 3.2 (after Hayou et al. 2024).

    Settings:
        distribution: "normal" or "uniform" of the same variance.
    """

    source: ClassVar[str] = "non-zero initialisation (Li et al. 2025), section 3.2"
    form: ClassVar[Form] = "kept"
    starts_A: ClassVar[bool] = False

    distribution: Literal["normal", "uniform"] = "normal"

    def factors(self, layer: Layer) -> Factors:
        """Draw B, leave A zero."""
        B = draw((layer.d_out, layer.r), self.distribution, 1 / math.sqrt(layer.r), layer.generator())
        return Factors(empty(layer.r, layer.d_in).zero_(), B)


@register("gaussian")
@dataclass(frozen=True)
class Gaussian(Method):
    """PEFT's "gaussian": A normal with standard deviation 1/r, B = 0.

    Source: PEFT, ``init_lora_weights="gaussian"``.
    """

    source: ClassVar[str] = "PEFT, init_lora_weights='gaussian'"
    form: ClassVar[Form] = "kept"

    def factors(self, layer: Layer) -> Factors:
        """Draw A, leave B zero."""
        A = draw((layer.r, layer.d_in), "normal", 1 / layer.r, layer.generator())
        return Factors(A, empty(layer.d_out, layer.r).zero_())


@register("orthogonal")
@dataclass(frozen=True)
class Orthogonal(Method):
    """Both factors non-zero, their product zero: the rows of A and the columns of B use orthogonal halves of R^r.

    With Q (r, r) a random orthogonal matrix, Q1 its odd rows and Q2 its even ones, and X, Y normal:
    A = Q1' X' / 10, B = Y Q2 / 10, so B A = Y Q2 Q1' X' / 100 = 0. The rank must be even.

    Source: PEFT, ``init_lora_weights="orthogonal"``.
    """

    source: ClassVar[str] = "PEFT, init_lora_weights='orthogonal'"
    form: ClassVar[Form] = "kept"

    def check(self, layer: Layer) -> None:
        """Refuse an odd rank."""
        super().check(layer)
        if layer.r % 2:
            raise LayerError(
                f"layer {layer.name!r}: method 'orthogonal' needs an even rank, and r is {layer.r}; choose another."
            )

    def factors(self, layer: Layer) -> Factors:
        """Draw Q, X and Y."""
        generator = layer.generator()
        half = layer.r // 2
        Q, _ = torch.linalg.qr(torch.randn(layer.r, layer.r, generator=generator, dtype=torch.float64, device="cpu"))
        X = torch.randn(layer.d_in, half, generator=generator, dtype=torch.float64, device="cpu")
        Y = torch.randn(layer.d_out, half, generator=generator, dtype=torch.float64, device="cpu")
        A = (X @ Q[0::2]).T / 10
        B = Y @ Q[1::2] / 10
        return Factors(A.float(), B.float())
