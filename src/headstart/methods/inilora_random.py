"""The variants of IniLoRA that need no weight: wide normal draws (alpha) and Kaiming draws (beta)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headstart.methods.base import Factors, Layer, Method, check_positive
from headstart.methods.draws import Distribution, draw, draw_named
from headstart.methods.registry import register

# The paper's own abbreviations.
ALIASES: dict[str, Distribution] = {"K-N": "kaiming-normal", "K-U": "kaiming-uniform"}


@register("inilora-alpha")
@dataclass(frozen=True)
class IniLoRAAlpha(Method):
    """IniLoRA-alpha: A and B normal with mean 0 and standard deviation 0.5; s B A is subtracted.

    Source: IniLoRA, equation 4 and Figure 3.

    Settings:
        std: the standard deviation; the paper's Figure 3 goes from 1e-4 to 1.5.
    """

    source: ClassVar[str] = "IniLoRA, section 3, equation 4"

    std: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, std=self.std)

    def factors(self, layer: Layer) -> Factors:
        """Draw A, then B."""
        generator = layer.generator()
        A = draw((layer.r, layer.d_in), "normal", self.std, generator)
        return Factors(A, draw((layer.d_out, layer.r), "normal", self.std, generator))


@register("inilora-beta")
@dataclass(frozen=True)
class IniLoRABeta(Method):
    """IniLoRA-beta: A and B from one named distribution, Kaiming's by default; s B A is subtracted.

    Source: IniLoRA, sections 3 and 4.3.4 (Figure 4).

    Settings:
        distribution: "kaiming-normal" (K-N) or "kaiming-uniform" (K-U), both with gain sqrt(2) and fan-in (d_in for
            A, r for B); Figure 4 also has "xavier-normal", "xavier-uniform", "normal" (standard deviation 0.01),
            "uniform" (-0.1 to 0.1), "orthogonal", "sparse" (half zero, else 0.01) and "constant" (0.001).
    """

    source: ClassVar[str] = "IniLoRA, sections 3 and 4.3.4"

    distribution: Distribution = "kaiming-normal"

    def __post_init__(self) -> None:
        object.__setattr__(self, "distribution", ALIASES.get(self.distribution, self.distribution))
        super().__post_init__()

    def factors(self, layer: Layer) -> Factors:
        """Draw A, then B."""
        generator = layer.generator()
        A = draw_named((layer.r, layer.d_in), self.distribution, generator)
        return Factors(A, draw_named((layer.d_out, layer.r), self.distribution, generator))
