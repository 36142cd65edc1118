"""Reading what layers' inputs tell alone: forward passes, without labels and without a backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headstart.linalg.precision import full_precision
from headstart.statistics.batches import Samples, is_padded, most_padded, moved, token_labels
from headstart.statistics.masks import Tokens, Unmatched
from headstart.statistics.reader import Reader
from headstart.statistics.routed import routed
from headstart.statistics.sums import Regroup, Restart, Sums

# In a batch, a sample's inputs differ by rounding from those that it has alone; more than this is padding that leaks.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 5e-2


class ForwardReader:
    """Reads batches into sums of the layers' inputs.

    Whole batches are read where a padded sample's inputs are those that it has alone, else one sample at a time.

    Args:
        reader: knows how samples are cut and how the model is called.
        modules: the base layers to look at, by name.
        tokens: which tokens count.
    """

    def __init__(self, reader: Reader, modules: Mapping[str, nn.Module], tokens: Tokens) -> None:
        self._reader = reader
        self._modules = modules
        self._tokens = tokens
        self._device = reader.device
        self._compared = False
        self._apart = False

    def read(self, samples: Samples, sums: Sums) -> None:
        """Run the model forward, so that the sums see the layers' inputs.

        Raises:
            Restart: the sums have to be cleared, and all batches read again.
        """
        samples = Samples(moved(samples.batch, self._device), samples.indices, samples.cut)
        if self._tokens == "labels" and token_labels(samples.batch) is None:
            self._tokens = "attention"
            self._reader.note("the data have no label a token, so all tokens of the attention mask were counted")
        if self._tokens == "labels":
            self._reader.learn(samples)
        apart = samples.cut and (samples.size == 1 or self._apart or self._leaks(samples))
        for part in self._reader.each_alone(samples) if apart else [samples]:
            self._read(part, sums)

    def _read(self, samples: Samples, sums: Sums) -> None:
        batch = self._reader.given(samples.batch)
        masks = self._reader.begun(sums, batch, samples, self._tokens)
        try:
            with contextlib.ExitStack() as taps:
                taps.enter_context(self._watching(sums, self._modules.keys() & sums.shapes.keys()))
                if experts := self._reader.watched.experts:
                    taps.enter_context(routed(experts, partial(_take_routed, sums)))
                self._reader.run_layers(batch)
            sums.check_groups()
        except Unmatched:
            self._apart = True
            self._reader.note(
                "some layers see other rows than the batch's tokens, among which padding can't be found, so samples "
                "were read one at a time"
            )
            raise Restart from None
        except Regroup as regroup:
            sums.split(regroup.group)
            raise Restart from None
        if masks.unmatched:
            self._reader.note("some layers see other rows than the batch's tokens: all of theirs count")

    @contextlib.contextmanager
    def _watching(self, sums: Sums, names: set[str]) -> Iterator[None]:
        def hook_for(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                with full_precision([self._device]):
                    sums.take(name, args[0])

            return hook

        handles = [self._modules[name].register_forward_pre_hook(hook_for(name)) for name in sorted(names)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leaks(self, samples: Samples) -> bool:
        """Return whether the padded sample's inputs of the last layer depend on the batch around it; asked once."""
        if self._compared or not is_padded(samples.batch):
            return False
        self._compared = True
        mask, row = samples.batch["attention_mask"], most_padded(samples.batch)
        in_batch = self._last_inputs(samples.batch)
        alone = self._last_inputs(self._reader.alone(samples.batch, row))
        if in_batch is None or alone is None or in_batch.shape[:-1] != mask.shape:
            return False
        tokens = in_batch[row][mask[row] != 0].float()
        expected = alone.reshape(-1, alone.shape[-1]).float()
        allowed = _TOLERANCE.get(in_batch.dtype, _HALF_TOLERANCE) * float(expected.norm())
        self._apart = tokens.shape != expected.shape or float((tokens - expected).norm()) > allowed
        if self._apart:
            self._reader.note("a sample's inputs depend on the padding around it, so samples were read one at a time")
        return self._apart

    def _last_inputs(self, batch: dict[str, Any]) -> Tensor | None:
        """Return what the layer reads that is called last, where it has rows of tokens by samples."""
        last: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            last[:] = [args[0]]

        handles = [module.register_forward_pre_hook(hook) for module in self._modules.values()]
        try:
            self._reader.run_layers(batch)
        finally:
            for handle in handles:
                handle.remove()
        return last[0] if last and last[0].dim() == 3 else None


def _take_routed(sums: Sums, name: str, hidden: Tensor, chosen: Tensor, inputs: Tensor, output: Tensor) -> Tensor:
    """Let the sums take what an expert reads; what it computes stays as it is."""
    with full_precision([inputs.device]):
        sums.take_routed(name, hidden, chosen, inputs)
    return output
