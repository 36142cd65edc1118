"""Starts of convolutions: the SVD of their kernels as rows, their gradients, and what is saved of them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import headstart as hs
from headstart.errors import CheckpointError, LayerError
from headstart.layers.adapters import find
from headstart.layers.convolutions import ConvLayer
from headstart.layers.find import lora_layers
from headstart.stream import stream_start

SHAPES = {1: (nn.Conv1d, (16,)), 2: (nn.Conv2d, (10, 10)), 3: (nn.Conv3d, (6, 6, 6))}


class Convolved(nn.Module):
    """Two convolutions and a linear layer; the loss is of a class a sample."""

    def __init__(self, dims):
        super().__init__()
        kind, _ = SHAPES[dims]
        self.first = kind(3, 8, 3, stride=2, padding=1)
        # PEFT can't merge what it adds to a kernel of size one in three dimensions.
        self.second = kind(8, 12, 3 if dims == 3 else 1, padding=int(dims == 3), bias=False)
        self.head = nn.Linear(12, 4)

    def forward(self, pixels, labels=None):
        hidden = self.second(torch.tanh(self.first(pixels)))
        logits = self.head(torch.tanh(hidden).flatten(2).mean(2))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def base(dims):
    torch.manual_seed(0)
    return Convolved(dims).eval()


def batch(dims, seed=0, size=3):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, *SHAPES[dims][1], generator=generator)
    return {"pixels": pixels, "labels": torch.randint(0, 4, (size,), generator=generator)}


def wrapped(model, targets=("first", "second", "head"), **settings):
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), **settings))


def answers(model, dims):
    with torch.no_grad():
        return model(**batch(dims, 7)).logits


def trained(model, dims):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        model(**batch(dims, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("dims", SHAPES)
def test_pissa_is_the_svd_of_the_kernels_as_rows(dims, form):
    model = wrapped(base(dims))
    weights = {
        target.name: target.module.get_base_layer().weight.detach().double().flatten(1)
        for target in lora_layers(model, "default")
    }
    before = answers(model, dims)
    hs.initialize_(model, "pissa", form=form, cache=False)
    for target in lora_layers(model, "default"):
        names = ("lora_start_A", "lora_start_B") if form == "anchored" else ("lora_A", "lora_B")
        A, B = (getattr(target.module, name)["default"].weight.detach().double().flatten(1) for name in names)
        U, S, Vh = torch.linalg.svd(weights[target.name])
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        torch.testing.assert_close(target.scaling * B @ A, best, rtol=1e-5, atol=1e-6)
    if form == "anchored":
        assert torch.equal(answers(model, dims), before)
    else:
        torch.testing.assert_close(answers(model, dims), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", SHAPES)
def test_lora_one_is_of_the_kernels_gradient(dims):
    model = base(dims)
    data = [batch(dims, seed) for seed in range(2)]
    gradient = {}
    exact = copy.deepcopy(model).double()
    for whole in data:
        for row in range(3):
            exact(whole["pixels"][row : row + 1].double(), whole["labels"][row : row + 1]).loss.backward()
    for name in ("first", "second"):
        gradient[name] = exact.get_submodule(name).weight.grad.flatten(1) / 6
    model = wrapped(model)
    hs.initialize_(model, "lora-one:samples=6", data=data)
    for target in lora_layers(model, "default"):
        if target.name not in gradient:
            continue
        factors = target.module.lora_A, target.module.lora_B
        A, B = (factor["default"].weight.detach().double().flatten(1) for factor in factors)
        U, S, Vh = torch.linalg.svd(-gradient[target.name])
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        assert float((B @ A * best).sum() / (B @ A).norm() / best.norm()) > 1 - 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


STARTS = ["lora", "init-ab", "pissa", "olora", "milora", "inilora", "mica", "loram"]
STARTS += ["lora-one:samples=3", "lora-ga:samples=3"]


@pytest.mark.parametrize("method", STARTS)
@pytest.mark.parametrize("dims", SHAPES)
def test_a_trained_start_is_exported_saved_and_merged(dims, method, tmp_path):
    model = wrapped(base(dims), use_rslora=True)
    before = answers(model, dims)
    report = hs.initialize_(model, method, data=[batch(dims)], cache=False)
    forms = {layer.form for layer in report.layers}
    if forms == {"anchored"}:
        assert torch.equal(answers(model, dims), before)
    trained(model, dims)
    expected = answers(model, dims)
    assert not torch.equal(expected, before)
    with model.disable_adapter():
        assert torch.equal(answers(model, dims), before)
    hs.save_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(base(dims), tmp_path / "plain")
    torch.testing.assert_close(answers(plain, dims), expected, rtol=1e-4, atol=1e-4)
    assert hs.save_lora(model, tmp_path / "less", rank=1) > 0
    PeftModel.from_pretrained(base(dims), tmp_path / "less")
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    again = hs.load_checkpoint(base(dims), tmp_path / "checkpoint")
    torch.testing.assert_close(answers(again, dims), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "peft")
    native = PeftModel.from_pretrained(base(dims), tmp_path / "peft")
    torch.testing.assert_close(answers(native, dims), expected, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(answers(merged, dims), expected, rtol=1e-4, atol=1e-4)
    other = base(dims)
    with torch.no_grad():
        other.first.weight += 0.1
    with pytest.raises(CheckpointError, match=r"another base model.*'first'"):
        hs.load_checkpoint(other, tmp_path / "checkpoint")


def test_a_residual_network_comes_with_its_batch_norms():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["convolution"]))
    data = [{"pixel_values": pixels, "labels": torch.tensor([0, 2])}]
    report = hs.initialize_(model, "lora-one:samples=2", data=data)
    assert report.layers and all(torch.isfinite(p).all() for p in model.parameters())
    model = get_peft_model(ResNetForImageClassification(config).eval(), LoraConfig(r=4, target_modules=["convolution"]))
    assert all(isinstance(layer, ConvLayer) for layer in find(model, None).layers)
    before = model(pixels).logits
    hs.initialize_(model, "pissa", cache=False)
    assert torch.equal(model(pixels).logits, before)


@pytest.mark.parametrize("method", ["lora-xs", "gora", "eva", "lora-da", "lora-one:scale=search"])
def test_what_kernels_cannot_give_is_refused(method):
    model = wrapped(base(2))
    with pytest.raises(LayerError, match=r"'first' is a convolution, which method '.*' can't start: it "):
        hs.initialize_(model, method, data=[batch(2)])


@pytest.mark.parametrize(
    "setting", [{"groups": 2, "in_channels": 4}, {"dilation": 2}, {"padding_mode": "circular", "padding": 1}]
)
def test_convolutions_whose_adapter_is_no_change_of_their_kernels_are_named(setting):
    name = next(iter(setting))
    settings = {"in_channels": 3, "out_channels": 8, "kernel_size": 3} | setting
    model = nn.Sequential(nn.Conv2d(**settings))
    with pytest.raises(LayerError, match=rf"'0' is a convolution with {name}="):
        hs.initialize_(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])), "pissa")


def test_convolutions_are_not_streamed(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(LayerError, match=r"'resnet\..*convolution' is a convolution, which is not streamed"):
        stream_start(tmp_path / "model", "pissa", LoraConfig(r=2, target_modules=["convolution"]), tmp_path / "out")


def test_a_parametrised_weight_is_named():
    model = base(1)
    nn.utils.parametrizations.weight_norm(model.first)
    with pytest.raises(LayerError, match=r"'first' has a parametrised weight"):
        hs.initialize_(wrapped(model, ["first"]), "pissa")
