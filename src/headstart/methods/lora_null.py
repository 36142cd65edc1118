"""LoRA-Null: the part of the weight that data to preserve hardly excite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from headstart.linalg.precision import double
from headstart.methods.alive import rounding
from headstart.methods.base import Factors, Layer, Wants
from headstart.methods.inputs import InputsMethod
from headstart.methods.registry import register
from headstart.methods.zero import as_lora

# Of a moment in float32, eigenvalues below this share of the largest are rounding.
_ROUNDING = 1e-6


@register("lora-null")
@dataclass(frozen=True)
class LoRANull(InputsMethod):
    """LoRA-Null: with W P = U S V', B = U sqrt(S / s), A = sqrt(S / s) V'; s B A = W P is subtracted.

    P = N N', N the r eigenvectors of Z with the smallest eigenvalues, Z the mean of x x' over tokens of data whose
    ability is to stay (``preserve=``). An input without a part in N sees no adapter at the start; in version "v2", in
    which A doesn't train, it never does.

    Source: LoRA-Null (arXiv 2503.02659) and its published code, in which each sample's inputs are divided by their
    largest entry first. Its "null space" are the r directions that are excited least: of more tokens than inputs no
    direction is without any. Of fewer tokens, more than r directions are, and which of them are taken is arbitrary: the
    report has the rank of Z. Where W has nothing along N, A takes the rest of N and B is zero, so that it can train.

    Settings:
        version: "v1": both train; "v2": B alone.
        samples: how many samples Z is a mean over.
        tokens: over those that the attention mask shows, or those that predict a label.
    """

    source: ClassVar[str] = "LoRA-Null (arXiv 2503.02659)"
    cost: ClassVar[str] = "a forward pass over the samples to preserve, an eigenproblem a layer"

    version: Literal["v1", "v2"] = "v1"

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight and the second moment of the inputs to preserve are needed."""
        return Wants(weight=True, preserved=True, tokens=self.tokens)

    @property
    def freezes(self) -> tuple[str, ...]:
        """A, in version "v2"."""
        return ("lora_A",) if self.version == "v2" else ()

    def factors(self, layer: Layer) -> Factors:
        """Decompose W P, of which r triplets are all there are."""
        if layer.preserved is None or not bool(layer.preserved.inputs.count_nonzero()):
            note = "no input to preserve reached this layer, or only zeros; it starts as 'lora' does"
            return as_lora(layer, note)
        W, Z = double(layer.require_weight()), double(layer.preserved.inputs)
        values, vectors = torch.linalg.eigh(torch.lerp(Z, Z.mT, 0.5))
        N = vectors[:, : layer.r]
        U, S, Vh = torch.linalg.svd(W @ N, full_matrices=False)
        # Where W has nothing along N, the rest of N is A's, as large as plain LoRA's rows, and B is zero.
        there = rounding(layer) * torch.linalg.matrix_norm(W) < S
        root = torch.where(there, (S / layer.scaling).sqrt(), 0.0)
        A, B = torch.where(there, root, 1 / math.sqrt(3))[:, None] * (Vh @ N.mT), U * root
        empty = int((~there).sum())
        note = f"the weight is zero along {empty} of the {layer.r} directions taken; B starts at zero there"
        rank = int((values > _ROUNDING * values[-1]).sum())
        gap = float(values[layer.r] - values[layer.r - 1]) if layer.r < layer.d_in else float(values[-1])
        info = {"energy": float(values[: layer.r].clamp_min(0.0).sum() / values.sum()), "rank_of_inputs": float(rank)}
        # By how much rounding errors of Z turn the chosen directions.
        info["condition"] = float(values[-1]) / gap if gap > 0 else math.inf
        free = layer.d_in - rank
        caution = ""
        if free > layer.r:
            caution = f"inputs to preserve leave {free} directions free, of which {layer.r} are taken arbitrarily"
        return Factors(
            A.float(), B.float(), info=info, note=note if empty else "", caution=caution, frozen=self.freezes
        )
