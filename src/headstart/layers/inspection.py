"""Looking into an adapter's folder without its base model: ranks, norms and spectra of what it adds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from headstart.layers.checkpoint import AdapterFolder
from headstart.layers.mark import matrix_names
from headstart.linalg.product import product_svd
from headstart.names import kind_in_words


@dataclass(frozen=True)
class LayerDescription:
    """One layer of an adapter.

    Attributes:
        name: the layer's name in the base model.
        d_out, d_in, r: its shape and rank.
        form: "lora", "anchored", "residual" or "core".
        scaling: s.
        norm: Frobenius norm of what the layer adds to the base model's weight.
        singular_values: of the same, largest first (2 r of them in anchored and residual layers).
    """

    name: str
    d_out: int
    d_in: int
    r: int
    form: str
    scaling: float
    norm: float
    singular_values: list[float]

    @property
    def stable_rank(self) -> float:
        """The squared Frobenius norm over the squared spectral norm; 0 for a layer that adds nothing."""
        top = self.singular_values[0] if self.singular_values else 0.0
        return (self.norm / top) ** 2 if top else 0.0


@dataclass(frozen=True)
class Description:
    """An adapter: where it belongs, how it was made, and its layers."""

    path: str
    base_model: str | None
    method: str | None
    version: str | None
    checked_against_base: bool
    parameters: int
    other_tensors: list[str]
    layers: list[LayerDescription]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the head of the description."""
        lines = [f"{self.path}: {len(self.layers)} layers, {self.parameters:,} parameters"]
        lines.append(
            f"base model: {self.base_model or 'not named'}"
            + (
                " (a sample of its weights is stored, and compared when it is loaded)"
                if self.checked_against_base
                else ""
            )
        )
        if self.method:
            lines.append(f"start: {self.method}, headstart {self.version}")
        if self.other_tensors:
            lines.append(f"trained beside it: {', '.join(self.other_tensors[:4])}")
        return lines

    def table(self) -> list[tuple[str, ...]]:
        """Return a row a kind of layer; numbers are means over its layers."""
        kinds: dict[tuple[str, int, int, str, int, float], list[LayerDescription]] = defaultdict(list)
        for layer in self.layers:
            kind = kind_in_words(layer.name)
            kinds[kind, layer.d_out, layer.d_in, layer.form, layer.r, layer.scaling].append(layer)
        return [
            (
                kind,
                str(len(group)),
                f"{d_out}x{d_in}",
                form,
                str(r),
                f"{scaling:.4g}",
                f"{fmean([layer.norm for layer in group]):.4g}",
                f"{fmean([layer.singular_values[0] for layer in group]):.4g}",
                f"{fmean([layer.singular_values[-1] for layer in group]):.4g}",
                f"{fmean([layer.stable_rank for layer in group]):.2f}",
            )
            for (kind, d_out, d_in, form, r, scaling), group in kinds.items()
        ]


def inspect_adapter(saved: AdapterFolder) -> Description:
    """Describe an adapter that was read from its folder."""
    layers = []
    matrices = [
        named
        for name, layer in saved.layers.items()
        for named in zip(matrix_names(name, layer.stack), layer.matrices(), strict=True)
    ]
    for name, layer in matrices:
        A, B = layer.plain()
        singular_values = (layer.scaling * product_svd(B, A)[1]).tolist()
        layers.append(
            LayerDescription(
                name=name,
                d_out=layer.B.shape[0],
                d_in=layer.A[0].numel(),
                r=layer.r,
                form=layer.kind,
                scaling=layer.scaling,
                norm=sum(value * value for value in singular_values) ** 0.5,
                singular_values=singular_values,
            )
        )
    records = [record for record in saved.record.get("layers", {}).values() if record]
    methods = sorted({str(record["method"]) for record in records if record.get("method")})
    return Description(
        path=str(saved.path),
        base_model=saved.config.base_model_name_or_path,
        method=", ".join(methods) or None,
        version=saved.record.get("version"),
        checked_against_base=any("weight" in record for record in records),
        parameters=sum(
            layer.A.numel() + layer.B.numel() if layer.core is None else layer.core.numel()
            for layer in saved.layers.values()
        ),
        other_tensors=sorted(saved.other_tensors),
        layers=layers,
    )
