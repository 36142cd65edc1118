"""Starts on a GPU against those of the CPU; all skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from conftest import ANY_BASE, all_factors, logits, quick, started, tiny_llama, token_batch
from headstart.layers.find import lora_layers
from headstart.linalg.precision import full_precision
from headstart.statistics.sums import add_product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LEAST_EXCITED = ("lora-null", "sc-lora")


def on(device, name, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = tiny_llama().to(device, dtype)
    data = [token_batch(size=2, seed=seed) for seed in range(4)]
    return started(model, quick(name), data=data, **settings)


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("name", ANY_BASE)
def test_a_start_is_that_of_the_cpu(name, form):
    models = {device: on(device, name, form=form) for device in ("cpu", "cuda")}
    expected, found = (all_factors(models[device]) for device in ("cpu", "cuda"))
    weights = {target.name: target.stored().double() for target in lora_layers(models["cpu"], "default")}
    for layer, (A, B) in expected.items():
        other_A, other_B = (factor.cpu().double() for factor in found[layer])
        assert found[layer][0].is_cuda
        # Directions are free up to their sign, which the product doesn't know; A alone where B is zero.
        if B.count_nonzero() and A.count_nonzero():
            product = B.double() @ A.double()
            # Directions that data hardly excite are told apart by little: what is left of the weight there is small.
            size = weights[layer].norm() if name in LEAST_EXCITED else product.norm()
            torch.testing.assert_close(other_B @ other_A, product, rtol=0, atol=2e-3 * float(size))
        else:
            for factor, other in ((A, other_A), (B, other_B)):
                close = factor.double().T @ factor.double() if name == "mica" else factor.double()
                other = other.T @ other if name == "mica" else other
                torch.testing.assert_close(other, close, rtol=0, atol=2e-3 * max(float(close.norm()), 1e-6))
    said = logits(models["cpu"], token_batch())
    answer = logits(models["cuda"], {key: value.cuda() for key, value in token_batch().items()})
    torch.testing.assert_close(answer.cpu(), said, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ANY_BASE)
def test_a_start_of_half_precision_is_finite_and_leaves_its_base(name):
    torch.manual_seed(0)
    before = {key: value.clone() for key, value in tiny_llama().to("cuda", torch.bfloat16).state_dict().items()}
    model = on("cuda", name, torch.bfloat16)
    for A, B in all_factors(model).values():
        assert A.isfinite().all() and B.isfinite().all()
    after = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for key, value in model.state_dict().items()
    }
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_gradient_start_under_float16_autocast():
    with torch.autocast("cuda", torch.float16):
        model = on("cuda", "lora-one")
    exact = on("cuda", "lora-one")
    for (A, B), (exact_A, exact_B) in zip(all_factors(model).values(), all_factors(exact).values(), strict=True):
        product, expected = B @ A, exact_B @ exact_A
        assert float((product - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_products_are_summed_in_float32(dtype, place):
    generator = torch.Generator("cuda").manual_seed(0)
    g, x = (torch.randn(4096, width, generator=generator, device="cuda").to(dtype) for width in (24, 40))
    total = torch.ones(24, 40, device=place)
    with full_precision([torch.device("cuda")]):
        add_product(total, g, x)
    expected = 1 + (g.double().T @ x.double())
    # A sum of n products in float32 is off by eps times the root of n, where roundings are as good as drawn.
    allowed = torch.finfo(torch.float32).eps * len(g) ** 0.5
    assert float((total.double() - expected.to(place)).norm() / expected.norm()) < allowed
