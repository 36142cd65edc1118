"""Kronecker factors against float64 autograd, one sample at a time without its padding, and against curvlinops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import ARCHITECTURES, VOCABULARY, tiny_llama, tiny_t5, token_batch, wrap
from headstart.methods.base import Wants
from headstart.statistics.prepare import prepare
from oracles import exact_factors, relative
from passes import (
    BATCHES,
    Classes,
    Sequences,
    assert_exact,
    collated,
    collect,
    left,
    lora,
    named,
    pair_batch,
    reordered,
    singles,
    wider,
)


def cases():
    for architecture in ARCHITECTURES:
        for side in ("right", "left") if architecture != "vit" else ("none",):
            for outputs in ("diagonal", "full"):
                for tokens in ("attention", "labels") if architecture not in ("bert", "vit") else ("attention",):
                    yield pytest.param(
                        architecture, side, outputs, tokens, id=f"{architecture}-{side}-{outputs}-{tokens}"
                    )


@pytest.mark.parametrize("architecture, side, outputs, tokens", cases())
def test_factors_are_means_over_the_tokens_that_count(architecture, side, outputs, tokens):
    make, _, targets = ARCHITECTURES[architecture]
    base = make()
    batches = [BATCHES[architecture](seed=seed) for seed in (1, 2)]
    if side == "left":
        batches = [left(batch) for batch in batches]
    found = collect(wrap(copy.deepcopy(base), target_modules=targets), batches, outputs=outputs, tokens=tokens)
    assert_exact(found, exact_factors(base, batches, list(found.kronecker), tokens))
    assert found.samples == 8
    # Absolute positions move where the padding is on the left.
    moved = side == "left" and architecture in ("gpt2", "bert")
    assert ["one at a time" in note for note in found.notes] == [True] * moved


T5_NAMES = ["q", "k", "v", "o", "wi", "wo"]


@pytest.mark.parametrize(
    "inputs, answers, width, label_width",
    [
        pytest.param((6, 12, 8, 3), (9, 4, 10, 2), 12, 10, id="different"),
        pytest.param((12, 12, 12, 12), (12, 12, 12, 12), 12, 12, id="equal-whole"),
        pytest.param((6, 12, 8, 3), (6, 12, 8, 3), 12, 12, id="equal-same-padding"),
        pytest.param((6, 12, 8, 3), (9, 12, 10, 5), 12, 12, id="longer-answers"),
        pytest.param((9, 12, 10, 5), (6, 12, 8, 3), 12, 12, id="longer-inputs"),
    ],
)
def test_encoder_and_decoder_of_any_lengths(inputs, answers, width, label_width):
    base = tiny_t5()
    batch = pair_batch(inputs, answers, width, label_width)
    found = collect(wrap(copy.deepcopy(base), target_modules=T5_NAMES), [batch])
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)))
    assert found.notes == []


def test_an_encoder_as_long_as_the_padded_answer_in_batches_of_one():
    base = tiny_t5()
    batch = pair_batch((10, 12, 8, 3), (9, 4, 10, 2))
    alone = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(4)]
    found = collect(wrap(copy.deepcopy(base), target_modules=["q", "wo"]), alone)
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)))
    assert found.notes == []


def tiny_bart(length):
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 48))}
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    config = dict(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=length)
    return BartForConditionalGeneration(BartConfig(**config, **sides, **heads, **ids))


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("answers", [(12, 12, 12, 12), (6, 12, 8, 3), (9, 12, 10, 5)])
def test_pairs_as_long_as_the_model_can_read(answers, size):
    base = tiny_bart(12)
    batch = pair_batch((6, 12, 8, 3), answers, 12, 12)
    data = [batch] if size == 4 else singles(batch)
    base(**batch)
    found = collect(wrap(copy.deepcopy(base), target_modules=["q_proj", "v_proj", "fc1"]), data)
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)))


def test_a_decoder_without_a_mask_counts_what_has_a_label():
    """Wherever its labels are -100, at the beginning too: nothing else tells what is padding."""
    base, batch = tiny_t5(), pair_batch()
    batch["labels"][:2, :2] = -100
    found = collect(wrap(copy.deepcopy(base), target_modules=T5_NAMES), [batch])
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)))


def test_a_decoder_attention_mask_tells_the_decoders_padding():
    base = tiny_t5()
    batch = pair_batch()
    batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    found = collect(wrap(copy.deepcopy(base), target_modules=T5_NAMES), [batch])
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)))


def test_a_decoder_with_its_own_input_ids_and_mask():
    base = tiny_t5()
    batch = pair_batch((6, 12, 8, 3), (9, 8, 5, 2))
    batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    batch["decoder_input_ids"] = base._shift_right(batch["labels"])
    found = collect(wrap(copy.deepcopy(base), target_modules=["q", "v"]), [batch])
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)))


def test_gradient_and_factors_of_one_pass_are_those_of_two():
    base = tiny_llama()
    both = collect(wrap(copy.deepcopy(base)), [token_batch()])
    (plain,) = prepare(
        model := wrap(copy.deepcopy(base)),
        named(model),
        dict.fromkeys(named(model), Wants(gradient=True)),
        [token_batch()],
        4,
    ).passes()
    only = collect(wrap(copy.deepcopy(base)), [token_batch()], gradient=False)
    assert not only.gradients and not plain.kronecker
    for name in both.gradients:
        assert torch.equal(both.gradients[name], plain.gradients[name])
        assert torch.equal(both.kronecker[name].inputs, only.kronecker[name].inputs)
        assert torch.equal(both.kronecker[name].outputs, only.kronecker[name].outputs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision(architecture):
    make, _, targets = ARCHITECTURES[architecture]
    base = make()
    batch = BATCHES[architecture](seed=5)
    half = copy.deepcopy(base).bfloat16()
    given = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    found = collect(wrap(half, target_modules=targets), [given])
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)), tolerance=0.15)


def checkpointing():
    for architecture in ARCHITECTURES:
        for reentrant in (True, False):
            if architecture == "vit" and reentrant:
                continue  # nor does it train: nothing before its blocks requires a gradient
            yield pytest.param(architecture, reentrant, id=f"{architecture}-{reentrant}")


@pytest.mark.parametrize("architecture, reentrant", checkpointing())
def test_gradient_checkpointing(architecture, reentrant):
    make, _, targets = ARCHITECTURES[architecture]
    base = make()
    batch = BATCHES[architecture](seed=1)
    model = wrap(copy.deepcopy(base), target_modules=targets, lora_dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    found = collect(model, [batch])
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)))


def rates(model):
    """Every dropout rate and mode of a model, by module."""
    return {
        name: (
            module.training,
            {key: value for key, value in vars(module).items() if key == "p" or "drop" in key},
        )
        for name, module in model.named_modules()
    }


def dropout_rates(model):
    """Return the rates of the dropout modules."""
    return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_given_back_as_it_was(architecture, checkpointed, fails):
    make, _, targets = ARCHITECTURES[architecture]
    model = wrap(make(), target_modules=targets, lora_dropout=0.1)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    # Modes as someone left them: of one module, not of all.
    next(module for module in model.modules() if isinstance(module, nn.Dropout)).eval()
    before, during = rates(model), []
    assert 0.1 in dropout_rates(model)

    def watch(module, args):
        dropouts = [each for each in model.modules() if isinstance(each, nn.Dropout)]
        during.append((not any(each.training for each in dropouts), {each.p for each in dropouts}))
        if fails:
            raise RuntimeError("as out of memory")

    handle = next(iter(named(model).values())).get_base_layer().register_forward_pre_hook(watch)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            collect(model, [BATCHES[architecture](seed=1)])
    else:
        collect(model, [BATCHES[architecture](seed=1)])
    handle.remove()
    assert rates(model) == before
    assert during and all(off for off, _ in during)
    if checkpointed:
        # Some attention code reads the rate, and asks only whether the model trains.
        assert all(seen == {0.0} for _, seen in during)


class ClassesFirst(nn.Module):
    """What curvlinops wants of a sequence model: (samples, classes, tokens)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).movedim(-1, 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("size", [12, 5])
def test_factors_against_curvlinops(size, tokens, reduction):
    """Its empirical Fisher, KFAC-expand, for N samples of T tokens with one loss term each.

    With a(n,t) a layer's input and h(n,t) the gradient of the loss *term* of token t (cross entropy, not averaged),
    curvlinops keeps A = 1/(N T) sum a a', which is Z, and for the outputs, undoing its loss's own averaging,
    mean: B = 1/(N T) sum h h' (its factor batch^2 T^2 / (N T), batch = N, on gradients of the mean, h/(N T));
    sum:  B = sum h h'.
    A sample's own loss is the mean over its T terms, so g = h/T and Y = 1/(N T) sum g g' is B / T^2 for "mean", and
    B / (N T^3) for "sum".
    """
    curvlinops = pytest.importorskip("curvlinops")
    N, T = 12, tokens
    base = (Classes() if T == 1 else Sequences()).double()
    generator = torch.Generator().manual_seed(3)
    shape = (N,) if T == 1 else (N, T)
    x = torch.randn(*shape, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, shape, generator=generator)
    net = copy.deepcopy(base.net)
    operator = curvlinops.KFACLinearOperator(
        net if T == 1 else ClassesFirst(net),
        nn.CrossEntropyLoss(reduction=reduction),
        list(net.parameters()),
        [(x, y)],
        fisher_type="empirical",
        kfac_approx="expand",
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    # Data that curvlinops takes in one go come to the collector in batches of several sizes.
    batches = [{"x": x[i : i + size], "labels": y[i : i + size]} for i in range(0, N, size)]
    names = ["net.0", "net.2", "net.4"]
    found, exact = collect(lora(base, names), batches), exact_factors(base, batches, names)
    for name in names:
        theirs = name.removeprefix("net.") if T == 1 else name
        A, B = operator._input_covariances[theirs], operator._gradient_covariances[theirs]
        B = B / T**2 if reduction == "mean" else B / (N * T**3)
        # The oracle of all other tests, too.
        assert relative(exact[name].Z, A) < 1e-12 and relative(exact[name].Y, B) < 1e-12
        factors = found.kronecker[name]
        assert factors.tokens == N * T
        assert relative(factors.inputs, A) < 1e-5
        assert relative(factors.outputs, B) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "tokens"), [("llama", "attention"), ("llama", "labels"), ("gpt2", "attention"), ("t5", "labels")]
)
def test_how_the_samples_come_does_not_matter(architecture, tokens):
    make, _, targets = ARCHITECTURES[architecture]
    base = make()
    batch = (
        token_batch(6, 14)
        if architecture != "t5"
        else pair_batch((5, 12, 9, 3, 7, 6), (4, 8, 2, 10, 7, 9), 13, 11, seed=4)
    )
    parts = [reordered(batch, [0]), reordered(batch, [1, 2, 3]), reordered(batch, [4, 5])]
    rows = [{key: value[row] for key, value in batch.items()} for row in range(6)]
    ways = {
        "batches of one": dict(data=singles(batch)),
        "wider": dict(data=[wider(batch)]),
        "another order": dict(data=[reordered(batch, [3, 0, 5, 1, 4, 2])]),
        "split": dict(data=parts),
        "some wider": dict(data=[wider(part, by) for part, by in zip(parts, (0, 7, 3), strict=True)]),
        "collated": dict(data=rows, samples=6, collator=collated, batch_size=4),
        "offloaded": dict(data=[batch], offload="cpu"),
        "left": dict(data=[left(batch)]),
    }
    exact = exact_factors(base, [batch], list(collect(wrap(make(), target_modules=targets), [batch]).kronecker), tokens)
    for way, given in ways.items():
        found = collect(wrap(copy.deepcopy(base), target_modules=targets), tokens=tokens, **given)
        try:
            assert_exact(found, exact)
        except AssertionError as error:
            raise AssertionError(way) from error
