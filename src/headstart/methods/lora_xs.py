"""LoRA-XS: a core between the singular vectors of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from headstart.linalg.svd import truncated_svd
from headstart.methods.base import Factors, Form, Layer, Method, Wants, check_positive
from headstart.methods.draws import draw
from headstart.methods.registry import register


@register("lora-xs")
@dataclass(frozen=True)
class LoRAXS(Method):
    """LoRA-XS: with W = U S V', y = W x + s B R A x, B = U_r S_r and A = V_r' frozen, R normal; only R (r, r) trains.

    Source: Bałazy et al. 2024 (LoRA-XS), section 3. Kept: R is so small that the start is the base model's but for it.
    A weight of lower rank than r is refused, for a part of R could never train.

    Settings:
        std: standard deviation of R, 1e-5 in the paper.
        scale: which factor gets the singular values: "output", B = U_r S_r as the paper writes it, or "input",
            A = S_r V_r' as its published code does.
    """

    source: ClassVar[str] = "LoRA-XS (Bałazy et al. 2024), section 3"
    cost: ClassVar[str] = "a truncated SVD of each weight; trains r² numbers a layer"
    form: ClassVar[Form] = "core"

    std: float = 1e-5
    scale: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, std=self.std)

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight is needed."""
        return Wants(weight=True)

    def factors(self, layer: Layer) -> Factors:
        """Decompose the weight and draw R."""
        svd = truncated_svd(layer.require_weight(), layer.r)
        B, A = (svd.U * svd.S, svd.V.T) if self.scale == "output" else (svd.U, svd.S[:, None] * svd.V.T)
        R = draw((layer.r, layer.r), "normal", self.std, layer.generator())
        return Factors(A, B, core=R.to(A.device), info={"residual": svd.residual})
