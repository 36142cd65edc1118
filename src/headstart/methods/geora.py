"""GeoRA: PiSSA's start of a weight of which only the small entries are left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headstart.errors import MethodError
from headstart.linalg.precision import double, one_thread_each
from headstart.linalg.svd import truncated_svd
from headstart.methods.base import Factors, Layer, Method, Wants
from headstart.methods.registry import register
from headstart.methods.spectral import split_evenly
from headstart.progress import Show, silent

# Of the first decomposition: an entry beside a quantile comes or goes whole, so that an error moves W_geo by its root.
_TOLERANCE = 1e-7


@register("geora")
@dataclass(frozen=True)
class GeoRA(Method):
    """GeoRA: with W_geo = U S V', B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r', so s B A = U_r S_r V_r'; subtracted.

    W_geo is W with zeros in place of all entries but those where |W| is at or below its own rho-quantile, or |W_r| at
    or below its own, W_r being W's best approximation of rank r. What is subtracted comes off W, not off W_geo. A
    weight of zeros starts as ``lora`` does.

    Source: GeoRA (arXiv 2601.09361), by an implementation that is not its authors', with lora_alpha = r; dividing by
    s keeps its product at any other.

    Settings:
        rho: the share of the entries that each of the two conditions lets through, above 0; 1 is ``pissa``.
    """

    source: ClassVar[str] = "GeoRA (arXiv 2601.09361)"
    cost: ClassVar[str] = "two truncated SVDs of each weight"
    keep: ClassVar[bool] = True

    rho: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rho <= 1:
            raise MethodError(f"method {self.name!r}: rho={self.rho!r} must be above 0 and at most 1.")

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight is needed."""
        return Wants(weight=True)

    def factors(self, layer: Layer) -> Factors:
        """Decompose the weight of one layer, and then what is left of it."""
        return self.factors_batch([layer])[0]

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Decompose the weights of several layers of one shape and rank at once."""
        if any(layer.require_weight().device.type != "cpu" for layer in layers):
            return [self._start(layer) for layer in layers]
        return one_thread_each(self._start, layers)

    def _start(self, layer: Layer) -> Factors:
        W = layer.require_weight()
        svd = truncated_svd(double(W), layer.r, tol=_TOLERANCE)
        W = W.to(svd.U.device)
        image = (svd.U * svd.S) @ svd.V.T
        stays = image.abs() <= _quantile(image.abs(), self.rho)
        del image
        stays |= W.abs() <= _quantile(W.abs(), self.rho)
        share = float(stays.count_nonzero()) / stays.numel()
        return split_evenly(layer, truncated_svd(torch.where(stays, W, 0.0), layer.r), share_of_entries=share)


def _quantile(values: Tensor, rho: float) -> Tensor:
    """Return the largest value at or below the rho-quantile, which torch.quantile refuses above 16 million values."""
    return values.flatten().kthvalue(math.floor(rho * (values.numel() - 1)) + 1).values
