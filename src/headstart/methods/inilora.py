"""IniLoRA: the factors approximate the weight, by the paper's gradient descent or in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.errors import MethodError
from headstart.linalg.lowrank import adam_lowrank, squared_error, svd_lowrank_factors
from headstart.linalg.norms import squared_norm
from headstart.linalg.svd import TruncatedSVD, eckart_young_tail, truncated_svd_batch
from headstart.methods.base import Factors, Layer, Method, Wants, check_positive
from headstart.methods.draws import draw
from headstart.methods.registry import register
from headstart.progress import Show, silent


@register("inilora")
@dataclass(frozen=True)
class IniLoRA(Method):
    """IniLoRA: from A, B drawn normal(0, sigma_bar), minimise the mean of (W/s - B A)^2; s B A is subtracted.

    sigma_bar is the standard deviation of the weights, averaged over the target layers of one kind (all q_proj, all
    v_proj, ...); their averaged mean is taken as 0, as the published runs do. Published runs have s = 1; for any
    other s the target is W/s, so that s B A approximates W.

    Source: IniLoRA, section 3 (equations 1 to 3), settings from section 4.1 and the published code.

    Settings:
        solver: "svd", the closed form that the paper's descent converges to, and trains as well as
            (docs/results/inilora_gsm8k.md); or "adam", the descent itself, which takes some 3,000 times as long and
            alone knows the settings that follow.
        steps: of Adam; 0 leaves the draw (the paper's Table 7).
        lr: Adam's rate.
        decay, decay_every: the rate is multiplied by ``decay`` every ``decay_every`` steps.
        tolerance: stop a layer early once its squared error is within (1 + tolerance) of the smallest possible
            (Eckart-Young) one; None takes all steps, as published.
        gauge: for "svd", which of the equivalent factors: "aligned" (nearest to the draw, by orthogonal Procrustes),
            "flow" (aligned, with the norms that descent from the draw leaves), "random" (a random rotation),
            "balanced" (PiSSA's).
        std: the standard deviation of the draw in place of sigma_bar.
    """

    source: ClassVar[str] = "IniLoRA, section 3"
    cost: ClassVar[str] = "a truncated SVD, or 20,000 Adam steps a weight"
    keep: ClassVar[bool] = True

    solver: Literal["adam", "svd"] = "svd"
    steps: int = 20_000
    lr: float = 5e-4
    decay: float = 0.9
    decay_every: int = 5_000
    tolerance: float | None = None
    gauge: Literal["aligned", "flow", "random", "balanced"] = "aligned"
    std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, lr=self.lr, decay_every=self.decay_every, tolerance=self.tolerance, std=self.std)
        if not 0 < self.decay <= 1:
            raise MethodError(f"method {self.name!r}: decay={self.decay!r} must be above 0 and at most 1.")
        if self.steps < 0:
            raise MethodError(f"method {self.name!r}: steps={self.steps!r} must not be negative.")
        descent = ("steps", "lr", "decay", "decay_every", "tolerance")
        given = [name for name in descent if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if self.solver == "svd" and given:
            raise MethodError(
                f"method {self.name!r}: {given[0]} is of the descent: give solver=adam as well, or leave it out."
            )

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight is needed, and the moments of its kind where they scale the draw."""
        return Wants(weight=True, moments=self.std is None)

    def factors(self, layer: Layer) -> Factors:
        """Approximate one layer's weight."""
        return self.factors_batch([layer])[0]

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Approximate the weights of several layers of one shape and rank together; each as it would be alone."""
        rank, device = layers[0].r, layers[0].require_weight().device
        targets = [layer.require_weight() / layer.scaling for layer in layers]
        draws = [self._draw(layer) for layer in layers]
        svds = truncated_svd_batch(targets, rank)
        bounds = [_bound(target, svd) for target, svd in zip(targets, svds, strict=True)]
        histories: list[list[tuple[int, float]]] = [[] for _ in layers]
        if self.solver == "svd":
            pairs = []
            for layer, svd, (A0, B0) in zip(layers, svds, draws, strict=True):
                generator = layer.generator()
                pairs.append(svd_lowrank_factors(svd, self.gauge, A0=A0, B0=B0, generator=generator))
            A, B = (torch.stack(parts) for parts in zip(*pairs, strict=True))
            errors = squared_error(targets, A, B).tolist()
            steps = [0] * len(layers)
        else:
            fit = adam_lowrank(
                targets,
                torch.stack([A0 for A0, _ in draws]).to(device),
                torch.stack([B0 for _, B0 in draws]).to(device),
                steps=self.steps,
                lr=self.lr,
                decay=self.decay,
                decay_every=self.decay_every,
                tolerance=self.tolerance,
                optimum=torch.tensor(bounds, dtype=torch.float64, device=device),
                progress=partial(show, f"Adam, {len(layers)} of {layers[0].d_out}x{layers[0].d_in}"),
            )
            pairs = list(zip(fit.A, fit.B, strict=True))
            errors, steps, histories = fit.error.tolist(), fit.steps.tolist(), fit.history
        return [
            Factors(A, B, info={"error": error, "bound": bound, "steps": taken}, history=history)
            for (A, B), error, bound, taken, history in zip(pairs, errors, bounds, steps, histories, strict=True)
        ]

    def _draw(self, layer: Layer) -> tuple[Tensor, Tensor]:
        std = layer.require_moments().std if self.std is None else self.std
        generator = layer.generator()
        A0 = draw((layer.r, layer.d_in), "normal", std, generator)
        return A0, draw((layer.d_out, layer.r), "normal", std, generator)


def _bound(target: Tensor, svd: TruncatedSVD) -> float:
    """Return the smallest possible squared error; 0 where it is below what singular values in float32 can tell."""
    tail = eckart_young_tail(target, svd)
    return tail if tail > 1e-6 * squared_norm(target) else 0.0
