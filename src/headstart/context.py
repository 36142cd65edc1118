"""What all steps of a start share: seed, processes, progress, notes; and what measures its cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from headstart.processes import Processes
from headstart.progress import Show, progress_bars, silent

T = TypeVar("T")


class Clock:
    """Times the steps; one that is entered again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time a block as part of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - began

    def total(self) -> float:
        """Return the seconds of all steps."""
        return sum(self.seconds.values())


class Memory:
    """Peak memory: of the accelerator that is computed on, else the process's peak resident set."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Return the peak in bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return peak_resident()


def reset_peak_resident() -> None:
    """Let the peak begin anew, where the system can (Linux): a process may do one run after another."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_resident() -> int:
    """Return this process's peak resident set in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.is_file():
        # What getrusage gives begins with the parent's peak, from before the program was executed.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # not on Windows

    # In KiB, except on macOS, where it is in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


@dataclass
class Context:
    """What every step of a start needs: one object that is handed along.

    Attributes:
        seed: of all draws.
        processes: those that share the work.
        show: draws progress; see :mod:`headstart.progress`.
        clock: times the steps.
        layer_seconds: what the factors of each layer took.
        notes: sentences for the report, about what was not as asked for.
        batch_bytes: how many bytes of weights may be decomposed together, in float32; by default 256 MiB, and on a CPU
            one weight for each thread at least.
    """

    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    show: Show = silent
    clock: Clock = field(default_factory=Clock)
    layer_seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    batch_bytes: int | None = None

    def timed(self, step: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; the time that each takes to come is part of a step."""
        iterator = iter(items)
        while True:
            with self.clock(step):
                item = next(iterator, None)
            if item is None:
                return
            yield item


@contextmanager
def shown(progress: Show | bool, processes: Processes) -> Iterator[Show]:
    """Yield what draws progress: bars in the first process, nothing, or the user's own function."""
    if progress is True and processes.rank == 0:
        with progress_bars() as show:
            yield show
        return
    yield silent if isinstance(progress, bool) else progress
