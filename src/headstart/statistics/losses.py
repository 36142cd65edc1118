"""Making a batched pass weight its samples as one sample at a time would.

A method's gradient is the mean over samples of each sample's own loss gradient, and for a language model a sample's
own loss is the mean over its label tokens. A batch's loss is mostly something else: the mean over all label tokens
of the batch, in which long samples count more. How a model weights is not written down anywhere, so it is measured:
two samples are run apart and together, and the rule that explains the three losses is used from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headstart.errors import DataError
from headstart.statistics.batches import IGNORED, Batch, Samples, label_counts, single_sample, take

# How a batch's loss is made of its samples' own: a mean over samples; a mean over all label tokens; the same without
# the labels in first place (causal language models); their sum; none of these, so that samples have to be run one at
# a time.
Rule = Literal["samples", "tokens", "shifted tokens", "sum", "apart"]

Forward = Callable[[Batch], Any]


def loss_of(outputs: Any, first: int) -> Tensor:
    """Return the loss of a model's outputs.

    Raises:
        DataError: the model gave none.
    """
    loss = outputs.get("loss") if hasattr(outputs, "get") else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise DataError(
            f"the model returned no loss for the batch at sample {first}: batches need labels, and the model must "
            "return a mapping with a loss (return_dict=True)."
        )
    return loss if loss.dim() == 0 else loss.mean()


def check_labels(samples: Samples) -> None:
    """Raise DataError, naming the sample, where a sample has no label to learn from."""
    counts = label_counts(samples.batch)
    if counts is None:
        return
    empty = (counts[:, 0] == 0).nonzero().flatten()
    if len(empty):
        raise DataError(
            f"sample {samples.indices[int(empty[0])]} has no label left (all are -100): it may have been truncated "
            "before its answer; raise the maximum length or drop the sample."
        )


# In the order in which models use them; "apart" is what is left where none fits.
RULES: tuple[Rule, ...] = ("shifted tokens", "tokens", "samples", "sum")


def tells_apart(rules: Sequence[Rule], batch: Batch, size: int, dtype: torch.dtype) -> bool:
    """Return whether a batch's samples would weigh so differently under some of these rules that losses show it."""
    weights = [_weights(rule, batch, size) for rule in rules]
    visible = 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2
    return any(float((each - weights[0]).abs().max()) > visible for each in weights[1:])


def has_padding(batch: Batch) -> bool:
    """Return whether an attention mask hides something."""
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and not bool((mask != 0).all())


def _weights(rule: Rule, batch: Batch, size: int) -> Tensor:
    """Return how much each sample's own loss weighs in the batch's."""
    counts = label_counts(batch)
    if rule == "sum":
        return torch.ones(size, dtype=torch.float64, device="cpu")
    if rule == "samples" or counts is None:
        return torch.full((size,), 1 / size, dtype=torch.float64, device="cpu")
    used = counts[:, 1 if rule == "shifted tokens" else 0].cpu().double()
    return used / used.sum()


@torch.no_grad()
def fitting_rules(
    forward: Forward, batch: Batch, dtype: torch.dtype, rules: Sequence[Rule], *, encoder_decoder: bool
) -> list[Rule]:
    """Find out how the model weights the samples of a batch, from the two that differ most in their labels.

    Args:
        forward: runs the model on a batch.
        batch: at least two samples.
        dtype: of the model; decides how closely the losses must agree.
        rules: those to choose from, in this order.
        encoder_decoder: whether labels lie along a decoder's tokens, of which none is left out of the loss.

    Returns:
        The rules that explain the two samples' losses apart and together; none where samples depend on each other, or
        on the padding beside them.
    """
    counts = label_counts(batch)
    if counts is None:
        low, high = _padding_extremes(batch)
    else:
        low, high = int(counts[:, 0].argmin()), int(counts[:, 0].argmax())
        if low == high:
            low, high = _padding_extremes(batch)
    alone = [single_sample(batch, index, encoder_decoder=encoder_decoder) for index in (low, high)]
    outputs_apart = [forward(one) for one in alone]
    pair = take(batch, [low, high])
    outputs = forward(pair)
    exact = dtype in (torch.float32, torch.float64)
    if _padding_matters(outputs_apart, alone, outputs, pair, 1e-3 if exact else 5e-2):
        return []
    apart = torch.tensor(
        [float(loss_of(each, index)) for each, index in zip(outputs_apart, (low, high), strict=True)],
        dtype=torch.float64,
        device="cpu",
    )
    together = float(loss_of(outputs, low))
    misfits: dict[Rule, float] = {}
    for rule in rules:
        skipped = counts is None and rule in ("tokens", "shifted tokens")
        if not skipped and not (encoder_decoder and rule == "shifted tokens"):
            expected = float(_weights(rule, pair, 2) @ apart)
            misfits[rule] = abs(expected - together) / max(abs(together), 1e-12)
    # Half precisions round the logits, so the three losses agree to a few units in the third digit only. What they
    # can't tell apart is left open.
    tolerance, noise = (2e-5, 2e-6) if exact else (1e-2, 4e-3)
    likely = min(max(min(misfits.values(), default=0.0), noise), tolerance)
    return [rule for rule, misfit in misfits.items() if misfit <= likely]


def backward_of_sum(outputs: Any, samples: Samples, rule: Rule) -> bool:
    """Run backward so that the layers see the gradient of the sum of the samples' own losses.

    Returns:
        False, having computed nothing, where the rule can't be applied because the loss is not a function of the
        ``logits`` that the model returned; the samples then have to be run apart.
    """
    loss = loss_of(outputs, samples.first)
    if not loss.requires_grad:  # no tapped layer took part in this batch
        return True
    counts = label_counts(samples.batch)
    if rule == "sum":
        loss.backward()
        return True
    if rule in ("samples", "apart") or counts is None or bool((counts == counts[0]).all()):
        (loss * samples.size).backward()
        return True
    logits = outputs.get("logits") if hasattr(outputs, "get") else None
    if not isinstance(logits, Tensor) or logits.shape[0] != samples.size or not logits.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(loss, [logits], allow_unused=True)
    if gradient is None:
        return False
    used = counts[:, 1 if rule == "shifted tokens" else 0].to(device=gradient.device, dtype=torch.float32)
    if bool((used == 0).any()):
        raise only_first_label(samples)
    weights = (used.sum() / used).reshape(-1, *[1] * (gradient.dim() - 1))
    # In place: of a language model this is the largest tensor of the whole pass.
    torch.autograd.backward([logits], [gradient.mul_(weights)])
    return True


def only_first_label(samples: Samples) -> DataError:
    """Return the error for a sample whose only label a causal language model never uses."""
    counts = label_counts(samples.batch)
    row = int((counts[:, 1] == 0).nonzero()[0]) if counts is not None and bool((counts[:, 1] == 0).any()) else 0
    return DataError(
        f"sample {samples.indices[row]} has its only label in first place, which a causal language model never uses; "
        "drop the sample, or raise the maximum length."
    )


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def _padding_matters(apart: Sequence[Any], alone: Sequence[Batch], outputs: Any, pair: Batch, tolerance: float) -> bool:
    """Return whether a model's logits for a sample depend on the padding beside it; False where that can't be seen."""
    together = _logits(outputs)
    if together is None or len(together) != len(apart):
        return False
    for row, (each, one) in enumerate(zip(apart, alone, strict=True)):
        mine = _logits(each)
        if mine is None or len(mine) != 1 or mine.dim() != together.dim():
            return False
        mine, theirs = mine[0].float(), together[row].float()
        if mine.dim() == 2:
            # What a sample alone has kept is what the mask, or where logits lie along a decoder the labels, show.
            for name in ("attention_mask", "labels"):
                small, large = one.get(name), pair.get(name)
                if isinstance(small, Tensor) and isinstance(large, Tensor) and large.dim() == 2:
                    hidden = 0 if name == "attention_mask" else IGNORED
                    kept, held = small[0] != hidden, large[row] != hidden
                    if len(kept) == len(mine) and len(held) == len(theirs) and int(kept.sum()) == int(held.sum()):
                        mine, theirs = mine[kept], theirs[held]
                        break
            else:
                return False
        if mine.shape == theirs.shape and float((mine - theirs).norm()) > tolerance * float(mine.norm()):
            return True
    return False


def _logits(outputs: Any) -> Tensor | None:
    logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.dim() in (2, 3) else None


def _padding_extremes(batch: Batch) -> tuple[int, int]:
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor):
        return 0, 1
    lengths = mask.sum(1)
    low, high = int(lengths.argmin()), int(lengths.argmax())
    return (low, high) if low != high else (0, 1)
