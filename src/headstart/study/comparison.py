"""What a comparison is of, before anything is loaded for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from headstart.errors import MethodError
from headstart.methods import parse_method
from headstart.training.recipe import Recipe

BUILT_IN = "problems"


@dataclass(frozen=True)
class Comparison:
    """Everything that the results of a comparison depend on.

    Attributes:
        model: see ``headstart.training.models.resolve_model``.
        methods: names, with settings as ``init-ab:beta=2``.
        data: where the training examples come from; "problems" are the built-in word problems.
        held_out: where the held-out examples come from; None: the ``test`` split of ``data``, or of a single file its
            last examples.
        train_examples: how many to train on at most; more steps than they fill go over them again.
        held_out_examples: how many the held-out loss is measured on.
        graded_examples: how many of those are answered and graded; 0 for none.
        recipe: how each is trained.
    """

    model: str
    methods: tuple[str, ...] = ("lora", "init-ab", "pissa", "lora-one:samples=64")
    data: str = BUILT_IN
    held_out: str | None = None
    train_examples: int = 2_000
    held_out_examples: int = 48
    graded_examples: int = 48
    recipe: Recipe = field(default_factory=Recipe)

    def check(self) -> None:
        """Raise MethodError for an unknown method or setting, or no method at all, before anything is loaded."""
        if not self.methods:
            raise MethodError("no method to compare: name some, as in lora,pissa.")
        for method in self.methods:
            parse_method(method)
