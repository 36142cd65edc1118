"""Sharing a pass among processes: who reads which samples, and who gets the sums of which layers."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headstart.errors import HeadstartError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that initialise the model together.

    Attributes:
        rank: this one's number.
        count: how many there are; 1 where PyTorch's process group isn't set up.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def joined(cls) -> Processes:
        """Return the processes of the default group, as ``torchrun`` and ``accelerate launch`` set it up."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @classmethod
    def numbered(cls) -> Processes:
        """Return the processes as ``torchrun`` numbers them in the environment, with a process group or without.

        Raises:
            HeadstartError: a number there is none.
        """
        return cls(environment_number("RANK", 0), environment_number("WORLD_SIZE", 1))

    @property
    def several(self) -> bool:
        """Whether there is anyone to share with."""
        return self.count > 1

    def share(self, items: Sequence[T]) -> list[T]:
        """Return every ``count``-th item, beginning with this process's own."""
        return list(items[self.rank :: self.count])

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of the ranks."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.count
        with self._waiting():
            dist.all_gather_object(values, value)
        return values

    def sum_to(self, tensor: Tensor, owner: int) -> None:
        """Sum a tensor over the processes in place, for process ``owner``.

        The tensor is moved for the backend where it has to be (gloo and CPU tensors, nccl and CUDA ones).
        """
        if not self.several:
            return
        moved = tensor.to(_device_for(tensor))
        with self._waiting():
            dist.reduce(moved, dst=owner)
        if moved is not tensor:
            tensor.copy_(moved)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Say whom this process waited for, where the process group's time runs out or another process dies.

        Raises:
            HeadstartError: that happened.
        """
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            others = "1 other process" if self.count == 2 else f"{self.count - 1} other processes"
            raise HeadstartError(
                f"process {self.rank} waited {time.monotonic() - began:.0f} s for {others}: {error}"
            ) from error


def environment_number(variable: str, default: int) -> int:
    """Return a number from the environment.

    Raises:
        HeadstartError: it is none.
    """
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise HeadstartError(f"{variable}={text!r} in the environment is not a process's number: unset it.")
    return int(text)


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Let a failure of one process fail all of them, with its own words, and none wait for what won't come.

    Nothing within the block may wait for another process.

    Raises:
        HeadstartError: another process failed; of the same kind as its own error, where that is one of headstart's.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
        if not processes.several:
            raise
    kind = type(failure) if isinstance(failure, HeadstartError) else HeadstartError
    failures = processes.gather(None if failure is None else (kind, str(failure)))
    if failure is not None:
        raise failure
    for rank, reported in enumerate(failures):
        if reported is not None:
            raise reported[0](f"process {rank} failed: {reported[1]}")


def owners(costs: Mapping[T, float], count: int) -> dict[T, int]:
    """Return who of ``count`` processes gets which item: the dearest first, each to whom has least to do so far."""
    load = [0.0] * count
    chosen: dict[T, int] = {}
    for item, cost in sorted(costs.items(), key=lambda pair: -pair[1]):
        rank = min(range(count), key=lambda number: (load[number], number))
        load[rank] += cost
        chosen[item] = rank
    return chosen


def digest(batch: Mapping[str, Any]) -> str:
    """Return a short hash of a batch's content, by which processes tell whether they were given the same data."""
    hashed = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            hashed.update(str(tuple(value.shape)).encode())
            hashed.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                hashed.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        elif isinstance(value, str | int | float):
            hashed.update(repr(value).encode())

    add(batch)
    return hashed.hexdigest()


def is_sharded(model: nn.Module) -> bool:
    """Return whether parameters are sharded over processes (FSDP2, ZeRO-3), so that all of them must run in step."""
    return any(isinstance(parameter, DTensor) or split_by_deepspeed(parameter) for parameter in model.parameters())


def split_by_deepspeed(parameter: Tensor) -> bool:
    """Return whether DeepSpeed's ZeRO-3 holds a parameter, of which no process sees the whole unless it is gathered."""
    return hasattr(parameter, "ds_id")


def in_step(items: Sequence[T], rounds: int, spare: T) -> Iterator[tuple[T, bool]]:
    """Yield ``rounds`` items with whether they count: where there are fewer, ``spare`` fills up, uncounted."""
    for number in range(rounds):
        yield (items[number], True) if number < len(items) else (spare, False)


def _device_for(tensor: Tensor) -> torch.device:
    """Return a device that the process group can communicate from, the tensor's own if it is one."""
    served = {part.split(":")[0]: part.split(":")[-1] for part in str(dist.get_backend_config()).split(",")}
    if served.get(tensor.device.type) not in (None, "gloo") or (tensor.device.type == "cpu" and "cpu" in served):
        return tensor.device
    return torch.device("cpu") if "cpu" in served else torch.device("cuda", torch.cuda.current_device())
