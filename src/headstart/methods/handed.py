"""Starts that PEFT itself computes: named here, so that they can be asked for and compared like any other.

What they do is PEFT's code alone; :mod:`headstart.layers.handed` calls it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from headstart.errors import MethodError
from headstart.methods.base import Factors, LayerInputs, Method, Needs, check_positive
from headstart.methods.registry import register


class HandedOver(Method):
    """A start whose factors come from PEFT."""

    draws: ClassVar[bool] = False

    def factors(self, layer: LayerInputs) -> Factors:
        """Refuse: PEFT needs the model, not a layer's statistics."""
        raise MethodError(f"method {self.name!r} is PEFT's own and needs the model: call headstart.initialize_.")


@register("pissa-niter")
@dataclass(frozen=True)
class PiSSANiter(HandedOver):
    """PEFT's ``pissa_niter_N``: PiSSA from a randomised SVD with N subspace iterations; subtracted.

    Source: PEFT. ``pissa`` is exact, and faster.

    Settings:
        iterations: N.
    """

    source: ClassVar[str] = "PEFT's own; PiSSA (Meng et al. 2024)"
    cost: ClassVar[str] = "a randomised SVD of each weight"
    needs: ClassVar[Needs] = Needs.WEIGHT
    draws: ClassVar[bool] = True

    iterations: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0:
            raise MethodError(f"method {self.name!r}: iterations={self.iterations!r} must not be negative.")


@register("mica")
@dataclass(frozen=True)
class MiCA(HandedOver):
    """PEFT's ``mica``: B holds the r left singular vectors of the least singular values, frozen; A = 0 trains.

    Source: PEFT.
    """

    source: ClassVar[str] = "PEFT's own; MiCA (arXiv 2604.01694)"
    cost: ClassVar[str] = "a full SVD of each weight"
    needs: ClassVar[Needs] = Needs.WEIGHT


@register("eva")
@dataclass(frozen=True)
class EVA(HandedOver):
    """PEFT's ``eva``: A holds the leading right singular vectors of the layer's inputs, B = 0.

    Ranks are redistributed between layers where ``rho`` is above 1; a layer may lose its adapter altogether.

    Source: PEFT.

    Settings:
        samples: how many are read, again and again until the vectors stand still.
        rho: a layer gets at most rho r; 1 leaves ranks alone.
        tau: the cosine similarity at which a vector counts as standing still.
        tokens: whose inputs are read: those with a label, or all of the attention mask.
        whiten: divide each vector by the root of its singular value.
        adjust_scaling: change alpha with the rank, so that the scale of gradients stays.
    """

    source: ClassVar[str] = "PEFT's own; EVA (arXiv 2410.07170)"
    cost: ClassVar[str] = "forward passes over the samples with an incremental SVD a layer"
    needs: ClassVar[Needs] = Needs.INPUTS

    samples: int = 256
    rho: float = 2.0
    tau: float = 0.99
    tokens: Literal["labels", "attention"] = "labels"
    whiten: bool = False
    adjust_scaling: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, samples=self.samples)
        if not self.rho >= 1 or not 0 <= self.tau <= 1:
            raise MethodError(f"method {self.name!r}: rho must be at least 1, and tau between 0 and 1.")


@register("corda")
@dataclass(frozen=True)
class CorDA(HandedOver):
    """PEFT's ``corda``: a PiSSA-like split of the weight times the covariance C of the layer's inputs; subtracted.

    Source: PEFT.

    Settings:
        samples: how many C is averaged over.
        mode: "ipm" (instruction-previewed) takes the largest singular triplets of W C, "kpm" (knowledge-preserved) the
            smallest.
    """

    source: ClassVar[str] = "PEFT's own; CorDA (arXiv 2406.05223)"
    cost: ClassVar[str] = "a forward pass over the samples, a full SVD of each weight"
    needs: ClassVar[Needs] = Needs.WEIGHT | Needs.INPUTS

    samples: int = 256
    mode: Literal["ipm", "kpm"] = "ipm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, samples=self.samples)


@register("loftq")
@dataclass(frozen=True)
class LoftQ(HandedOver):
    """PEFT's ``replace_lora_weights_loftq``: on a 4-bit base Q, s B A is near W - Q, the error of quantisation; kept.

    Source: PEFT, whose code for it runs on an accelerator only. The unquantised weights W are read from the model's
    safetensors files.

    Settings:
        model_path: the folder or file with W; None for where the model was loaded from.
    """

    source: ClassVar[str] = "PEFT's own; LoftQ (Li et al. 2023)"
    cost: ClassVar[str] = "reads the unquantised weights; a full SVD a layer, on an accelerator"

    model_path: str | None = None
