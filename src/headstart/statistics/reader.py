"""Running the model on batches, so that every sample's own loss counts the same and padding doesn't count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from headstart.errors import BASE_PREFIX, DataError, not_finite
from headstart.layers.weights import model_device
from headstart.names import in_base
from headstart.processes import Processes
from headstart.statistics.batches import (
    IGNORED,
    Batch,
    Samples,
    label_counts,
    moved,
    single_sample,
    token_width,
)
from headstart.statistics.confirmed import Confirmed
from headstart.statistics.halves import by_half, divided, half_of
from headstart.statistics.losses import infinite_loss, loss_of, only_first_label
from headstart.statistics.masks import TokenMasks, Tokens, Unmatched
from headstart.statistics.quiet import drawn_from
from headstart.statistics.runs import Loss, Runs
from headstart.statistics.sums import Regroup, Restart, Sums
from headstart.statistics.tap import LossScale
from headstart.statistics.trial import Run, Seen, cut_to_window, rounding, tried
from headstart.statistics.watched import Watched

# Samples' own losses from the outputs of a whole batch; one sample at a time; batches as wholes, with their own loss.
Way = Literal["own", "apart", "whole"]

# Tokens that are read at once: so many that a processor isn't any faster with more.
_TOKENS_AT_ONCE = {"cpu": 1024, "other": 2048}


class Reader:
    """Reads batches into sums, in whichever way gives every sample's own loss the same weight.

    The first sample is read on trial: where its loss is one that can be computed from the logits, whole batches are
    read so, else one sample at a time. It is read twice, since a model that is random has no gradient to start from.

    Args:
        model: called with each batch as keyword arguments.
        watched: what is looked at.
        tokens: which tokens count in Kronecker factors.
        in_step_with: processes that must run the model in step, because its parameters are sharded over them: samples
            are then read one at a time, and what one process finds wrong, all do.
        loss: computes a batch's loss in place of the model: one sample at a time, or where a sample can't be taken out
            or has no loss by itself, of whole batches.
        whole: read batches as wholes with their own loss, as losses need that compare the samples of a batch.
        seed: of what a loss draws at random.

    Attributes:
        watched: what is looked at.
        device: of the model's inputs.
        notes: sentences for the report.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Watched,
        tokens: Tokens,
        *,
        in_step_with: Processes | None,
        loss: Loss | None = None,
        whole: bool = False,
        seed: int = 0,
    ) -> None:
        self._model = model
        self.watched = watched
        self._tokens = tokens
        self.device = model_device(model)
        self._loss = loss
        self._whole = whole
        self._seed = seed
        self._runs = Runs(model, watched.modules, loss=loss, in_step=in_step_with is not None)
        self._in_step_with = in_step_with
        self._scale = LossScale()
        self._way: Way | None = None
        self._why = "the loss of the first sample is not finite"
        self._confirmed = Confirmed(self._runs, model, seed, self.device)
        self.notes: list[str] = []

    @property
    def keeps_batches(self) -> bool:
        """Whether batches mean something, so that samples mustn't be put together in others."""
        return self._runs.encoder_decoder or self.probes_batches

    @property
    def probes_batches(self) -> bool:
        """Whether a sample alone may be more than the loss can be computed of."""
        return self._whole or self._loss is not None

    def read(self, samples: Samples, sums: Sums) -> None:
        """Run forward and backward, so that the sums see the gradient of the sum of the samples' own losses.

        Raises:
            Restart: the sums have to be cleared, and all batches read again.
        """
        samples = Samples(moved(samples.batch, self.device), samples.indices, samples.cut)
        self.learn(samples)
        self._confirm(samples)
        for part in self._parts(samples, halves=sums.by_half):
            expected = self._confirmed.outputs_alone(part) if self._way == "own" else None
            draws = drawn_from(self._seed + 7919 * part.first, self.device)
            with draws, self.watched.into(sums, self._scale):
                self._accumulate(part, sums, expected)

    def learn(self, samples: Samples) -> None:
        """Find out what the model's loss is, from one sample, where that isn't known yet."""
        if self._way is None:
            self._find_way(samples)

    def run_layers(self, batch: Batch) -> None:
        """Run the model on a batch for what its layers see."""
        with torch.no_grad(), drawn_from(self._seed, self.device):
            self._runs.layers(moved(batch, self.device))

    def alone(self, batch: Batch, row: int) -> Batch:
        """Return one sample of a batch without its padding."""
        return single_sample(batch, row, encoder_decoder=self._runs.encoder_decoder)

    def each_alone(self, samples: Samples) -> Iterator[Samples]:
        """Yield the samples of a batch one by one, without their padding; a batch that can't be cut as it is."""
        if not samples.cut:
            yield samples
            return
        for row in range(samples.size):
            yield Samples(self.alone(samples.batch, row), (samples.indices[row],))

    def given(self, batch: Batch) -> Batch:
        """Return a batch as the model is given it."""
        return self._runs.given(batch)

    def begun(self, sums: Sums, batch: Batch, samples: Samples, tokens: Tokens, *, alone: bool = False) -> TokenMasks:
        """Let the sums begin with a batch, as the model is given it; return which of its tokens count.

        With ``alone``, or where samples are not several that can be told apart, rows of unknown kind all count.
        """
        if tokens == "labels" and self._runs.shifted is None and not self._runs.encoder_decoder:
            self.note("which positions predict a label can't be told: those that carry one were counted")
        masks = TokenMasks(
            batch,
            samples.size,
            tokens,
            encoder_decoder=self._runs.encoder_decoder,
            alone=alone or samples.size == 1 or not samples.cut,
            shifted=bool(self._runs.shifted) and not self._runs.encoder_decoder,
        )
        sums.begin(masks, half_of(samples))
        return masks

    def _find_way(self, samples: Samples) -> None:
        sample = self._sample_on_trial(samples)
        try:
            first = self._tried(partial(self._runs.examined, sample), 0)
        except Exception:
            if self._loss is None or not samples.cut or samples.size == 1:
                raise
            # Such as a loss of pairs that lie one after the other: a genuine fault shows on the whole batch as well.
            self._read_whole("the loss can't be computed of a sample alone")
            sample, first = samples.batch, self._tried(partial(self._runs.whole, samples.batch, 1), 0)
        if self._any(not math.isfinite(first.loss)):
            return  # reading the sample will say so
        if self._way is None:
            doubt = self._confirmed.doubt(samples, sample)
            if doubt is not None:
                self._runs.forget()
            self._choose(samples, first, doubt)
        tolerance = math.sqrt(rounding(self._model, self.device))
        if self._way == "own" and not samples.cut:
            # The batch's own loss weighs its samples otherwise.
            self._runs.with_labels = True
            first = self._tried(self._read_on_trial(sample), 0)
        second = self._tried_without_labels(sample, first, tolerance) or self._tried(self._read_on_trial(sample), 1)
        if not self._any(not first.is_like(second, tolerance)):
            return
        if self._way == "own":
            self._read_apart("the loss is not a function of the logits that the model returns")
            second = self._tried(partial(self._runs.whole, sample, 1), 2)
            if first.is_like(second, tolerance):
                return
        self._random(first, second, samples)

    def _confirm(self, samples: Samples) -> None:
        """Read otherwise, and all again, where the loss that was found isn't the model's on a batch like this one."""
        doubt = self._confirmed.doubt(samples) if self._way == "own" else None
        if doubt is None:
            return
        self._runs.forget()
        if samples.cut:
            self._read_apart(doubt)
        else:
            self._read_whole(doubt)
        raise Restart

    def _tried_without_labels(self, sample: Batch, first: Seen, tolerance: float) -> Seen | None:
        """Read without labels, so that the model doesn't compute its own loss as well; None where that won't do."""
        if self._way != "own" or self._runs.with_labels:
            return None
        try:
            second = self._tried(self._read_on_trial(sample), 1)
        except Exception:  # whatever a model says that can't do without its labels
            second = None
        if second is None or not first.is_like(second, tolerance):
            self._runs.with_labels = True
            return None
        return second

    def _random(self, first: Seen, second: Seen, samples: Samples) -> None:
        losses = f"of sample {samples.first} it was {first.loss:.6g} and {second.loss:.6g}"
        if self._loss is None:
            raise DataError(
                f"the model is random in evaluation mode, so that it has no gradient to start from: read twice, the "
                f"loss {losses}; switch off what draws at random, or give loss= with fixed draws."
            )
        self.note(f"the loss is random ({losses}): its draws follow from the seed")

    def _choose(self, samples: Samples, first: Seen, doubt: str | None) -> None:
        if self._whole or not samples.cut:
            if self._runs.own is not None and not self._whole:
                self._way = "own"
                return
            self._way = "whole"
            if not self._whole:
                self.note(
                    "the samples of a batch can't be told apart, so each batch was read as a whole; where it doesn't "
                    "tell how many it holds, it counts as one of samples"
                )
            return
        if self._runs.own is not None:
            self._way = "own"
            return
        if self._in_step_with is None and self._compares_samples(samples, first):
            self._read_whole("the loss compares the samples of a batch")
        elif not first.flat or samples.size > 1:
            # A batch of one may yet be followed by larger ones that have a gradient.
            self._way = "apart"
            given = "loss= was given" if self._loss else doubt or "the model's loss can't be computed from its logits"
            self._why = "its parameters are sharded" if self._in_step_with else given

    def _compares_samples(self, samples: Samples, first: Seen) -> bool:
        """Return whether a sample alone has no loss to learn from, but a batch does."""
        if samples.size == 1:
            return False
        if first.flat:
            return not self._tried(partial(self._runs.whole, samples.batch, 1), 0).flat
        if self._loss is not None or not samples.batch.get("return_loss"):
            return False
        # So contrastive models are asked for their loss, which has no labels.
        with torch.no_grad():
            apart = [loss_of(self._model(**self.alone(samples.batch, row)), 0) for row in range(samples.size)]
            together = float(loss_of(self._model(**samples.batch), 0))
        mean = float(torch.stack(apart).mean())
        return abs(mean - together) > math.sqrt(rounding(self._model, self.device)) * abs(together)

    def _sample_on_trial(self, samples: Samples) -> Batch:
        """Return a short sample with two labels or more, cut to a window of its tokens where it has nothing else."""
        if not samples.cut or self._whole:
            return samples.batch
        counts = label_counts(samples.batch)
        if counts is None or not bool(counts[:, 1].any()):
            return self.alone(samples.batch, 0)
        learned = samples.batch["labels"].cpu() != IGNORED
        enough = [row for row in range(samples.size) if int(counts[row, 1]) > 1] or [int(counts[:, 1].argmax())]
        sample = self.alone(samples.batch, min(enough, key=lambda row: int(learned[row].nonzero()[-1])))
        return sample if self._runs.encoder_decoder else cut_to_window(sample)

    def _read_on_trial(self, batch: Batch) -> Callable[[], Run]:
        return partial(self._runs.apart, batch, 1) if self._way == "own" else partial(self._runs.whole, batch, 1)

    def _tried(self, run: Callable[[], Run], draw: int) -> Seen:
        modules, stacks = self.watched.modules, self.watched.stacks
        return tried(run, modules, self._scale, self._seed + draw, self.device, self._most, stacks)

    # Reading.

    def _parts(self, samples: Samples, *, halves: bool) -> list[Samples]:
        """Divide a batch of which every sample's own loss is computed: what its layers keep is most of the memory."""
        parts = by_half(samples) if halves and samples.cut and self._way != "whole" else [samples]
        if self._way != "own" or not samples.cut or not isinstance(samples.batch.get("labels"), Tensor):
            return parts
        tokens = _TOKENS_AT_ONCE["cpu" if self.device.type == "cpu" else "other"]
        most = max(1, tokens // max(1, token_width(samples.batch)))
        return [piece for part in parts for piece in divided(part, most)]

    def _accumulate(self, samples: Samples, sums: Sums, expected: Tensor | None = None) -> None:
        if self._way != "whole" and samples.cut:
            if samples.size > 1 and self._way != "own":
                self.note(f"{self._why}, so samples were read one at a time")
                for sample in self.each_alone(samples):
                    self._accumulate(sample, sums)
                return
            if samples.size == 1:
                (samples,) = self.each_alone(samples)
        batch = self._runs.given(samples.batch)
        if self._way == "own":
            self._check_predicted(batch, samples)
        try:
            run, masks = self._tapped_forward(batch, samples, sums)
        except Unmatched:
            self._read_apart("some layers see other rows than the batch's tokens, among which padding can't be found")
            self._accumulate(samples, sums)
            return
        if expected is not None and not self._confirmed.has_outputs(expected, run, batch, samples):
            self._read_apart("a sample's outputs depend on the batch or the padding around it")
            self._accumulate(samples, sums)
            return
        if masks.unmatched:
            self.note("some layers see other rows than the batch's tokens: all of theirs count")
        self._finish(run, samples)
        sums.count(samples.size)

    def _tapped_forward(self, batch: Batch, samples: Samples, sums: Sums) -> tuple[Run, TokenMasks]:
        while True:
            masks = self.begun(sums, batch, samples, self._tokens, alone=self._way == "whole")
            try:
                run = (
                    self._runs.apart(batch, samples.size)
                    if self._way == "own"
                    else self._runs.whole(batch, samples.size, samples.first)
                )
                sums.check_groups()
            except Regroup as regroup:
                sums.split(regroup.group)
            else:
                sums.replaying = True
                return run, masks

    def _finish(self, run: Run, samples: Samples) -> None:
        checked = False

        def gradient_at(scale: float) -> Tensor:
            nonlocal checked
            loss, gradient = run.at(scale)
            if not checked:
                self._check_finite(loss, samples)
                checked = True
            return gradient

        self._scale.backward(run.tensor, gradient_at, self._most)

    # Failures.

    def _check_predicted(self, batch: Batch, samples: Samples) -> None:
        counts = label_counts(batch)
        next_token = self._runs.own is not None and self._runs.own.kind == "next token"
        if next_token and counts is not None and bool((counts[:, 1] == 0).any()):
            raise only_first_label(samples)

    def _check_finite(self, value: Tensor, samples: Samples) -> None:
        loss = float(value)
        failure = None if math.isfinite(loss) else infinite_loss(loss, samples)
        if self._in_step_with is not None:
            words = next((message for message in self._in_step_with.gather(failure and str(failure)) if message), None)
            if words is not None:
                raise DataError(words)
        if failure is None:
            return
        for name, parameter in self._model.named_parameters():
            if parameter.device.type != "meta" and not math.isfinite(float(parameter.detach().abs().max())):
                raise not_finite(in_base(name.removeprefix(BASE_PREFIX)).rpartition(".")[0])
        raise failure

    def _any(self, flag: bool) -> bool:
        return flag if self._in_step_with is None else any(self._in_step_with.gather(flag))

    def _most(self, number: float) -> float:
        return number if self._in_step_with is None else max(self._in_step_with.gather(number))

    def _read_apart(self, why: str) -> None:
        self._way, self._why = "apart", why

    def _read_whole(self, why: str) -> None:
        self._way = "whole"
        self.note(f"{why}, so batches were read as wholes")

    def note(self, sentence: str) -> None:
        """Keep a sentence for the report, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
