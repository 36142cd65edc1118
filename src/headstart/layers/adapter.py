"""An adapter as tensors by layer: the common ground of exporting from a model and from a folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor
from torch.nn.functional import pad

from headstart.errors import BASE_PREFIX, CheckpointError
from headstart.layers.anchored import START_NAMES
from headstart.layers.core import CORE
from headstart.layers.mark import StackOf, key_of
from headstart.layers.stacks import laid_together, stacked, taken_apart
from headstart.layers.unwrap import plain_name
from headstart.linalg.product import product_norm, truncate_product

# How files name A and B of a layer: of an embedding, and of any other.
_ENDINGS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AdapterLayer:
    """One layer's tensors as they are stored: A (r, d_in), B (d_out, r), anchors or core where there are any, and s.

    Of an anchored layer A and B are the differences to the anchors A0 and B0. Of a convolution they are kernels,
    (r, channels, k, ...) and (d_out, r, 1, ...). Of an ``embedding`` d_in is its tokens, and files name A and B
    otherwise. Of a parameter that stacks matrices they are (E r, d_in) and (d_out, r E), see
    :mod:`headstart.layers.stacks`.
    """

    A: Tensor
    B: Tensor
    A0: Tensor | None
    B0: Tensor | None
    scaling: float
    kind: str = "lora"
    core: Tensor | None = None
    stack: StackOf | None = None
    embedding: bool = False

    @property
    def r(self) -> int:
        """The rank, of each matrix of a stack."""
        return self.A.shape[0] // (1 if self.stack is None else self.stack.experts)

    def matrices(self) -> list[AdapterLayer]:
        """Return the layers of a stack's matrices, each for itself; of any other layer itself, kernels as rows."""
        if self.A.ndim > 2:
            A0, B0 = (None if part is None else part.flatten(1) for part in (self.A0, self.B0))
            return [replace(self, A=self.A.flatten(1), B=self.B.flatten(1), A0=A0, B0=B0)]
        if self.stack is None:
            return [self]
        factors = zip(*taken_apart(self.A, self.B, self.stack.experts), strict=True)
        if self.A0 is None or self.B0 is None:
            return [AdapterLayer(A, B, None, None, self.scaling, self.kind) for A, B in factors]
        starts = zip(*taken_apart(self.A0, self.B0, self.stack.experts), strict=True)
        return [
            AdapterLayer(A, B, A0, B0, self.scaling, self.kind)
            for (A, B), (A0, B0) in zip(factors, starts, strict=True)
        ]

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return (A_out, B_out) of the plain LoRA that does the same on the untouched base model; of no stack.

        That is (A, B) itself; of an anchored or residual layer A_out = [A0 + dA; dA] and B_out = [dB, B0], where
        dA = A - A0 and dB = B - B0; of a core layer A and B R. Whatever is computed for it is in float32 at least, as
        half precision would round what the running layer doesn't.
        """
        if self.core is not None:
            B, core = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (self.B, self.core))
            return self.A, B @ core
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        if self.kind == "residual":
            return torch.cat((self.A, self.A - self.A0)), torch.cat((self.B - self.B0, self.B0), dim=1)
        return stacked(self.A, self.B, self.A0, self.B0)


def split(
    tensors: Mapping[str, Tensor], config: LoraConfig, stacks: Mapping[str, StackOf] | None = None
) -> tuple[dict[str, AdapterLayer], dict[str, Tensor]]:
    """Sort a PEFT adapter's tensors into layers, and the others (heads that are trained beside it).

    Those that earlier versions of headstart wrote are read, too.

    Args:
        tensors: by PEFT's names.
        config: of the adapter.
        stacks: by layer, what is known of those whose parameter stacks several matrices.

    Raises:
        CheckpointError: a layer lacks one of its tensors, or their shapes don't fit together.
    """
    # PEFT's own saving of a model with compiled parts writes the names of what is around them.
    tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    other_tensors: dict[str, Tensor] = {}
    roles = {ending: "AB"[place] for endings in _ENDINGS.values() for place, ending in enumerate(endings)}
    roles[f"{CORE}.weight"] = "core"
    embeddings: set[str] = set()
    for kind, (name_A, name_B) in START_NAMES.items():
        roles |= {f"{name_A}.weight": f"{kind} A0", f"{name_B}.weight": f"{kind} B0"}
    for key, tensor in renewed(tensors).items():
        ending = next((ending for ending in roles if key.endswith(f".{ending}")), None)
        if ending is None:
            other_tensors[key] = tensor
            continue
        name = key.removesuffix(f".{ending}").removeprefix(BASE_PREFIX)
        parts.setdefault(name, {})[roles[ending]] = tensor
        if ending in _ENDINGS[True]:
            embeddings.add(name)
    return {
        name: _layer(name, by_role, config, (stacks or {}).get(name), name in embeddings)
        for name, by_role in parts.items()
    }, other_tensors


# How earlier versions named anchors and cores, which were parameters and not modules.
_EARLIER = {
    "lora_anchor_A": ("lora_start_A.weight", "lora_A.weight"),
    "lora_anchor_B": ("lora_start_B.weight", "lora_B.weight"),
    "lora_residual_A": ("lora_residual_A.weight", None),
    "lora_residual_B": ("lora_residual_B.weight", None),
    CORE: (f"{CORE}.weight", None),
}


def renewed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors as this version stores them; those that are so already, as they are.

    Earlier versions kept the whole factors of an anchored layer, beside anchors that had other names: what is kept now
    is A - A0 and B - B0.
    """
    new = dict(tensors)
    for key, tensor in tensors.items():
        layer, _, ending = key.rpartition(".")
        if ending not in _EARLIER:
            continue
        name, factor = _EARLIER[ending]
        del new[key]
        new[f"{layer}.{name}"] = tensor
        whole = tensors.get(f"{layer}.{factor}")
        if whole is not None and whole.shape == tensor.shape:
            wide = torch.promote_types(whole.dtype, torch.float32)
            new[f"{layer}.{factor}"] = whole.to(wide) - tensor.to(wide)
    return new


def _layer(
    name: str, by_role: dict[str, Tensor], config: LoraConfig, stack: StackOf | None, embedding: bool
) -> AdapterLayer:
    kind = next((kind for kind in START_NAMES if any(role.startswith(kind) for role in by_role)), "lora")
    roles = ["A", "B"] if kind == "lora" else ["A", "B", f"{kind} A0", f"{kind} B0"]
    if kind == "lora" and "core" in by_role:
        kind = "core"
    missing = [role for role in roles if role not in by_role]
    if missing:
        raise CheckpointError(f"the adapter's layer {name!r} lacks {', '.join(missing)}: the file is not complete.")
    A, B = by_role["A"], by_role["B"]
    A0, B0 = (by_role[role] for role in roles[2:]) if kind in START_NAMES else (None, None)
    core = by_role.get("core")
    # Of a convolution B's kernels are single numbers, (d_out, r, 1, ...).
    fit = A.dim() == B.dim() >= 2 and A.shape[0] == B.shape[1] and set(B.shape[2:]) <= {1}
    fit = fit and (core is None or core.shape == (A.shape[0], A.shape[0]))
    if not fit or (A0 is not None and A0.shape != A.shape) or (B0 is not None and B0.shape != B.shape):
        raise CheckpointError(f"the adapter's layer {name!r} has tensors whose shapes don't fit together.")
    if stack is not None and A.shape[0] % stack.experts:
        raise CheckpointError(f"the adapter's layer {name!r} has tensors that don't fit {stack.experts} experts.")
    layer = AdapterLayer(A, B, A0, B0, 1.0, kind, core, stack, embedding)
    pattern_key = get_pattern_key(list(config.alpha_pattern), key_of(name, stack))
    alpha = config.alpha_pattern.get(pattern_key, config.lora_alpha)
    scaling = alpha / layer.r**0.5 if config.use_rslora else alpha / layer.r
    return replace(layer, scaling=float(scaling))


# What is said of any plain adapter: that PEFT draws its factors before it reads them, and that it is not for training.
_WRITTEN: dict[str, Any] = {"init_lora_weights": True, "inference_mode": True}


@dataclass(frozen=True)
class PlainAdapter:
    """A plain LoRA: tensors with PEFT's names, a config that fits them, and what truncation lost.

    ``relative_error`` is over all layers: the Frobenius norm of what is missing over that of the whole update.
    """

    tensors: dict[str, Tensor]
    config: LoraConfig
    relative_error: float


def make_plain(
    layers: Mapping[str, AdapterLayer],
    other_tensors: Mapping[str, Tensor],
    config: LoraConfig,
    rank: int | None,
    *,
    uniform: bool = False,
) -> PlainAdapter:
    """Turn layers into a plain LoRA for the untouched base model.

    Its config says ``use_rslora=False`` and has an alpha that gives the same scaling, because llama.cpp divides alpha
    by the rank whatever the config says. (Not so where LoRA tensors of other than linear layers come along.)

    Args:
        layers, other_tensors: from :func:`split`.
        config: of the adapter; the returned one is a copy with rank, alpha and patterns that fit.
        rank: truncate every layer's update to at most this rank, by SVD of the product; None keeps it whole.
        uniform: give all layers one rank and one scaling, in place of patterns: smaller ranks are filled up with
            zeros, and what differs in scaling goes into B. vLLM reads neither pattern, llama.cpp no alpha_pattern.

    Raises:
        CheckpointError: ``rank`` is not positive.
    """
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise CheckpointError(f"rank={rank!r} must be a whole number of at least 1.")
    factors: dict[str, list[Pair]] = {}
    lost = whole = 0.0
    for name, layer in layers.items():
        factors[name] = []
        for A, B in (matrix.plain() for matrix in layer.matrices()):
            if rank is not None and rank < A.shape[0]:
                norm = layer.scaling * product_norm(B, A)
                B, A, error = truncate_product(B, A, rank)
                lost, whole = lost + (error * norm) ** 2, whole + norm**2
            elif rank is not None:
                whole += (layer.scaling * product_norm(B, A)) ** 2
            factors[name].append((A, B))
    scalings = {name: layer.scaling for name, layer in layers.items()}
    if uniform:
        factors, scalings = _uniform(factors, scalings)
    ranks = {name: len(pairs[0][0]) for name, pairs in factors.items()}
    stranded = next((key for key in other_tensors if "lora_" in key), None)
    fits = all(ranks[name] == layer.r and scalings[name] == layer.scaling for name, layer in layers.items())
    if stranded and not fits:
        raise CheckpointError(
            f"{stranded!r} can't be given another rank or scaling: only linear layers are exported at 2 r or less."
        )
    tensors: dict[str, Tensor] = dict(other_tensors)
    for name, pairs in factors.items():
        A, B = pairs[0] if layers[name].stack is None else laid_together(*zip(*pairs, strict=True))
        if layers[name].A.ndim > 2:
            A, B = A.reshape(len(A), *layers[name].A.shape[1:]), B.reshape(*B.shape, *layers[name].B.shape[2:])
        for ending, factor in zip(_ENDINGS[layers[name].embedding], (A, B), strict=True):
            tensors[f"{BASE_PREFIX}{name}.{ending}"] = factor
    if stranded:
        fitting = replace(config, **_WRITTEN)
    else:
        fitting = _fitting_config(config, layers, ranks, scalings, patterns=not uniform)
    return PlainAdapter(tensors, fitting, (lost / whole) ** 0.5 if whole else 0.0)


def _uniform(
    factors: Mapping[str, list[Pair]], scalings: Mapping[str, float]
) -> tuple[dict[str, list[Pair]], dict[str, float]]:
    """Return factors that do the same at the largest rank and the most common scaling."""
    if not factors:
        return {}, {}
    rank, scaling = max(len(pairs[0][0]) for pairs in factors.values()), _most_common(scalings)

    def padded(A: Tensor, B: Tensor, own: float) -> Pair:
        more = rank - len(A)
        if own != scaling:
            B = B.to(torch.promote_types(B.dtype, torch.float32)) * (own / scaling)
        return pad(A, (0, 0, 0, more)), pad(B, (0, more))

    alike = {name: [padded(A, B, scalings[name]) for A, B in pairs] for name, pairs in factors.items()}
    return alike, dict.fromkeys(factors, scaling)


def _fitting_config(
    config: LoraConfig,
    layers: Mapping[str, AdapterLayer],
    ranks: dict[str, int],
    scalings: Mapping[str, float],
    *,
    patterns: bool,
) -> LoraConfig:
    """Return a config that gives every layer its rank and scaling, where ``patterns`` by the user's own patterns."""
    alphas = {name: _tidy(scalings[name] * rank) for name, rank in ranks.items()}
    factors = {ranks[name] / layer.r for name, layer in layers.items()}
    if len(factors) == 1 and patterns and not config.use_rslora:
        # All layers grew alike (by 1 or by 2), so the user's own patterns stay readable: scale their values.
        factor = factors.pop()
        return replace(
            config,
            r=round(config.r * factor),
            lora_alpha=_tidy(config.lora_alpha * factor),
            rank_pattern={key: round(value * factor) for key, value in config.rank_pattern.items()},
            alpha_pattern={key: _tidy(value * factor) for key, value in config.alpha_pattern.items()},
            **_WRITTEN,
        )
    r, alpha = _most_common(ranks), _most_common(alphas)
    keys = {name: key_of(name, layer.stack) for name, layer in layers.items()}
    return replace(
        config,
        r=r,
        lora_alpha=alpha,
        rank_pattern=exact_pattern({keys[name]: rank for name, rank in ranks.items()}, r),
        alpha_pattern=exact_pattern({keys[name]: own for name, own in alphas.items()}, alpha),
        use_rslora=False,
        **_WRITTEN,
    )


def exact_pattern(values: Mapping[str, T], default: T) -> dict[str, T]:
    """Return a pattern of PEFT's (``rank_pattern``, ``alpha_pattern``) that gives each layer its own value.

    Args:
        values: by the layers' names in the base model.
        default: what layers have that no key fits; they are left out.
    """
    # PEFT takes a bare name for the ending of others, too.
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _tidy(alpha: float) -> int | float:
    """Return a whole number as an int, which is what other programs expect of lora_alpha."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha
