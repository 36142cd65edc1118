"""LoRA-DA: factors from the gradient and the Fisher information of the fine-tuning data."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import LayerError, MethodError
from headstart.linalg.damped import DampedInverse, damped_inverse
from headstart.linalg.guidance import guidance_space
from headstart.linalg.precision import double
from headstart.linalg.svd import truncated_svd
from headstart.methods.base import Factors, Form, Layer, Wants, check_positive
from headstart.methods.gradient import GradientMethod, no_gradient
from headstart.methods.registry import register
from headstart.methods.zero import as_lora
from headstart.progress import Show, silent

# The square of this is how far the largest singular value may be off, relatively.
_SIGMA_TOLERANCE = 1e-3
_ATTENTION = re.compile(r"attn|attention|(^|\.)(q|k|v|o|out|query|key|value|qkv)(_?proj)?$", re.IGNORECASE)
# Inside these, names as attention has them mean something else.
_OTHER = re.compile(
    r"(^|\.)(ff|ffn|mlp|feed_?forward|mixer|experts?|classifier|pooler|score|lm_head)(\.|$)", re.IGNORECASE
)


@register("lora-da")
@dataclass(frozen=True)
class LoRADA(GradientMethod):
    """LoRA-DA: A = A0' / sqrt(gamma), B = Delta A0 / sqrt(gamma); kept.

    With Z and Y the damped means of x x' and g g' over tokens (K-FAC) and G the mean gradient::

        Delta = -Y^-1 G Z^-1                                the Fisher-gradient estimate of where to go
        Omega = variance tr(Y^-1) / N Z^-1 - bias Delta' Delta     the guidance matrix
        A0    = the r eigenvectors of Omega with the smallest eigenvalues

    Source: LoRA-DA, Theorem 4.2, equations 18 to 21, Algorithm 1; damping, weights, gamma and normalisation as its
    published code has them.

    Settings:
        samples: how many samples G, Y and Z are means over; 256 in the paper, 16 to 4,096 in its appendix J.
        damping: added to the diagonals of Y and Z; raised where Z could not be inverted (the report says where).
        population: N, the size of the training set; None for the number that the verb knows of, else ``samples``.
        fisher: Y's diagonal, as published, all of it, or no Fisher information at all: Delta = -G, which leaves no
            variance term either (set ``variance=0``), and A0 the leading right singular vectors of G (Remark 4.3).
        tokens: Y and Z are means over the tokens that the attention mask shows, or over those with a label.
        normalize: divide Delta by its largest singular value (Omega by its square, which leaves A0 as it is).
        variance: weight of the first term of Omega, 0.03 in the published code; 0 is the ablation "w/o var".
        bias: weight of the second term; 0 is the ablation "w/o bias".
        gamma: 1024 in the published code.
        tol: how far tr(A0' Omega A0) may be from its optimum, relative to it.
        iterations: None to solve to ``tol``; a number for so many steps of LOBPCG from a random start, whatever they
            leave: 10 in the published code.
        layers: where to use the method; the layers left out start as 'lora' does (appendix I).
    """

    source: ClassVar[str] = "LoRA-DA, Theorem 4.2, Algorithm 1"
    cost: ClassVar[str] = "a gradient pass over the samples, an inverse and an eigenproblem a layer"
    form: ClassVar[Form] = "kept"

    damping: float = 1e-6
    population: int | None = None
    fisher: Literal["diagonal", "full", "none"] = "diagonal"
    tokens: Literal["attention", "labels"] = "attention"
    normalize: bool = True
    variance: float = 0.03
    bias: float = 1.0
    gamma: float = 1024.0
    tol: float = 1e-6
    iterations: int | None = None
    layers: Literal["all", "attention", "feed-forward"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self.name,
            gamma=self.gamma,
            tol=self.tol,
            population=self.population,
            iterations=self.iterations,
        )
        for setting, value in (("damping", self.damping), ("variance", self.variance), ("bias", self.bias)):
            if not 0 <= value < math.inf:
                raise MethodError(f"method {self.name!r}: {setting}={value!r} must be at least 0 and finite.")
        if self.variance == 0 and self.bias == 0:
            raise MethodError(f"method {self.name!r}: variance and bias are both 0, which leaves nothing to choose by.")
        if self.fisher == "none" and self.variance != 0:
            raise MethodError(f"method {self.name!r}: without Fisher information there is no variance; set variance=0.")

    def wants(self, layer: Layer) -> Wants:
        """Return what to collect for a layer: nothing where it starts as 'lora' does."""
        if not self._chosen(layer.name):
            return Wants()
        if self.fisher == "none":
            return super().wants(layer)
        return Wants(gradient=True, outputs=self.fisher, tokens=self.tokens, population=self.population is None)

    def factors(self, layer: Layer) -> Factors:
        """Solve one layer."""
        return self.factors_batch([layer])[0]

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Solve layers, inverting a Z that several of them share once."""
        inverses: dict[int, DampedInverse] = {}
        return [self._one(layer, inverses) for layer in layers]

    def _chosen(self, layer: str) -> bool:
        attention = bool(_ATTENTION.search(layer)) and not _OTHER.search(layer)
        return self.layers == "all" or (self.layers == "attention") == attention

    def _one(self, layer: Layer, inverses: dict[int, DampedInverse]) -> Factors:
        if not self._chosen(layer.name):
            return as_lora(layer)
        if self.fisher == "none":
            return self._gradient_only(layer)
        G = layer.require_gradient()
        if not bool(G.count_nonzero()):
            return no_gradient(layer)
        kronecker = layer.require_kronecker()
        assert kronecker.outputs is not None  # as wanted
        Z = inverses.get(id(kronecker.inputs))
        if Z is None:
            # Only one input's inverse is held at a time.
            inverses.clear()
            Z = inverses[id(kronecker.inputs)] = damped_inverse(kronecker.inputs, self.damping)
        preconditioned, trace, damping_Y = self._outputs_solved(kronecker.outputs, double(G))
        delta = -(preconditioned @ Z.inverse)
        population = self.population or layer.training.population or self.samples
        space = guidance_space(
            Z.inverse,
            delta,
            layer.r,
            variance=self.variance * trace / population,
            bias=self.bias,
            factor=Z.matrix,
            tol=self.tol,
            iterations=self.iterations,
            seed=layer.seed,
        )
        # In float64: where damping is tiny, Delta leaves the range of float32.
        sigma = float((delta @ truncated_svd(delta, 1, tol=_SIGMA_TOLERANCE).V.to(delta)).norm())
        if not 0 < sigma < math.inf:
            raise LayerError(
                f"layer {layer.name!r}: -Y^-1 G Z^-1 has norm {sigma}, out of the range of numbers; raise damping."
            )
        scale = 1.0 / (sigma if self.normalize else 1.0)
        A0 = double(space.vectors)
        B = delta @ A0 * scale
        info = {
            "objective": space.objective * scale**2,
            "objective_error": space.error,
            "steps": float(space.iterations),
            "dense": float(space.exact),
            "condition": Z.condition,
            "damping": Z.damping,
            "damping_outputs": damping_Y,
            "sigma": sigma,
        }
        raised = [f"of inputs to {Z.damping:.0e}"] if Z.raised else []
        raised += [f"of output gradients to {damping_Y:.0e}"] if damping_Y > self.damping else []
        repair = f"damping {' and '.join(raised)}: with {self.damping:g}, rounding errors would rule" if raised else ""
        return self._scaled(A0, B, info, repair)

    def _gradient_only(self, layer: Layer) -> Factors:
        """Remark 4.3: A0 = V_r and Delta A0 = -U_r S_r."""
        svd, info = self.decompose(layer, layer.r)
        if svd is None:
            return no_gradient(layer)
        B = -svd.U * svd.S / (svd.S[0] if self.normalize else 1.0)
        return self._scaled(svd.V, B, info, "")

    def _scaled(self, A0: Tensor, B: Tensor, info: dict[str, float], repair: str) -> Factors:
        root = math.sqrt(self.gamma)
        return Factors((A0.T / root).float(), (B / root).float(), info=info, repair=repair)

    def _outputs_solved(self, outputs: Tensor, G: Tensor) -> tuple[Tensor, float, float]:
        """Return Y^-1 G, tr(Y^-1), and the damping used."""
        if outputs.dim() == 1:
            damping = float(self.damping)
            if damping == 0 and float(outputs.min()) <= 0:
                damping = max(float(torch.finfo(torch.float32).eps * double(outputs).mean()), 1e-30)
            inverse = 1.0 / (double(outputs) + damping)
            return inverse[:, None] * G, float(inverse.sum()), damping
        Y = damped_inverse(outputs, self.damping)
        return Y.inverse @ G, float(Y.inverse.diagonal().sum()), Y.damping
