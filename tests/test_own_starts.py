"""Starts from outside the package, one small file each: verb, command line, cache, two processes, FSDP2."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import headstart as hs
from conftest import factors_of, tiny_llama, token_batch, wrap
from headstart.cache import open_cache
from headstart.layers.find import TargetLayer, lora_layers
from headstart.methods import registry
from headstart.stream import stream_start
from test_processes import batches, factors, together

FOLDER = Path(__file__).parent / "starts"
FILES = ["of_weight", "of_gradient", "of_inputs", "of_both"]
NAMES = ["longest-rows", "steepest-rows:samples=10", "input-directions:samples=10", "steepest-image:samples=10"]
TARGETS = ["q_proj", "down_proj"]


def load():
    for file in FILES:
        importlib.import_module(f"starts.{file}")


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Register them for these tests alone: others go through whatever is registered."""
    load()
    yield
    for name in NAMES:
        registry._METHODS.pop(name.partition(":")[0])


def started(name, **options):
    model = wrap(tiny_llama(), target_modules=TARGETS)
    report = hs.initialize_(model, name, data=batches(), progress=False, **options)
    return model, report


def relative(x, y):
    x, y = x.detach(), y.detach()
    return float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-12))


def agree(got, expected):
    for name, parts in expected.items():
        product, other = (B @ A for A, B in (parts, got[name]))
        # Singular vectors have no sign of their own; where B is zero, A's rows span the space.
        if not bool(product.count_nonzero()):
            product, other = (A.T @ A for A, _ in (parts, got[name]))
        assert relative(other, product) < 1e-3, name


@pytest.mark.parametrize("file", FILES)
def test_a_start_is_a_file_of_less_than_forty_lines(file):
    assert len((FOLDER / f"{file}.py").read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.parametrize("name", NAMES)
def test_the_verb_takes_it(name):
    model, report = started(name)
    assert report.method.partition(":")[0] == name.partition(":")[0]
    base = tiny_llama()
    logits = base(**token_batch()).logits
    if hs.methods.parse_method(name).form == "anchored" or "input" in name:
        assert torch.equal(model(**token_batch()).logits, logits)
    else:
        before, after = (sum(float(each(**batch).loss) for batch in batches()) for each in (base, model))
        assert after < before
    for target in lora_layers(model, "default"):
        A, B = factors_of(target.module)
        W = base.get_submodule(target.name).weight
        if "rows" in name and "longest" in name:
            rows = W.norm(dim=1).topk(target.r).indices
            assert relative(target.scaling * (B @ A)[rows], W[rows]) < 1e-6
        if "image" in name:
            assert relative(target.scaling * B @ A, W @ A.T @ A) < 1e-5


def test_the_cache_keeps_what_depends_on_weights_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("HEADSTART_CACHE_LIMIT")
    counts = [started(name, cache=tmp_path / "cache")[1].cached for name in NAMES for _ in range(2)]
    layers = len(started(NAMES[0], cache=False)[1].layers)
    assert counts == [0, layers, 0, 0, 0, 0, 0, 0]
    assert len(open_cache(tmp_path / "cache").entries()) == layers


def in_a_process(rank, name):
    load()
    model, report = started(name)
    return factors(model), report.samples


def sharded(rank, name):
    load()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = wrap(tiny_llama(), target_modules=TARGETS)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    report = hs.initialize_(model, name, data=batches(), progress=False)
    return factors(model), report.samples


@pytest.mark.parametrize("how", [in_a_process, sharded])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_factors_of_one(tmp_path, name, how):
    model, report = started(name)
    for got, samples in together(tmp_path, how, name):
        assert samples == report.samples
        agree(got, factors(model))


ENTRY_POINTS = """[headstart.methods]
mine = of_weight
broken = of_nothing
"""


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_finds_an_installed_one(tmp_path, fresh):
    site = tmp_path / "site"
    (site / "mine-1.0.dist-info").mkdir(parents=True)
    (site / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (site / "mine-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "of_weight.py").write_text((FOLDER / "of_weight.py").read_text(encoding="utf-8"))
    base = copy.deepcopy(tiny_llama())
    base.save_pretrained(tmp_path / "base")
    program = f"import sys\nsys.path.insert(0, {str(site)!r})\nfrom headstart.cli import main\nmain({{}})"
    listed, said = fresh.run(program.format(["methods"]))
    assert "longest-rows" in listed and "pissa" in listed
    assert "entry point 'broken'" in said
    out = tmp_path / "out"
    options = ["--method", "longest-rows", "--stream", "--targets", ",".join(TARGETS), "--rank", "4", "--alpha", "8"]
    fresh.run(program.format(["init", str(tmp_path / "base"), *options, "--out", str(out)]))
    loaded = hs.load_checkpoint(tiny_llama(), out)
    agree(factors(loaded), factors(started("longest-rows")[0]))


def test_starts_that_are_settled_together_are_not_streamed(tmp_path):
    class Settled(hs.PiSSA):
        def settle(self, starts, ranks):
            return {name: starts[name] for name in sorted(starts)}

    with pytest.raises(hs.MethodError, match="settles the starts of all layers together"):
        stream_start(tmp_path, Settled(), LoraConfig(target_modules=TARGETS), tmp_path / "out")


def test_a_layer_that_fails_leaves_no_process_waiting_for_sharded_weights(monkeypatch):
    """Every process takes part in gathering every weight, whatever became of its own layers."""

    class Failing(hs.PiSSA):
        def factors_batch(self, layers, show=None):
            raise hs.LayerError("layer 'x' can't be started")

    read, weight = [], TargetLayer.weight
    monkeypatch.setattr(TargetLayer, "weight", lambda layer: read.append(layer.name) or weight(layer))
    monkeypatch.setattr(TargetLayer, "sharded", property(lambda layer: True))
    model = wrap(tiny_llama())
    with pytest.raises(hs.LayerError, match="can't be started"):
        hs.initialize_(model, Failing(), progress=False)
    assert sorted(read) == sorted(target.name for target in lora_layers(model, "default"))
