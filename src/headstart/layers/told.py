"""What an adapter's config tells of layers whose parameters stack matrices, where the model isn't at hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from headstart.errors import BASE_PREFIX, CheckpointError
from headstart.layers.mark import StackOf
from headstart.names import in_base

_ENDING = ".lora_A.weight"


def stacks_told_by(
    config: LoraConfig, tensors: Mapping[str, Tensor], known: Mapping[str, StackOf]
) -> dict[str, StackOf]:
    """Return what is known of layers that are parameters', by name, those that only PEFT's own files tell of included.

    PEFT writes neither which parameter a layer adapts nor how many matrices that holds. The first follows from
    ``target_parameters`` and the nesting of its layers, the innermost the parameter that its module has first; the
    second from the rank that the config gives that parameter.

    Args:
        config: of the adapter.
        tensors: by PEFT's names.
        known: what is told elsewhere, which nothing is made out for.

    Raises:
        CheckpointError: a layer's tensors fit no number of experts.
    """
    rows = {
        key.removesuffix(_ENDING).removeprefix(BASE_PREFIX): len(tensor)
        for key, tensor in tensors.items()
        if key.endswith(_ENDING)
    }
    by_holder: dict[str, list[str]] = defaultdict(list)
    for name in rows:
        by_holder[in_base(name)].append(name)
    stacks = dict(known)
    for holder, names in by_holder.items():
        if known.keys() & set(names):
            continue
        if parameters := _parameters(config, holder, names, rows):
            innermost_first = sorted(names, key=lambda name: -name.count(".base_layer"))
            stacks |= _assigned(config, holder, innermost_first, parameters, rows)
    return stacks


def _parameters(config: LoraConfig, holder: str, names: Sequence[str], rows: Mapping[str, int]) -> list[str]:
    """Return the parameters of a module that its layers may be of, in the order in which modules have them."""
    targets = sorted(getattr(config, "target_parameters", None) or ())
    plain = len(names) == 1 and rows[names[0]] == _rank(config, holder)
    chosen = []
    for target in targets:
        parent, _, parameter = target.rpartition(".")
        fits = holder == parent or holder.endswith(f".{parent}") if parent else not plain
        if fits:
            chosen.append(parameter)
    # All of Transformers' experts have what goes in before what comes out.
    return sorted(dict.fromkeys(chosen), key=lambda parameter: parameter.startswith("down"))


def _assigned(
    config: LoraConfig, holder: str, names: Sequence[str], parameters: Sequence[str], rows: Mapping[str, int]
) -> dict[str, StackOf]:
    """Return which layer is which parameter's: the first assignment in which all hold as many matrices."""
    for chosen in permutations(parameters, len(names)):
        ranks = [_rank(config, f"{holder}.{parameter}") for parameter in chosen]
        counts = {rows[name] / rank for name, rank in zip(names, ranks, strict=True)}
        if len(counts) == 1 and (experts := counts.pop()) == int(experts):
            return {name: StackOf(int(experts), parameter) for name, parameter in zip(names, chosen, strict=True)}
    raise CheckpointError(
        f"the adapter's layer {holder!r} has tensors of {rows[names[0]]} rows, which fit no number of experts at the "
        "rank that its config gives them."
    )


def _rank(config: LoraConfig, key: str) -> int:
    rank: int = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)
    return rank
