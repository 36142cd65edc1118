"""LoRA-DA: factors from the gradient and the Fisher information of the fine-tuning data."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import LayerError, MethodError
from headstart.linalg.damped import DampedInverse, damped_inverse, factored_damping, numerical_rank
from headstart.linalg.guidance import guidance_space
from headstart.linalg.halves import agreement
from headstart.linalg.precision import double
from headstart.linalg.svd import truncated_svd
from headstart.methods.base import Factors, Form, Layer, Wants, check_positive
from headstart.methods.gradient import GradientMethod, no_gradient
from headstart.methods.registry import register
from headstart.methods.zero import as_lora
from headstart.progress import Show, silent

# The square of this is how far the largest singular value may be off, relatively.
_SIGMA_TOLERANCE = 1e-3
_EPS = torch.finfo(torch.float32).eps
_ATTENTION = re.compile(r"attn|attention|(^|\.)(q|k|v|o|out|query|key|value|qkv)(_?proj)?$", re.IGNORECASE)
# Inside these, names as attention has them mean something else.
_OTHER = re.compile(
    r"(^|\.)(ff|ffn|mlp|feed_?forward|mixer|experts?|classifier|pooler|score|lm_head)(\.|$)", re.IGNORECASE
)


# What the variance term stands for: see LoRADA.
Noise = Literal["published", "tokens", "unbiased"]


@dataclass(frozen=True)
class _Preset:
    """Settings that go together.

    Attributes:
        relative: damping is relative to the factors' mean diagonals.
        damping, noise: what these settings are where they are None.
    """

    relative: bool
    damping: float
    noise: Noise


_PRESETS = {
    "published": _Preset(relative=False, damping=1e-6, noise="published"),
    "scale-free": _Preset(relative=True, damping=0.1, noise="unbiased"),
}


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
        preset: "published" as the published code has it: ``damping`` is added to the diagonals of Y and Z as it is,
            1e-6, in whichever units the loss and the inputs have, and ``noise`` is "published". "scale-free", which no
            unit matters to: sqrt(damping) times its own mean diagonal is added to each of them (Martens and Grosse's
            factored split), with a damping of 0.1, and ``noise`` is "unbiased".
        damping: None for the preset's; raised where Z could not be inverted (the report says where).
        population: N, the size of the training set; None for the number that the verb knows of, else ``samples``.
        fisher: Y's diagonal, as published, all of it, or no Fisher information at all: Delta = -G, which leaves no
            variance term either (set ``variance=0``), and A0 the leading right singular vectors of G (Remark 4.3).
        tokens: Y and Z are means over the tokens that the attention mask shows, or over those with a label.
        normalize: divide Delta by its largest singular value (Omega by its square, which leaves A0 as it is).
        noise: what the first term of Omega counts; None for the preset's. "published": tr(Y^-1) / N Z^-1. "tokens":
            T times that, as the Fisher information of Theorem 4.2 is that of a sample, and a sample has T tokens (of
            those that Y is a mean over). "unbiased": and what the n samples' own noise adds to Delta'Delta in the mean,
            T / n times ``bias``. In the last two Y^-1 Y0 Y^-1, with Y0 undamped, is in place of Y^-1, and in what is
            added for n samples the same of Z: where damping rules there is less noise than the inverse says.
        variance: weight of that term; None for 0.03 where ``noise`` is "published", as in the published code, else 1. 0
            is the ablation "w/o var".
        bias: weight of the second term; 0 is the ablation "w/o bias".
        gamma: 1024 in the published code.
        tol: how far tr(A0' Omega A0) may be from its optimum, relative to it.
        iterations: None to solve to ``tol``; a number for so many steps of LOBPCG from a random start, whatever they
            leave: 10 in the published code.
        scale: "published"; or "search": that multiple of it, the same for all layers, which lowers the loss of further
            samples most (:mod:`headstart.statistics.search`).
        layers: where to use the method; the layers left out start as 'lora' does (appendix I).
        halves: measure the noise of Delta by two halves of the samples (see :mod:`headstart.statistics.halves`). The
            start is the same without; this takes a second sum as large as G, and reads each batch in two parts.

    In the report's ``info`` of a layer, beside what its arithmetic did:
        noise: what the samples' noise is expected to hold of Delta's squared norm, by the Fisher factors, relative to
            what it has: about 1 where there is nothing else. These take a sample's tokens for independent; where they
            aren't, there is more.
        variance_share: of both terms of Omega in the chosen directions, the share of the first.
        rank_inputs: the numerical rank of Z.
        energy_inputs: the share of the inputs' mean square along the chosen directions; r / d_in of any others.
        noise_halves, cosine_halves: with ``halves``, what of Delta's squared norm is noise by two halves of the samples
            (Y and Z being those of all), and the cosine of the two Deltas; absent where there is but one sample. The
            report cautions where noise has more than half.
        in_rounding, in_noise: how many of the chosen directions have no more input than rounding errors, and how many
            no more of Delta than the samples' noise alone could have there. The report cautions where there are any.
    """

    source: ClassVar[str] = "LoRA-DA, Theorem 4.2, Algorithm 1"
    cost: ClassVar[str] = "a gradient pass over the samples, an inverse and an eigenproblem a layer"
    form: ClassVar[Form] = "kept"

    preset: Literal["published", "scale-free"] = "published"
    damping: float | None = None
    population: int | None = None
    fisher: Literal["diagonal", "full", "none"] = "diagonal"
    tokens: Literal["attention", "labels"] = "attention"
    normalize: bool = True
    noise: Noise | None = None
    variance: float | None = None
    bias: float = 1.0
    gamma: float = 1024.0
    tol: float = 1e-6
    iterations: int | None = None
    scale: Literal["published", "search"] = "published"
    layers: Literal["all", "attention", "feed-forward"] = "all"
    halves: bool = False

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
            if value is not None and not 0 <= value < math.inf:
                raise MethodError(f"method {self.name!r}: {setting}={value!r} must be at least 0 and finite.")
        if self.variance == 0 and self.bias == 0:
            raise MethodError(f"method {self.name!r}: variance and bias are both 0, which leaves nothing to choose by.")
        if self.fisher == "none" and self.variance != 0:
            raise MethodError(f"method {self.name!r}: without Fisher information there is no variance; set variance=0.")

    def wants(self, layer: Layer) -> Wants:
        """Return what to collect for a layer: nothing where it starts as 'lora' does."""
        if not self._chosen(layer.name):
            return Wants()
        wants = replace(super().wants(layer), halves=self.halves)
        if self.fisher == "none":
            return wants
        return replace(wants, outputs=self.fisher, tokens=self.tokens, population=self.population is None)

    def factors(self, layer: Layer) -> Factors:
        """Solve one layer."""
        return self.factors_batch([layer])[0]

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Solve layers, inverting a Z that several of them share once."""
        inputs: dict[int, _Inputs] = {}
        return [self._one(layer, inputs) for layer in layers]

    def _chosen(self, layer: str) -> bool:
        attention = bool(_ATTENTION.search(layer)) and not _OTHER.search(layer)
        return self.layers == "all" or (self.layers == "attention") == attention

    def _settled(self) -> _Preset:
        """Return the preset, with what the settings have in its place."""
        preset = _PRESETS[self.preset]
        damping = preset.damping if self.damping is None else float(self.damping)
        return replace(preset, damping=damping, noise=self.noise or preset.noise)

    def _one(self, layer: Layer, shared: dict[int, _Inputs]) -> Factors:
        if not self._chosen(layer.name):
            return as_lora(layer)
        if self.fisher == "none":
            return self._gradient_only(layer)
        G = layer.require_gradient()
        if not bool(G.count_nonzero()):
            return no_gradient(layer)
        kronecker = layer.require_kronecker()
        assert kronecker.outputs is not None  # as wanted
        settled = self._settled()
        asked = (settled.damping, settled.damping)
        if settled.relative:
            asked = factored_damping(kronecker.inputs, kronecker.outputs, settled.damping)
        samples = layer.samples or self.samples
        population = self.population or layer.training.population or self.samples
        inputs = shared.get(id(kronecker.inputs))
        if inputs is None:
            # Only one input's inverse is held at a time.
            shared.clear()
            own_noise = self.bias * population / samples if settled.noise == "unbiased" and self.variance != 0 else 0.0
            inputs = shared[id(kronecker.inputs)] = _Inputs.of(kronecker.inputs, asked[0], own_noise)
        Z = inputs.solved
        G = G if layer.half is None else torch.cat((G, layer.half.gradient), 1)
        outputs = _Outputs.of(kronecker.outputs, double(G), asked[1])
        delta, *delta_of_half = (-(part @ Z.inverse) for part in outputs.preconditioned.split(layer.d_in, 1))
        # Of one sample: as many rows of g and x as a sample has.
        spread = outputs.spread * kronecker.tokens / samples
        if settled.noise == "published":
            weight = (0.03 if self.variance is None else self.variance) * outputs.trace / population
        else:
            weight = (1.0 if self.variance is None else self.variance) * spread / population
        space = guidance_space(
            inputs.variance,
            delta,
            layer.r,
            variance=weight,
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
        moved = delta @ A0
        # Of Delta, by the samples that it was measured on.
        on_outputs = (spread / samples, outputs.largest_spread * kronecker.tokens / samples**2)
        noise = _Chosen.of(A0, moved, inputs, *on_outputs)
        # Over sigma, so that squares stay in the range of numbers.
        spread_there = weight / sigma * float((A0 * (inputs.variance @ A0)).sum()) / sigma
        held_there = self.bias * float((moved / sigma).square().sum())
        expected = math.sqrt(on_outputs[0] * Z.spread_trace()) / sigma
        info = {
            "objective": space.objective * scale**2,
            "objective_error": space.error,
            "steps": float(space.iterations),
            "dense": float(space.exact),
            "condition": Z.condition,
            "damping": Z.damping,
            "damping_outputs": outputs.damping,
            "sigma": sigma,
            "variance_share": spread_there / (spread_there + held_there) if spread_there > 0 else 0.0,
            "noise": (expected / float((delta / sigma).norm())) ** 2,
            "rank_inputs": float(inputs.rank),
            "energy_inputs": noise.energy,
            "in_rounding": float(noise.in_rounding),
            "in_noise": float(noise.in_noise),
        }
        causes = noise.causes(inputs.rank, layer.r) + _by_halves(info, layer, delta, *delta_of_half)
        raised = [f"of inputs to {Z.damping:.0e}"] if Z.raised else []
        raised += [f"of output gradients to {outputs.damping:.0e}"] if outputs.damping > asked[1] else []
        less = f"{math.sqrt(settled.damping):g} of mean diagonals" if settled.relative else f"{settled.damping:g}"
        repair = f"damping {' and '.join(raised)}: with {less}, rounding errors would rule" if raised else ""
        return self._scaled(A0, moved * scale, info, repair, causes)

    def _gradient_only(self, layer: Layer) -> Factors:
        """Remark 4.3: A0 = V_r and Delta A0 = -U_r S_r."""
        svd, info = self.decompose(layer, layer.r)
        if svd is None:
            return no_gradient(layer)
        B = -svd.U * svd.S / (svd.S[0] if self.normalize else 1.0)
        of_half = [] if layer.half is None else [layer.half.gradient]
        return self._scaled(svd.V, B, info, causes=_by_halves(info, layer, layer.require_gradient(), *of_half))

    def _scaled(
        self, A0: Tensor, B: Tensor, info: dict[str, float], repair: str = "", causes: Sequence[str] = ()
    ) -> Factors:
        root = math.sqrt(self.gamma)
        caution = f"noise may decide the start: {', and '.join(causes)}" if causes else ""
        return Factors((A0.T / root).float(), (B / root).float(), info=info, repair=repair, caution=caution)


@dataclass(frozen=True)
class _Inputs:
    """What the layers that read one input share.

    Attributes:
        moment: Z undamped (d_in, d_in), as it was given.
        solved: its damped inverse.
        variance: (d_in, d_in), the variance term but for its weight.
        rank: the numerical rank of Z.
    """

    moment: Tensor
    solved: DampedInverse
    variance: Tensor
    rank: int

    @classmethod
    def of(cls, moment: Tensor, damping: float, own_noise: float) -> _Inputs:
        """Solve one; ``own_noise`` is the weight of what the samples' own noise leaves, relative to the inverse's."""
        solved = damped_inverse(moment, damping)
        variance = solved.inverse + own_noise * solved.spread() if own_noise else solved.inverse
        return cls(moment, solved, variance, numerical_rank(moment))


@dataclass(frozen=True)
class _Outputs:
    """What Y does to one layer.

    Attributes:
        preconditioned: Y^-1 times what was given.
        trace: of Y^-1, damped.
        spread, largest_spread: trace and largest eigenvalue of Y^-1 Y0 Y^-1, with Y0 undamped.
        damping: the one used.
    """

    preconditioned: Tensor
    trace: float
    spread: float
    largest_spread: float
    damping: float

    @classmethod
    def of(cls, moment: Tensor, G: Tensor, damping: float) -> _Outputs:
        """Solve one: Y0 is (d_out,), its diagonal, or (d_out, d_out); G (d_out, any number)."""
        if moment.dim() == 1:
            diagonal = double(moment)
            if damping == 0 and float(diagonal.min()) <= 0:
                damping = max(float(_EPS * diagonal.mean()), 1e-30)
            inverse = 1.0 / (diagonal + damping)
            spread = inverse.square() * diagonal.clamp_min(0)
            return cls(inverse[:, None] * G, float(inverse.sum()), float(spread.sum()), float(spread.max()), damping)
        Y = damped_inverse(moment, damping)
        trace = float(Y.inverse.diagonal().sum())
        return cls(Y.inverse @ G, trace, Y.spread_trace(), Y.spread_norm(), Y.damping)


@dataclass(frozen=True)
class _Chosen:
    """How much the directions of A0 stand out from noise.

    Attributes:
        energy: the share of the inputs' mean square that lies along them.
        in_rounding: how many hold no more of it than the rounding errors of sums in float32.
        in_noise: how many hold no more of Delta than the samples' noise alone could, however they were chosen.
    """

    energy: float
    in_rounding: int
    in_noise: int

    @classmethod
    def of(cls, A0: Tensor, moved: Tensor, inputs: _Inputs, spread: float, largest: float) -> _Chosen:
        """Measure.

        Noise of Delta is taken to be Gaussian, of the covariance that the Fisher factors give it: S (x) T for outputs
        and inputs. Along a fixed direction v it has tr(S) v'Tv in the mean, but directions that were chosen for it may
        have more: up to (sqrt(tr S) + sqrt(|S| d_in))^2 v'Tv, and (sqrt(tr S |T|) + sqrt(|S| tr T))^2 (Chevet).

        Args:
            A0: (d_in, r), orthonormal.
            moved: Delta A0.
            inputs: of the layer.
            spread, largest: the trace of S and its largest eigenvalue.
        """
        moment, Z = double(inputs.moment), inputs.solved
        diagonal = moment.diagonal().clamp_min(0)
        energies = (A0 * (moment @ A0)).sum(0).clamp_min(0)
        alone = A0.square().T @ diagonal
        image = Z.inverse @ A0
        along = (A0 * image).sum(0) - Z.damping * image.square().sum(0)
        chosen = (math.sqrt(spread) + math.sqrt(largest * len(A0))) ** 2 * along
        most = (math.sqrt(spread * Z.spread_norm()) + math.sqrt(largest * Z.spread_trace())) ** 2
        total = float(diagonal.sum())
        return cls(
            energy=float(energies.sum()) / total if total > 0 else 0.0,
            in_rounding=int((energies <= len(A0) * _EPS * alone).sum()),
            in_noise=int((moved.square().sum(0) <= chosen.clamp_max(most)).sum()),
        )

    def causes(self, rank: int, r: int) -> list[str]:
        """Return why noise may decide what A0 is."""
        causes = []
        if rank < r:
            causes.append("the inputs of the samples span fewer directions than the rank")
        if self.in_rounding:
            causes.append("along some of the chosen directions inputs have no more than rounding errors")
        if self.in_noise:
            causes.append("Delta is no larger along some of the chosen directions than sampling noise alone could be")
        return causes


def _by_halves(info: dict[str, float], layer: Layer, delta: Tensor, first: Tensor | None = None) -> list[str]:
    """Add to a layer's numbers what two halves of Delta say, where there are; return why noise may decide the start."""
    if layer.half is None or first is None:
        return []
    cosine, noise = agreement(delta, first, layer.half.share)
    info |= {"noise_halves": noise, "cosine_halves": cosine}
    return ["by two halves of the samples more than half of Delta's squared norm is noise"] if noise > 0.5 else []
