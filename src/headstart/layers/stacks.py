"""PEFT's layer of a parameter that stacks matrices, such as a mixture's experts: its layout, and its anchored form.

For a parameter of E matrices ``ParamWrapper`` holds all A_e on top of each other, expert by expert, (E r, d_in), and of
all B_e the first columns, then the second ones, (d_out, r E). It allows no variants, so the anchored form lies in what
it adds to the parameter: s (B A - B0 A0) as one product of rank 2 r, zero at the start, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor


def swapped(module: Any) -> bool:
    """Return whether a parameter's matrices are (d_out, d_in), to PEFT: those of all but modules that say otherwise."""
    return bool(module._did_swap_in_out_features) or module.get_param().ndim == 2


def stacked(dA: Tensor, dB: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Return (A_out (2 r, d_in), B_out (d_out, 2 r)) of the plain LoRA that does what an anchored layer does.

    A_out = [A0 + dA; dA] and B_out = [dB, B0], in float32 at least: in half precision the sum would lose digits of dA
    that the layer computes with.
    """
    dA, dB, A0, B0 = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (dA, dB, A0, B0))
    return torch.cat((A0 + dA, dA), dim=-2), torch.cat((dB, B0), dim=-1)


def laid_together(A: Sequence[Tensor], B: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (A (E r, d_in), B (d_out, r E)) as PEFT holds them, from each expert's A (r, d_in) and B (d_out, r)."""
    return rows_together(A), columns_together(B)


def rows_together(A: Sequence[Tensor]) -> Tensor:
    """Return A (E r, d_in) as PEFT holds it, from each expert's."""
    return torch.cat(list(A))


def columns_together(B: Sequence[Tensor]) -> Tensor:
    """Return B (d_out, r E) as PEFT holds it, from each expert's."""
    return torch.stack(list(B), dim=-1).flatten(1)


def taken_apart(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return (A (E, r, d_in), B (E, d_out, r)) from PEFT's layout; the inverse of :func:`laid_together`."""
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def product_of_stack(module: Any, A: Tensor, B: Tensor) -> Tensor:
    """Return B_e A_e of all experts, from PEFT's layout, in the shape and order in which the parameter is stored."""
    A, B = taken_apart(A, B, module.num_experts)
    return as_stored(module, B @ A)


def as_stored(module: Any, matrices: Tensor) -> Tensor:
    """Return matrices (E, d_out, d_in) in the shape and order in which the parameter is stored."""
    return (matrices if swapped(module) else matrices.mT).reshape(module.get_param().shape)


class AnchoredParamWrapper(ParamWrapper):
    """PEFT's layer of a parameter, of which some adapter is anchored."""

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """Return (lhs, rhs, s) whose product s lhs rhs is what the adapter adds, as the parameter is stored."""
        factors = self._anchored_factors(adapter_name)
        if factors is None:
            return super().get_delta_factors(adapter_name)
        A, B = factors
        lhs, rhs = (B, A) if swapped(self) else (A.mT, B.mT)
        dtype = self.get_param().dtype
        return lhs.to(dtype), rhs.to(dtype), self.scaling[adapter_name]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the adapter adds to the parameter."""
        factors = self._anchored_factors(adapter_name)
        if factors is None:
            return super().get_delta_weight(adapter_name, *args, **kwargs)
        A, B = factors
        return as_stored(self, self.scaling[adapter_name] * (B @ A)).to(self.get_param())

    def _anchored_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Return (A_out, B_out) of each expert, None for an adapter that is not anchored."""
        if adapter not in getattr(self, "lora_start_A", ()):
            return None
        self.lora_variant[adapter].note_run()
        A0, B0 = (part[adapter].weight.detach() for part in (self.lora_start_A, self.lora_start_B))
        factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        (dA, dB), (A0, B0) = (taken_apart(*pair, self.num_experts) for pair in (factors, (A0, B0)))
        return stacked(dA, dB, A0, B0)


# PEFT tells its own layers of parameters by this name, when adapters are added to them.
AnchoredParamWrapper.__name__ = ParamWrapper.__name__
