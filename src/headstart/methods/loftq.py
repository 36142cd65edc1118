"""LoftQ: what quantisation took from the weight, given back by the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headstart.errors import LayerError
from headstart.linalg.norms import squared_norm
from headstart.linalg.svd import eckart_young_tail, truncated_svd_batch
from headstart.methods.base import Factors, Form, Layer, Method, Wants
from headstart.methods.registry import register
from headstart.methods.spectral import split_evenly
from headstart.progress import Show, silent

# Squared, relative: rounding to 4 bits leaves about 0.01, and two unrelated weights of one size are 2 apart.
_ANOTHER = 0.5


@register("loftq")
@dataclass(frozen=True)
class LoftQ(Method):
    """LoftQ: with W - Q = U S V', B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r'; kept.

    W is the weight before it was quantised, read from the model's safetensors files, and Q what it stands for
    now. As Q stays as it is, this is the best start of rank r: W - Q - s B A is no larger for any other. (The paper's
    further steps also quantise anew, to W - s B A, which needs a base that isn't quantised yet.)

    Source: LoftQ (Li et al. 2023), section 3; PEFT's ``replace_lora_weights_loftq``, which leaves out s and needs an
    accelerator.

    Settings:
        model_path: where W lies: the model's folder, a safetensors file, or a name on the hub (which must have been
            downloaded); None for where the model came from.
    """

    source: ClassVar[str] = "LoftQ (Li et al. 2023), section 3"
    cost: ClassVar[str] = "a truncated SVD of each quantisation error"
    form: ClassVar[Form] = "kept"

    model_path: str | None = None

    def wants(self, layer: Layer) -> Wants:
        """Return that the weight is needed as it is and as it was."""
        return Wants(weight=True, original=True, model_path=self.model_path)

    def check(self, layer: Layer) -> None:
        """Refuse a weight that isn't quantised."""
        super().check(layer)
        if layer.quantised is None:
            raise LayerError(
                f"layer {layer.name!r} is not quantised, so there is nothing for method 'loftq' to give back: load the "
                "model quantised (as by BitsAndBytesConfig), or leave the layer out of target_modules."
            )

    def factors(self, layer: Layer) -> Factors:
        """Decompose the error of one layer."""
        return self.factors_batch([layer])[0]

    def factors_batch(self, layers: Sequence[Layer], show: Show = silent) -> list[Factors]:
        """Decompose the errors of several layers of one shape and rank together."""
        errors = [layer.require_original() - layer.require_weight() for layer in layers]
        for layer, error in zip(layers, errors, strict=True):
            relative = squared_norm(error) / (squared_norm(layer.require_original()) or 1.0)
            if not relative < _ANOTHER:
                raise LayerError(
                    f"layer {layer.name!r}: the unquantised weight that was read differs from the model's by "
                    f"{relative**0.5:.0%}, so it is another model's; set model_path to what this one was made from."
                )
        starts = []
        for layer, error, svd in zip(layers, errors, truncated_svd_batch(errors, layers[0].r), strict=True):
            errors_after = {"error_quantised": squared_norm(error), "error": eckart_young_tail(error, svd)}
            starts.append(split_evenly(layer, svd, **errors_after))
        return starts
