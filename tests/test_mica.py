"""MiCA: minor left singular vectors, frozen, under an A that starts at zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from conftest import logits, started, tiny_gpt2, tiny_llama, token_batch, wrap
from headstart.errors import LayerError
from headstart.layers.find import lora_layers
from headstart.methods.base import Layer
from inputs import worst_angle
from known_layers import from_spectrum


def of_weight(W, r, s=1.0):
    return Layer("layer", *W.shape, r, s, weight=W.float())


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(1, 24),
    d_in=st.integers(1, 24),
    decades=st.floats(0, 12),
    repeated=st.booleans(),
    zeros=st.integers(0, 4),
    data=st.data(),
)
def test_B_is_orthonormal_in_the_directions_of_least_gain(d_out, d_in, decades, repeated, zeros, data):
    side = min(d_out, d_in)
    r = data.draw(st.integers(1, side))
    S = torch.logspace(0, -decades, side, dtype=torch.float64)
    S = torch.ones_like(S) if repeated else S
    S[side - min(zeros, side) :] = 0
    W = from_spectrum(d_out, d_in, S).float()
    start = hs.MiCA().factors(of_weight(W, r, s=3.0))
    B = start.B.double()
    assert torch.allclose(B.T @ B, torch.eye(r, dtype=torch.float64), atol=1e-6)
    assert not bool(start.A.count_nonzero()) and start.A.shape == (r, d_in)
    assert start.frozen == ("lora_B",)
    # What the thin decomposition leaves for them: the r least singular values of W, seen through B.
    least = torch.linalg.svdvals(W.double())[side - r :]
    if d_out <= d_in:
        assert torch.allclose(torch.linalg.svdvals(B.T @ W.double()), least, rtol=1e-4, atol=1e-6)
    else:
        assert float((B.T @ W.double()).norm()) <= float(least.norm()) * (1 + 1e-4) + 1e-6


def test_tall_weights_give_vectors_of_their_range_not_of_the_null_space_beside_it():
    W = from_spectrum(20, 6, torch.linspace(6, 1, 6))
    B = hs.MiCA().factors(of_weight(W, 3)).B
    assert worst_angle(B, torch.linalg.svd(W, full_matrices=False).U[:, 3:]) < 1e-5


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_space_is_that_of_pefts_own(make):
    """PEFT's is in the base layer's precision: of a bfloat16 model its B is bfloat16's, orthonormal to 1 in 256."""
    targets = ["c_attn", "c_proj"] if make is tiny_gpt2 else "all-linear"
    ours = started(make(), "mica", target_modules=targets)
    theirs = wrap(make(), init_lora_weights="mica", target_modules=targets)
    for one, other in zip(lora_layers(ours, "default"), lora_layers(theirs, "default"), strict=True):
        B, pefts = (target.module.lora_B["default"].weight for target in (one, other))
        assert worst_angle(B, pefts) < 1e-3, one.name
        assert not bool(other.module.lora_A["default"].weight.count_nonzero())
        assert not B.requires_grad and not pefts.requires_grad
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_a_half_precision_base_gets_a_B_as_orthonormal_as_any():
    base = tiny_llama().to(torch.bfloat16)
    for target in lora_layers(started(base, "mica"), "default"):
        B = target.module.lora_B["default"].weight.double()
        assert torch.allclose(B.T @ B, torch.eye(4, dtype=torch.float64), atol=1e-6)


def test_training_stays_within_the_span_of_B(tmp_path):
    model, batch = wrap(tiny_llama()), token_batch()
    base = logits(model, batch)
    hs.initialize_(model, "mica")
    assert torch.equal(logits(model, batch), base)
    before = {target.name: target.module.lora_B["default"].weight.clone() for target in lora_layers(model, "default")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(logits(model, batch), base)
    for target in lora_layers(model, "default"):
        B = target.module.lora_B["default"].weight.detach()
        assert torch.equal(B, before[target.name])
        delta = target.module.get_delta_weight("default").detach().double()
        outside = delta - B.double() @ (B.double().T @ delta)
        assert float(delta.norm()) > 0 and float(outside.norm()) < 1e-5 * float(delta.norm())
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    loaded = hs.load_checkpoint(tiny_llama(), tmp_path / "checkpoint")
    assert torch.allclose(logits(loaded, batch), logits(model, batch), atol=1e-6)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_lora_fa_would_leave_nothing_to_train():
    model = wrap(tiny_llama())
    hs.lora_fa_(model)
    with pytest.raises(LayerError, match="starts A at zero, so B can't matter"):
        hs.initialize_(model, "mica")
    model = started(tiny_llama(), "mica")
    with pytest.raises(LayerError, match="its B is frozen by its start already"):
        hs.lora_fa_(model)


def test_a_rank_above_the_smaller_side_is_refused():
    with pytest.raises(LayerError, match="rank 40 is more than its smaller side, 32"):
        started(tiny_llama(), "mica", r=40)
