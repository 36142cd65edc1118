"""Running the model on batches, so that every sample's own loss counts the same and padding doesn't count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from headstart.errors import BASE_PREFIX, DataError, not_finite
from headstart.layers.weights import model_device
from headstart.statistics.batches import IGNORED, Batch, Samples, label_counts, single_sample
from headstart.statistics.losses import (
    RULES,
    Rule,
    backward_of_sum,
    fitting_rules,
    has_padding,
    loss_of,
    model_dtype,
    only_first_label,
    tells_apart,
)
from headstart.statistics.masks import TokenMasks, Tokens, Unmatched
from headstart.statistics.processes import Processes
from headstart.statistics.sums import Regroup, Sums
from headstart.statistics.tap import tapped


class Reader:
    """Reads batches into sums, weighting samples by the rule measured on the batches that can tell.

    Args:
        model: called with each batch as keyword arguments.
        modules: the base layers to tap, by name.
        tokens: which tokens count in Kronecker factors.
        in_step_with: processes that must run the model in step, because its parameters are sharded over them: samples
            are then read one at a time, and what one process finds wrong, all do.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], tokens: Tokens, *, in_step_with: Processes | None
    ) -> None:
        self._model = model
        self._modules = modules
        self._tokens = tokens
        self._device = model_device(model)
        self.encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        config = getattr(model, "config", None)
        self._longest = getattr(config, "max_position_embeddings", None) or math.inf
        self._apart = in_step_with is not None
        self._in_step_with = in_step_with
        self._dtype = model_dtype(model)
        # Which rules of weighting fit all that was measured so far.
        self._rules: list[Rule] = list(RULES)
        self._measured = False
        self._padding_measured = False
        self.notes: list[str] = []

    def read(self, samples: Samples, sums: Sums) -> None:
        """Run forward and backward, so that the sums see the gradient of the sum of the samples' own losses."""
        batch = self.moved(samples.batch)
        samples = Samples(batch, samples.indices)
        if not self._apart and samples.size > 1:
            self._measure(batch, samples.size)
        names = {name: self._modules[name] for name in sums.shapes}
        with tapped(names, sums.watch):
            self._accumulate(samples, sums)

    def forward(self, batch: Batch) -> Any:
        """Run the model on a batch of its own device."""
        return self._model(**batch)

    def alone(self, batch: Batch, row: int) -> Batch:
        """Return one sample of a batch without its padding."""
        return single_sample(batch, row, encoder_decoder=self.encoder_decoder)

    def moved(self, batch: Batch) -> Batch:
        """Return a batch on the model's device."""
        return {key: value.to(self._device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _measure(self, batch: Batch, size: int) -> None:
        """Narrow down the rules on the first batch, the first padded one, and those that can tell open rules apart."""
        padding = has_padding(batch) and not self._padding_measured
        if self._measured and not padding and not tells_apart(self._rules, batch, size, self._dtype):
            return
        self._measured = True
        self._padding_measured |= padding
        # Without taps: only the pass's own backward may reach the sums.
        self._rules = fitting_rules(self.forward, batch, self._dtype, self._rules, encoder_decoder=self.encoder_decoder)
        if not self._rules:
            self._read_apart("the loss of a batch is not a mean of its samples' losses in this model")

    def _accumulate(self, samples: Samples, sums: Sums) -> None:
        if self._apart and samples.size > 1:
            for row in range(samples.size):
                self._accumulate(Samples(self.alone(samples.batch, row), (samples.indices[row],)), sums)
            return
        alone = samples.size == 1
        if alone:
            samples = Samples(self.alone(samples.batch, 0), samples.indices)
        try:
            outputs, masks = self._tapped_forward(samples, sums, alone)
        except Unmatched:
            self._read_apart("some layers see other rows than the batch's tokens, among which padding can't be found")
            self._accumulate(samples, sums)
            return
        if masks.unmatched:
            self._note("some layers see other rows than the batch's tokens: all of theirs count")
        self._check_finite(outputs, samples)
        if not backward_of_sum(outputs, samples, self._rules[0] if self._rules else "apart"):
            self._read_apart("the loss is not a function of the logits that the model returns")
            self._accumulate(samples, sums)

    def _tapped_forward(self, samples: Samples, sums: Sums, alone: bool) -> tuple[Any, TokenMasks]:
        batch = _told_apart(samples.batch, self._longest) if self.encoder_decoder else samples.batch
        while True:
            masks = TokenMasks(batch, samples.size, self._tokens, encoder_decoder=self.encoder_decoder, alone=alone)
            sums.begin(masks)
            try:
                outputs = self.forward(batch)
                sums.check_groups()
            except Regroup as found:
                sums.split(found.group)
            else:
                sums.replaying = True
                return outputs, masks

    def _check_finite(self, outputs: Any, samples: Samples) -> None:
        loss = float(loss_of(outputs, samples.first).detach())
        failure = None if math.isfinite(loss) else _infinite(loss, samples)
        if self._in_step_with is not None:
            words = next((each for each in self._in_step_with.gather(failure and str(failure)) if each), None)
            if words is not None:
                raise DataError(words)
        if failure is None:
            return
        for name, parameter in self._model.named_parameters():
            if parameter.device.type != "meta" and not math.isfinite(float(parameter.detach().abs().max())):
                raise not_finite(name.removeprefix(BASE_PREFIX).replace(".base_layer", "").rpartition(".")[0])
        raise failure

    def _read_apart(self, why: str) -> None:
        self._apart = True
        self._note(f"{why}, so samples were read one at a time")

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def _told_apart(batch: Batch, longest: float) -> Batch:
    """Give a decoder's labels another length where they are as long as the encoder's input: layers are told by length.

    Padding at the end, which no loss and no other token sees, is added or left out. Where neither can be, samples have
    to be read one at a time.

    Args:
        batch: of an encoder-decoder.
        longest: how many positions the model knows.
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if not isinstance(labels, Tensor) or not isinstance(mask, Tensor) or labels.shape != mask.shape:
        return batch
    if any(key.startswith("decoder_") for key in batch):
        return batch
    if bool((labels[:, -1] == IGNORED).all()):
        return batch | {"labels": labels[:, :-1]}
    if labels.shape[1] >= longest:
        return batch
    return batch | {"labels": functional.pad(labels, (0, 1), value=IGNORED)}


def _infinite(loss: float, samples: Samples) -> DataError:
    counts = label_counts(samples.batch)
    if counts is not None and bool((counts[:, 1] == 0).any()):
        return DataError(f"the loss is {loss}: {only_first_label(samples)}")
    low, high = min(samples.indices), max(samples.indices)
    if samples.size == 1:
        which = f"sample {low}"
    elif high - low + 1 == samples.size:
        which = f"samples {low} to {high}"
    else:
        which = "samples " + ", ".join(map(str, sorted(samples.indices)))
    return DataError(f"the loss is {loss} on {which}: check the labels, and the model's precision.")
