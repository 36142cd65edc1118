"""Mean and standard deviation of the weights, averaged over the layers of a kind."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor

from headstart.linalg.norms import in_double
from headstart.methods.base import Moments


def kind_moments(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Moments]:
    """Return each kind's moments: IniLoRA, equations 1 and 2.

    Args:
        weights: (kind, weight) of every target layer, each weight looked at once.

    Returns:
        By kind, the mean of the layers' means and the mean of their standard deviations (of the whole matrix, without
        Bessel's correction).
    """
    means: dict[str, list[float]] = defaultdict(list)
    deviations: dict[str, list[float]] = defaultdict(list)
    for kind, weight in weights:
        mean = sum(float(part.sum()) for _, part in in_double(weight)) / weight.numel()
        square = sum(float(part.sub_(mean).square_().sum()) for _, part in in_double(weight)) / weight.numel()
        means[kind].append(mean)
        deviations[kind].append(math.sqrt(square))
    return {
        kind: Moments(sum(means[kind]) / len(means[kind]), sum(deviations[kind]) / len(deviations[kind]))
        for kind in means
    }
