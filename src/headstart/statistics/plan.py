"""How many passes over the data it takes to collect everything within a memory budget."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from headstart.errors import MethodError

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}

_CGROUP = Path("/sys/fs/cgroup")

# Activations and the factorisation need room beside the statistics.
_SHARE_OF_FREE = 0.5


@dataclass(frozen=True)
class Need:
    """Layers that have to be collected in one pass, because they share sums, and the bytes of all of these."""

    names: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Which layers are collected in which pass.

    Attributes:
        passes: the layers of each planned pass.
        bytes: the most that a pass holds.
        budget: bytes that it was planned for.
        seconds: expected for all passes, None where not known.
        over: layers that are larger than the budget by themselves.
    """

    passes: tuple[tuple[str, ...], ...]
    bytes: int
    budget: int
    seconds: float | None = None
    over: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        count = f"{len(self.passes)} pass" + ("es" if len(self.passes) != 1 else "")
        about = "" if self.seconds is None else f", about {_duration(self.seconds)}"
        return f"{count}, {self.bytes / 2**30:.2f} GiB{about}"


def make_plan(needs: Sequence[Need], budget: int, *, seconds: float | None = None) -> Plan:
    """Put the layers into as few passes as first-fit decreasing finds, the largest first.

    What is larger than the budget by itself gets a pass of its own: it can't be made smaller here.

    Args:
        needs: what has to be held for which layers.
        budget: bytes a pass may hold.
        seconds: expected for one pass.
    """
    bins: list[list[Need]] = []
    room: list[int] = []
    for need in sorted(needs, key=lambda need: -need.bytes):
        for number, left in enumerate(room):
            if need.bytes <= left:
                bins[number].append(need)
                room[number] -= need.bytes
                break
        else:
            bins.append([need])
            room.append(budget - need.bytes)
    return Plan(
        passes=tuple(tuple(name for need in group for name in need.names) for group in bins),
        bytes=max((sum(need.bytes for need in group) for group in bins), default=0),
        budget=budget,
        seconds=None if seconds is None else seconds * len(bins),
        over=tuple(need.names for need in needs if need.bytes > budget),
    )


def parse_bytes(budget: int | str | None, device: torch.device) -> int:
    """Return a memory budget in bytes.

    Args:
        budget: bytes, or a string such as "6GiB", "800MB", "2g" (a bare letter is binary); None for half of what is
            free on ``device``.
        device: where the statistics are kept.

    Raises:
        MethodError: it is neither, or not positive.
    """
    if budget is None:
        return int(free_memory(device) * _SHARE_OF_FREE)
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", budget.lower())
        if match is None or match[2] not in _UNITS:
            raise MethodError(f'memory_budget={budget!r} must be bytes, or a size such as "6GiB" or "800MB".')
        budget = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(budget, bool) or not isinstance(budget, int) or budget <= 0:
        raise MethodError(f'memory_budget={budget!r} must be a positive number of bytes, or a size such as "6GiB".')
    return budget


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch holds but doesn't use is free to this program.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Processes on one machine share what is free there.
    return _free_here() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _free_here() -> int:
    free = int(psutil.virtual_memory().available)
    try:
        # Within a container, its own limit counts.
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
