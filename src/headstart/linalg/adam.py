"""Adam's descent on factor pairs of matrices of one shape: what `lowrank.adam_lowrank` runs.

A step reads W twice, in ``A W'`` and ``B'W``: 4 d_out d_in r operations. All else is of the factors' size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# What a descent asks before each step: whether to give up.
Stop = Callable[[], bool]

# The least rate: an update is a division by a number that is proportional to one over the rate.
_LEAST_RATE = 1e-30


@dataclass(frozen=True)
class Schedule:
    """``torch.optim.Adam`` under ``StepLR``: ``lr`` is multiplied by ``decay`` after every ``decay_every`` steps."""

    steps: int
    lr: float
    decay: float
    decay_every: int
    betas: tuple[float, float]
    eps: float

    def divisors(self, step: int) -> tuple[float, float]:
        """Return (c, e) of a step, counted from 0: it subtracts ``mean / (c sqrt(square) + e)``."""
        beta1, beta2 = self.betas
        rate = self.lr * self.decay ** (step // self.decay_every) / (1 - beta1 ** (step + 1))
        rate = max(rate, _LEAST_RATE)
        return 1 / (rate * math.sqrt(1 - beta2 ** (step + 1))), self.eps / rate


class StoppedError(Exception):
    """A descent was told to stop."""


@dataclass
class Path:
    """Where a descent of n matrices ended and how it came there.

    Attributes:
        A: (n, r, d_in).
        B: (n, d_out, r).
        steps: taken by each.
        history: of each, (step, squared error) on the way; the end is not among them.
    """

    A: Tensor
    B: Tensor
    steps: list[int]
    history: list[list[tuple[int, float]]]


@torch.no_grad()
def descend(
    W: Tensor,
    A0: Tensor,
    B0: Tensor,
    schedule: Schedule,
    *,
    good_enough: Tensor | None,
    check_every: int,
    keep_every: int,
    tell: Callable[[int], None],
    stop: Stop,
) -> Path:
    """Descend from the draws; matrices that are good enough leave the stack.

    Args:
        W: (n, d_out, d_in), contiguous; the type and device of all that is computed.
        A0: (n, r, d_in), the start.
        B0: (n, d_out, r), the start.
        schedule: the steps and their rates.
        good_enough: (n,) in float64, squared errors at which to stop; None takes all steps.
        check_every: steps between looks.
        keep_every: steps between the errors kept in the history, a multiple of ``check_every``.
        tell: called at each look with the steps taken so far.
        stop: asked before each step.

    Raises:
        StoppedError: ``stop`` was set.
    """
    n = len(W)
    path = Path(A0.to(W, copy=True), B0.to(W, copy=True), [schedule.steps] * n, [[] for _ in range(n)])
    active = torch.arange(n, dtype=torch.int64, device=W.device)
    descent = Descent(W, A0, B0, schedule)
    walker = _walker(descent, schedule, 0)
    for first in range(0, schedule.steps, check_every):
        tell(first)
        if good_enough is not None or first % keep_every == 0:
            errors = descent.squared_errors()
            if first % keep_every == 0:
                for i, error in zip(active.tolist(), errors.tolist(), strict=True):
                    path.history[i].append((first, error))
            done = torch.zeros_like(active, dtype=torch.bool) if good_enough is None else errors <= good_enough[active]
            if bool(done.any()):
                path.A[active[done]], path.B[active[done]] = descent.A[done], descent.B.mT[done]
                for i in active[done].tolist():
                    path.steps[i] = first
                active = active[~done]
                if not len(active):
                    return path
                descent.keep(~done)
                walker = _walker(descent, schedule, first)
        walker(min(check_every, schedule.steps - first), stop)
    path.A[active], path.B[active] = descent.A, descent.B.mT
    return path


class Descent:
    """n factor pairs and Adam's moments of them.

    The entries of a pair lie in one row, A (r, d_in) before B' (r, d_out), so that one call updates both. As rows of
    a thin block: times a matrix, those run several times faster on a processor than columns.
    """

    def __init__(self, W: Tensor, A0: Tensor, B0: Tensor, schedule: Schedule) -> None:
        self.W, self.schedule = W, schedule
        self.scale = 2.0 / (W.shape[-2] * W.shape[-1])
        self.weight = torch.linalg.vector_norm(W, dim=(1, 2), dtype=torch.float64).square()
        self.rank = A0.shape[1]
        self.values = torch.cat([A0.to(W).flatten(1), B0.mT.to(W).flatten(1)], dim=1)
        self.means, self.squares = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self._view()

    def keep(self, chosen: Tensor) -> None:
        """Go on with some of the pairs; ``chosen`` is (n,) of bool."""
        self.W, self.weight = self.W[chosen], self.weight[chosen]
        self.values, self.means, self.squares = self.values[chosen], self.means[chosen], self.squares[chosen]
        self._view()

    def _view(self) -> None:
        self.grads, self.scratch = torch.empty_like(self.values), torch.empty_like(self.values)
        self.gram = self.W.new_empty(len(self.W), self.rank, self.rank)
        self.A, self.B = self._split(self.values)
        self.grad_A, self.grad_B = self._split(self.grads)
        self.At, self.Bt = self.A.mT, self.B.mT
        self.times_W, self.times_Wt = _times(self.W, self.rank), _times(self.W.mT, self.rank)

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        (n, d_out, d_in), r = self.W.shape, self.rank
        return flat[:, : r * d_in].view(n, r, d_in), flat[:, r * d_in :].view(n, r, d_out)

    def step(self, c: float | Tensor, e: float | Tensor) -> None:
        """Take one step with the `Schedule.divisors` c and e; on a device, they may be tensors there."""
        beta1, beta2 = self.schedule.betas
        of_A, of_B = self.times_W(self.B), self.times_Wt(self.A)
        torch.bmm(self.B, self.Bt, out=self.gram)
        torch.baddbmm(of_A, self.gram, self.A, beta=-self.scale, alpha=self.scale, out=self.grad_A)
        torch.bmm(self.A, self.At, out=self.gram)
        torch.baddbmm(of_B, self.gram, self.B, beta=-self.scale, alpha=self.scale, out=self.grad_B)
        self.means.lerp_(self.grads, 1 - beta1)
        self.squares.mul_(beta2).addcmul_(self.grads, self.grads, value=1 - beta2)
        torch.sqrt(self.squares, out=self.scratch).mul_(c).add_(e)
        self.values.addcdiv_(self.means, self.scratch, value=-1)

    def squared_errors(self) -> Tensor:
        """Return the squared errors (n,) in float64: exact for the A W' of the working precision."""
        A, B = self.A.double(), self.B.double()
        cross = (self.times_Wt(self.A).double() * B).sum((1, 2))
        return (self.weight - 2 * cross + ((A @ A.mT) * (B @ B.mT)).sum((1, 2))).clamp_min(0.0)


def _times(W: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """Return X -> X W for stacks W (n, p, q) and X (n, rows, p).

    A product with a thin block takes a processor's library less time than putting W into the order that it computes
    in. Where torch's oneDNN can be given a matrix in that order, that is done once. (What torch.compile calls for the
    frozen weights of linear layers; twice as fast for 576x576 and rank 8.)
    """
    if len(W) == 1 and W.device.type == "cpu" and W.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(W[0].mT.contiguous(), rows)
            linear = torch.ops.mkldnn._linear_pointwise
            linear(W.new_zeros(rows, W.shape[1]), packed, None, "none", [], "")
            return lambda X: linear(X[0], packed, None, "none", [], "")[None]
        except (AttributeError, NotImplementedError, RuntimeError):
            pass  # a torch built without it, or one that calls it otherwise
    return lambda X: torch.bmm(X, W)


def _walker(descent: Descent, schedule: Schedule, first: int) -> Callable[[int, Stop], None]:
    """Return a function (count, stop) that takes so many steps more, from step ``first`` on."""
    step = OnDevice(descent, schedule, first).step if descent.W.is_cuda else _OnProcessor(descent, schedule, first).step

    def walk(count: int, stop: Stop) -> None:
        for _ in range(count):
            if stop():
                raise StoppedError
            step()

    return walk


class _OnProcessor:
    def __init__(self, descent: Descent, schedule: Schedule, first: int) -> None:
        self.descent, self.schedule, self.count = descent, schedule, first

    def step(self) -> None:
        self.descent.step(*self.schedule.divisors(self.count))
        self.count += 1


class OnDevice:
    """Steps whose divisors lie on the device, so that a CUDA graph can replay one: a launch in place of a dozen."""

    def __init__(self, descent: Descent, schedule: Schedule, first: int) -> None:
        self.descent = descent
        divisors = [schedule.divisors(step) for step in range(first, schedule.steps)]
        self.table = torch.tensor(divisors, dtype=descent.W.dtype, device=descent.W.device)
        self.count = torch.zeros(1, dtype=torch.int64, device=descent.W.device)
        self.taken = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        """Take the next step."""
        if self.graph is not None:
            self.graph.replay()
            return
        self.eager()
        self.taken += 1
        # What the first call of a kernel sets up can't be recorded.
        if self.taken == 1 and self.descent.W.is_cuda:
            self.graph = self._record()

    def eager(self) -> None:
        """Take the next step without the graph."""
        c, e = self.table.index_select(0, self.count)[0].unbind()
        self.descent.step(c, e)
        self.count.add_(1)

    def _record(self) -> torch.cuda.CUDAGraph | None:
        try:
            with torch.cuda.device(self.descent.W.device):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.eager()
            return graph
        except RuntimeError:
            # Not every device and library can; the steps are the same without.
            return None
