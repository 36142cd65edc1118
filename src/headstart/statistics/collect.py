"""Collecting what methods ask for: planned passes over the data, shared by the processes that run together."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from headstart.errors import DataError, LayerError
from headstart.methods.base import Wanted
from headstart.statistics.batches import Batch, Collator, Samples, iterate_samples, size_of
from headstart.statistics.gather import Statistics, anywhere, finest, gathered
from headstart.statistics.lengths import by_length
from headstart.statistics.losses import check_labels
from headstart.statistics.masks import Layout, Tokens, layout_of
from headstart.statistics.plan import Need, Plan, make_plan, parse_bytes
from headstart.statistics.probe import InputsSeen, inputs_seen
from headstart.statistics.processes import Processes, digest, in_step, is_sharded, together
from headstart.statistics.quiet import active_beside, adapters_off, drawn_from, dropout_off, frozen
from headstart.statistics.reader import Reader
from headstart.statistics.runs import Loss
from headstart.statistics.sums import Shape, Sums

Progress = Callable[[str, int, int], None]

logger = logging.getLogger(__name__)

# A backward pass through frozen weights costs as much as the forward pass, and the sums about as much again.
_BACKWARD = 3.0


class Collector:
    """Reads the data in as few passes as the memory budget allows, at the base model, dropout off.

    Each layer's part is added to its sums as soon as backward reaches it. Samples weigh as METHODS defines the loss
    (each one's own), whatever the batch size and padding. The model is given back in the mode and with the
    requires_grad flags that it came with; no parameter's ``.grad`` is touched.

    Where PyTorch's process group is set up, every process makes a collector and reads its share: of the same data
    every ``count``-th batch, of data that are already divided (their first batches differ) all of its own, up to its
    share of ``samples``. Sums are then added up where the layer is to be solved. Parameters sharded by FSDP2 need all
    processes to run the model in step, so that samples are read one at a time.

    Args:
        model: the PEFT model; called with each batch as keyword arguments, it must return a loss.
        layers: the LoRA layers by name; all adapters of the model are off during the pass.
        wanted: by layer, what to collect; layers that are not in it are left alone.
        data: see :func:`headstart.statistics.batches.iterate_samples`; read once, at the beginning, and held.
        samples: how many samples to read.
        collator, batch_size: for data of single samples.
        memory_budget: bytes for all that a pass sums, or a string such as "6GiB"; None for half of what is free.
        offload: "cpu" keeps the sums there.
        seed: of the sketches, and of what data, collator and loss draw at random: the same in every process.
        processes: those that share the work.
        adapter: the one that is started; others that are active, and so switched off, are named in a note.
        loss, whole: see :class:`headstart.statistics.reader.Reader`.

    Raises:
        DataError: the data are empty, a sample has no label, the model gives no loss, or the loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LoraLayer],
        wanted: Mapping[str, Wanted],
        data: Iterable[Any],
        samples: int,
        *,
        collator: Collator | None = None,
        batch_size: int = 8,
        memory_budget: int | str | None = None,
        offload: Literal["cpu"] | None = None,
        seed: int = 0,
        processes: Processes | None = None,
        adapter: str | None = None,
        loss: Loss | None = None,
        whole: bool = False,
    ) -> None:
        self._model = model
        self._beside = [] if adapter is None else active_beside(model, adapter)
        self._seed = seed
        self._asked = samples
        self._offload = offload == "cpu"
        self._processes = processes or Processes()
        self._lockstep = self._processes.several and is_sharded(model)
        device = next(model.parameters()).device
        modules = {name: layers[name].get_base_layer() for name in wanted}
        tokens: Tokens = next((each.tokens for each in wanted.values()), "attention")
        self._layouts: dict[str, Layout] = {}
        in_step_with = self._processes if self._lockstep else None
        self._reader = Reader(model, modules, tokens, in_step_with=in_step_with, loss=loss, whole=whole, seed=seed)
        self._shapes = {
            name: Shape(int(layers[name].out_features), int(layers[name].in_features), each)
            for name, each in wanted.items()
        }
        place = torch.device("cpu") if self._offload else device
        # One plan for all, though each has its own idea of what is free.
        budget = min(self._processes.gather(parse_bytes(memory_budget, place)))
        with together(self._processes), drawn_from(seed, device):
            chunks = list(iterate_samples(data, samples, collator=collator, batch_size=batch_size))
            for chunk in chunks if loss is None else []:
                check_labels(chunk)
        self._chunks, self._spare = self._share(chunks, samples)
        self.tokens = sum(self._processes.gather(sum(_tokens(chunk.batch) for chunk in self._chunks)))
        self.layers: tuple[str, ...] = tuple(wanted)
        self.samples = sum(self._processes.gather(sum(chunk.size for chunk in self._chunks)))
        self._groups, seconds = self._probe(modules)
        repeats = max((each.passes for each in wanted.values() if each.gradient == "sketch"), default=1)
        self.plan: Plan = make_plan(self._needs(), budget, readings_a_pass=repeats, seconds=seconds)
        logger.info("data: %s", self.plan)

    def passes(self, progress: Progress | None = None) -> Iterator[Statistics]:
        """Yield the statistics of one planned pass after another; free them before asking for the next.

        Args:
            progress: called with (plan in words, samples done, samples to do in all readings).

        Raises:
            LayerError: a sum is not finite; names the layer.
            DataError: see above.
        """
        done = 0
        label = f"data: {self.plan}"
        mine = sum(chunk.size for chunk in self._chunks)

        def advanced(samples: int) -> None:
            nonlocal done
            done += samples
            if progress is not None:
                progress(label, done, mine * self.plan.readings)

        if progress is not None:
            progress(label, 0, mine * self.plan.readings)
        reached = False
        for names in self.plan.passes:
            sums = Sums(
                {name: self._shapes[name] for name in names},
                self._groups,
                self._layouts,
                offload=self._offload,
                seed=self._seed,
            )
            readings = self.plan.readings // len(self.plan.passes)
            rounds = max(self._processes.gather(len(self._chunks))) if self._lockstep else len(self._chunks)
            for reading in range(readings):
                with together(self._processes):
                    self._read(sums, rounds, advanced)
                self._add_up_sketches(sums, last=reading == readings - 1)
            found = gathered(sums, self._processes, self.samples, self.tokens)
            reached |= bool(found.groups)
            if names == self.plan.passes[-1]:
                found.notes += self._notes()
                if not reached:
                    raise DataError(
                        "no gradient reached any of the adapter's layers: check that the loss depends on them."
                    )
            yield found

    def _share(self, chunks: list[Samples], samples: int) -> tuple[list[Samples], Samples]:
        """Return the batches that this process reads, and one to keep in step with when there are no more."""
        divided = len(set(self._processes.gather(digest(chunks[0].batch)))) > 1
        if divided:
            share = len(range(self._processes.rank, samples, self._processes.count))
            chunks = list(iterate_samples([chunk.batch for chunk in chunks], max(share, 1)))
        # Where labels lie along a decoder, a sample has two lengths.
        chunks = chunks if self._reader.keeps_batches else by_length(chunks)
        if self._lockstep:
            chunks = [
                chunk if row is None else Samples(self._reader.alone(chunk.batch, row), (chunk.indices[row],))
                for chunk in chunks
                for row in _rows(chunk, whole=False)
            ]
        return (chunks if divided else self._processes.share(chunks)), chunks[0]

    def _probe(self, modules: Mapping[str, nn.Module]) -> tuple[dict[str, int], float]:
        """Run two samples forward, each alone: which layers read the same input, how their rows lie, how long it takes.

        The longest sample shows most; a second one of another length, what holds for all lengths.
        """
        chunks = self._chunks or [self._spare]
        rows = [(chunk, row) for chunk in chunks for row in _rows(chunk, whole=self._reader.probes_batches)]
        lengths = [
            _tokens({key: value if row is None else value[row : row + 1] for key, value in _masks(chunk)})
            for chunk, row in rows
        ]
        longest = max(range(len(rows)), key=lambda place: lengths[place])
        other = next((place for place, length in enumerate(lengths) if length != lengths[longest]), longest)
        partitions, layouts = [], []
        for place in (other, longest):
            chunk, row = rows[place]
            batch = chunk.batch if row is None else self._reader.alone(chunk.batch, row)
            began = time.perf_counter()
            with together(self._processes):
                seen = self._inputs_of(modules, batch)
            seconds = time.perf_counter() - began
            size = 1 if row is not None else max(1, size_of(batch))
            layouts.append({name: layout_of(seen.shapes.get(name), _tokens(batch) // size) for name in modules})
            # Were a group found not to be one, a process would have to run a batch again, out of step.
            shared = InputsSeen() if self._lockstep else seen
            partitions.append(shared.groups(list(modules)))
        self._layouts = {name: one if one == layouts[1][name] else "other" for name, one in layouts[0].items()}
        seconds *= _BACKWARD * sum(_tokens(chunk.batch) or chunk.size for chunk in self._chunks) / (_tokens(batch) or 1)
        return finest([each for found in self._processes.gather(partitions) for each in found]), seconds

    def _inputs_of(self, modules: Mapping[str, nn.Module], batch: Batch) -> InputsSeen:
        with inputs_seen(modules) as seen, self._quiet():
            self._reader.run_layers(batch)
        return seen

    def _needs(self) -> list[Need]:
        members: dict[int, list[str]] = defaultdict(list)
        for name, group in self._groups.items():
            members[group].append(name)
        needs = []
        for names in members.values():
            first = self._shapes[names[0]]
            if first.wanted.outputs is None:
                needs += [Need((name,), 4 * _floats(self._shapes[name])) for name in names]
                continue
            size = first.d_in**2 + first.d_in + sum(_floats(self._shapes[name]) for name in names)
            needs.append(Need(tuple(names), 4 * size))
        return needs

    def _read(self, sums: Sums, rounds: int, advanced: Callable[[int], None]) -> None:
        with self._quiet():
            for chunk, counts in in_step(self._chunks, rounds, self._spare):
                sums.muted = not counts
                self._reader.read(chunk, sums)
                if counts:
                    advanced(chunk.size)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with dropout_off(self._model), adapters_off(self._model), frozen(self._model):
            yield

    def _add_up_sketches(self, sums: Sums, *, last: bool) -> None:
        wanted = [name for name, shape in sums.shapes.items() if shape.wanted.gradient == "sketch"]
        reached = anywhere(self._processes, {name for name in wanted if sums.layers[name].sketch is not None})
        device = next(self._model.parameters()).device
        for name in wanted:
            if name not in reached:
                continue
            layer = sums.layers[name]
            if layer.sketch is None:
                layer.sketch = sums.new_sketch(sums.shapes[name], device)
            for tensor in layer.sketch.tensors():
                self._processes.sum_to(tensor, None)
            try:
                if not last:
                    layer.sketch.advance()
            except ValueError as error:
                raise LayerError(f"layer {name!r}: {error}; check the loss and the precision.") from error

    def _notes(self) -> list[str]:
        notes = []
        if self._beside:
            notes.append(f"other adapters are active ({', '.join(self._beside)}): all were off while data were read")
        if self.plan.over:
            name = self.plan.over[0][0]
            notes.append(f"layer {name!r} alone needs more than memory_budget; it was collected in a pass of its own")
        if self.samples < self._asked:
            notes.append(f"the data held {self.samples} samples, {self._asked} were asked for")
        for more in self._processes.gather(self._reader.notes):
            notes += [note for note in more if note not in notes]
        return notes


def _floats(shape: Shape) -> int:
    wanted = shape.wanted
    gradient = {"exact": shape.d_out * shape.d_in, "sketch": wanted.width * (shape.d_out + shape.d_in), "no": 0}
    outputs = {None: 0, "diagonal": 2 * shape.d_out, "full": shape.d_out**2 + shape.d_out}
    return gradient[wanted.gradient] + outputs[wanted.outputs]


def _rows(chunk: Samples, *, whole: bool) -> Sequence[int | None]:
    """Return the rows of a batch's samples, None for a batch that can't, or mustn't, be cut."""
    return range(chunk.size) if chunk.cut and not whole else (None,)


def _masks(chunk: Samples) -> list[tuple[str, Tensor]]:
    found = [(name, chunk.batch.get(name)) for name in ("attention_mask", "input_ids")]
    return [(name, value) for name, value in found if isinstance(value, Tensor)]


def _tokens(batch: Batch) -> int:
    for name in ("attention_mask", "input_ids"):
        value = batch.get(name)
        if isinstance(value, Tensor):
            return int(value.sum()) if name == "attention_mask" else value.numel()
    return 0
