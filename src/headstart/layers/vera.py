"""VeRA layers: y = W x + diag(b) B diag(d) A x, A and B frozen and shared by all layers, b and d trained.

A start for them is a dictionary: A's rows and B's columns are the principal directions of what a method finds layer by
layer (LoRA-DA, appendix E). As b is zero at first, the model starts where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.vera.config import VeraConfig
from peft.tuners.vera.layer import Linear
from torch import Tensor, nn

from headstart.errors import BASE_PREFIX, LayerError
from headstart.layers.find import TargetLayer, active_adapters
from headstart.layers.formats import check_not_tensor_parallel
from headstart.linalg.precision import double, like
from headstart.methods.base import Factors


@dataclass(frozen=True)
class VeraTarget(TargetLayer):
    """One VeRA layer of one adapter."""

    @property
    def r(self) -> int:
        """How many directions the layer has a say in: the dictionary's size, or its own smaller side."""
        return min(super().r, self.d_out, self.d_in)

    @property
    def scaling(self) -> float:
        """VeRA has no factor in front of its product."""
        return 1.0

    def start_norm(self, factors: Factors) -> float:
        """Return 0: a dictionary adds nothing until b trains."""
        return 0.0

    @property
    def trainable(self) -> int:
        """The numbers that train: b and d."""
        return self.d_out + int(self.module.r[self.adapter])


def vera_adapter(model: nn.Module, adapter: str | None) -> str | None:
    """Return the adapter to work on if it is one of VeRA, else None."""
    configs = getattr(model, "peft_config", None) or {}
    active = [adapter] if adapter is not None or not configs else active_adapters(model)
    return active[0] if len(active) == 1 and isinstance(configs.get(active[0]), VeraConfig) else None


def find_vera_layers(model: Any, adapter: str) -> list[TargetLayer]:
    """Return the layers that share the dictionary, checked.

    Raises:
        LayerError: there is none, the adapter is merged or trained, or its files would not hold the dictionary.
    """
    if not model.peft_config[adapter].save_projection:
        raise LayerError(
            f"adapter {adapter!r} has save_projection=False: its files would hold a seed in place of the dictionary; "
            "set save_projection=True in the VeraConfig."
        )
    targets: list[TargetLayer] = [
        VeraTarget(name.removeprefix(BASE_PREFIX), module, adapter)
        for name, module in model.named_modules()
        if isinstance(module, Linear) and adapter in module.vera_lambda_b
    ]
    if not targets:
        raise LayerError(f"adapter {adapter!r} has no VeRA layer in this model: check its target_modules.")
    check_not_tensor_parallel(model, [(target.name, target.module.get_base_layer()) for target in targets])
    for target in targets:
        module: Any = target.module
        if module.merged:
            raise LayerError(f"layer {target.name!r} has merged adapters: call model.unmerge_adapter() first.")
        if module.vera_lambda_b[adapter].device.type == "meta":
            raise LayerError(
                f"layer {target.name!r} has its adapter on the meta device, where there are no values: load the "
                "model's weights onto a device before it is wrapped."
            )
        if float(module.vera_lambda_b[adapter].detach().abs().max()) != 0:
            raise LayerError(
                f"layer {target.name!r}: vera_lambda_b of adapter {adapter!r} is not zero, so the adapter is already "
                "trained; start from a fresh one."
            )
    return targets


@torch.no_grad()
def install_dictionary(starts: Sequence[tuple[TargetLayer, Factors]]) -> None:
    """Put the principal directions of the layers' starts into the shared A and B.

    They are scaled to the Frobenius norm of the random matrices that they replace, so that learning rates keep their
    meaning. Where there are fewer directions than the dictionary holds, the rest of it stays random.

    Raises:
        LayerError: a layer's start is zero, which tells no direction.
    """
    for target, factors in starts:
        if not (bool(factors.A.count_nonzero()) and bool(factors.B.count_nonzero())):
            raise LayerError(
                f"layer {target.name!r}: its start has a zero factor, which tells no direction for VeRA's dictionary; "
                "use a method that starts both factors, such as lora-da, and data that reach all layers."
            )
    module: Any = starts[0][0].module
    A, B = (shared[starts[0][0].adapter] for shared in (module.vera_A, module.vera_B))
    directions_A = principal_directions([factors.A for _, factors in starts], A)
    directions_B = principal_directions([factors.B.T for _, factors in starts], B.T).T
    A.copy_(directions_A)
    B.copy_(directions_B)


def principal_directions(spaces: Sequence[Tensor], random: Tensor) -> Tensor:
    """Return the leading principal directions of subspaces, as rows of the shape and norm of ``random``.

    Args:
        spaces: each (r_i, d_i), whose rows span a subspace; d_i at most n, the missing entries counting as zero. Every
            subspace weighs the same in every direction.
        random: (r, n), what to fill up with.
    """
    r, n = random.shape
    rows = []
    for space in spaces:
        basis = torch.linalg.svd(double(space), full_matrices=False).Vh
        rows.append(torch.nn.functional.pad(basis, (0, n - basis.shape[1])))
    _, S, Vh = torch.linalg.svd(torch.cat(rows), full_matrices=False)
    count = min(r, int((1e-10 * S[0] < S).sum()))
    unit = torch.nn.functional.normalize(double(random), dim=1)
    directions = torch.cat((Vh[:count].to(unit.device), unit[count:]))
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = torch.where(largest < 0, -directions, directions)
    return like(directions * (double(random).norm() / directions.norm()), random)
