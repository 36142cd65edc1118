"""Every start that reads data is the same however its samples come: one at a time, padded further, in another order."""

from __future__ import annotations

import functools

import pytest

import headstart as hs
from conftest import all_factors, quick, tiny_llama, token_batch, wrap
from headstart.methods import method_names, parse_method
from passes import reordered, singles, wider

# lora-null takes the directions of least energy, between which rounding decides: its own tests allow for that.
METHODS = [name for name in method_names() if name not in ("per-layer", "lora-null") and parse_method(name).reads_data]
# With the published damping rounding decides, too.
WELL_POSED = {"lora-da": ",preset=scale-free"}
# All of the samples, whatever their order.
SAMPLES = 6


def method_of(name):
    return parse_method(quick(name).replace("samples=4", f"samples={SAMPLES}") + WELL_POSED.get(name, ""))


def batch(seed):
    """Samples of three lengths."""
    return token_batch(SAMPLES, 22, seed)


@functools.cache
def products(name, way):
    learned, kept = ([WAYS[way](batch(seed))] if way != "one at a time" else singles(batch(seed)) for seed in (1, 2))
    model = wrap(tiny_llama().double(), r=2)
    hs.initialize_(model, method_of(name), data=learned, preserve=kept, progress=False)
    return {layer: (B @ A).double() for layer, (A, B) in all_factors(model).items()}


WAYS = {
    "together": lambda whole: whole,
    "one at a time": singles,
    "padded further": wider,
    "in another order": lambda whole: reordered(whole, [3, 0, 5, 1, 4, 2]),
}


@pytest.mark.filterwarnings("ignore::headstart.errors.HeadstartWarning")
@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize("name", METHODS)
def test_it_does_not_matter_how_the_samples_come(name, way):
    expected, found = products(name, "together"), products(name, way)
    assert expected.keys() == found.keys()
    for layer, product in expected.items():
        difference = float((found[layer] - product).norm())
        assert difference <= 1e-4 * float(product.norm()), (layer, difference / float(product.norm()))
