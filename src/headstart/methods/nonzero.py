"""Non-zero starts of Li et al. 2025: A and B drawn at one scale, with the product subtracted or kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from headstart.methods.base import Factors, Form, Layer, Method, check_positive
from headstart.methods.draws import draw
from headstart.methods.registry import register

# Exponents of the width n in the standard deviations of A and B, by optimizer (section 3.3, appendices B and C).
SCHEMES: dict[str, tuple[float, float]] = {
    "adam": (-1 / 2, -1 / 2),
    "sgd": (-3 / 4, -1 / 4),
    "lora+": (-1.0, 0.0),
}


@dataclass(frozen=True)
class _InitAB(Method):
    beta: float = 1.0
    scheme: Literal["adam", "sgd", "lora+"] = "adam"
    distribution: Literal["normal", "uniform"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, beta=self.beta)

    def factors(self, layer: Layer) -> Factors:
        """Draw A, then B."""
        exponent_A, exponent_B = SCHEMES[self.scheme]
        n = float(layer.d_in)
        generator = layer.generator()
        A = draw((layer.r, layer.d_in), self.distribution, self.beta * n**exponent_A, generator)
        B = draw((layer.d_out, layer.r), self.distribution, self.beta * n**exponent_B, generator)
        return Factors(A, B)


@register("init-ab")
@dataclass(frozen=True)
class InitAB(_InitAB):
    """Init[AB](beta): A and B drawn with standard deviation beta / sqrt(d_in) each; s B A is subtracted.

    Source: Li et al. 2025, Definition 6, Theorem 1 and section 4.

    Settings:
        beta: scale; the paper uses 0.25 to 16. 1 is Kaiming's scale.
        scheme: exponents of the width n = d_in in the standard deviations of A and B. "adam": -1/2 and -1/2;
            "sgd": -3/4 and -1/4; "lora+" (rates of order 1/n for A and 1 for B): -1 and 0.
        distribution: "normal" or "uniform" of the same variance.
    """

    source: ClassVar[str] = "non-zero initialisation (Li et al. 2025), section 3.3"
    rate: ClassVar[float | None] = 1 / 1.8


@register("init-ab-plus")
@dataclass(frozen=True)
class InitABPlus(_InitAB):
    """Init[AB+](beta): the draw of ``init-ab``, with s B A kept, so that training starts beside the base model.

    Source: Li et al. 2025, section 4.3, which finds it harmless while beta < 8.

    Settings: those of ``init-ab``.
    """

    source: ClassVar[str] = "non-zero initialisation (Li et al. 2025), section 4.3"
    form: ClassVar[Form] = "kept"
