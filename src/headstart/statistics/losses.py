"""A sample's own loss, from the logits.

A method's gradient is the mean over samples of each sample's own loss gradient, and for a language model a sample's
own loss is the mean over its label tokens. A batch's loss is mostly something else: the mean over all label tokens
of the batch, in which long samples count more. So samples' own losses are computed here from the logits, wherever that
gives what the model itself says: on the same logits, the same loss and the same gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.errors import DataError
from headstart.statistics.batches import IGNORED, Samples, label_counts

# Cross entropy of the next token's label, of the token's own, or of one class a sample; mean squared error; binary
# cross entropy.
Kind = Literal["next token", "token", "class", "squares", "logistic"]

# Of two computations of one loss from the same logits in float32, and of its gradient.
_SAME_LOSS, _SAME_GRADIENT = 1e-5, 1e-2
# Sums that a processor's narrowest vectors run beside each other in one of many exponentials.
_LANES = 8
# Logits that are computed at once, as floats: 64 MiB.
_AT_ONCE = 2**24


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


def logits_of(outputs: Any) -> Tensor | None:
    """Return the logits of a model's outputs, where they are one tensor."""
    logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def check_labels(samples: Samples) -> None:
    """Raise DataError, naming the sample, where a sample has no label to learn from."""
    counts = label_counts(samples.batch)
    if counts is None or len(counts) != samples.size:
        return
    empty = (counts[:, 0] == 0).nonzero().flatten()
    if len(empty):
        raise DataError(
            f"sample {samples.indices[int(empty[0])]} has no label left (all are -100): it may have been truncated "
            "before its answer; raise the maximum length or drop the sample."
        )


def only_first_label(samples: Samples) -> DataError:
    """Return the error for a sample whose only label a causal language model never uses."""
    counts = label_counts(samples.batch)
    row = int((counts[:, 1] == 0).nonzero()[0]) if counts is not None and bool((counts[:, 1] == 0).any()) else 0
    return DataError(
        f"sample {samples.indices[row]} has its only label in first place, which a causal language model never uses; "
        "drop the sample, or raise the maximum length."
    )


def predicted(labels: Tensor, *, shifted: bool) -> Tensor:
    """Return the label that each position predicts (samples, tokens), the next one's where ``shifted``."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if shifted else labels


@dataclass(frozen=True)
class OwnLoss:
    """How samples' own losses follow from logits (samples, tokens, classes) or (samples, classes), and labels."""

    kind: Kind

    @property
    def of_tokens(self) -> bool:
        """Whether each token has a label."""
        return self.kind in ("next token", "token")

    def gradient(
        self, states: Tensor, labels: Tensor, scale: float, *, head: nn.Linear | None = None, together: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the samples' own losses (samples,) and the gradient of their scaled sum with respect to the states.

        Args:
            states: the logits, or with ``head`` what the head makes them of; needs no graph.
            labels: as the model takes them.
            scale: of the gradient.
            head: makes logits of states, some rows at a time.
            together: return the gradient of the mean over all of the batch's labels instead, as models compute it.
        """
        if not self.of_tokens:
            return self._rows(states, labels, scale, together=together)
        targets = predicted(labels, shifted=self.kind == "next token").to(states.device)
        used = targets != IGNORED
        counts = used.sum(1)
        weights = 1 / (counts.sum().expand_as(counts) if together else counts).float()
        places = used.flatten().nonzero().flatten()
        flat = states.detach().flatten(0, 1)
        gradient = torch.zeros_like(flat)
        losses = torch.zeros(len(states), dtype=torch.float32, device=states.device)
        classes = flat.shape[1] if head is None else head.out_features
        for rows in places.split(max(16, _AT_ONCE // classes)):
            owners = rows // states.shape[1]
            picked = targets.flatten()[rows]
            part = flat[rows]
            if head is None:
                terms, slope = _cross_entropy(part.float(), picked, weights[owners] * scale)
                gradient[rows] = slope.to(gradient.dtype)
            else:
                with torch.enable_grad():
                    logits = head(part.requires_grad_(True))
                terms, slope = _cross_entropy(logits.detach().float(), picked, weights[owners] * scale)
                (gradient[rows],) = torch.autograd.grad(logits, part, slope.to(logits.dtype))
            losses.index_add_(0, owners, terms * weights[owners])
        return losses, gradient.view_as(states)

    def is_of(self, loss: Tensor, logits: Tensor, labels: Tensor) -> bool:
        """Return whether a batch's loss is the mean of this one over its labels, or over its samples."""
        for together in (True, False)[: len(logits)]:
            values, _ = self.gradient(logits, labels, 1.0, together=together)
            value = values.sum() if self.of_tokens and together else values.mean()
            if _same_value(value, loss, logits.shape[-1]):
                return True
        return False

    def _rows(self, logits: Tensor, labels: Tensor, scale: float, *, together: bool) -> tuple[Tensor, Tensor]:
        count = len(logits)
        given = logits.detach().float().reshape(count, -1).requires_grad_(True)
        with torch.enable_grad():
            if self.kind == "class":
                losses = functional.cross_entropy(given, labels.reshape(-1), reduction="none")
            else:
                of = functional.mse_loss if self.kind == "squares" else functional.binary_cross_entropy_with_logits
                losses = of(given, labels.reshape(count, -1).float(), reduction="none").mean(1)
            total = losses.mean() if together else losses.sum()
        (gradient,) = torch.autograd.grad(total, given)
        return losses.detach(), gradient.mul_(scale).reshape(logits.shape).to(logits.dtype)


def find_own_loss(loss: Tensor, logits: Tensor, gradient: Tensor, labels: Tensor) -> OwnLoss | None:
    """Return the loss that a model computes, told by its value and its gradient; None where none is alike, or two are.

    Args:
        loss: of a batch; a scalar.
        logits: of which it is a function.
        gradient: of the loss with respect to the logits.
        labels: of the batch.
    """
    alike = []
    for kind in _possible(logits, labels):
        own = OwnLoss(kind)
        losses, slope = own.gradient(logits, labels, 1.0, together=True)
        value = losses.sum() if own.of_tokens else losses.mean()
        if _same(value, slope, loss, gradient):
            alike.append(own)
    return alike[0] if len(alike) == 1 else None


def predicts_next(gradient: Tensor, labels: Tensor) -> bool | None:
    """Return whether positions predict the next token's label, told by where logits have a gradient; None if not told.

    Args:
        gradient: of the loss with respect to the logits (samples, tokens, classes).
        labels: one integer a token.
    """
    if gradient.shape[:-1] != labels.shape:
        return None
    used = (gradient != 0).any(-1)
    fits = [torch.equal(used, predicted(labels, shifted=shifted) != IGNORED) for shifted in (True, False)]
    return fits[0] if fits[0] != fits[1] else None


def _possible(logits: Tensor, labels: Tensor) -> tuple[Kind, ...]:
    if labels.is_floating_point():
        fits = len(logits) == len(labels) and logits.numel() == labels.numel()
        return ("squares", "logistic") if fits else ()
    if labels.dim() == 2 and logits.dim() == 3 and logits.shape[:-1] == labels.shape:
        return ("next token", "token")
    return ("class",) if logits.dim() == 2 and labels.numel() == len(logits) else ()


def _same(value: Tensor, slope: Tensor, loss: Tensor, gradient: Tensor) -> bool:
    if not _same_value(value, loss, slope.shape[-1]):
        return False
    gradient = gradient.float()
    return float((slope.float() - gradient).norm()) <= _SAME_GRADIENT * float(gradient.norm())


def _same_value(value: Tensor, loss: Tensor, classes: int) -> bool:
    # A loss that the model itself rounds to half precision agrees to that precision only. What a sum over all classes
    # loses is no share of the loss: terms below half a unit in the last place of 1 vanish beside a likely class's.
    tolerance = max(_SAME_LOSS, 2 * torch.finfo(loss.dtype).eps) * float(loss.float().abs())
    tolerance += classes / _LANES * torch.finfo(torch.float32).eps / 2
    return float((value - loss.float()).abs()) <= tolerance + 1e-7


def _cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's cross entropy, and the gradient of its multiple; the logits are used up."""
    total = logits.logsumexp(1)
    terms = total - logits.gather(1, labels[:, None]).squeeze(1)
    slope = logits.sub_(total[:, None]).exp_()
    slope.scatter_add_(1, labels[:, None], slope.new_full((len(labels), 1), -1.0))
    return terms, slope.mul_(weights[:, None])


def infinite_loss(loss: float, samples: Samples) -> DataError:
    """Return the error for a loss that is not finite, naming the samples that it is of."""
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
