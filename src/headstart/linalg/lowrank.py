"""Approximating matrices W by products B A: by Adam from a given start, or in closed form in a chosen gauge.

Any invertible M turns (B, A) into (B M, M^-1 A) with the same product. Adam isn't indifferent to that choice,
the gauge; descent fixes it through its start, the closed form by a rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event
from typing import Literal

import torch
from torch import Tensor

from headstart.linalg.adam import Path, Schedule, Stop, descend
from headstart.linalg.norms import in_double, squared_norm
from headstart.linalg.precision import double, solving_device
from headstart.linalg.svd import TruncatedSVD

_CHECK_SECONDS = 1.0

Gauge = Literal["balanced", "aligned", "flow", "random"]


@dataclass(frozen=True)
class LowRankFit:
    """Factors of n matrices and how well they fit.

    Attributes:
        A: (n, r, d_in), in the type of the matrices.
        B: (n, d_out, r), likewise.
        error: (n,) squared Frobenius norms of ``W - B A``, in float64.
        steps: (n,) Adam steps taken, int64.
        history: of each matrix, about a hundred (step, mean over the entries of ``(W - B A)^2``) on the way, the
            start and the end among them.
    """

    A: Tensor
    B: Tensor
    error: Tensor
    steps: Tensor
    history: list[list[tuple[int, float]]]


@torch.no_grad()
def adam_lowrank(
    W: Tensor | Sequence[Tensor],
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

    On a processor, as many matrices run at once as torch has threads, each on one thread from its first step to its
    last, which keeps it in that core's cache: what comes out for a matrix is the same bit for bit, whatever comes with
    it and however many threads there are. Elsewhere all run as one stack, in batched products.

    Args:
        W: (n, d_out, d_in), float32 or float64, or a sequence of such matrices; all is computed in this type, but for
            the errors (float64).
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
        progress: called with (steps done, ``steps``), the first averaged over the matrices; an exception that it
            raises ends the descent.

    Raises:
        ValueError: where shapes or types don't fit, or a setting is out of its range.
    """
    _check_fit(W, A0, B0, steps, lr, decay_every, check_every, tolerance, optimum)
    device = solving_device(W[0].device)
    W, A0, B0 = [w.detach().to(device) for w in W], A0.to(device), B0.to(device)
    schedule = Schedule(steps, lr, decay, decay_every, betas, eps)
    good_enough = None
    if tolerance is not None and optimum is not None:
        good_enough = (1 + tolerance) * double(optimum).to(device)
    # Of the looks, as many as leave a hundred.
    keep_every = check_every * max(1, math.ceil(steps / (100 * check_every)))

    @torch.no_grad()
    def run(chosen: slice, tell: Callable[[int], None], stop: Stop) -> LowRankFit:
        # A copy: it begins where vector instructions like it, as the same matrix alone would.
        stack = torch.stack(W[chosen])
        path = descend(
            stack,
            A0[chosen].detach(),
            B0[chosen].detach(),
            schedule,
            good_enough=None if good_enough is None else good_enough[chosen],
            check_every=check_every,
            keep_every=keep_every,
            tell=tell,
            stop=stop,
        )
        errors = squared_error(stack, path.A, path.B)
        return LowRankFit(
            path.A,
            path.B,
            errors,
            torch.tensor(path.steps, dtype=torch.int64, device="cpu"),
            _history(path, errors, W[0].numel()),
        )

    n = len(W)
    alone = device.type == "cpu"
    fits = _run_all(run, [slice(i, i + 1) for i in range(n)] if alone else [slice(0, n)], steps, progress)
    return LowRankFit(
        A=torch.cat([fit.A for fit in fits]),
        B=torch.cat([fit.B for fit in fits]),
        error=torch.cat([fit.error for fit in fits]),
        steps=torch.cat([fit.steps for fit in fits]).to(device),
        history=[history for fit in fits for history in fit.history],
    )


def _history(path: Path, errors: Tensor, entries: int) -> list[list[tuple[int, float]]]:
    """Return each matrix's means over the entries, the end last."""
    return [
        [(step, error / entries) for step, error in way if step < last] + [(last, end / entries)]
        for way, last, end in zip(path.history, path.steps, errors.tolist(), strict=True)
    ]


def _run_all(
    run: Callable[[slice, Callable[[int], None], Stop], LowRankFit],
    slices: Sequence[slice],
    steps: int,
    progress: Callable[[int, int], None] | None,
) -> list[LowRankFit]:
    """Run the descents, as many at once as torch has threads, each on one; ``progress`` is called in this thread."""
    threads, stop = torch.get_num_threads(), Event()
    messages: SimpleQueue[tuple[int, int]] = SimpleQueue()
    done = [0] * len(slices)

    def descend_slice(i: int) -> LowRankFit:
        try:
            return run(slices[i], lambda step: messages.put((i, step)), stop.is_set)
        finally:
            messages.put((i, -1))

    try:
        workers = min(threads, len(slices))
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(descend_slice, i) for i in range(len(slices))]
            try:
                ended = 0
                while ended < len(futures):
                    try:
                        i, step = messages.get(timeout=_CHECK_SECONDS)
                    except Empty:
                        # A thread that could not begin says nothing, but for its error.
                        for future in futures:
                            if future.done():
                                future.result()
                        continue
                    if step < 0:
                        ended, step = ended + 1, steps
                        futures[i].result()
                    done[i] = step
                    if progress is not None:
                        progress(sum(done) // len(done), steps)
            except BaseException:
                # Whatever it was, an interrupt too: nothing goes on behind the caller's back.
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in futures]
    finally:
        # The workers' setting is also what threads started later would begin with.
        torch.set_num_threads(threads)


def squared_error(W: Tensor | Sequence[Tensor], A: Tensor, B: Tensor) -> Tensor:
    """Return the squared Frobenius norms of ``W - B A``, (n,) in float64.

    As ``||W||^2 - 2 <W A', B> + <B'B, A A'>``: good to about 1e-15 times ``||W||^2``, and never below zero.

    Args:
        W: (n, d_out, d_in), or a sequence of n matrices.
        A: (n, r, d_in).
        B: (n, d_out, r).
    """
    errors = torch.zeros(len(W), dtype=torch.float64, device=solving_device(A.device))
    # Copies, so that each is aligned as it would be alone.
    for i, (w, a, b) in enumerate(zip(W, A, B, strict=True)):
        a, b = (double(factor.clone()) for factor in (a, b))
        cross = sum(((part @ a.mT) * b[rows]).sum() for rows, part in in_double(w))
        errors[i] = squared_norm(w) - 2 * cross + ((b.mT @ b) * (a @ a.mT)).sum()
    return errors.clamp_min(0.0)


def svd_lowrank_factors(
    svd: TruncatedSVD,
    gauge: Gauge,
    *,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(A, B)``, A (k, d_in) and B (d_out, k), with ``B A = U diag(S) V'``, in one of four gauges.

    - "balanced": ``B = U sqrt(S)``, ``A = sqrt(S) V'``.
    - "aligned": ``B Q`` and ``Q'A`` of these, with the orthogonal Q that brings them nearest to a start: it
      minimises ``||B Q - B0||^2 + ||Q'A - A0||^2``. Q changes no norm, which leaves
      ``tr(Q' (B'B0 + A A0'))`` to maximise: an orthogonal Procrustes problem, solved by ``Q = X Y'`` for the
      SVD ``X diag(.) Y'`` of the k by k matrix ``B'B0 + A A0'`` (Schönemann, 1966).
    - "flow": aligned, with the norms that gradient flow from the start would leave. Flow conserves ``B'B - A A'``, in
      the start near ``delta I``, ``delta = (||B0||^2 - ||A0||^2) / k``; the columns of B get squared norms
      ``g = (delta + sqrt(delta^2 + 4 S^2)) / 2`` and the rows of A ``S^2 / g``, whose difference is delta.
    - "random": balanced, with Q uniform (Haar) among the orthogonal matrices.

    Args:
        svd: of the matrix to approximate.
        gauge: one of the above.
        A0: (k, d_in), for "aligned" and "flow".
        B0: (d_out, k), likewise.
        generator: for "random", on the CPU; None takes torch's own.

    Returns:
        A and B in float32.

    Raises:
        ValueError: for an unknown gauge, or "aligned" or "flow" without a fitting A0 and B0.
    """
    U, S, V = double(svd.U), double(svd.S), double(svd.V)
    Q, delta = torch.eye(len(S), dtype=U.dtype, device=U.device), S.new_zeros(())
    if gauge in ("aligned", "flow"):
        shapes = (len(S), len(V)), (len(U), len(S))
        if A0 is None or B0 is None or (A0.shape, B0.shape) != shapes:
            raise ValueError(f'gauge "{gauge}" needs A0 {shapes[0]} and B0 {shapes[1]}')
        A0, B0 = double(A0).to(V), double(B0).to(U)
        if gauge == "flow":
            delta = (B0.square().sum() - A0.square().sum()) / len(S)
        columns, rows = _norms(S, delta)
        X, _, Yh = torch.linalg.svd((U * columns).mT @ B0 + rows[:, None] * V.mT @ A0.mT)
        Q = X @ Yh
    elif gauge == "random":
        Q = _haar(len(S), generator).to(U)
    elif gauge != "balanced":
        raise ValueError(f'gauge must be "balanced", "aligned", "flow" or "random", got {gauge!r}')
    columns, rows = _norms(S, delta)
    A, B = rows[:, None] * V.mT, U * columns
    return (Q.mT @ A).float(), (B @ Q).float()


def _norms(S: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return norms (k,) of B's columns and A's rows whose products are S and whose squares differ by delta."""
    # The larger one is a sum; the smaller one would be a difference of like numbers.
    larger = (delta.abs() / 2 + (delta.square() / 4 + S.square()).sqrt()).sqrt()
    smaller = torch.where(larger > 0, S / larger, 0.0)
    return (larger, smaller) if delta >= 0 else (smaller, larger)


def _haar(size: int, generator: torch.Generator | None) -> Tensor:
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu"))
    # QR alone isn't uniform: it fixes signs by its own convention (Mezzadri, 2007).
    turned: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return turned


def _check_fit(
    W: Tensor | Sequence[Tensor],
    A0: Tensor,
    B0: Tensor,
    steps: int,
    lr: float,
    decay_every: int,
    check_every: int,
    tolerance: float | None,
    optimum: Tensor | None,
) -> None:
    kinds = {(w.shape, w.dtype, w.device) for w in W}
    if len(kinds) != 1 or W[0].ndim != 2 or W[0].dtype not in (torch.float32, torch.float64):
        given = ", ".join(f"{tuple(shape)} {dtype} {device}" for shape, dtype, device in kinds)
        raise ValueError(f"expected matrices of one shape and device in float32 or float64, got {given or 'none'}")
    n, (d_out, d_in) = len(W), W[0].shape
    if A0.ndim != 3 or B0.shape != (n, d_out, A0.shape[1]) or (A0.shape[0], A0.shape[2]) != (n, d_in):
        raise ValueError(f"A0 {tuple(A0.shape)} and B0 {tuple(B0.shape)} don't fit {n} of {d_out}x{d_in}")
    if steps < 0 or decay_every < 1 or check_every < 1:
        raise ValueError("steps can't be negative, and decay_every and check_every must be at least 1")
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if tolerance is not None and (optimum is None or optimum.shape != (n,)):
        raise ValueError("tolerance needs optimum, the smallest possible squared error of each matrix")
