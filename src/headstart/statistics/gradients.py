"""The mean gradient of the loss with respect to the weights of the layers that ask, in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from headstart.errors import BASE_PREFIX, DataError, LayerError, not_finite
from headstart.statistics.batches import Batch, Collator, Samples, iterate_samples, label_counts, single_sample
from headstart.statistics.losses import (
    Rule,
    backward_of_sum,
    check_labels,
    loss_of,
    measure_rule,
    model_dtype,
    needs_probe,
)
from headstart.statistics.quiet import adapters_off, dropout_off, frozen
from headstart.statistics.tap import Sink, tapped

Progress = Callable[[int, int], None]


@dataclass
class GradientStatistics:
    """What the pass found.

    Attributes:
        gradients: by layer, G (d_out, d_in) in float32: the mean over samples of each sample's own loss gradient.
            A layer that no gradient reached is missing.
        samples: how many samples were read.
        tokens: how many tokens they held, padding not counted (0 where the data are no tokens).
        notes: sentences for the report, where something was not as asked for.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    notes: list[str] = field(default_factory=list)


def mean_gradients(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    data: Iterable[Any],
    samples: int,
    *,
    collator: Collator | None = None,
    batch_size: int = 8,
    offload: Literal["cpu"] | None = None,
    progress: Progress | None = None,
) -> GradientStatistics:
    """Compute the mean gradient of the loss at the base model, dropout off, layer by layer inside the backward pass.

    Each layer's part is added to its sum as soon as backward reaches it, so that at most one float32 gradient a layer
    is held beside the model and its activations. Samples weigh as METHODS defines the loss (each one's own), whatever
    the batch size and padding. The model is given back in the mode and with the requires_grad flags that it came
    with; no parameter's ``.grad`` is touched.

    Args:
        model: the PEFT model; called with each batch as keyword arguments, it must return a loss.
        layers: the LoRA layers by name; their adapters are off during the pass.
        data: see :func:`headstart.statistics.batches.iterate_samples`.
        samples: how many samples to average over.
        collator, batch_size: for data of single samples.
        offload: "cpu" keeps the sums there.
        progress: called with (samples done, samples asked for).

    Raises:
        DataError: the data are empty, a sample has no label, the model gives no loss, or the loss is not finite.
        LayerError: a gradient is not finite; names the layer.
    """
    result = GradientStatistics()
    sums = result.gradients

    def sink_for(name: str) -> Sink:
        def sink(inputs: Tensor, gradient: Tensor) -> None:
            part = gradient.float().T @ inputs.float() if offload else None
            if name not in sums:
                device = torch.device(offload) if offload else gradient.device
                sums[name] = torch.zeros(gradient.shape[1], inputs.shape[1], device=device)
            if part is not None:
                sums[name] += part.to(sums[name].device)
            else:
                sums[name].addmm_(gradient.float().T, inputs.float())

        return sink

    modules = {name: layer.get_base_layer() for name, layer in layers.items()}
    sinks = {name: sink_for(name) for name in modules}
    with dropout_off(model), adapters_off(list(layers.values())), frozen(model):
        reader = _Reader(model)
        for chunk in iterate_samples(data, samples, collator=collator, batch_size=batch_size):
            check_labels(chunk)
            # Probing runs the model without taps: only this pass's own backward may reach the sinks.
            batch = reader.prepare(chunk)
            with tapped(modules, sinks):
                reader.accumulate(batch)
            result.samples += chunk.size
            result.tokens += _tokens(chunk.batch)
            if progress is not None:
                progress(result.samples, samples)
    if not sums:
        raise DataError("no gradient reached any of the adapter's layers: check that the loss depends on them.")
    for name, total in sums.items():
        total /= result.samples
        if not bool(torch.isfinite(total).all()):
            raise LayerError(f"layer {name!r}: its gradient has NaN or infinity; check the loss and the precision.")
    if result.samples < samples:
        result.notes.append(f"the data held {result.samples} samples, {samples} were asked for")
    if reader.rule == "apart":
        result.notes.append(
            "the loss of a batch is not a mean of its samples' losses in this model, so samples were read one at a time"
        )
    return result


class _Reader:
    """Runs the model on batches, weighting samples by the rule measured on the first batch that can tell."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._dtype = model_dtype(model)
        self.rule: Rule | None = None

    def prepare(self, samples: Samples) -> Samples:
        """Move a batch to the model's device, and measure the rule if this batch can tell it."""
        moved = {
            key: value.to(self._device) if isinstance(value, Tensor) else value for key, value in samples.batch.items()
        }
        if self.rule is None and samples.size > 1 and needs_probe(moved):
            self.rule = measure_rule(self._forward, moved, self._dtype)
        return Samples(moved, samples.first, samples.size)

    def accumulate(self, samples: Samples) -> None:
        """Run forward and backward, so that the taps see the gradient of the sum of the samples' own losses."""
        if self.rule != "apart" or samples.size == 1:
            outputs = self._forward(samples.batch)
            _check_finite(self._model, outputs, samples)
            if backward_of_sum(outputs, samples, self.rule or "samples"):
                return
            self.rule = "apart"
        for index in range(samples.size):
            self.accumulate(Samples(single_sample(samples.batch, index), samples.first + index, 1))

    def _forward(self, batch: Batch) -> Any:
        return self._model(**batch)


def _check_finite(model: nn.Module, outputs: Any, samples: Samples) -> None:
    loss = float(loss_of(outputs, samples.first).detach())
    if math.isfinite(loss):
        return
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise not_finite(name.removeprefix(BASE_PREFIX).replace(".base_layer", "").rpartition(".")[0])
    counts = label_counts(samples.batch)
    if counts is not None and bool((counts[:, 1] == 0).any()):
        index = samples.first + int((counts[:, 1] == 0).nonzero()[0])
        raise DataError(
            f"the loss is {loss}: sample {index} has its only label in first place, which a causal language model "
            "never uses; drop the sample, or raise the maximum length."
        )
    last = samples.first + samples.size - 1
    which = f"sample {last}" if samples.size == 1 else f"samples {samples.first} to {last}"
    raise DataError(f"the loss is {loss} on {which}: check the labels, and the model's precision.")


def _tokens(batch: Batch) -> int:
    for name in ("attention_mask", "input_ids"):
        value = batch.get(name)
        if isinstance(value, Tensor):
            return int(value.sum()) if name == "attention_mask" else value.numel()
    return 0
