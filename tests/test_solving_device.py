"""Devices without float64: what needs it is solved on the CPU, and comes out the same."""

from __future__ import annotations

import copy

import pytest
import torch

import headstart as hs
import pretend
from conftest import factors_of, tiny_llama, token_batch, wrap
from headstart.layers import weights
from headstart.layers.find import lora_layers
from headstart.layers.vera import principal_directions
from headstart.linalg.damped import damped_inverse
from headstart.linalg.guidance import guidance_space
from headstart.linalg.lowrank import adam_lowrank, squared_error, svd_lowrank_factors
from headstart.linalg.norms import squared_norm
from headstart.linalg.precision import double, like, solving_device
from headstart.linalg.product import product_norm, product_svd, truncate_product
from headstart.linalg.svd import eckart_young_tail, truncated_svd, truncated_svd_batch
from headstart.methods import get_method
from headstart.methods.base import Kronecker, Layer
from headstart.statistics.moments import kind_moments


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance(n, seed=0):
    rows = normal(3 * n, n, seed=seed)
    return rows.T @ rows / (3 * n)


def svd_of(move):
    svd = truncated_svd(move(normal(40, 30)), 4)
    return svd.U, svd.S, svd.V


def krylov_of(move):
    svds = truncated_svd_batch([move(normal(300, 280)), move(1e9 * normal(280, 300, seed=1))], 3)
    return [part for svd in svds for part in (svd.U, svd.S, svd.V)]


def norms_of(move):
    matrix = move(normal(30, 20))
    moments = kind_moments([("q", matrix)])["q"]
    return squared_norm(matrix), eckart_young_tail(matrix, truncated_svd(matrix, 3)), moments.mean, moments.std


def product_of(move):
    B, A = move(normal(30, 4)), move(normal(4, 20, seed=1))
    return [*product_svd(B, A), product_norm(B, A), *truncate_product(B, A, 2)]


def inverse_of(move):
    found = damped_inverse(move(covariance(24)), 1e-6)
    return found.matrix, found.inverse, found.condition


def space_of(move):
    Z = covariance(24)
    found = guidance_space(
        move(torch.linalg.inv(Z)), move(normal(30, 24)), 3, variance=0.1, bias=1.0, factor=move(Z), tol=1e-6
    )
    return found.vectors, found.values, found.error


def descent_of(move):
    W, A0, B0 = move(normal(2, 20, 16)), move(normal(2, 3, 16, seed=1)), move(normal(2, 20, 3, seed=2))
    fit = adam_lowrank(W, A0, B0, steps=20, check_every=5)
    return fit.A, fit.B, fit.error, squared_error(W, A0, B0)


def gauge_of(move):
    A0, B0 = move(normal(3, 16, seed=1)), move(normal(20, 3, seed=2))
    return svd_lowrank_factors(truncated_svd(move(normal(20, 16)), 3), "flow", A0=A0, B0=B0)


def dictionary_of(move):
    return [principal_directions([move(normal(3, 20)), move(normal(3, 16, seed=1))], move(normal(8, 20, seed=2)))]


@pytest.mark.parametrize(
    "solve",
    [
        svd_of,
        krylov_of,
        norms_of,
        product_of,
        inverse_of,
        space_of,
        descent_of,
        gauge_of,
        dictionary_of,
    ],
)
def test_the_same_comes_out(solve):
    expected = solve(lambda tensor: tensor)
    with pretend.device() as device:
        found = [part.cpu() if isinstance(part, torch.Tensor) else part for part in solve(lambda each: each.to(device))]
    for own, plain in zip(found, expected, strict=True):
        assert torch.equal(own, plain) if isinstance(own, torch.Tensor) else own == pytest.approx(plain, rel=1e-12)


def test_what_a_program_gets_back_is_on_its_device():
    with pretend.device() as device:
        B, A = normal(30, 4).to(device), normal(4, 20).to(device)
        for part in (*product_svd(B, A), *truncate_product(B, A, 2)[:2]):
            assert part.device == device


def test_the_device_that_is_pretended_has_no_float64():
    with pretend.device() as device:
        tensor = torch.ones(2, device=device)
        for convert in (
            lambda: tensor.double(),
            lambda: tensor.to("cpu", torch.float64),
            lambda: double(normal(2)).to(device),
        ):
            with pytest.raises(TypeError, match="no float64"):
                convert()
        assert solving_device(device) == torch.device("cpu")
        assert double(tensor).dtype == torch.float64 and double(tensor).device.type == "cpu"
        assert like(double(tensor), tensor).device == device


def test_devices_with_float64_are_their_own():
    for name in ("cpu", "cuda:1"):
        assert solving_device(name) == torch.device(name)


@pytest.mark.parametrize(
    "method",
    [
        get_method("lora-ga"),
        get_method("lora-ga", convention="peft", directions="random", scale="weight"),
        get_method("lora-ga", norm_clip=True),
        get_method("lora-one"),
        get_method("kfac-newton"),
        get_method("kfac-newton", p=0.3, fisher="diagonal"),
        get_method("gora"),
        get_method("keeplora"),
        get_method("keeplora-plus"),
        get_method("lora-sb", lr=1e-3),
        get_method("lora-sb", lr=1e-3, optimizer="sgd", split="suboptimal"),
        get_method("lora-da"),
        get_method("lora-da", fisher="full"),
        get_method("lora-da", fisher="none", variance=0.0),
        get_method("pissa"),
        get_method("milora"),
        get_method("olora"),
        get_method("olora-tail"),
        get_method("rlpo"),
        get_method("geora"),
        get_method("loram"),
        get_method("lora-xs"),
        get_method("inilora", solver="svd", std=0.1),
        get_method("inilora", solver="adam", steps=10, std=0.1),
        get_method("orthogonal"),
    ],
    ids=str,
)
def test_methods_get_what_they_solve_on_the_solving_device(method):
    """All that a method is given is moved there first, so that no method has to know."""

    def start(move):
        Y = covariance(20, seed=3)
        outputs = Y if getattr(method, "fisher", "") == "full" else Y.diagonal().clone()
        kronecker = Kronecker(move(covariance(16)), move(outputs), move(normal(16)), move(normal(20)), 48)
        layer = Layer(
            "layer",
            20,
            16,
            4,
            2.0,
            weight=move(normal(20, 16)),
            gradient=move(normal(20, 16, seed=1)),
            kronecker=kronecker,
        )
        return method.factors(layer)

    expected = start(lambda tensor: tensor)
    with pretend.device() as device:
        found = start(lambda tensor: tensor.to(device).to(solving_device(device)))
    assert torch.equal(found.A, expected.A)
    assert torch.equal(found.B, expected.B)


@pytest.mark.parametrize(
    "method", ["pissa", "inilora:solver=svd", "lora-one:samples=4", "lora-da:samples=4", "lora-xs"]
)
def test_the_verb_solves_there(monkeypatch, method):
    """The layers say that they are on a device that this machine has not, so that a move to it would fail."""
    base = tiny_llama()
    plain, elsewhere = wrap(copy.deepcopy(base)), wrap(copy.deepcopy(base))
    hs.initialize_(plain, method, data=[token_batch()])
    asked = []

    def missing(layer):
        asked.append(layer)
        return torch.device("mps")

    monkeypatch.setattr(weights, "home", missing)
    hs.initialize_(elsewhere, method, data=[token_batch()])
    assert asked
    for own, other in zip(lora_layers(elsewhere, "default"), lora_layers(plain, "default"), strict=True):
        for found, expected in zip(factors_of(own.module), factors_of(other.module), strict=True):
            assert torch.equal(found, expected)
            assert found.count_nonzero()
