"""``hs.Monitor``: the scaling theory's quantities of a real model in training, from a sample of its layers."""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import TrainerCallback

from headstart.errors import HeadstartWarning, LayerError, nearest
from headstart.files import write_whole
from headstart.layers.anchored import anchors, current_factors
from headstart.layers.convolutions import is_convolution
from headstart.layers.core import core_of
from headstart.layers.experts import is_stack
from headstart.layers.find import TargetLayer, lora_layers, resolve_adapter
from headstart.layers.unwrap import looks_through, unwrapped
from headstart.monitor.padding import Padding
from headstart.monitor.quantities import Pair, Quantities, quantities
from headstart.processes import is_sharded

# Records that a run of known length has, where ``every`` is not given; and steps between them where it isn't known.
_SOME, _EVERY = 50, 10
# In the trainer's history and in its saves.
RECORDS, STARTS = "headstart_monitor", "headstart_monitor.safetensors"


@dataclass(frozen=True)
class Record:
    """One layer at one step.

    Attributes:
        step: of the optimiser, from 1.
        layer: its name.
        quantities: what was measured.
    """

    step: int
    layer: str
    quantities: Quantities

    def row(self) -> dict[str, Any]:
        """Return it as plain types, the quantities by name."""
        return {"step": self.step, "layer": self.layer, **asdict(self.quantities)}


class Monitor(TrainerCallback):
    """Measures, every so many steps, what :class:`headstart.monitor.Quantities` names, in a sample of LoRA layers.

    As a callback: ``Trainer(..., callbacks=[hs.Monitor()])``, after the model has its start. In a loop of one's own::

        with hs.Monitor(model) as monitor:
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                monitor.step()
                optimizer.zero_grad()

    Nothing is kept on the autograd graph. Forward and backward hooks of the sampled layers do nothing but in steps that
    are recorded, of which they read the first batch. Under several processes the first one's batches are read. The
    start is what the factors are when the monitor begins, and of anchored layers their anchor; a trainer's saves keep
    it, so that a run that goes on measures against the same.

    Args:
        model: the PEFT model; a trainer's own where it is None.
        adapter: which adapter; the active one where it is None.
        every: steps between records; None for some 50 over a trainer's run, and 10 in a loop of one's own. The first
            step is always recorded.
        layers: how many layers are sampled, over depths and kinds; or their names. None for one of each kind.
        tokens: how many of a batch's tokens are read, evenly spaced; of padding none, as far as the attention mask that
            the model is called with fits what a layer reads.

    Attributes:
        records: what was measured, by step and layer.
        seconds: spent on it.

    Raises:
        LayerError: the model has no LoRA layer, or none of a name.
        ValueError: a number is below 1.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        adapter: str | None = None,
        every: int | None = None,
        layers: int | Sequence[str] | None = None,
        tokens: int = 128,
    ) -> None:
        for name, value in (("every", every), ("layers", layers), ("tokens", tokens)):
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.records: list[Record] = []
        self.seconds = 0.0
        self._model, self._adapter, self._every, self._asked, self._tokens = model, adapter, every, layers, tokens
        self._layers: list[_Watched] = []
        self._padding: Padding | None = None
        self._step = 0

    def __enter__(self) -> Monitor:
        if self._model is None:
            raise LayerError("Monitor needs the model, in a loop of one's own: hs.Monitor(model).")
        self._every = self._every or _EVERY
        self._begin(self._model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def step(self) -> None:
        """Note that the optimiser has made a step; measure it where its turn has come."""
        self._step += 1
        began = time.perf_counter()
        for layer in self._layers:
            measured = layer.measured()
            if measured is not None:
                self.records.append(Record(self._step, layer.target.name, measured))
        self._arm()
        self.seconds += time.perf_counter() - began

    def rows(self) -> list[dict[str, Any]]:
        """Return the records as plain types."""
        return [record.row() for record in self.records]

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Begin with the trainer's model; go on from its save where it does."""
        if not state.is_world_process_zero:
            return
        model = self._model if self._model is not None else known["model"]
        self._every = self._every or max(1, math.ceil(state.max_steps / _SOME))
        self._step = state.global_step
        self.records = [_record(row) for entry in state.log_history for row in entry.get(RECORDS, ())]
        self._begin(model)
        if self._step:
            self._take_starts(Path(args.output_dir) / f"checkpoint-{self._step}" / STARTS)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the step, and note it in the trainer's history, which its saves keep."""
        if not state.is_world_process_zero:
            return
        count = len(self.records)
        self.step()
        if len(self.records) > count:
            state.log_history.append(
                {"step": state.global_step, RECORDS: [record.row() for record in self.records[count:]]}
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the starts beside the trainer's save."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and self._layers and folder.is_dir():
            tensors = {
                f"{layer.target.name}.{name}": part.contiguous()
                for layer in self._layers
                for name, part in zip("AB", layer.start, strict=True)
            }
            write_whole(folder / STARTS, save(tensors))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the hooks away."""
        self._end()

    def _begin(self, model: nn.Module) -> None:
        self._end()
        if is_sharded(model):
            warnings.warn(
                "hs.Monitor records nothing: the model's factors are sharded, and it reads whole ones.",
                HeadstartWarning,
                stacklevel=3,
            )
            return
        targets = sampled(model, self._adapter, self._asked)
        with unwrapped(model) as inside:
            padding = self._padding = Padding(inside)
        self._layers = [_Watched(target, self._tokens, padding) for target in targets]
        self._arm()

    def _arm(self) -> None:
        """Have the next step's first batch read where it is to be recorded."""
        assert self._every is not None
        due = self._step == 0 or (self._step + 1) % self._every == 0
        for layer in self._layers:
            layer.arm(due)

    def _take_starts(self, path: Path) -> None:
        try:
            tensors = load_file(path)
            for layer in self._layers:
                layer.start = (tensors[f"{layer.target.name}.A"], tensors[f"{layer.target.name}.B"])
        except (OSError, KeyError, SafetensorError):
            warnings.warn(
                f"hs.Monitor finds no start of this run in {path}: what it measures against the start is measured "
                "against the step that training goes on from.",
                HeadstartWarning,
                stacklevel=3,
            )

    def _end(self) -> None:
        for layer in self._layers:
            layer.remove()
        if self._padding is not None:
            self._padding.remove()
        self._layers, self._padding = [], None


@looks_through
def sampled(model: nn.Module, adapter: str | None, asked: int | Sequence[str] | None) -> list[TargetLayer]:
    """Return the layers to watch.

    Args:
        model: the PEFT model.
        adapter: see :class:`Monitor`.
        asked: how many, or their names; None for one of each kind.

    Raises:
        LayerError: there is no LoRA layer, or none of a name.
    """
    name = resolve_adapter(model, adapter)
    # What reaches a mixture's experts doesn't pass through PEFT's layer of their parameter; a convolution has no rows.
    linear = (layer for layer in lora_layers(model, name) if not is_stack(layer.module))
    linear = (layer for layer in linear if not is_convolution(layer.module))
    layers = {layer.name: layer for layer in linear if name in layer.module.lora_A}
    if not layers:
        raise LayerError("the model has no linear LoRA layer to watch.")
    if asked is not None and not isinstance(asked, int):
        for wanted in asked:
            if wanted not in layers:
                raise LayerError(f"the model has no LoRA layer {wanted!r}.{nearest(wanted, layers)}")
        return [layers[wanted] for wanted in asked]
    kinds: dict[str, list[TargetLayer]] = defaultdict(list)
    for layer in layers.values():
        kinds[layer.kind].append(layer)
    count = min(len(kinds) if asked is None else asked, len(layers))
    chosen: dict[str, TargetLayer] = {}
    for place in range(len(layers)):
        if len(chosen) == count:
            break
        # Kinds in turn, at depths that go up from the first to the last.
        of_kind = list(kinds.values())[place % len(kinds)]
        depth = (place + 0.5) / count % 1
        nearby = sorted(of_kind, key=lambda layer: abs(of_kind.index(layer) + 0.5 - depth * len(of_kind)))
        fresh = next((layer for layer in nearby if layer.name not in chosen), None)
        if fresh is not None:
            chosen[fresh.name] = fresh
    return [layer for layer in layers.values() if layer.name in chosen]


class _Watched:
    """One layer with its hooks."""

    def __init__(self, target: TargetLayer, tokens: int, padding: Padding) -> None:
        self.target = target
        self._tokens = tokens
        self._padding = padding
        self._armed = False
        self._inputs: Tensor | None = None
        self._gradients: Tensor | None = None
        self._before: Pair | None = None
        anchored = anchors(target.module, target.adapter)
        self.start: Pair = self._copied(anchored if anchored is not None else self._factors())
        self._hook = target.module.register_forward_hook(self._seen)

    def arm(self, due: bool) -> None:
        """Have the next batch read, or not."""
        self._armed = due
        self._inputs = self._gradients = self._before = None

    def remove(self) -> None:
        """Take the hook away."""
        self._hook.remove()
        self.arm(False)

    def measured(self) -> Quantities | None:
        """Return what the step did; None where no batch of it was read."""
        if self._inputs is None or self._before is None:
            return None
        after = self._copied(self._factors())
        return quantities(self._inputs, self.start, self._before, after, self.target.scaling, self._gradients)

    def _factors(self) -> Pair:
        """Return A and B, or of a core A and B R: what it trains stands for B then."""
        A, B = current_factors(self.target.module, self.target.adapter)
        R = core_of(self.target.module, self.target.adapter)
        return (A, B) if R is None else (A, B.to(R.dtype) @ R.detach())

    @staticmethod
    def _copied(pair: Pair) -> Pair:
        """Return copies in float32 on the CPU, where small decompositions cost least."""
        A, B = pair
        return A.detach().to("cpu", torch.float32, copy=True), B.detach().to("cpu", torch.float32, copy=True)

    def _seen(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Read the first batch of a step that is due; under gradient checkpointing its second forward pass."""
        if not self._armed or not isinstance(output, Tensor) or not output.requires_grad:
            return
        shown = self._padding.shown(inputs[0])
        if shown.count == 0:
            return
        self._armed = False
        rows = inputs[0].detach().reshape(-1, self.target.d_in)
        count = min(self._tokens, shown.count)
        chosen = torch.linspace(0, shown.count - 1, count, dtype=torch.float64, device="cpu").long().to(rows.device)
        if shown.index is not None:
            chosen = shown.index.to(rows.device)[chosen]
        self._inputs = rows[chosen].float().cpu()
        self._before = self._copied(self._factors())

        def read(gradient: Tensor) -> None:
            self._gradients = gradient.detach().reshape(-1, self.target.d_out)[chosen].float().cpu()

        output.register_hook(read)


def _record(row: dict[str, Any]) -> Record:
    measured = {name: value for name, value in row.items() if name not in ("step", "layer")}
    return Record(row["step"], row["layer"], Quantities(**measured))
