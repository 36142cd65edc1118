"""A sketch stands for the same mean gradient as the gradient itself: where it is exact, so are the factors' sizes."""

from __future__ import annotations

import functools

import pytest

import headstart as hs
from conftest import factors_of, tiny_llama, token_batch, wrap
from headstart.layers.core import core_of
from headstart.layers.find import lora_layers
from headstart.methods import get_method, method_class, method_names
from headstart.methods.gradient import GradientMethod

# By method, the settings that change what is made of the triplets, or of their sizes.
SETTINGS = {
    "lora-ga": ["", "gamma=2"],
    "lora-one": ["", "gamma=2"],
    "lora-sb": [f"optimizer=sgd,lr=0.01,split={split}" for split in ("orthonormal", "suboptimal")],
    "lora-da": [
        f"fisher=none,variance=0,normalise={normalise}{more}"
        for normalise in ("true", "false")
        for more in ("", ",gamma=2", ",bias=0.5", ",tokens=labels")
    ],
}
CASES = [(name, more) for name, each in SETTINGS.items() for more in each]


def test_all_methods_that_can_be_sketched_are_tried():
    sketchable = {name for name in method_names() if issubclass(method_class(name), GradientMethod)}
    assert sketchable == set(SETTINGS)
    for name in sketchable:
        assert "gradients" in get_method(name).settings()


@functools.cache
def factors(method, samples):
    # Few tokens, so that the gradient's rank is below what the sketch holds, and nothing of it is lost.
    data = [token_batch(size=samples, length=8, padded=False)]
    model = wrap(tiny_llama(), r=2, target_modules=["q_proj", "down_proj"])
    report = hs.initialize_(model, method, data=data, progress=False)
    assert report.samples == samples
    found = []
    for target in lora_layers(model, "default"):
        found += factors_of(target.module)
        core = core_of(target.module, "default")
        found += [] if core is None else [core.detach()]
    return found


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize(("name", "more"), CASES)
def test_a_sketch_that_loses_nothing_gives_the_factors_of_the_gradient(name, more, samples, passes):
    settings = f"{name}:samples={samples}{',' if more else ''}{more}"
    exact = factors(settings, samples)
    sketched = factors(f"{settings},gradients=sketch,width=120,passes={passes}", samples)
    for own, other in zip(sketched, exact, strict=True):
        assert float((own - other).norm()) <= 2e-3 * float(other.norm()), (float(own.norm()), float(other.norm()))


def test_the_sizes_do_not_depend_on_how_often_a_sample_is_read():
    """A sum over samples would double; where nothing is normalised, the factors would show it."""
    once = token_batch(size=2, length=5, padded=False)
    for method in ("lora-da:fisher=none,variance=0,normalise=false", "lora-sb:optimizer=sgd,lr=0.01,split=suboptimal"):
        norms = []
        for data in ([once], [once, once, once]):
            model = wrap(tiny_llama(), r=2, target_modules=["q_proj"])
            count = 2 * len(data)
            report = hs.initialize_(
                model, f"{method},samples={count},gradients=sketch,width=40", data=data, progress=False
            )
            norms.append([layer.norm_B for layer in report.layers])
        assert norms[1] == pytest.approx(norms[0], rel=1e-3)
        assert min(norms[0]) > 0
