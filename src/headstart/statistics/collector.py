"""Reading the data in planned passes, shared by the processes that run together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from headstart.errors import DataError
from headstart.processes import Processes, in_step, together
from headstart.statistics.batches import Samples
from headstart.statistics.forward import ForwardReader
from headstart.statistics.gather import Statistics, gathered
from headstart.statistics.masks import Layout, Tokens
from headstart.statistics.plan import Plan
from headstart.statistics.quiet import quiet
from headstart.statistics.reader import Reader
from headstart.statistics.sums import Restart, Shape, Sums

Progress = Callable[[str, int, int], None]


@dataclass
class Collector:
    """Reads batches in as few passes as the memory budget allows, at the base model, dropout off.

    Each layer's part is added to its sums as soon as backward reaches it, or, where no backward pass is wanted, as
    soon as the layer is called. Samples weigh as METHODS defines the loss (each one's own), whatever the batch size and
    padding. The model is given back in the mode and with the requires_grad flags that it came with; no parameter's
    ``.grad`` is touched. Sums are added up over the processes where the layer is to be solved.

    Attributes:
        model, reader, modules, token_choice: what is run, how, what is looked at, and which tokens count.
        backward: whether a backward pass is wanted.
        shapes: of the layers, and what is wanted of each.
        groups: by layer, the number of the group of layers that read the same input.
        layouts: by layer, how its rows lie.
        chunks: the batches of this process; ``spare`` keeps step with other processes when there are no more.
        plan: which layers are collected in which pass.
        processes, lockstep: those that share the work, and whether they must run the model in step.
        offload: see :func:`headstart.statistics.prepare.prepare`.
        asked: how many samples were asked for; ``samples`` and ``tokens`` are how many there are, in all processes.
        beside: other adapters that are active.
    """

    model: nn.Module
    reader: Reader
    modules: Mapping[str, nn.Module]
    token_choice: Tokens
    backward: bool
    shapes: Mapping[str, Shape]
    groups: Mapping[str, int]
    layouts: Mapping[str, Layout]
    chunks: Sequence[Samples]
    spare: Samples
    plan: Plan
    processes: Processes
    lockstep: bool
    offload: bool
    asked: int
    samples: int
    tokens: int
    beside: Sequence[str]

    def passes(self, progress: Progress | None = None) -> Iterator[Statistics]:
        """Yield the statistics of one planned pass after another; free them before asking for the next.

        Args:
            progress: called with (plan in words, samples done, samples to do in all passes).

        Raises:
            LayerError: a sum is not finite; names the layer.
            DataError: a loss is not finite, or no layer was reached.
        """
        done = 0
        label = f"data: {self.plan}"
        own_samples = sum(chunk.size for chunk in self.chunks)

        def advanced(samples: int) -> None:
            nonlocal done
            done += samples
            if progress is not None:
                progress(label, done, own_samples * len(self.plan.passes))

        advanced(0)
        reached = False
        for names in self.plan.passes:
            shapes = {name: self.shapes[name] for name in names}
            sums = Sums(shapes, self.groups, self.layouts, offload=self.offload)
            self._read(sums, advanced)
            statistics = gathered(sums, self.processes, self.samples, self.tokens)
            reached |= bool(statistics.groups)
            if names == self.plan.passes[-1]:
                statistics.notes += self._notes()
                if not reached:
                    raise DataError(
                        "no gradient reached any of the adapter's layers: check that the loss depends on them."
                        if self.backward
                        else "the model called none of the adapter's layers: check the data."
                    )
            yield statistics

    def _read(self, sums: Sums, advanced: Callable[[int], None]) -> None:
        rounds = max(self.processes.gather(len(self.chunks))) if self.lockstep else len(self.chunks)
        reader = self.reader if self.backward else ForwardReader(self.reader, self.modules, self.token_choice)
        with together(self.processes):
            restart = True
            while restart:
                restart, since = False, 0
                try:
                    with quiet(self.model):
                        for chunk, counts in in_step(self.chunks, rounds, self.spare):
                            sums.muted = not counts
                            reader.read(chunk, sums)
                            if counts:
                                advanced(chunk.size)
                                since += chunk.size
                except Restart:
                    sums.clear()
                    advanced(-since)
                    restart = True

    def _notes(self) -> list[str]:
        notes = []
        if self.beside:
            notes.append(f"other adapters are active ({', '.join(self.beside)}): all were off while data were read")
        if self.plan.over:
            name = self.plan.over[0][0]
            notes.append(f"layer {name!r} alone needs more than memory_budget; it was collected in a pass of its own")
        if self.samples < self.asked:
            notes.append(f"the data held {self.samples} samples, {self.asked} were asked for")
        for more in self.processes.gather(self.reader.notes):
            notes += [note for note in more if note not in notes]
        return notes
