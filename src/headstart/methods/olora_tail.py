"""OLoRA-tail: the weight's minor directions, without its singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from headstart.linalg.svd import TruncatedSVD
from headstart.methods.base import Factors, Layer
from headstart.methods.registry import register
from headstart.methods.spectral import SingularTriplets


@register("olora-tail")
@dataclass(frozen=True)
class OLoRATail(SingularTriplets):
    """OLoRA-tail: with the thin W = U S V', B = the last r columns of U, A those of V, transposed; s B A is subtracted.

    B'B = A A' = I, so that s B A has r singular values of s, whatever those of W are: unlike ``milora``, which takes
    out W's smallest triplets, this takes out a product as large as lora_alpha makes it.

    Source: On the Scaling of PEFT (arXiv 2606.02437), where it was trained by reinforcement learning at rank 1;
    neither its lora_alpha nor its learning rate was found. The formula is the authors' account of it and that of one
    implementation by others.
    """

    source: ClassVar[str] = "On the Scaling of PEFT (arXiv 2606.02437)"
    cost: ClassVar[str] = "a full SVD of each weight"
    keep: ClassVar[bool] = True
    which: ClassVar[Literal["largest", "smallest"]] = "smallest"

    def start(self, layer: Layer, svd: TruncatedSVD) -> Factors:
        """Take the singular vectors alone."""
        return Factors(svd.V.T, svd.U, info={"residual": svd.residual})
