"""What keeps a start from directions that never train: those of which both A's row and B's column are nothing.

The gradient of A's row i is s B[:, i]' G, and that of B's column i is s G A[i]'. Where the weight has fewer directions
than the rank, or none, a formula that splits it leaves both of them zero, or what rounding makes of zero.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from headstart.errors import LayerError
from headstart.linalg.norms import squared_norm
from headstart.linalg.precision import double
from headstart.methods.base import Factors, Layer, Method
from headstart.methods.zero import LoRA


def rounding(layer: Layer) -> float:
    """Return what a singular value may be of rounding errors alone, in float64, relative to the matrix's norm."""
    return max(layer.d_out, layer.d_in) * torch.finfo(torch.float64).eps


def revived(method: Method, layer: Layer, factors: Factors) -> Factors:
    """Return a method's factors with every direction able to train: dead ones start as 'lora' does.

    B A stays as it is, to rounding errors of W. A core between dead directions can't be helped so.

    Raises:
        LayerError: a core, or what is frozen, leaves directions that can't train; names the layer.
    """
    if factors.core is not None:
        _check_core(method, layer, factors)
        return factors
    dead = _dead(layer, factors).to(factors.A.device)
    count = int(dead.sum())
    if not count:
        return factors
    plain = LoRA().factors(layer)
    A = torch.where(dead[:, None], plain.A.to(factors.A), factors.A)
    B = torch.where(dead, plain.B.to(factors.B), factors.B)
    all_of_it = "A and B would be zero, and never train; it starts as 'lora' does"
    some = f"{count} of its {len(A)} directions would be zero in A and B, and never train; they start as 'lora' does"
    note = "; ".join(filter(None, (factors.note, all_of_it if count == len(A) else some)))
    repaired = replace(factors, A=A, B=B, note=note)
    if bool(_dead(layer, repaired).any()):
        raise LayerError(
            f"layer {layer.name!r}: method {method.name!r} leaves A and B zero in {count} of {len(A)} directions, and "
            f"of these {' and '.join(_frozen(layer, factors))} is frozen, so that they would never train; use another "
            "method, or leave the layer out of target_modules."
        )
    return repaired


def _dead(layer: Layer, factors: Factors) -> Tensor:
    """Return which directions (r,) have no gradient, beyond rounding."""
    of_A, of_B = _norms(factors)
    frozen, still = _frozen(layer, factors), torch.zeros_like(of_A)
    # What moves A is B, and the other way about.
    moving = torch.maximum(still if "lora_A" in frozen else of_B, still if "lora_B" in frozen else of_A)
    product = float((of_A * of_B).max())
    norms = (_bound, _norm) if layer.weight is not None else (lambda _: 0.0,)
    for norm in norms:  # the bound is read many times as fast, and says all where every direction is alive
        # Of a direction of W that is split evenly, each factor has the root.
        dead = moving <= math.sqrt(rounding(layer) * max(product, norm(layer)))
        if not bool(dead.any()):
            break
    return dead


def _bound(layer: Layer) -> float:
    """Return what W's norm over s is at most."""
    weight = layer.require_weight()
    return max(map(abs, map(float, torch.aminmax(weight)))) * math.sqrt(weight.numel()) / layer.scaling


def _norm(layer: Layer) -> float:
    return math.sqrt(squared_norm(layer.require_weight())) / layer.scaling


def _frozen(layer: Layer, factors: Factors) -> list[str]:
    return sorted({*layer.frozen, *factors.frozen})


def _norms(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return the norms of A's rows and of B's columns, in float64, which squares don't leave."""
    A, B = double(factors.A), double(factors.B)
    return torch.linalg.vector_norm(A, dim=1), torch.linalg.vector_norm(B, dim=0)


def _check_core(method: Method, layer: Layer, factors: Factors) -> None:
    r = len(factors.A)
    # A core's gradient is s B' G A'.
    able = min(int((norms > rounding(layer) * norms.max()).sum()) for norms in _norms(factors))
    if able < r:
        lower = f"lower r to {able}" if able else "use another method"
        raise LayerError(
            f"layer {layer.name!r}: method {method.name!r} finds {able} directions of the {r} that the rank asks for, "
            f"which leaves a part of the core that could not train; {lower}, or leave the layer out of target_modules."
        )
