"""Whether the loss that one short sample showed is the model's on all data, as they come.

What a short sample doesn't show is asked for by itself: labels that the model ignores, padding that it leaves out in a
way of its own, and what else a batch holds by which it may weigh tokens or samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from headstart.statistics.batches import IGNORED, Batch, Samples, is_padded, most_padded, single_sample, take
from headstart.statistics.losses import predicted
from headstart.statistics.quiet import drawn_from
from headstart.statistics.runs import Runs
from headstart.statistics.trial import Run, cut_at_padding, rounding

# What models read to make their logits, as Transformers' tokenizers, processors and collators name it.
_INPUTS = re.compile(
    r".*(_ids|_embeds|_values(_videos)?|_features|_thw|_sizes?|attention_mask|head_mask|pixel_mask)"
    r"|labels|bbox|langs|lengths|seq_idx|cache_position|(cu_seq_lens|max_length)_[qk]"
)
# Logits of a sample that are looked at, as floats: 256 MiB. A longer one is cut.
_MOST_LOGITS = 2**26
# Of so few classes, all are asked for; of more, those that models ignore if any.
_FEW_CLASSES = 32
_IGNORABLE = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id", "mask_token_id")


def unmodelled(batch: Batch) -> str | None:
    """Return the name of something in a batch that the loss may weigh tokens or samples by; None where nothing is.

    That is a number, or a tensor of no more numbers than the batch has labels, that isn't known as what logits are made
    of.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return None
    for name, value in batch.items():
        if not _INPUTS.fullmatch(name) and any(size <= labels.numel() for size in _sizes(value)):
            return name
    return None


class Confirmed:
    """Compares what a model's forward passes return with the loss that was found, and with what samples are alone.

    Args:
        runs: runs the model, and knows the loss.
        model: of the runs.
        seed: of what it draws by chance.
        device: of the model's inputs.
    """

    def __init__(self, runs: Runs, model: nn.Module, seed: int, device: torch.device) -> None:
        self._runs = runs
        self._model = model
        self._chance = seed, device
        self._kinds: set[tuple[frozenset[str], bool]] = set()
        # Whether a batch, and a padded one, was compared with its samples' outputs alone.
        self._compared = {False: False, True: False}

    def doubt(self, samples: Samples, trial: Batch | None = None) -> str | None:
        """Return why the loss that was found may not be the model's on a batch; None where it is, or where none was.

        Args:
            samples: the batch, on the model's device. Batches with the same names in them, and with padding or without,
                are asked about once; those that can't be cut each, where they hold what the loss may depend on.
            trial: a sample of it, on which the loss was found: on it labels are asked about, and the batch is not.
        """
        if self._runs.own is None:
            return None
        name = unmodelled(samples.batch)
        if name is not None and samples.cut:
            return f"the loss may depend on {name!r}, which batches hold"
        with drawn_from(*self._chance):
            same = self._whatever_the_labels(trial) if trial is not None else self._on(samples, again=name is not None)
        return None if same else "the model's loss is not the mean over all labels that its logits give"

    def _whatever_the_labels(self, sample: Batch) -> bool:
        """Return whether the loss stays what it is with labels that models ignore, in the place of a sample's own."""
        own, labels = self._runs.own, sample["labels"]
        if own is None or not own.of_tokens:
            return own is not None
        used = labels != IGNORED
        if own.kind == "next token":
            used[:, 0] = False
        count, values = int(used.sum()), self._values()
        for start in range(0, len(values), max(1, count)):
            chosen = torch.tensor(values[start:] + values, dtype=labels.dtype, device=labels.device)
            others = labels.clone()
            others[used] = chosen.repeat(-(-count // len(chosen)))[:count]
            if not self._runs.agrees(sample | {"labels": others}):
                return False
        return True

    def _on(self, samples: Samples, *, again: bool) -> bool:
        """Return whether the loss is the model's on a batch like this one, where that wasn't asked yet or is ``again``.

        Where samples can be taken out of the batch, one is looked at, padding and all: the one that has most of it.
        """
        batch, own = samples.batch, self._runs.own
        padded = is_padded(batch)
        kind = frozenset(batch), padded
        if kind in self._kinds and not again:
            return True
        self._kinds.add(kind)
        if samples.cut:
            batch = take(batch, [most_padded(batch) if padded else samples.size - 1])
            if own is not None and own.of_tokens and not self._runs.encoder_decoder:
                batch = cut_at_padding(batch, max(16, _MOST_LOGITS // self._runs.classes))
                if not bool((predicted(batch["labels"], shifted=own.kind == "next token") != IGNORED).any()):
                    return True  # reading it will say so
        return self._runs.agrees(batch)

    def outputs_alone(self, samples: Samples) -> Tensor | None:
        """Return the outputs of the most padded sample alone, where a batch like this one wasn't compared yet."""
        if samples.size == 1 or not samples.cut:
            return None
        padded = is_padded(samples.batch)
        if self._compared[padded]:
            return None
        self._compared[padded] = True
        runs, row = self._runs, most_padded(samples.batch)
        batch = runs.given(single_sample(samples.batch, row, encoder_decoder=runs.encoder_decoder))
        with torch.no_grad():
            return runs.compared(runs.states(batch), batch, 0)

    def has_outputs(self, alone: Tensor, run: Run, batch: Batch, samples: Samples) -> bool:
        """Return whether a batch that was run gives its most padded sample the outputs that it has alone."""
        with torch.no_grad():
            given = self._runs.compared(run.tensor.detach(), batch, most_padded(samples.batch))
        allowed = math.sqrt(rounding(self._model, self._chance[1])) * float(alone.norm())
        return given.shape == alone.shape and float((given - alone).norm()) <= allowed

    def _values(self) -> list[int]:
        classes = self._runs.classes
        if classes <= _FEW_CLASSES:
            return list(range(classes))
        config = getattr(self._model, "config", None)
        named = [getattr(config, name, None) for name in _IGNORABLE]
        values = [value for value in (0, *named, 1, classes - 1) if isinstance(value, int) and 0 <= value < classes]
        return list(dict.fromkeys(values))


def _sizes(value: object) -> Iterator[int]:
    """Yield how many numbers each tensor, or number, of a batch's entry has."""
    if isinstance(value, Tensor):
        yield value.numel()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield 1
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _sizes(part)
    elif isinstance(value, list | tuple):
        numbers = [part for part in value if isinstance(part, int | float)]
        yield from [len(numbers)] if numbers else []
        for part in value:
            yield from _sizes(part) if isinstance(part, Tensor | Mapping | list | tuple) else ()
