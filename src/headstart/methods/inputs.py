"""Starts from the second moment of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headstart.methods.base import Method, check_positive


@dataclass(frozen=True)
class InputsMethod(Method):
    """Base of the methods that read means over ``samples`` samples' inputs.

    Settings:
        samples: how many.
        tokens: over the tokens that the attention mask shows, or over those that predict a label.
    """

    samples: int = 256
    tokens: Literal["attention", "labels"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, samples=self.samples)
