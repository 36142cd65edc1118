"""KeepLoRA: the gradient's directions outside those to protect, the weight's and inputs', in an A that stays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import LayerError, MethodError
from headstart.linalg.precision import double
from headstart.linalg.svd import right_signs, truncated_svd
from headstart.methods.base import Factors, Form, Layer, Wants
from headstart.methods.draws import draw
from headstart.methods.gradient import GradientMethod
from headstart.methods.registry import register

# A gradient is a sum in float32: what is smaller than its rounding, relative to its norm, is no direction of its own.
_NOISE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class _Keeping(GradientMethod):
    """Base of the two versions, which differ in B and in whether the start is subtracted."""

    cost: ClassVar[str] = "a gradient pass over the samples, an eigenproblem of each weight"

    weight_share: float = 0.2
    inputs_share: float = 0.0
    tokens: Literal["attention", "labels"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, value in (("weight_share", self.weight_share), ("inputs_share", self.inputs_share)):
            if not 0 <= value < 1:
                raise MethodError(f"method {self.name!r}: {setting}={value!r} must be at least 0, below 1.")

    def wants(self, layer: Layer) -> Wants:
        """Return what to collect: the gradient, and what directions are protected by."""
        weight, inputs = self.weight_share > 0, self.inputs_share > 0
        return replace(super().wants(layer), weight=weight, preserved=inputs, tokens=self.tokens)

    def check(self, layer: Layer) -> None:
        """Refuse DoRA, whose magnitude would change what protected inputs give, and where too little is left for r.

        What the weight alone protects is counted where the weight is given. What inputs to preserve add is known no
        sooner than they are read.
        """
        super().check(layer)
        if layer.dora:
            raise LayerError(
                f"layer {layer.name!r} uses DoRA, whose magnitude changes what the inputs give that method "
                f"{self.name!r} protects; train without DoRA."
            )
        weighs = self.weight_share > 0
        if layer.weight is not None and weighs:
            self._check_left(layer, _leading_count(layer.weight, self.weight_share))
        elif not weighs:
            self._check_left(layer, 0)

    def checks_weight(self, layer: Layer) -> bool:
        """Whether the weight could protect so much that too little is left, which seldom needs a look at it.

        Of m squared singular values the leading k have at least k / m of the sum, so that weight_share m of them are
        the most it can take.
        """
        most = math.ceil(self.weight_share * min(layer.d_out, layer.d_in))
        return self.weight_share > 0 and most + layer.r > layer.d_in

    @property
    def freezes(self) -> tuple[str, ...]:
        """A, whose rows are free of what is protected."""
        return ("lora_A",)

    def protected(self, layer: Layer) -> Tensor:
        """Return an orthonormal basis (d_in, k) of the input directions in which the layer must stay as it is."""
        P = torch.zeros(layer.d_in, 0, dtype=torch.float64, device=double(layer.require_gradient()).device)
        if self.weight_share > 0:
            P = leading_inputs(layer.require_weight(), self.weight_share)
        if self.inputs_share > 0 and layer.preserved is not None:
            P = with_inputs(P, layer.preserved.inputs, self.inputs_share)
        return P

    def start(self, layer: Layer) -> tuple[Factors, Tensor]:
        """Return a frozen A with B = 0, and G A' (d_out, r) in float64.

        Raises:
            LayerError: fewer than r directions are left.
        """
        G, P = double(layer.require_gradient()), double(self.protected(layer))
        self._check_left(layer, P.shape[1])
        free = G - (G @ P) @ P.mT
        whole = float(G.square().sum())
        svd = truncated_svd(free, layer.r)
        directions = int((double(svd.S) > _NOISE * whole**0.5).sum())
        drawn = double(draw((layer.d_in, layer.r - directions), "normal", 1.0, layer.generator())).to(G.device)
        V = torch.cat((double(svd.V)[:, :directions], drawn), 1)
        for _ in range(2):  # once leaves the rounding of what was taken out
            V = torch.linalg.qr(V - P @ (P.mT @ V)).Q
        V = V * right_signs(V)
        info = {"protected": float(P.shape[1]), "residual": svd.residual}
        if whole > 0:
            info["free_share"] = float(free.square().sum()) / whole
        notes = []
        if directions < layer.r:
            notes.append(f"its gradient has {directions} directions beside those protected; A's other rows are drawn")
        if self.inputs_share > 0 and layer.preserved is None:
            notes.append("no input to preserve reached it")
        A = V.mT.float().contiguous()
        B = torch.zeros(layer.d_out, layer.r, dtype=torch.float32, device=A.device)
        start = Factors(A, B, info=info, note="; ".join(notes), frozen=self.freezes)
        return start, G @ double(A).mT

    def _check_left(self, layer: Layer, protected: int) -> None:
        left = layer.d_in - protected
        if left < layer.r:
            raise LayerError(
                f"layer {layer.name!r}: method {self.name!r} protects {protected} of {layer.d_in} input directions, "
                f"which leaves {left} for rank {layer.r}; lower weight_share, inputs_share or r."
            )


@register("keeplora")
@dataclass(frozen=True)
class KeepLoRA(_Keeping):
    """KeepLoRA: with G (I - P P') = U S V', A = V_r', frozen, and B = U_r S_r; s B A is subtracted, and only B trains.

    P holds the input directions to protect: the leading right singular vectors of W, until they have ``weight_share``
    of the sum of its squared singular values; then, of data whose ability is to stay (``preserve=``), those leading
    directions of the layer's inputs outside of these that bring what is protected of their energy to ``inputs_share``.
    As A P = 0 and A stays, training changes nothing of what the layer makes of an input in their span.

    Source: KeepLoRA (arXiv 2601.19659) and its published code, whose data to preserve are those of earlier tasks. One
    of its code trees takes left singular vectors, of layers that are square; right ones are meant.

    Settings:
        samples: how many samples the gradient is averaged over. The published code takes all of the task's; ours is
            LoRA-DA's.
        weight_share: from 0, nothing is protected, to below 1. Published: 0.2 for CLIP's text tower, 0.85 for its
            vision tower, and 0.99 in the scripts for a larger model. Where too few directions are left for the rank,
            the layer is refused, before any data are read.
        inputs_share: 0, no data to preserve are read, to below 1; 0.99 is published for tasks after the first. How many
            directions that takes only the data can say: where it leaves too few, the layer is refused after they are
            read.
        tokens: of the inputs to preserve, those that the attention mask shows, or those that predict a label.
    """

    source: ClassVar[str] = "KeepLoRA (arXiv 2601.19659)"

    def factors(self, layer: Layer) -> Factors:
        """Decompose what of the gradient is free."""
        start, image = self.start(layer)
        # G A' is U_r S_r, as A's rows are free of P.
        return replace(start, B=image.float())


@register("keeplora-plus")
@dataclass(frozen=True)
class KeepLoRAPlus(_Keeping):
    """KeepLoRA++: KeepLoRA's A, frozen, and B = 0; nothing to subtract, and only B trains.

    Source: KeepLoRA++ (arXiv 2606.16256) and its published code, without its scale for each layer.

    Settings:
        samples: how many samples the gradient is averaged over, as in keeplora.
        weight_share, inputs_share, tokens: as in keeplora.
    """

    source: ClassVar[str] = "KeepLoRA++ (arXiv 2606.16256)"
    form: ClassVar[Form] = "kept"

    def factors(self, layer: Layer) -> Factors:
        """Decompose what of the gradient is free, and keep the directions alone."""
        return self.start(layer)[0]


def leading_inputs(W: Tensor, share: float) -> Tensor:
    """Return the fewest leading right singular vectors (d_in, k) of W that hold ``share`` of its squared norm.

    Args:
        W: (d_out, d_in).
        share: at least 0, below 1.

    Returns:
        An orthonormal basis of their span, in float64.
    """
    W = double(W)
    wide = W.shape[0] < W.shape[1]
    values, vectors = _descending(_gram(W))
    count = _fewest(values, share * float(values.sum()))
    return torch.linalg.qr(W.mT @ vectors[:, :count]).Q if wide else vectors[:, :count]


def _leading_count(W: Tensor, share: float) -> int:
    """Return how many directions :func:`leading_inputs` finds, by eigenvalues alone."""
    gram = _gram(double(W))
    values = torch.linalg.eigvalsh(torch.lerp(gram, gram.mT, 0.5)).flip(0).clamp_min(0)
    return _fewest(values, share * float(values.sum()))


def _gram(W: Tensor) -> Tensor:
    """Return the smaller of W W' and W' W."""
    return W @ W.mT if W.shape[0] < W.shape[1] else W.mT @ W


def with_inputs(P: Tensor, Z: Tensor, share: float) -> Tensor:
    """Return a basis P with the fewest further directions with which it holds ``share`` of inputs' energy.

    Args:
        P: (d_in, k), orthonormal, in float64.
        Z: the inputs' second moment (d_in, d_in), whose trace is their energy.
        share: at least 0, below 1.

    Returns:
        An orthonormal basis (d_in, k + more), whose first k columns are P's.
    """
    Z = double(Z)
    outside = Z - P @ (P.mT @ Z)
    outside = outside - (outside @ P) @ P.mT
    values, vectors = _descending(outside)
    protected = float((P * (Z @ P)).sum())
    more = vectors[:, : _fewest(values, share * float(Z.trace()) - protected)]
    more = torch.linalg.qr(more - P @ (P.mT @ more)).Q
    return torch.cat((P, more), 1)


def _descending(moment: Tensor) -> tuple[Tensor, Tensor]:
    # Products aren't symmetric to the last digit, and rounding leaves small eigenvalues negative.
    values, vectors = torch.linalg.eigh(torch.lerp(moment, moment.mT, 0.5))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _fewest(values: Tensor, enough: float) -> int:
    """Return how many of the first values it takes for their sum to be enough."""
    return int((values.cumsum(0) - values < enough).sum())
