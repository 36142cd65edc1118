"""EVA: the directions in which a layer's inputs vary most, and ranks where they explain most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import MethodError
from headstart.linalg.precision import double
from headstart.linalg.svd import truncated_svd
from headstart.methods.base import Factors, Form, Kronecker, Layer, Method, Wants, check_positive
from headstart.methods.registry import register
from headstart.methods.zero import as_lora
from headstart.progress import Show, silent

# The sums are float32: a variance below their rounding, relative to the mean square of all inputs, says nothing.
_NOISE = torch.finfo(torch.float32).eps


@register("eva")
@dataclass(frozen=True)
class EVA(Method):
    """EVA: A = the r leading eigenvectors of Z - m m', as rows; B = 0; kept.

    Z is the mean of x x' over tokens and m that of x, so these are the leading principal components of the layer's
    inputs, exactly: what the published incremental SVD converges to.

    Ranks are shared out: each layer offers up to floor(rho r) components (and no more than its smaller side), and of
    all layers' components those with the largest explained-variance ratios (their variance over the layer's total) are
    taken, as many as the ranks add up to. Equal ones go to the earlier layer. A layer that is left without any loses
    its adapter; one that no input reached keeps its rank. With ``rho=1`` all ranks stay.

    Source: EVA (Paischer et al. 2024), section 3, and its published code; PEFT's ``init_lora_weights="eva"``.

    Settings:
        samples: how many samples Z and m are means over.
        rho: how much larger a layer's rank may become.
        tokens: means over the tokens that predict a label (the published code's are those that have one), or over all
            that the attention mask shows.
        whiten: divide row i by the root of the i-th singular value of the centred inputs (all tokens, not their mean).
        adjust_scaling: lora_alpha follows the rank, so that s stays; else s follows it, and lora_alpha stays.
    """

    source: ClassVar[str] = "EVA (Paischer et al. 2024), section 3"
    cost: ClassVar[str] = "a forward pass over the samples, an eigenproblem an input"
    form: ClassVar[Form] = "kept"

    samples: int = 256
    rho: float = 2.0
    tokens: Literal["attention", "labels"] = "labels"
    whiten: bool = False
    adjust_scaling: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, samples=self.samples)
        if not 1 <= self.rho < math.inf:
            raise MethodError(f"method {self.name!r}: rho={self.rho!r} must be at least 1 and finite.")

    def wants(self, layer: Layer) -> Wants:
        """Return that the moments of the inputs are needed."""
        return Wants(inputs=True, tokens=self.tokens)

    def factors(self, layer: Layer) -> Factors:
        """Decompose the inputs of one layer."""
        return self.factors_batch([layer])[0]

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Decompose inputs, those that several layers share once."""
        most: dict[int, int] = {}
        for layer in layers:
            if layer.kronecker is not None:
                key = id(layer.kronecker.inputs)
                most[key] = max(most.get(key, 0), self._offered(layer))
        components: dict[int, _Components] = {}
        starts = []
        for layer in layers:
            if layer.kronecker is None:
                note = "no input reached this layer in the samples; it starts as 'lora' does"
                starts.append(as_lora(layer, note))
                continue
            key = id(layer.kronecker.inputs)
            if key not in components:
                components[key] = _components(layer.kronecker, most[key])
            starts.append(self._start(layer, components[key]))
        return starts

    @property
    def shares_ranks(self) -> bool:
        """Whether layers may get other ranks than they have."""
        return self.rho > 1

    def settle(self, starts: Mapping[str, Factors], ranks: Mapping[str, int]) -> dict[str, Factors]:
        """Give the ranks to the components that explain most, and take these for A."""
        sharing = [name for name in ranks if starts[name].worth]
        offers = [(-worth, place, name) for place, name in enumerate(sharing) for worth in starts[name].worth]
        taken = Counter(name for _, _, name in sorted(offers)[: sum(ranks[name] for name in sharing)])
        settled = dict(starts)
        for name in sharing:
            settled[name] = self._of_rank(starts[name], taken[name])
        return settled

    def _offered(self, layer: Layer) -> int:
        """Return how many components a layer offers."""
        return max(layer.r, min(math.floor(layer.r * self.rho), layer.d_out, layer.d_in))

    def _start(self, layer: Layer, components: _Components) -> Factors:
        offered = self._offered(layer)
        rows, worth = components.rows[:offered], components.ratios[:offered]
        if self.whiten:
            # What doesn't vary has no scale of its own.
            singular = components.singular[:offered, None]
            rows = rows / torch.where(singular > 0, singular.sqrt(), 1.0)
        B = torch.zeros(layer.d_out, layer.r, dtype=torch.float32, device=rows.device)
        return Factors(
            rows[: layer.r].float().contiguous(),
            B,
            spare=rows[layer.r :].float().contiguous(),
            worth=tuple(worth),
            info={"variance": components.variance, "varying": float(components.varying)},
            keeps="scaling" if self.adjust_scaling else "alpha",
        )

    def _of_rank(self, start: Factors, rank: int) -> Factors:
        assert start.spare is not None  # as _start gave it
        A = torch.cat((start.A, start.spare))[:rank]
        # Not B itself: its memory is that of all columns.
        B = start.B.new_zeros(len(start.B), rank)
        info = {**start.info, "explained": math.fsum(start.worth[:rank])}
        varying = int(info.pop("varying"))
        note = start.note
        if varying < rank:
            few = f"its inputs vary in {varying} directions, fewer than its rank, so that A's other rows are arbitrary"
            note = "; ".join(filter(None, (note, few)))
        return replace(start, A=A, B=B, spare=None, worth=(), info=info, note=note)


@dataclass(frozen=True)
class _Components:
    """Principal components of a layer's inputs.

    Attributes:
        rows: (k, d_in), orthonormal, in descending order of variance.
        ratios: of each, its variance over the sum of all variances.
        singular: (k,), singular values of the centred inputs of all tokens.
        variance: the sum of all variances.
        varying: how many of the k have a variance beyond rounding.
    """

    rows: Tensor
    ratios: list[float]
    singular: Tensor
    variance: float
    varying: int


def _components(kronecker: Kronecker, count: int) -> _Components:
    """Return the ``count`` leading principal components."""
    second = double(kronecker.inputs)
    mean = double(kronecker.mean_input).to(second.device)
    # Products in float32 aren't symmetric to the last digit.
    centred = torch.lerp(second, second.mT, 0.5) - torch.outer(mean, mean)
    rows = double(truncated_svd(centred, count).V).mT
    # Rounding can leave a small eigenvalue negative, which a singular value would hide.
    variances = ((rows @ centred) * rows).sum(1)
    varying = int((variances > _NOISE * second.diagonal().sum()).sum())
    variances = variances.clamp_min(0.0)
    total = float(centred.diagonal().sum())
    ratios = (variances / total).tolist() if total > 0 else [0.0] * count
    return _Components(rows, ratios, (variances * kronecker.tokens).sqrt(), max(total, 0.0), varying)
