"""Experts that a mixture holds in one tensor: each expert's matrix is a layer of its own to a start.

Transformers keeps the experts of a layer as parameters of shape (E, d_out, d_in), or (E, d_in, d_out) where the module
says ``is_transposed``, and PEFT adapts such a parameter, or a matrix on a module that is no linear layer such as a
router's, through one ``ParamWrapper`` (``target_parameters``): W_e + s B_e A_e for each expert e. It holds all A_e on
top of each other, expert by expert, (E r, d_in), and of all B_e the first columns, then the second ones, (d_out, r E).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from headstart.errors import LayerError
from headstart.layers.find import TargetLayer, lora_layers
from headstart.layers.mark import StackOf, key_of, matrix_names
from headstart.layers.stacks import laid_together, swapped
from headstart.methods.base import Factors, Layer

# What Transformers gives modules whose experts' function can be chosen (``use_experts_implementation``).
_CHOOSING = ("config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


@dataclass(frozen=True)
class ExpertLayer(TargetLayer):
    """One expert's matrix in a parameter that holds several.

    Attributes:
        stack: PEFT's layer of the parameter, under its own name.
        expert: which of its matrices, from 0.
    """

    stack: TargetLayer
    expert: int

    @property
    def transposed(self) -> bool:
        """Whether the matrices are stored as (d_in, d_out)."""
        return not swapped(self.module)

    @property
    def pattern_key(self) -> str:
        """The name by which PEFT's patterns know the parameter."""
        return key_of(self.stack.name, stack_of(self.stack))

    def facts(self) -> Layer:
        """Return what a method may know of the matrix before anything is read."""
        return replace(super().facts(), held_as="stack", shows_inputs=self.shows_inputs)

    @property
    def shows_inputs(self) -> bool:
        """Whether what reaches the expert can be read: the module lets the function be chosen that computes it."""
        base: Any = self.module.get_base_layer()
        return self.module.get_param().ndim == 3 and all(hasattr(base, name) for name in _CHOOSING)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameter that the matrix lies in, and the bias that belongs to it (gpt-oss has such)."""
        own = self.module.get_base_layer().named_parameters(recurse=False)
        return [parameter for name, parameter in own if name.startswith(self.module.parameter_name)]

    def stored(self) -> Tensor:
        """Return the matrix in its own storage order, detached."""
        stack = super().stored()
        return stack[self.expert] if stack.ndim == 3 else stack


def is_stack(module: LoraLayer) -> bool:
    """Return whether a layer of PEFT's adapts a parameter, and not a module."""
    return isinstance(module, ParamWrapper)


def stack_of(target: TargetLayer) -> StackOf | None:
    """Return what is known of a layer that is a parameter's, None for a module's."""
    module: Any = target.module
    if not is_stack(module):
        return None
    return StackOf(int(module.num_experts), str(module.parameter_name))


def stacks_in(model: nn.Module, adapter: str) -> dict[str, StackOf]:
    """Return what is known of an adapter's layers that are parameters', by name."""
    stacks = {target.name: stack_of(target) for target in lora_layers(model, adapter)}
    return {name: stack for name, stack in stacks.items() if stack is not None}


def experts_of(stack: TargetLayer) -> list[TargetLayer]:
    """Return the layers that a start sees in place of a parameter's: one for each expert, or for a single matrix one.

    Their names are those that separate experts would have, ``mlp.experts.3.gate_up_proj``, so that patterns and kinds
    are the same.
    """
    names = matrix_names(stack.name, stack_of(stack))
    return [ExpertLayer(name, stack.module, stack.adapter, stack, expert) for expert, name in enumerate(names)]


def lower_ranks(layers: Sequence[TargetLayer]) -> dict[str, int]:
    """Return a ``rank_pattern`` by which all experts of a parameter train about as much as one matrix at its rank.

    That is r/E of E experts at rank r, at least 1; by PEFT's name of the parameter within its block. Empty where there
    are no experts, or their ranks are no higher than that already.
    """
    pattern: dict[str, int] = {}
    for layer in layers:
        if isinstance(layer, ExpertLayer):
            lower = max(1, layer.r // layer.module.num_experts)
            if lower < layer.r:
                pattern[".".join(layer.pattern_key.split(".")[-2:])] = lower
    return pattern


def joined(starts: Sequence[tuple[TargetLayer, Factors]]) -> list[tuple[TargetLayer, Factors]]:
    """Return starts with those of a parameter's experts put together, in PEFT's layout, as one of its layer."""
    ready: dict[str, tuple[TargetLayer, Factors]] = {}
    by_stack: dict[str, list[tuple[ExpertLayer, Factors]]] = defaultdict(list)
    for layer, factors in starts:
        if not isinstance(layer, ExpertLayer):
            ready[layer.name] = layer, factors
            continue
        by_stack[layer.stack.name].append((layer, factors))
        ready.setdefault(layer.stack.name, (layer.stack, factors))
    for name, experts in by_stack.items():
        parts = [factors for _, factors in sorted(experts, key=lambda pair: pair[0].expert)]
        A, B = laid_together([part.A for part in parts], [part.B for part in parts])
        frozen = agreed_frozen([(layer.name, factors.frozen, factors.note) for layer, factors in experts])
        ready[name] = ready[name][0], replace(parts[0], A=A, B=B, frozen=frozen)
    return list(ready.values())


def agreed_frozen(starts: Sequence[tuple[str, tuple[str, ...], str]]) -> tuple[str, ...]:
    """Return what must not train of a parameter's experts: of those that start as asked for, all the same.

    Args:
        starts: of each expert its name, what of it must not train, and the note on what was done differently.

    Raises:
        LayerError: they differ; names two.
    """
    asked = [start for start in starts if not start[2]] or list(starts)
    first, frozen, _ = asked[0]
    for name, own, _ in asked:
        if set(own) != set(frozen):
            raise LayerError(differing(first, name))
    return frozen


def differing(first: str, second: str) -> str:
    """Return the sentence on two experts of one parameter of which other factors would train."""
    return (
        f"layers {first!r} and {second!r} are matrices of one parameter, and their methods differ in which of its "
        "factors train: give them methods that train the same."
    )
