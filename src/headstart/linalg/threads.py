"""Many small computations, as many at once as torch has threads, each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Given = TypeVar("Given")
Result = TypeVar("Result")


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
