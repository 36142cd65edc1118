"""LoRA-SB: a core that starts at the best low-rank image of full fine-tuning's first step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import LayerError, MethodError
from headstart.linalg.precision import double
from headstart.linalg.svd import truncated_svd
from headstart.methods.base import Factors, Form, Layer, Wants, check_positive
from headstart.methods.draws import draw, empty
from headstart.methods.gradient import GradientMethod
from headstart.methods.registry import register


@register("lora-sb")
@dataclass(frozen=True)
class LoRASB(GradientMethod):
    """LoRA-SB: y = W x + s B R A x with B = U_r, A = V_r', R = S_r / s from Delta = U S V'; only R trains; kept.

    Delta is the first update that full fine-tuning would make with the mean gradient G: -eta sign(G) with AdamW,
    -eta G with SGD. As B'B = AA' = I, the gradient that R sees is the best one (Theorem 3).

    Source: LoRA-SB, section 3, Algorithm 1; the ablations from its section on initialisation.

    Settings:
        samples: how many samples G is averaged over; None for ``share`` of the training set.
        share: 0.1 % in the paper.
        optimizer: whose first step Delta is.
        lr: eta, the rate of that step; None for what the data tell: a trainer's schedule, or that of a recipe (the peak
            rate over the number of warm-up steps, as in the published code).
        split: "orthonormal" as above, or "suboptimal": B = U_r S_r, A = V_r', R = I / s, the same product.
        source_matrix: what is decomposed: the "update"; the update with "noise" of ``noise`` times its own standard
            deviation; or a "kaiming" matrix, uniform with variance 1 / (3 d_in), scaled to the update's norm.
        noise: see there.
        scale: of R: "published"; or "search": that multiple, the same for all layers, which lowers the loss of further
            samples most (:mod:`headstart.statistics.search`).
    """

    source: ClassVar[str] = "LoRA-SB, section 3, Algorithm 1"
    cost: ClassVar[str] = "a gradient pass over the samples, a truncated SVD a layer; trains r² numbers a layer"
    form: ClassVar[Form] = "core"

    samples: int | None = None  # type: ignore[assignment] # None: a share of the training set
    share: float = 0.001
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = None
    split: Literal["orthonormal", "suboptimal"] = "orthonormal"
    source_matrix: Literal["update", "noise", "kaiming"] = "update"
    noise: float = 1.0
    scale: Literal["published", "search"] = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, share=self.share, lr=self.lr, noise=self.noise)
        if self.share > 1:
            raise MethodError(f"method {self.name!r}: share={self.share!r} is more than the whole training set.")

    def sample_count(self, population: int | None = None) -> int:
        """Return ``samples``, or ``share`` of the training set, at least one.

        Raises:
            MethodError: neither is known.
        """
        if self.samples is not None:
            return self.samples
        if population is None:
            raise MethodError(
                f"method {self.name!r} reads {self.share:.2%} of the training set, whose size these data don't tell: "
                "give samples."
            )
        return max(1, math.ceil(self.share * population))

    def wants(self, layer: Layer) -> Wants:
        """Return what to collect; a share of the training set can be taken where its size is known."""
        return replace(super().wants(layer), population=self.samples is None, rate=self.lr is None)

    def check(self, layer: Layer) -> None:
        """Refuse to guess the rate of the first step."""
        super().check(layer)
        self._rate(layer)

    def _rate(self, layer: Layer) -> float:
        eta = self.lr or layer.training.first_lr
        if eta is None:
            raise MethodError(
                f"method {self.name!r} needs the rate of the first optimizer step: set lr (--lr), or give a trainer as "
                "data."
            )
        return eta

    def factors(self, layer: Layer) -> Factors:
        """Decompose the first update."""
        eta = self._rate(layer)
        G = layer.require_gradient()
        if not bool(G.count_nonzero()):
            return self._unreached(layer)
        delta = self._matrix(layer, -eta * (G.sign() if self.optimizer == "adamw" else G))
        svd = truncated_svd(delta, layer.r)
        share = float(double(svd.S).square().sum() / double(delta).square().sum())
        return self._split(layer, svd.U, svd.S, svd.V, {"residual": svd.residual, "share": share, "lr": eta})

    def _matrix(self, layer: Layer, delta: Tensor) -> Tensor:
        if self.source_matrix == "update":
            return delta
        generator = layer.generator()
        if self.source_matrix == "noise":
            drawn = draw((layer.d_out, layer.d_in), "normal", 1.0, generator).to(delta.device)
            return delta + self.noise * delta.std(correction=0) * drawn
        drawn = empty(layer.d_out, layer.d_in).uniform_(-1.0, 1.0, generator=generator).to(delta.device)
        return drawn * (delta.norm() / drawn.norm())

    def _split(self, layer: Layer, U: Tensor, S: Tensor, V: Tensor, info: dict[str, float]) -> Factors:
        if not float(S[-1]) > 0:
            raise LayerError(
                f"layer {layer.name!r}: the first update has rank below {layer.r}, which leaves a part of the core "
                "that could not train; lower r, or read more samples."
            )
        if self.split == "suboptimal":
            eye = torch.eye(layer.r, dtype=U.dtype, device=U.device)
            return Factors(V.T, U * S, core=eye / layer.scaling, info=info)
        return Factors(V.T.contiguous(), U, core=torch.diag(S) / layer.scaling, info=info)

    def _unreached(self, layer: Layer) -> Factors:
        """Where no gradient came, the core is zero between random directions, and can still train."""
        generator = layer.generator()
        B = torch.linalg.qr(draw((layer.d_out, layer.r), "normal", 1.0, generator)).Q
        A = torch.linalg.qr(draw((layer.d_in, layer.r), "normal", 1.0, generator)).Q.T
        note = "no gradient reached this layer in the samples; its core starts at zero between random directions"
        return Factors(A.contiguous(), B, core=empty(layer.r, layer.r).zero_(), note=note)
