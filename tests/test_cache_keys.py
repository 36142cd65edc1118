"""Which methods' factors can be kept, and the keys that tell one start from another: what they depend on."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import headstart as hs
from cached import content, known
from headstart.cache import FactorCache, cacheable, description, keys, layer_key
from headstart.cache.keys import _source_digest
from headstart.layers import weights
from headstart.layers.weights import weight_digest
from headstart.methods import Moments, get_method, method_class, method_names, parse_method
from headstart.methods.base import ANY_LAYER, Method, Wants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn])
def test_the_digest_is_of_content_type_and_shape(dtype):
    W = torch.randn(6, 8).to(dtype)
    assert weight_digest(W) == weight_digest(W.clone()) == weight_digest(W.T.contiguous().T)
    changed = W.clone()
    changed.view(torch.uint8)[5, -1] ^= 1
    others = [changed, W.T, W.reshape(-1), W.reshape(8, 6), W[:0], torch.zeros_like(W), W.view(torch.uint8)]
    assert weight_digest(W) not in [weight_digest(other) for other in others]
    assert weight_digest(torch.tensor(1.0)) != weight_digest(torch.tensor(2.0))


@pytest.mark.parametrize("rows", [1, 7, 64, 65, 1000])
def test_large_tensors_are_hashed_in_parts(rows, monkeypatch):
    monkeypatch.setattr(weights, "_PART_BYTES", 1024)
    W = torch.randn(rows, 16)
    digest = weight_digest(W)
    assert weight_digest(torch.randn(16, rows).T.copy_(W)) == digest
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert weight_digest(W) == digest
    last = W.clone()
    last[-1, -1] += 1
    assert weight_digest(last) != digest
    if rows > 64:
        swapped = torch.cat([W[16:32], W[:16], W[32:]])
        assert weight_digest(swapped) != digest


def test_which_methods_can_be_kept():
    kept = {name for name in method_names() if cacheable(get_method(name))}
    assert {"inilora", "pissa", "milora", "olora", "lora-xs"} <= kept
    needs = {str(method_class(name)().wants(ANY_LAYER)) for name in kept}
    assert needs == {"weight", "weight + moments"}
    by_default = {name for name in method_names() if method_class(name).keep}
    assert by_default == {"inilora", "milora", "mica", "olora-tail", "rlmo", "geora"} and by_default <= kept


def test_a_method_from_elsewhere_must_declare_its_version():
    @dataclass(frozen=True)
    class Mine(Method):
        name = "mine"
        extra: object = None

        def wants(self, layer):
            return Wants(weight=True)

        def factors(self, layer):
            raise NotImplementedError

    class Versioned(Mine):
        arithmetic_version = 1

    class Next(Mine):
        arithmetic_version = 2

    Next.__qualname__ = Versioned.__qualname__
    assert not cacheable(Mine())
    assert cacheable(Versioned())
    assert not cacheable(Versioned(extra=torch.zeros(1)))
    assert layer_key(Versioned(), known(), "0", device="cpu") != layer_key(Next(), known(), "0", device="cpu")


def test_whatever_the_factors_depend_on_changes_the_key(monkeypatch):
    method = hs.IniLoRA(solver="adam")
    first = layer_key(method, known(), "0", device="cpu")
    assert layer_key(method, known(weight=torch.zeros(6, 5)), "0", device=torch.device("cpu")) == first
    assert layer_key(hs.IniLoRA(solver="adam", lr=5e-4), known(scaling=2), "0", device="cpu") == first
    others = [
        layer_key(method, known(**change), "0", device="cpu")
        for change in (
            dict(name="k"),
            dict(seed=1),
            dict(r=3),
            dict(scaling=1.0),
            dict(d_out=5, d_in=6),
            dict(moments=Moments(0.0, 0.03)),
        )
    ]
    others += [
        layer_key(method, known(), "1", device="cpu"),
        layer_key(method, known(), "0", device="cuda:1"),
        layer_key(method, known(), "0", device="cpu", transposed=True),
        *(layer_key(hs.get_method(name), known(), "0", device="cpu") for name in ("pissa", "milora", "olora")),
    ]
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        words = dict(solver="svd", gauge="random", tolerance=0.1, std=0.1, decay=0.5)
        changed = dataclasses.replace(method, **{field.name: words.get(field.name, value if value is None else 7)})
        others.append(layer_key(changed, known(), "0", device="cpu"))
    monkeypatch.setattr(torch, "__version__", "9.9.9+cpu")
    others.append(layer_key(method, known(), "0", device="cpu"))
    monkeypatch.undo()
    monkeypatch.setattr("headstart.cache.keys.ARITHMETIC_VERSION", -1)
    others.append(layer_key(method, known(), "0", device="cpu"))
    assert len({first, *others}) == 1 + len(others)


def test_a_changed_source_changes_the_key(tmp_path, monkeypatch):
    package = Path(keys.__file__).parent.parent
    for room in ("methods", "linalg"):
        shutil.copytree(package / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    first = _source_digest.__wrapped__()
    monkeypatch.setattr(keys, "__file__", str(tmp_path / "cache" / "keys.py"))
    assert _source_digest.__wrapped__() == first
    source = tmp_path / "linalg" / "svd.py"
    source.write_bytes(source.read_bytes() + b"\n# changed\n")
    assert _source_digest.__wrapped__() != first
    shutil.rmtree(tmp_path / "linalg")
    shutil.rmtree(tmp_path / "methods")
    assert _source_digest.__wrapped__() == hs.__version__


@pytest.mark.parametrize("backend", [torch.backends.cuda, torch.backends.mkldnn])
def test_precision_that_a_program_allows_its_model_makes_no_other_key(backend):
    if not hasattr(getattr(backend, "matmul", None), "fp32_precision"):
        pytest.skip("this torch has no such setting")
    method, layer = get_method("pissa"), known()
    before, held = layer_key(method, layer, "0" * 64, device="cpu"), backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "tf32"
    try:
        assert layer_key(method, layer, "0" * 64, device="cpu") == before
    finally:
        backend.matmul.fp32_precision = held


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "lora-xs", "inilora"])
def test_seed_and_name_count(name):
    method = get_method(name, **(dict(solver="adam", steps=3) if name == "inilora" else {}))
    W = torch.randn(6, 5)
    layers = [known(weight=W), known(weight=W, seed=1), known(weight=W, name="other")]
    keys = {layer_key(method, layer, weight_digest(W), device="cpu") for layer in layers}
    different = {str(content(method.factors(layer))) for layer in layers}
    assert len(keys) == 3 >= len(different)


@pytest.mark.parametrize(
    "text", ["pissa", "milora", "olora", "lora-xs", "inilora:solver=adam,steps=3", "inilora:solver=svd"]
)
def test_a_methods_factors_are_served_again(text, tmp_path):
    method = parse_method(text)
    layers = [known(name=f"layer{number}", weight=torch.randn(6, 5)) for number in range(3)]
    keys = [layer_key(method, layer, weight_digest(layer.require_weight()), device="cpu") for layer in layers]
    made = method.factors_batch(layers)
    results = [
        FactorCache(tmp_path, 2**30).fetch(
            keys, compute, describe=lambda position: description(method, layers[position])
        )
        for compute in (lambda positions: [made[position] for position in positions], pytest.fail)
    ]
    for found in results:
        assert [content(each) for each in found] == [content(each) for each in made]
