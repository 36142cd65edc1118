"""Factors don't depend on what a program sets for its model: autocast, TF32, determinism, default type and device."""

from __future__ import annotations

import ast
import contextlib
import copy
from pathlib import Path

import pytest
import torch

import headstart as hs
from conftest import ANY_BASE, KINDS, listed_factors, quick, tiny_llama, token_batch, wrap
from headstart.linalg.precision import full_precision

# Settings that take other ways through the code than the defaults.
MORE = [
    "inilora:solver=svd,gauge=flow",
    "inilora:solver=svd,gauge=random",
    "inilora-beta:distribution=orthogonal",
    "inilora-beta:distribution=sparse",
    "init-ab:distribution=uniform",
    "lora-da:samples=4,fisher=full,tokens=labels",
    "lora-da:samples=4,iterations=10",
    "kfac-newton:samples=4,p=0.3,fisher=diagonal",
    "gora:samples=4,ranks=given",
    "lora-ga:samples=4,convention=peft,directions=random,scale=weight",
    "corda:samples=4,mode=kpm",
    "eva:samples=4,whiten=true,rho=1",
    "lora-sb:samples=4,lr=0.001,source_matrix=noise",
    "lora-sb:samples=4,lr=0.001,source_matrix=kaiming,split=suboptimal",
]
METHODS = [quick(name) for name in ANY_BASE] + MORE
NO_DATA = [name for name in METHODS if "samples" not in name]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def start(base, method, setting=contextlib.nullcontext):
    model = wrap(copy.deepcopy(base), target_modules=["q_proj", "down_proj"])
    with setting():
        report = hs.initialize_(model, method, data=[token_batch()], preserve=[token_batch()], progress=False)
    return listed_factors(model), report


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(method, torch.bfloat16) for method in METHODS] + [(quick(name), torch.float64) for name in KINDS],
)
def test_the_default_type_changes_nothing(method, dtype):
    """The model has its own type; what torch takes for new tensors is neither the factors' nor the draws'."""
    base = tiny_llama()
    expected, _ = start(base, method)
    found, report = start(base, method, lambda: default_dtype(dtype))
    assert not report.warnings
    for own, plain in zip(found, expected, strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own, plain)


@pytest.mark.parametrize("method", NO_DATA)
def test_the_default_device_changes_nothing(method):
    """On the meta device nothing has values, so that a tensor made there by default would be found out."""
    base = tiny_llama()
    expected, _ = start(base, method)
    found, _ = start(base, method, lambda: torch.device("meta"))
    for own, plain in zip(found, expected, strict=True):
        assert torch.equal(own, plain)


@pytest.mark.parametrize(
    ("method", "setting"),
    [(method, lambda: torch.autocast("cpu", torch.bfloat16)) for method in METHODS]
    + [(quick(name), setting) for name in KINDS for setting in (tf32, deterministic)],
)
def test_what_is_solved_is_solved_in_full_precision(method, setting):
    """The model's own passes may differ, so methods with data get a model that autocast and TF32 leave alone."""
    base = tiny_llama()
    if "samples" in method:
        base = base.double()
    expected, _ = start(base, method)
    found, _ = start(base, method, setting)
    for own, plain in zip(found, expected, strict=True):
        assert torch.equal(own, plain)


SETTINGS_OF_PRODUCTS = {
    "as torch comes": lambda: None,
    "the older setting, high": lambda: torch.set_float32_matmul_precision("high"),
    "the older setting, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "the oldest setting": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "the newer setting": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "the newer setting of oneDNN": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "the newer setting for all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "the older and the newer, at odds": lambda: (
        torch.set_float32_matmul_precision("high"),
        setattr(torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),
    ),
}


def seen():
    """All that is set, as it reads; PyTorch refuses to read some of it where the older and the newer way differ."""
    reads = {
        "older": torch.get_float32_matmul_precision,
        "oldest": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cuda": lambda: torch.backends.cuda.matmul.fp32_precision,
        "oneDNN": lambda: torch.backends.mkldnn.matmul.fp32_precision,
        "all": lambda: torch.backends.fp32_precision,
        "float16": lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "bfloat16": lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "split k": lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction_split_k,
        "accumulation": lambda: torch.backends.cuda.matmul.allow_fp16_accumulation,
        "deterministic": torch.are_deterministic_algorithms_enabled,
        "warns": torch.is_deterministic_algorithms_warn_only_enabled,
        "autocast": lambda: torch.is_autocast_enabled("cpu"),
    }
    values = {}
    for name, read in reads.items():
        try:
            values[name] = read()
        except RuntimeError:
            values[name] = "refused"
    return values


@pytest.fixture
def restored():
    """Leave torch as it came, whatever a test sets."""
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has the older setting alone")
@pytest.mark.parametrize("name", SETTINGS_OF_PRODUCTS)
def test_flags_are_ieee_within_and_restored_after(restored, name):
    SETTINGS_OF_PRODUCTS[name]()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.autocast("cpu", torch.bfloat16):
        before = seen()
        with contextlib.suppress(KeyError), full_precision():
            within = seen()
            raise KeyError
        after = seen()
    assert (within["cuda"], within["oneDNN"]) == ("ieee", "ieee")
    assert (within["older"], within["oldest"]) == ("highest", False)
    assert not any(within[flag] for flag in ("float16", "bfloat16", "accumulation", "deterministic", "autocast"))
    assert after == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has the older setting alone")
def test_a_flag_that_inherits_goes_on_inheriting(restored):
    torch.backends.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    with full_precision():
        pass
    assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


MAKERS = {
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "eye",
    "linspace",
    "arange",
    "tensor",
    "randperm",
    "randint",
}


def test_no_new_tensor_takes_torchs_defaults():
    """Each says its type and its device, so that no program's defaults can reach it."""
    checked = 0
    for path in Path(hs.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.")):
                continue
            made, said = ast.unparse(node.func).removeprefix("torch."), {word.arg for word in node.keywords}
            if made in MAKERS:
                assert {"dtype", "device"} <= said, f"{path.name}:{node.lineno}"
                checked += 1
            elif made == "Generator":
                assert node.args, f"{path.name}:{node.lineno}"
                checked += 1
    assert checked > 30
