"""The monitor: its quantities against dense ones, its hooks, and runs that go on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback

import headstart as hs
from conftest import started, tiny_gpt2, tiny_llama, tiny_t5, token_batch, wrap
from headstart.errors import HeadstartWarning, LayerError
from headstart.layers.anchored import anchors, current_factors
from headstart.layers.find import lora_layers
from headstart.monitor import quantities
from headstart.monitor.monitor import RECORDS, STARTS, sampled
from test_resume import arguments, losses, rows

FACTOR = st.tuples(st.integers(1, 6), st.integers(6, 20), st.integers(6, 20), st.integers(1, 30), st.integers(0, 2**20))


def drawn(r, d_out, d_in, tokens, seed):
    """Return inputs, three pairs of factors and output gradients, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = [(normal(r, d_in), normal(d_out, r)) for _ in range(3)]
    return normal(tokens, d_in), pairs, normal(tokens, d_out)


def size(tensor):
    return float(tensor.square().mean().sqrt())


def angles(space, other):
    """Principal angles between the row spaces of two matrices of full rank, by projections."""
    P, Q = (torch.linalg.pinv(matrix) @ matrix for matrix in (space, other))
    cosines = torch.linalg.svdvals(P @ Q)[: min(len(space), len(other))].clamp(max=1)
    return float(cosines.square().mean()), math.degrees(math.acos(float(cosines[-1])))


@settings(max_examples=60, deadline=None)
@given(FACTOR)
def test_quantities_are_those_of_dense_matrices(shape):
    z, ((A0, B0), (A, B), (A1, B1)), gradients = drawn(*shape)
    s = 1.7
    found = quantities(z, (A0, B0), (A, B), (A1, B1), s, gradients)
    before, after = (z @ (s * left @ right).T for left, right in ((B, A), (B1, A1)))
    deltas = [s * z @ (left @ right).T for left, right in ((B, A1 - A), (B1 - B, A), (B1 - B, A1 - A))]
    torch.testing.assert_close(sum(deltas), after - before)
    near = {"rel": 1e-4, "abs": 1e-6}
    assert found.z_a == pytest.approx(size(z @ A.T), **near)
    assert found.z_b == pytest.approx(size(before), **near)
    assert [found.delta1, found.delta2, found.delta3] == pytest.approx([size(delta) for delta in deltas], **near)
    assert [found.norm_a, found.norm_b] == pytest.approx([float(A1.norm()), float(B1.norm())], **near)
    moved = s * (B1 @ A1 - B0 @ A0)
    assert found.update == pytest.approx(float(moved.norm()), **near)
    shares = torch.linalg.svdvals(moved)[: 2 * len(A)]
    shares = shares / shares.sum()
    assert found.effective_rank == pytest.approx(math.exp(float(-(shares * shares.log()).nansum())), rel=1e-3)
    overlap, angle = angles(A1, A0)
    assert found.start_overlap == pytest.approx(overlap, rel=1e-4, abs=1e-5)
    assert found.start_angle == pytest.approx(angle, abs=0.05)
    _, values, right = torch.linalg.svd(gradients.T @ z, full_matrices=False)
    leading = right[: len(A)][values[: len(A)] > 1e-6 * values[0]]
    separated = len(leading) == len(values) or values[len(leading) - 1] > 1.001 * values[len(leading)]
    if separated:
        overlap, angle = angles(A1, leading)
        assert found.gradient_overlap == pytest.approx(overlap, rel=1e-3, abs=1e-4)
        assert found.gradient_angle == pytest.approx(angle, abs=0.1)


def test_what_is_zero_has_no_space_and_no_rank():
    A, B, z = torch.randn(3, 8), torch.zeros(6, 3), torch.randn(5, 8)
    found = quantities(z, (A, B), (A, B), (A, B), 1.0, torch.zeros(5, 6))
    assert (found.z_b, found.delta1, found.delta2, found.delta3, found.update, found.effective_rank) == (0,) * 6
    assert found.start_overlap == pytest.approx(1.0)
    assert found.start_angle == pytest.approx(0.0, abs=0.1)
    assert found.gradient_overlap is None
    found = quantities(z, (torch.zeros(3, 8), B), (A, B), (A, B), 1.0)
    assert found.start_overlap is None
    assert found.gradient_angle is None


def trained(model, monitor, steps, lr=1e-2, batch=None):
    """Train by a loop of one's own; return what each step's factors and inputs were."""
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], lr=lr)
    with monitor:
        for _ in range(steps):
            model(**(batch or token_batch())).loss.backward()
            optimizer.step()
            monitor.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("method", ["lora", "init-ab", "pissa", "lora-sb:samples=4,lr=1e-3"])
def test_a_real_layer_is_measured_as_densely(method):
    data = [token_batch()] if "samples" in method else None
    model = started(tiny_llama(), method, data=data)
    name = "model.layers.1.mlp.up_proj"
    (target,) = (layer for layer in lora_layers(model, "default") if layer.name == name)

    def factors():
        A, B = (part.clone().double() for part in current_factors(target.module, "default"))
        if "lora_core" in target.module._modules:
            B = B @ target.module.lora_core["default"].weight.detach().double()
        return A, B

    shown = token_batch()["attention_mask"].bool()
    assert not shown.all()
    start = anchors(target.module, "default")
    start = factors() if start is None else tuple(part.clone().double() for part in start)
    inputs, gradients = [], []

    def seen(module, given, output):
        inputs.append(given[0].detach()[shown].double())
        output.register_hook(lambda grad: gradients.append(grad.detach()[shown].double()))

    target.module.register_forward_hook(seen)
    before = factors()
    monitor = hs.Monitor(model, every=1, layers=[name], tokens=10_000)
    trained(model, monitor, 1, lr=0.1)
    after = factors()
    (record,) = monitor.records
    assert (record.step, record.layer) == (1, name)
    expected = quantities(inputs[0], start, before, after, target.scaling, gradients[0])
    for key, value in record.row().items():
        if key not in ("step", "layer"):
            assert value == pytest.approx(getattr(expected, key), rel=1e-3, abs=1e-5), key
    # The gradient of the factors is that of the weight, of which the monitor reads inputs and output gradients.
    G = gradients[0].T @ inputs[0]
    assert float(G.norm()) > 0
    if method != "lora":
        assert record.quantities.delta2 > 0


def test_records_come_every_so_many_steps_and_hooks_go():
    model = started(tiny_llama(), "init-ab")
    monitor = hs.Monitor(model, every=3)
    before = [len(module._forward_hooks) for module in model.modules()]
    trained(model, monitor, 10)
    assert sorted({record.step for record in monitor.records}) == [1, 3, 6, 9]
    assert len({record.layer for record in monitor.records}) == 7
    assert [len(module._forward_hooks) for module in model.modules()] == before
    assert monitor.seconds > 0


def test_training_is_the_same_with_and_without():
    losses = []
    for watched in (True, False):
        model = started(tiny_llama(), "init-ab")
        optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-2)
        monitor = hs.Monitor(model, every=1)
        if watched:
            monitor.__enter__()
        for _ in range(3):
            loss = model(**token_batch()).loss
            loss.backward()
            optimizer.step()
            if watched:
                monitor.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]


def test_tokens_are_evenly_spaced_and_the_first_batch_of_a_step_is_read():
    model = started(tiny_llama(), "init-ab")
    monitor = hs.Monitor(model, every=1, layers=1, tokens=5)
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], lr=0.1)
    with monitor:
        (watched,) = monitor._layers
        model(**token_batch(seed=0)).loss.backward()
        read = watched._inputs.clone()
        model(**token_batch(seed=1)).loss.backward()
        assert torch.equal(watched._inputs, read)
        assert len(read) == 5
        assert watched._gradients.shape == (5, watched.target.d_out)
        assert not watched._inputs.requires_grad
        optimizer.step()
        monitor.step()
    assert len(monitor.records) == 1


def test_gradient_checkpointing_reads_the_pass_that_has_gradients():
    plain, again = (started(tiny_llama(), "init-ab") for _ in range(2))
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again.enable_input_require_grads()
    again.train()
    records = []
    for model in (plain, again):
        monitor = hs.Monitor(model, every=1)
        trained(model, monitor, 2)
        records.append([record.row() for record in monitor.records])
    for row, other in zip(*records, strict=True):
        assert row["layer"] == other["layer"]
        for key in ("z_a", "z_b", "delta1", "delta2", "gradient_overlap", "update"):
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key


def padded(batch, pads, side="right"):
    """A batch with so many tokens of padding in each row, or packed into one row where that is None."""
    if pads is None:
        positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        flat = {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": positions}
        return {name: value.reshape(1, -1) for name, value in flat.items()}
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    width = (pads, 0) if side == "left" else (0, pads)
    return {name: nn.functional.pad(batch[name], width, value=value) for name, value in fill.items()}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("tokens", [10, 10_000])
def test_padding_is_not_read(build, tokens):
    batch = token_batch(padded=False)
    rows = {}
    for pads, side in ((0, "right"), (20, "right"), (20, "left")):
        model = started(build(), "init-ab").eval()
        monitor = hs.Monitor(model, every=1, tokens=tokens)
        trained(model, monitor, 2, batch=padded(batch, pads, side))
        rows[pads, side] = monitor.rows()
    for other in ((20, "right"), (20, "left")) if build is tiny_llama else ((20, "right"),):
        for row, expected in zip(rows[other], rows[0, "right"], strict=True):
            for name, value in expected.items():
                # Angles are as uncertain as the root of what cosines are.
                near = {"abs": 0.1} if name.endswith("angle") else {"rel": 1e-4, "abs": 1e-6}
                assert row[name] == (value if isinstance(value, str) else pytest.approx(value, **near)), (row, name)


@pytest.mark.parametrize("form", ["positional", "packed", "bare"])
def test_masks_come_in_every_way_that_a_model_is_called(form):
    batch = padded(token_batch(padded=False), 20)
    model = started(tiny_llama(), "init-ab")
    with hs.Monitor(model, every=1, layers=1, tokens=10_000) as monitor:
        (watched,) = monitor._layers
        if form == "positional":
            model(batch["input_ids"], batch["attention_mask"])
        elif form == "packed":
            model(**padded(token_batch(padded=False), None))
        else:
            model(batch["input_ids"])
        assert len(watched._inputs) == {"positional": 48, "packed": 48, "bare": 4 * 32}[form]
    assert not model._forward_pre_hooks


def test_an_encoder_and_its_decoder_have_masks_of_their_own():
    model = wrap(tiny_t5())
    source, target = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    mask, labels = torch.ones_like(source), target.clone()
    mask[0, 3:] = 0
    labels[1, 2:] = -100
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    with hs.Monitor(model, every=1, layers=names, tokens=10_000) as monitor:
        model(input_ids=source, attention_mask=mask, labels=labels)
        counts = [len(layer._inputs) for layer in monitor._layers]
    assert counts == [10, 7]


def test_steps_of_anchored_factors_in_half_precision_are_measured_whole():
    """A0 + dA in bfloat16 would round the step away."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj", "q_proj"])
    model = get_peft_model(tiny_llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    hs.initialize_(model, "inilora-alpha", progress=False)
    name = "model.layers.1.mlp.up_proj"
    (target,) = (layer for layer in lora_layers(model, "default") if layer.name == name)
    module, s = target.module, target.scaling
    assert module.lora_A["default"].weight.dtype == torch.bfloat16
    inputs, batch = [], token_batch(padded=False)
    module.register_forward_hook(lambda _, x, y: inputs.append(x[0].detach().double().reshape(-1, target.d_in)))

    def differences():
        return [getattr(module, part)["default"].weight.detach().double().clone() for part in ("lora_A", "lora_B")]

    A0, B0 = (part.detach().double() for part in anchors(module, "default"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)
    with hs.Monitor(model, every=1, layers=[name], tokens=10_000) as monitor:
        for _ in range(3):
            dA, dB = differences()
            model(**batch).loss.backward()
            optimizer.step()
            monitor.step()
            optimizer.zero_grad()
    stepped_A, stepped_B = (now - before for now, before in zip(differences(), (dA, dB), strict=True))
    z = inputs[-1]
    measured = monitor.records[-1].quantities
    near = {"rel": 2e-3}
    assert measured.delta1 == pytest.approx(size(s * z @ stepped_A.T @ (B0 + dB).T), **near)
    assert measured.delta2 == pytest.approx(size(s * z @ (A0 + dA).T @ stepped_B.T), **near)
    assert measured.delta3 == pytest.approx(size(s * z @ stepped_A.T @ stepped_B.T), **near)
    dA, dB = differences()
    assert measured.update == pytest.approx(float((s * (dB @ (A0 + dA) + B0 @ dA)).norm()), **near)
    A, B = current_factors(module, "default")
    assert A.dtype == B.dtype == torch.float32
    torch.testing.assert_close(A.double(), A0 + dA, rtol=1e-6, atol=0)


def test_layers_are_sampled_over_kinds_and_depths():
    model = wrap(tiny_llama(num_hidden_layers=6))
    names = [layer.name for layer in sampled(model, None, None)]
    assert len({name.rsplit(".", 1)[1] for name in names}) == len(names) == 7
    assert len({name.split(".")[2] for name in names}) >= 5
    assert len(sampled(model, None, 3)) == 3
    assert len(sampled(model, None, 1000)) == 42
    assert [layer.name for layer in sampled(model, None, ["model.layers.2.mlp.up_proj"])] == [
        "model.layers.2.mlp.up_proj"
    ]
    with pytest.raises(
        LayerError, match=r"no LoRA layer 'model.layers.2.mlp.up'. Did you mean 'model.layers.2.mlp.up_proj'"
    ):
        sampled(model, None, ["model.layers.2.mlp.up"])
    assert [layer.kind for layer in sampled(wrap(tiny_gpt2(), target_modules=["c_attn"]), None, None)]


@pytest.mark.parametrize("wrong", [{"every": 0}, {"layers": 0}, {"tokens": 0}])
def test_numbers_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        hs.Monitor(**wrong)


def test_a_model_is_needed():
    with pytest.raises(LayerError, match=r"hs.Monitor\(model\)"), hs.Monitor():
        pass
    with pytest.raises(LayerError, match="no LoRA layer"), hs.Monitor(tiny_llama()):
        pass


@pytest.mark.parametrize("method", ["init-ab", "pissa"])
def test_a_trainers_run_that_goes_on_has_the_records_of_one_that_was_not_cut(tmp_path, method):
    whole = hs.Monitor(every=2, layers=3)
    uncut = Trainer(started(tiny_llama(), method), arguments(tmp_path / "run"), train_dataset=rows(), callbacks=[whole])
    uncut.train()
    assert sorted({record.step for record in whole.records}) == [1, 2, 4, 6, 8]
    assert (tmp_path / "run" / "checkpoint-4" / STARTS).is_file()
    rest = hs.Monitor(every=2, layers=3)
    model = started(tiny_llama(), method, seed=99)
    again = Trainer(model, arguments(tmp_path / "run"), train_dataset=rows(), callbacks=[rest])
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(again) == losses(uncut)
    assert [record.row() for record in rest.records] == [record.row() for record in whole.records]
    assert sum(RECORDS in row for row in again.state.log_history) == 5


def test_a_start_that_was_not_kept_is_said(tmp_path):
    uncut = Trainer(started(tiny_llama(), "init-ab"), arguments(tmp_path / "run"), train_dataset=rows())
    uncut.train()
    monitor = hs.Monitor()
    again = Trainer(
        started(tiny_llama(), "init-ab"), arguments(tmp_path / "run"), train_dataset=rows(), callbacks=[monitor]
    )
    with pytest.warns(HeadstartWarning, match="finds no start of this run"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert monitor.records[0].quantities.start_overlap > 0.9


def test_a_run_of_known_length_has_some_fifty_records(tmp_path):
    monitor = hs.Monitor(layers=1)
    settings = arguments(tmp_path, max_steps=120, save_strategy="no")
    Trainer(started(tiny_llama(), "init-ab"), settings, train_dataset=rows(), callbacks=[monitor]).train()
    assert len(monitor.records) == 41
    assert isinstance(monitor, TrainerCallback)
