"""How the runs of a comparison are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.layers.install import Subtracting


@dataclass(frozen=True)
class Recipe:
    """How every run of a comparison is trained.

    Attributes:
        steps, batch_size, lr: of AdamW, without weight decay; the rate falls along a cosine after ``warmup`` of the
            steps.
        seed: for the factors, the data order and dropout.
        r, lora_alpha, use_rslora, target_modules: as PEFT has them.
        form: "anchored" or "residual".
        max_length: longer rows are cut.
        max_new_tokens: for the answers that are graded; None: as long as the longest held-out answer, and some more.
    """

    steps: int = 20
    batch_size: int = 8
    lr: float = 1e-3
    warmup: float = 0.1
    seed: int = 0
    r: int = 8
    lora_alpha: int = 16
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    form: Subtracting = "anchored"
    max_length: int = 512
    max_new_tokens: int | None = None

    @property
    def warmup_steps(self) -> int:
        """The steps over which the rate rises."""
        return math.ceil(self.warmup * self.steps)

    @property
    def first_lr(self) -> float:
        """The rate of the first step: the peak over the steps of the warm-up, as LoRA-SB's published code has it."""
        return self.lr / max(1, self.warmup_steps)
