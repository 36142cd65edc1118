"""Where and in what arithmetic factors are solved for: IEEE float32 and float64, on a device that has both.

A program's autocast, TF32 and determinism are meant for its model. What is solved here, compared with bounds and kept
in a cache must not depend on them, nor on whether the model's device knows float64. What is many and
small takes a thread each, and so doesn't depend on their number either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Given = TypeVar("Given")
Result = TypeVar("Result")

# What torch.set_float32_matmul_precision's words stand for on CUDA and in oneDNN.
_WORDS = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}
_REDUCTIONS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


def solving_device(device: torch.device | str) -> torch.device:
    """Return where the factor mathematics of tensors on ``device`` runs: there, or on the CPU if it has no float64.

    Apple's MPS has none, nor have some of Intel's and DirectML's devices.
    """
    device = torch.device(device)
    return device if _has_float64(device) else torch.device("cpu")


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, detached, on its :func:`solving_device`; itself where it is that already."""
    # In two steps: a device without float64 can't convert on the way either.
    return tensor.detach().to(solving_device(tensor.device)).to(torch.float64)


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor in the type and on the device of another, which need not have the tensor's own type."""
    return tensor.to(other.dtype).to(other.device)


@contextmanager
def full_precision(devices: Iterable[torch.device | str] = ()) -> Iterator[None]:
    """Within the block, float32 is IEEE's, whatever the program around it has set; after it, all is as it was.

    Switched off are autocast (on the CPU and on ``devices``), TF32 and bfloat16 in place of float32 (by either of
    PyTorch's two sets of settings), reductions in reduced precision, and errors and filling by
    ``use_deterministic_algorithms``.

    Args:
        devices: those, beside the CPU, that the block computes on.
    """
    with ExitStack() as stack:
        for kind in {torch.device(device).type for device in (*devices, "cpu")}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        _float32_products(stack)
        matmul = torch.backends.cuda.matmul
        for name in _REDUCTIONS:
            with suppress(AttributeError):  # not every version has them all
                _reduction_off(matmul, name, stack)
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        stack.callback(
            torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled(), warn_only=warns
        )
        torch.use_deterministic_algorithms(False)
        yield


def one_thread_each(function: Callable[[Given], Result], items: Sequence[Given]) -> list[Result]:
    """Return what ``function`` gives for each item, in their order; it must not depend on the order of the calls.

    Operations on tensors that are too small for several threads spend more time waiting for them than they save. A
    result is the same bit for bit whatever items come with it and however many threads there are.

    Args:
        function: computes on the CPU.
        items: one for each call.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not items:
        return [function(item) for item in items]
    try:
        with ThreadPoolExecutor(min(threads, len(items)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        # The workers' setting is also what threads started later would begin with.
        torch.set_num_threads(threads)


def _float32_products(stack: ExitStack) -> None:
    """Set products of float32 to IEEE's, and restore them with the stack."""
    switches = float32_switches()
    values = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    # PyTorch refuses to read its older setting where the newer ones contradict it; so it is found by trying.
    word = next((word for word in _WORDS if _reads_as(word, switches)), "highest")
    torch.set_float32_matmul_precision("highest")

    def restore() -> None:
        torch.set_float32_matmul_precision(word)
        for switch, value in zip(switches, values, strict=True):
            # Left to what it inherits, where that is the same.
            switch.fp32_precision = "none"
            if switch.fp32_precision != value:
                switch.fp32_precision = value

    stack.callback(restore)


def float32_switches() -> list[Any]:
    """Return what has the newer setting (``fp32_precision``) of products, on CUDA and in oneDNN, as far as there is."""
    switches = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [switch for switch in switches if getattr(switch, "fp32_precision", None) is not None]


def _reads_as(word: str, switches: list[Any]) -> bool:
    """Return whether the older setting is ``word``, having set the newer ones so that it can be read if it is."""
    for switch, value in zip(switches, _WORDS[word], strict=False):
        switch.fp32_precision = value
    try:
        return torch.get_float32_matmul_precision() == word
    except RuntimeError:
        return False


def _reduction_off(matmul: Any, name: str, stack: ExitStack) -> None:
    allowed = getattr(matmul, name)
    split = getattr(matmul, f"{name}_split_k", None)
    stack.callback(setattr, matmul, name, allowed if split is None else (allowed, split))
    setattr(matmul, name, False)


@cache
def _has_float64(device: torch.device) -> bool:
    if device.type in ("cpu", "cuda"):
        return True
    try:
        one = torch.ones((), dtype=torch.float32, device=device).to(torch.float64)
        return float((one + one / 3).cpu()) == 1 + 1 / 3
    except torch.OutOfMemoryError:  # says nothing of the device, and the answer is kept
        raise
    except (RuntimeError, TypeError):
        return False
