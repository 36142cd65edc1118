"""Approximating matrices W by products B A: by Adam from a given start, or in closed form in a chosen gauge.

Any invertible M turns (B, A) into (B M, M^-1 A) with the same product. Adam isn't indifferent to that choice,
the gauge; descent fixes it through its start, the closed form by a rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.linalg.svd import TruncatedSVD

Gauge = Literal["balanced", "aligned", "random"]


@dataclass(frozen=True)
class LowRankFit:
    """Factors of n matrices and how well they fit.

    Attributes:
        A: (n, r, d_in), in the type of the matrices.
        B: (n, d_out, r), likewise.
        error: (n,) squared Frobenius norms of ``W - B A``, in float64.
        steps: (n,) Adam steps taken, int64.
    """

    A: Tensor
    B: Tensor
    error: Tensor
    steps: Tensor


@torch.no_grad()
def adam_lowrank(
    W: Tensor,
    A0: Tensor,
    B0: Tensor,
    *,
    steps: int = 20_000,
    lr: float = 5e-4,
    decay: float = 0.9,
    decay_every: int = 5_000,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    tolerance: float | None = None,
    optimum: Tensor | None = None,
    check_every: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> LowRankFit:
    """Minimise the mean over the entries of ``(W - B A)^2`` by Adam, for each of n matrices on its own.

    Each step is that of ``torch.optim.Adam`` under ``StepLR``. The gradients are taken in Gram form,
    ``2/(d_out d_in) (B (A A') - W A')`` for B and ``2/(d_out d_in) ((B'B) A - B'W)`` for A, so no residual of
    the size of W is formed. Defaults are those of IniLoRA (section 4.1 and the published code).

    Args:
        W: (n, d_out, d_in), float32 or float64; all is computed in this type, but for the errors (float64).
        A0: (n, r, d_in), the start.
        B0: (n, d_out, r), the start.
        steps: the most steps; 0 returns the start.
        lr: the rate, multiplied by ``decay`` after every ``decay_every`` steps.
        decay: see ``lr``.
        decay_every: see ``lr``.
        betas: of Adam.
        eps: of Adam.
        tolerance: a matrix whose squared error is at most ``(1 + tolerance) * optimum`` takes no more steps;
            None takes them all.
        optimum: (n,) the smallest possible squared errors (`eckart_young_tail`); needed with ``tolerance``.
        check_every: steps between looks at the error, and between calls of ``progress``.
        progress: called with (steps done, ``steps``).

    Raises:
        ValueError: where shapes or types don't fit, or a setting is out of its range.
    """
    _check_fit(W, A0, B0, steps, decay_every, check_every, tolerance, optimum)
    fitted_A, fitted_B = A0.detach().to(W, copy=True), B0.detach().to(W, copy=True)
    taken = torch.full((len(W),), steps, dtype=torch.int64, device=W.device)
    active = torch.arange(len(W), device=W.device)
    target, state = W.detach(), _Adam(fitted_A.clone(), fitted_B.clone(), betas, eps)
    for step in range(steps):
        if step % check_every == 0:
            if progress is not None:
                progress(step, steps)
            if tolerance is not None and optimum is not None:
                bound = (1 + tolerance) * optimum.to(W.device, torch.float64)[active]
                done = squared_error(target, state.A, state.B) <= bound
                if bool(done.any()):
                    fitted_A[active[done]], fitted_B[active[done]] = state.A[done], state.B[done]
                    taken[active[done]] = step
                    active, target = active[~done], target[~done]
                    state.keep(~done)
        if not len(active):
            break
        state.step(target, lr * decay ** (step // decay_every))
    fitted_A[active], fitted_B[active] = state.A, state.B
    if progress is not None:
        progress(steps, steps)
    return LowRankFit(fitted_A, fitted_B, squared_error(W, fitted_A, fitted_B), taken)


def squared_error(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return the squared Frobenius norms of ``W - B A``, (n,) in float64.

    As ``||W||^2 - 2 <W A', B> + <B'B, A A'>``: good to about 1e-15 times ``||W||^2``, and never below zero.

    Args:
        W: (n, d_out, d_in).
        A: (n, r, d_in).
        B: (n, d_out, r).
    """
    errors = W.new_zeros(len(W), dtype=torch.float64)
    # One at a time, so that a single matrix is held in float64.
    for i, (w, a, b) in enumerate(zip(W.detach(), A.detach().double(), B.detach().double(), strict=True)):
        w = w.double()
        cross = ((a @ w.mT) * b.mT).sum()
        errors[i] = w.square().sum() - 2 * cross + ((b.mT @ b) * (a @ a.mT)).sum()
    return errors.clamp_min(0.0)


def svd_lowrank_factors(
    svd: TruncatedSVD,
    gauge: Gauge,
    *,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(A, B)``, A (k, d_in) and B (d_out, k), with ``B A = U diag(S) V'``, in one of three gauges.

    - "balanced": ``B = U sqrt(S)``, ``A = sqrt(S) V'``.
    - "aligned": ``B Q`` and ``Q'A`` of these, with the orthogonal Q that brings them nearest to a start: it
      minimises ``||B Q - B0||^2 + ||Q'A - A0||^2``. Q changes no norm, which leaves
      ``tr(Q' (B'B0 + A A0'))`` to maximise: an orthogonal Procrustes problem, solved by ``Q = X Y'`` for the
      SVD ``X diag(.) Y'`` of the k by k matrix ``B'B0 + A A0'`` (Schönemann, 1966).
    - "random": likewise with Q uniform (Haar) among the orthogonal matrices.

    Args:
        svd: of the matrix to approximate.
        gauge: one of the above.
        A0: (k, d_in), for "aligned".
        B0: (d_out, k), for "aligned".
        generator: for "random", on the CPU; None takes torch's own.

    Returns:
        A and B in float32.

    Raises:
        ValueError: for an unknown gauge, or "aligned" without a fitting A0 and B0.
    """
    root = svd.S.double().sqrt()
    A, B = root[:, None] * svd.V.double().mT, svd.U.double() * root
    if gauge == "aligned":
        if A0 is None or B0 is None or A0.shape != A.shape or B0.shape != B.shape:
            raise ValueError(f'gauge "aligned" needs A0 {tuple(A.shape)} and B0 {tuple(B.shape)}')
        X, _, Yh = torch.linalg.svd(B.mT @ B0.detach().to(B) + A @ A0.detach().to(A).mT)
        Q = X @ Yh
        A, B = Q.mT @ A, B @ Q
    elif gauge == "random":
        Q = _haar(len(root), generator).to(A)
        A, B = Q.mT @ A, B @ Q
    elif gauge != "balanced":
        raise ValueError(f'gauge must be "balanced", "aligned" or "random", got {gauge!r}')
    return A.float(), B.float()


def _haar(size: int, generator: torch.Generator | None) -> Tensor:
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    # QR alone isn't uniform: it fixes signs by its own convention (Mezzadri, 2007).
    turned: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return turned


class _Adam:
    """torch.optim.Adam's update of a stack of factor pairs, of which some can be dropped on the way."""

    def __init__(self, A: Tensor, B: Tensor, betas: tuple[float, float], eps: float) -> None:
        self.A, self.B = A, B
        self.betas, self.eps, self.count = betas, eps, 0
        self.means = [torch.zeros_like(A), torch.zeros_like(B)]
        self.squares = [torch.zeros_like(A), torch.zeros_like(B)]

    def keep(self, chosen: Tensor) -> None:
        self.A, self.B = self.A[chosen], self.B[chosen]
        self.means = [mean[chosen] for mean in self.means]
        self.squares = [square[chosen] for square in self.squares]

    def step(self, W: Tensor, lr: float) -> None:
        scale = 2.0 / (W.shape[-2] * W.shape[-1])
        # As rows times a matrix, (W A')' = A W': thin blocks run faster so on a processor.
        grad_A = (self.B.mT @ self.B @ self.A).sub_(self.B.mT @ W).mul_(scale)
        grad_B = (self.B @ (self.A @ self.A.mT)).sub_((self.A @ W.mT).mT).mul_(scale)
        self.count += 1
        beta1, beta2 = self.betas
        rate = lr / (1 - beta1**self.count)
        root = math.sqrt(1 - beta2**self.count)
        parameters = (self.A, self.B)
        for parameter, grad, mean, square in zip(parameters, (grad_A, grad_B), self.means, self.squares, strict=True):
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            parameter.addcdiv_(mean, square.sqrt().div_(root).add_(self.eps), value=-rate)


def _check_fit(
    W: Tensor,
    A0: Tensor,
    B0: Tensor,
    steps: int,
    decay_every: int,
    check_every: int,
    tolerance: float | None,
    optimum: Tensor | None,
) -> None:
    if W.ndim != 3 or W.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected (n, d_out, d_in) in float32 or float64, got {tuple(W.shape)}, {W.dtype}")
    n, d_out, d_in = W.shape
    if A0.ndim != 3 or B0.shape != (n, d_out, A0.shape[1]) or (A0.shape[0], A0.shape[2]) != (n, d_in):
        raise ValueError(f"A0 {tuple(A0.shape)} and B0 {tuple(B0.shape)} don't fit W {tuple(W.shape)}")
    if steps < 0 or decay_every < 1 or check_every < 1:
        raise ValueError("steps can't be negative, and decay_every and check_every must be at least 1")
    if tolerance is not None and (optimum is None or optimum.shape != (n,)):
        raise ValueError("tolerance needs optimum, the smallest possible squared error of each matrix")
