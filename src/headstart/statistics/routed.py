"""Reading what reaches each expert of a mixture: its inputs and output gradients, as of any other linear layer.

Transformers lets the function that computes a mixture's experts be chosen from a public registry. The one that is
chosen here, while data are read, computes them one after another and hands each one's product over on the way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.layers.experts import ExpertLayer
from headstart.layers.find import TargetLayer

# Called with a layer's name, all tokens (tokens, d), which of them go to the expert (rows,), what it reads of them
# (rows, d_in) and computes (rows, d_out); returns the latter, tapped or as it is.
See = Callable[[str, Tensor, Tensor, Tensor, Tensor], Tensor]

# By module, the names of its experts' layers, by parameter and expert.
Experts = Mapping[nn.Module, Mapping[tuple[str, int], str]]

_NAME = "headstart"
_SEES: dict[int, tuple[Mapping[tuple[str, int], str], See]] = {}


def routed_layers(layers: Sequence[TargetLayer]) -> Experts:
    """Return by module the names of the layers that are its experts' matrices, by parameter and expert.

    Args:
        layers: of which those of modules that can't be watched are left out.
    """
    names: dict[nn.Module, dict[tuple[str, int], str]] = {}
    for layer in layers:
        if isinstance(layer, ExpertLayer) and layer.shows_inputs:
            module: Any = layer.module
            names.setdefault(module.get_base_layer(), {})[module.parameter_name, layer.expert] = layer.name
    return names


@contextlib.contextmanager
def routed(experts: Experts, see: See) -> Iterator[None]:
    """Within the block, ``see`` is shown every product of the modules' experts that a token was sent to."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # not in all releases, but wherever experts show it

    ALL_EXPERTS_FUNCTIONS.register(_NAME, _one_by_one)
    configs: dict[int, tuple[Any, Any]] = {}
    for module in experts:
        config: Any = module.config
        configs.setdefault(id(config), (config, config._experts_implementation))
    try:
        for module, names in experts.items():
            _SEES[id(module)] = names, see
        for config, _ in configs.values():
            config._experts_implementation = _NAME
        yield
    finally:
        for config, before in configs.values():
            config._experts_implementation = before
        for module in experts:
            _SEES.pop(id(module), None)


def _one_by_one(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Compute a mixture's experts: of the tokens (tokens, d) those that chose each (tokens, k), weighted likewise."""
    names, see = _SEES.get(id(module), ({}, _unseen))
    first = "gate_up_proj" if module.has_gate else "up_proj"
    total = torch.zeros_like(hidden)
    for expert in chosen.unique().tolist():
        if not 0 <= expert < module.num_experts:  # another process's, where experts are divided
            continue
        tokens, place = torch.where(chosen == expert)

        def product(parameter: str, inputs: Tensor, expert: int = expert, tokens: Tensor = tokens) -> Tensor:
            weight = getattr(module, parameter)[expert]
            bias = getattr(module, f"{parameter}_bias")[expert] if module.has_bias else None
            output = functional.linear(inputs, weight.mT if module.is_transposed else weight, bias)
            name = names.get((parameter, expert))
            return output if name is None else see(name, hidden, tokens, inputs, output)

        inner = product(first, hidden[tokens])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        output = product("down_proj", inner)
        if module.has_post_expert_norm:
            output = module.post_expert_norm(output)
        output = output * weights[tokens, place, None]
        total = total.index_add(0, tokens, output.to(total.dtype))
    return total


def _unseen(name: str, hidden: Tensor, tokens: Tensor, inputs: Tensor, output: Tensor) -> Tensor:
    """Leave an output as it is: of experts that nobody looks at."""
    return output
