"""The toy model of "Beyond Zero Initialization" (section 3.4, appendix D.1), fine-tuned cell by cell.

f(x) = W_out relu((W_0 + B A) relu(W_in x)) is pretrained whole on one set of images; on another A and B train alone.
All cells that see the same batches share relu(W_in x) and W_0 relu(W_in x), which are computed once: what is left for a
cell are products with its r columns, some 25 times fewer operations than the whole model takes at n = 4096, r = 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from headstart.dynamics.images import CLASSES, PIXELS, Images
from headstart.progress import Show, silent

# Rows that are measured at a time: their hidden units stay in a processor's cache.
_ROWS = 128


@dataclass(frozen=True)
class Network:
    """The pretrained weights, in float32.

    Attributes:
        into: W_in (n, 784).
        middle: W_0 (n, n), which is adapted.
        out: W_out (10, n).
    """

    into: Tensor
    middle: Tensor
    out: Tensor

    @property
    def width(self) -> int:
        """The hidden width n."""
        return len(self.middle)


@dataclass(frozen=True)
class Frozen:
    """What of some images doesn't depend on A and B.

    Attributes:
        inputs: (count, n), relu(W_in x), what the adapted layer is given.
        base: (count, n), W_0 of these.
        labels: (count,).
    """

    inputs: Tensor
    base: Tensor
    labels: Tensor


def fresh_network(width: int, seed: int) -> Network:
    """Return untrained weights by He's initialisation (Kaiming normal for relu), as appendix D.1 has it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = ((width, PIXELS), (width, width), (CLASSES, width))
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes)
    return Network(*(part.mul_((2 / part.shape[1]) ** 0.5) for part in drawn))


def pretrain(
    network: Network, images: Images, *, steps: int, rate: float, batch: int, seed: int, show: Show = silent
) -> Network:
    """Return the network after ``steps`` of AdamW without decay on all its weights; the given one stays as it is."""
    weights = [part.clone().requires_grad_() for part in (network.into, network.middle, network.out)]
    into, middle, out = weights
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0, fused=True)
    for done, rows in enumerate(batches(len(images), steps, batch, seed), 1):
        hidden = (images.pixels[rows] @ into.mT).relu()
        logits = (hidden @ middle.mT).relu() @ out.mT
        optimizer.zero_grad()
        cross_entropy(logits, images.labels[rows]).backward()
        optimizer.step()
        show("pretraining", done, steps)
    return Network(*(weight.detach() for weight in weights))


def batches(count: int, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield the rows of each step: passes over all rows, each in an order of its own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = torch.empty(0, dtype=torch.long, device="cpu")
    for _ in range(steps):
        while len(rows) < batch:
            rows = torch.cat([rows, torch.randperm(count, generator=generator, dtype=torch.long, device="cpu")])
        yield rows[:batch]
        rows = rows[batch:]


def frozen_part(network: Network, images: Images, rows: Tensor | slice = slice(None)) -> Frozen:
    """Return what all cells share of these rows of the images."""
    inputs = (images.pixels[rows] @ network.into.mT).relu()
    return Frozen(inputs, inputs @ network.middle.mT, images.labels[rows])


def fine_tune_(A: Tensor, B: Tensor, out: Tensor, data: Sequence[Frozen], rate: float) -> list[float]:
    """Train A (r, n) and B (n, r) in place, a step of AdamW without decay a batch; return the loss before each."""
    A.grad, B.grad = torch.empty_like(A), torch.empty_like(B)
    optimizer = torch.optim.AdamW([A, B], lr=rate, weight_decay=0, fused=True)
    losses = []
    for batch in data:
        losses.append(gradients_(A, B, out, batch))
        optimizer.step()
    A.grad = B.grad = None
    return losses


def gradients_(A: Tensor, B: Tensor, out: Tensor, batch: Frozen) -> float:
    """Write the gradients of the mean cross-entropy into ``A.grad`` and ``B.grad``; return the loss.

    By hand, as autograd would also keep and read what no cell needs.
    """
    count = len(batch.labels)
    low = batch.inputs @ A.mT
    hidden = torch.addmm(batch.base, low, B.mT)
    logits = hidden.relu() @ out.mT
    loss = cross_entropy(logits, batch.labels)
    of_logits = (logits.softmax(dim=1) - one_hot(batch.labels, CLASSES)) / count
    back = torch.ops.aten.threshold_backward(of_logits @ out, hidden, 0)
    assert A.grad is not None and B.grad is not None
    torch.mm(back.mT, low, out=B.grad)
    torch.mm((back @ B).mT, batch.inputs, out=A.grad)
    return float(loss)


def measure(A: Tensor, B: Tensor, out: Tensor, data: Frozen) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    total, right = 0.0, 0
    for start in range(0, len(data.labels), _ROWS):
        rows = slice(start, start + _ROWS)
        hidden = torch.addmm(data.base[rows], data.inputs[rows] @ A.mT, B.mT)
        logits, labels = hidden.relu_() @ out.mT, data.labels[rows]
        total += float(cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(dim=1) == labels).sum())
    return total / len(data.labels), right / len(data.labels)
