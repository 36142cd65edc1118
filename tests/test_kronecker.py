"""Kronecker factors against float64 autograd, one sample at a time without its padding, and against curvlinops."""

from __future__ import annotations

import copy
import math
import types
from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

import headstart as hs
from conftest import (
    ARCHITECTURES,
    VOCABULARY,
    class_batch,
    image_batch,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
    token_batch,
    wrap,
)
from headstart.errors import HeadstartWarning
from headstart.layers.find import lora_layers
from headstart.methods.base import Wants
from headstart.statistics.prepare import prepare

# The oracle: the definitions of METHODS, "Notation" and "LoRA-DA", word for word.


@dataclass
class Exact:
    """What the definition gives for one layer."""

    gradient: torch.Tensor | float = 0.0
    Z: torch.Tensor | float = 0.0
    Y: torch.Tensor | float = 0.0
    mean_input: torch.Tensor | float = 0.0
    mean_output: torch.Tensor | float = 0.0
    tokens: int = 0
    inputs: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)


def samples_of(batches):
    """Yield each sample by itself, without its padding."""
    for batch in batches:
        for row in range(len(batch["labels"])):
            yield stripped({key: value[row : row + 1] for key, value in batch.items()})


def stripped(one):
    if "attention_mask" not in one:
        return one
    keep = one["attention_mask"][0].bool()
    width = len(keep)
    if one.pop("two_sided", None) is None:
        return {k: v[:, keep] if v.dim() == 2 and v.shape[1] == width else v for k, v in one.items()}
    # Encoder and decoder have lengths of their own; labels pad the decoder with -100.
    found = {k: one[k][:, keep] for k in ("input_ids", "attention_mask")}
    mask = one.get("decoder_attention_mask", (one["labels"] != -100).long())
    return found | {k: v[:, mask[0].bool()] for k, v in one.items() if k not in found}


def exact_factors(base, batches, names, tokens="attention"):
    """Return by layer the means over tokens, from one backward pass a sample in float64."""
    model = copy.deepcopy(base).double().eval()
    two_sided = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    calls = []

    def hook_for(name):
        def hook(module, args, output):
            calls.append((name, args[0].detach().clone(), output))
            return output.clone()  # what follows may work in place

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(hook_for(name))
    found = {name: Exact() for name in names}
    weights = [model.get_submodule(name).weight for name in names]
    count = 0
    if two_sided:
        batches = [batch | {"two_sided": torch.ones(len(batch["labels"]))} for batch in batches]
    for one in samples_of(batches):
        one = {key: value.double() if value.is_floating_point() else value for key, value in one.items()}
        calls.clear()
        loss = model(**one)["loss"]
        gradients = torch.autograd.grad(loss, [*weights, *(output for _, _, output in calls)], allow_unused=True)
        for name, weight, gradient in zip(names, weights, gradients, strict=False):
            found[name].gradient += torch.zeros_like(weight) if gradient is None else gradient
        for (name, x, output), g in zip(calls, gradients[len(names) :], strict=True):
            g = torch.zeros_like(output) if g is None else g
            if tokens == "labels" and not two_sided and x.dim() == 3 and x.shape[1] == one["labels"].shape[1]:
                learned = one["labels"] != -100
                x, g = x[learned], g[learned]
            found[name].inputs.append(x.reshape(-1, x.shape[-1]))
            found[name].grads.append(g.reshape(-1, g.shape[-1]))
        count += 1
    for name, each in found.items():
        each.gradient = each.gradient / count
        if type(model.get_submodule(name)).__name__ == "Conv1D":
            each.gradient = each.gradient.T
        if each.inputs:
            x, g = torch.cat(each.inputs), torch.cat(each.grads)
            each.tokens = len(x)
            each.Z, each.Y = x.T @ x / len(x), g.T @ g / len(g)
            each.mean_input, each.mean_output = x.mean(0), g.mean(0)
    return found


def named(model):
    return {target.name: target.module for target in lora_layers(model, "default")}


def collect(model, data, samples=None, *, outputs="full", tokens="attention", gradient="exact", **kwargs):
    """Return the statistics of the only pass."""
    layers = named(model)
    wanted = Wants(gradient=gradient, outputs=outputs, tokens=tokens)
    samples = samples or sum(len(batch["labels"]) for batch in data)
    (statistics,) = prepare(model, layers, dict.fromkeys(layers, wanted), data, samples, **kwargs).passes()
    return statistics


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def assert_exact(statistics, exact, *, tolerance=2e-5, gradients=True):
    """Compare all that a pass found with the definition."""
    assert set(statistics.kronecker) == set(exact)
    for name, expected in exact.items():
        factors = statistics.kronecker[name]
        Y = expected.Y if factors.outputs.dim() == 2 else expected.Y.diagonal()
        assert factors.tokens == expected.tokens, name
        assert factors.inputs.shape == expected.Z.shape and factors.outputs.shape == Y.shape
        assert relative(factors.inputs, expected.Z) < tolerance, name
        assert relative(factors.outputs, Y) < tolerance, name
        # A mean may be small beside what it is the mean of.
        for mean, exact_mean, second in (
            (factors.mean_input, expected.mean_input, expected.Z),
            (factors.mean_output, expected.mean_output, expected.Y),
        ):
            assert float((mean.double() - exact_mean).norm()) < tolerance * float(second.trace().sqrt()), name
        for value in (factors.inputs, factors.outputs, factors.mean_input, factors.mean_output):
            assert value.dtype == torch.float32
        assert relative(factors.inputs, factors.inputs.T.double()) < 1e-6, name
        if gradients:
            assert relative(statistics.gradients[name], expected.gradient) < tolerance, name


# Data.


def left(batch):
    """Move the padding to the left."""
    hidden = (batch["attention_mask"] == 0).sum(1)
    width = batch["attention_mask"].shape[1]
    return {
        key: torch.stack([row.roll(int(n)) for row, n in zip(value, hidden, strict=True)])
        if value.dim() == 2 and value.shape[1] == width
        else value
        for key, value in batch.items()
    }


def pair_batch(inputs=(6, 12, 8, 3), answers=(9, 4, 10, 2), width=12, label_width=10, seed=0):
    """Inputs and answers of these lengths, for an encoder and its decoder."""
    generator = torch.Generator().manual_seed(seed)
    size = len(inputs)
    ids = torch.randint(1, VOCABULARY, (size, width), generator=generator)
    labels = torch.randint(1, VOCABULARY, (size, label_width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(size):
        ids[row, inputs[row] :] = 0
        mask[row, inputs[row] :] = 0
        labels[row, answers[row] :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCHES = {"llama": token_batch, "gpt2": token_batch, "t5": pair_batch, "bert": class_batch, "vit": image_batch}
MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5, "bert": tiny_bert, "vit": tiny_vit}


# Every architecture.


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
        dict.fromkeys(named(model), Wants(gradient="exact")),
        [token_batch()],
        4,
    ).passes()
    only = collect(wrap(copy.deepcopy(base)), [token_batch()], gradient="no")
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


def rule_of(base, batch, dtype):
    model = base.to(dtype).eval()
    two_sided = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    found = fitting_rules(lambda given: model(**given), batch, dtype, RULES, encoder_decoder=two_sided)
    return found[0] if found else "apart"


@pytest.mark.parametrize(
    "make, batch_of, expected, dtype",
    [
        pytest.param(tiny_llama, token_batch, "shifted tokens", torch.float32, id="llama"),
        pytest.param(tiny_llama, token_batch, "shifted tokens", torch.bfloat16, id="llama-half"),
        pytest.param(tiny_t5, pair_batch, "tokens", torch.float32, id="t5"),
        pytest.param(tiny_t5, pair_batch, "tokens", torch.bfloat16, id="t5-half"),
        pytest.param(tiny_gpt2, lambda seed: left(token_batch(seed=seed)), "apart", torch.float32, id="gpt2-left"),
        pytest.param(
            tiny_gpt2,
            lambda seed: left(token_batch(seed=seed)),
            "apart",
            torch.bfloat16,
            id="gpt2-left-half",
        ),
        pytest.param(
            tiny_bert,
            lambda seed: left(class_batch(seed=seed)),
            "apart",
            torch.float32,
            id="bert-left",
        ),
    ],
)
def test_the_weighting_is_measured_right(make, batch_of, expected, dtype):
    assert [rule_of(make(), batch_of(seed=seed), dtype) for seed in range(12)] == [expected] * 12


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


# Small models for what the architectures don't do.


class Tokens(nn.Module):
    """Embeds tokens, runs ``body``, and learns a label a token: the loss is the mean over the labels that count."""

    def __init__(self, body, d=6, reduction="mean", loss_from=0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, d)
        self.body = body
        self.head = nn.Linear(d, VOCABULARY)
        self.config = types.SimpleNamespace(model_type="tokens", is_encoder_decoder=False)
        self.reduction, self.loss_from = reduction, loss_from

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.head(self.body(self.embed(input_ids)))
        used, of = logits[:, self.loss_from :].transpose(1, 2), labels[:, self.loss_from :]
        return {"loss": functional.cross_entropy(used, of, reduction=self.reduction), "logits": logits}


def lora(model, targets):
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets))


def whole_batch(size=4, length=5, seed=0):
    batch = token_batch(size, length, seed, padded=False)
    return batch | {"labels": batch["input_ids"].flip(1)}


def singles(batch):
    return [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(batch["labels"]))]


class Experts(nn.Module):
    """Each token goes to the expert that the signs of its first two numbers name; the last one gets none."""

    def __init__(self, d=6, empty=False):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(4))
        self.empty = empty

    def forward(self, x):
        place = ((x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()).clamp(max=2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = place == number
            if self.empty or bool(chosen.any()):
                out[chosen] = expert(x[chosen]).tanh()
        return x + out


EXPERTS = [f"body.experts.{number}" for number in range(4)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("outputs", ["diagonal", "full"])
def test_experts_see_no_padding_and_unused_ones_are_not_reached(outputs, flip):
    base = Tokens(Experts())
    batches = [token_batch(4, 12, seed) for seed in (1, 2)]
    batches = [left(batch) for batch in batches] if flip else batches
    found = collect(lora(base, EXPERTS), batches, outputs=outputs)
    assert any("one at a time" in note for note in found.notes)
    assert set(found.kronecker) == set(found.gradients) == set(found.groups) == set(EXPERTS[:3])
    assert_exact(found, exact_factors(base, batches, EXPERTS[:3]))
    assert sum(factors.tokens for factors in found.kronecker.values()) == found.tokens


def test_experts_and_labels():
    """Which rows have a label can't be told where a layer sees a part of them: all count, and that is said."""
    base = Tokens(Experts())
    found = collect(lora(base, EXPERTS), [token_batch()], tokens="labels")
    assert any("all of theirs count" in note for note in found.notes)
    assert_exact(found, exact_factors(base, [token_batch()], EXPERTS[:3]))


def test_an_expert_called_on_no_token_is_not_reached():
    base = Tokens(Experts(empty=True))
    found = collect(lora(base, EXPERTS), [token_batch()])
    assert EXPERTS[3] not in found.kronecker
    assert EXPERTS[3] not in found.gradients
    assert EXPERTS[3] not in found.groups
    assert_exact(found, exact_factors(base, [token_batch()], EXPERTS[:3]))


class Chosen(nn.Module):
    """One expert, for the tokens whose first number is positive, in an order of its own."""

    def __init__(self, d=6):
        super().__init__()
        self.expert = nn.Linear(d, d)

    def forward(self, x):
        chosen = x[..., 0] > 0
        out = torch.zeros_like(x)
        out[chosen] = self.expert(x[chosen]).tanh()
        return x + out


def chosen_by_ids():
    """A model whose expert gets the tokens 0 and 1."""
    base = Tokens(Chosen())
    with torch.no_grad():
        base.embed.weight[:, 0] = -1.0
        base.embed.weight[[0, 1], 0] = 1.0
    return base


def ids_batch(ids):
    """Of two samples, the second of which is one token shorter."""
    ids = torch.tensor(ids)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    labels = torch.where(mask > 0, 3 + torch.arange(ids.shape[1]), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(
            [[1, 7, 8, 9], [5, 6, 7, 0]],
        ),
        # The first sample by itself shows another number of rows than one.
        [[7, 7, 8, 9], [5, 1, 7, 0]],
        [[7, 1, 1, 9], [5, 6, 7, 8]],
        [[1, 1, 1, 9], [1, 1, 1, 0]],
    ],
)
def test_an_expert_that_gets_as_many_tokens_as_there_are_samples(ids):
    base = chosen_by_ids()
    batch = ids_batch(ids)
    found = collect(lora(base, ["body.expert"]), [batch])
    assert_exact(found, exact_factors(base, [batch], ["body.expert"]))


def test_an_expert_that_gets_as_many_tokens_as_there_are_samples_later():
    """The first batch shows two tokens of one sample, the second one of each and one of padding."""
    base = chosen_by_ids()
    # So long that there is no padding to be saved by another order.
    rest = [5] * 17
    data = [ids_batch([[1, 1, 8, *rest], [5, 6, *rest, 0]]), ids_batch([[1, 7, 8, *rest], [5, 6, *rest, 0]])]
    found = collect(lora(base, ["body.expert"]), data)
    assert any("one at a time" in note for note in found.notes)
    assert_exact(found, exact_factors(base, data, ["body.expert"]))


class SequenceFirst(nn.Module):
    """Puts the sequence before the samples, as PyTorch's recurrent and attention layers do by default."""

    def __init__(self, d=6):
        super().__init__()
        self.a = nn.Linear(d, d)

    def forward(self, x):
        return self.a(x.transpose(0, 1)).tanh().transpose(0, 1)


class SamplesFirst(SequenceFirst):
    """The same with samples first."""

    def forward(self, x):
        return self.a(x).tanh()


def batch_of_lengths(*lengths, seed=0):
    batch = whole_batch(len(lengths), max(lengths), seed)
    for row, length in enumerate(lengths):
        for key, padding in (("attention_mask", 0), ("labels", -100), ("input_ids", 0)):
            batch[key][row, length:] = padding
    return batch


def uneven_batch(size, length, seed=0):
    batch = whole_batch(size, length, seed)
    for row in range(1, size):
        cut = max(1, length - (1, 3, 2)[row % 3])
        batch["attention_mask"][row, cut:] = 0
        batch["labels"][row, cut:] = -100
        batch["input_ids"][row, cut:] = 0
    return batch


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("tokens", ["attention", "labels"])
@pytest.mark.parametrize("size", [3, 5])
def test_layers_that_see_the_sequence_first(size, tokens, flip):
    base = Tokens(SequenceFirst())
    batch = uneven_batch(size, 5)
    batch["labels"][:, 2] = -100
    batch = left(batch) if flip else batch
    found = collect(lora(base, ["body.a"]), [batch], tokens=tokens)
    # Its layout is known from one sample, so that batches can be read whole.
    assert found.notes == []
    # The oracle tells labels by samples first.
    other = Tokens(SamplesFirst())
    other.load_state_dict(base.state_dict())
    assert_exact(found, exact_factors(other, [batch], ["body.a"], tokens))
    if tokens == "attention":
        assert_exact(found, exact_factors(base, [batch], ["body.a"]))


class Pooled(nn.Module):
    """Adds to each token what a layer makes of the first one: one row a sample, as poolers see them."""

    def __init__(self, d=6):
        super().__init__()
        self.a, self.pooler = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        return self.a(x).tanh() + self.pooler(x[:, 0]).tanh()[:, None]


class Flat(Pooled):
    """Sees all tokens of all samples in a row."""

    def forward(self, x):
        return self.a(x.flatten(0, 1)).tanh().view_as(x)


@pytest.mark.parametrize("length", [4, 1])
@pytest.mark.parametrize(("body", "names"), [(Pooled, ["body.a", "body.pooler"]), (Flat, ["body.a"])])
def test_layers_that_see_one_row_a_sample_or_all_tokens_in_a_row(body, names, length):
    """A batch as long as it is wide, whose first sample has one token or more."""
    base, batch = Tokens(body()), batch_of_lengths(length, 4, 2, 3)
    found = collect(lora(base, names), [batch])
    assert_exact(found, exact_factors(base, [batch], names))
    if length > 1:
        assert found.notes == []


def test_the_sequence_first_after_a_sample_of_one_token():
    """From which it can't be told what comes first."""
    base, batch = Tokens(SequenceFirst()), batch_of_lengths(1, 5, 2, 4, 3)
    found = collect(lora(base, ["body.a"]), [batch])
    assert_exact(found, exact_factors(base, [batch], ["body.a"]))


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 1100), nn.Linear(1100, 6)

    def forward(self, x):
        return self.down(self.up(x).tanh())


def test_layers_wider_than_a_block_of_the_gram_matrices():
    base = Tokens(Wide())
    batch = uneven_batch(4, 6)
    found = collect(lora(base, ["body.up", "body.down"]), [batch])
    assert_exact(found, exact_factors(base, [batch], ["body.up", "body.down"]))


class InPlace(nn.Module):
    """Overwrites a layer's output, as many models do."""

    def __init__(self, kind, d=6):
        super().__init__()
        self.a, self.act, self.kind = nn.Linear(d, d), nn.ReLU(inplace=True), kind

    def forward(self, x):
        y = self.a(x)
        if self.kind == "activation":
            return self.act(y)
        if self.kind == "residual":
            y += x
            return y
        y = y.view(len(y), -1, 2, 3)
        y /= 3**0.5
        return y.flatten(2)


@pytest.mark.parametrize("kind", ["activation", "residual", "scale"])
def test_an_output_that_is_overwritten(kind):
    base = Tokens(InPlace(kind))
    lora(base, ["body.a"])(**whole_batch())["loss"].backward()  # such a model can be trained
    found = collect(lora(base, ["body.a"]), [whole_batch()])
    assert_exact(found, exact_factors(base, [whole_batch()], ["body.a"]))


# Weighting.


def test_a_token_classifier_counts_the_first_label():
    base = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    batch = uneven_batch(4, 6)
    found = collect(lora(base, ["body.0"]), [batch])
    assert_exact(found, exact_factors(base, [batch], ["body.0"]))


def test_a_loss_that_sums():
    base = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), reduction="sum")
    found = collect(lora(base, ["body.0"]), [whole_batch()])
    assert_exact(found, exact_factors(base, [whole_batch()], ["body.0"]))
    assert found.notes == []


def test_a_loss_that_sums_over_unequal_samples():
    base = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), reduction="sum")
    batch = uneven_batch(4, 6)
    found = collect(lora(base, ["body.0"]), [batch])
    assert_exact(found, exact_factors(base, [batch], ["body.0"]))
    # A rule of its own: no need to read the samples one at a time.
    assert found.notes == []


@pytest.mark.parametrize("sizes", [(1, 4, 3), (5, 2, 1), (8,)])
@pytest.mark.parametrize("outputs", ["diagonal", "full"])
def test_a_loss_that_sums_in_batches_of_several_sizes(sizes, outputs):
    base = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), reduction="sum")
    batch, ends = uneven_batch(8, 6), torch.tensor(sizes).cumsum(0).tolist()
    data = [reordered(batch, list(range(end - size, end))) for size, end in zip(sizes, ends, strict=True)]
    found = collect(lora(base, ["body.0"]), data, outputs=outputs)
    assert_exact(found, exact_factors(base, [batch], ["body.0"]))
    assert found.notes == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_of", [whole_batch, uneven_batch], ids=["whole", "uneven"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sum_is_told_from_a_mean(reduction, batch_of, dtype):
    torch.manual_seed(0)
    base = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), reduction=reduction)
    rules = {rule_of(base, batch_of(4, 6, seed=seed), dtype) for seed in range(12)}
    assert rules == {"sum"} if reduction == "sum" else not rules & {"sum", "apart"}


@pytest.mark.parametrize("size", [8, 3])
def test_a_sum_over_samples_of_one_class_each(size):
    base = Classes(reduction="sum")
    batch = {"x": torch.randn(8, 7, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(8) % 5}
    data = [reordered(batch, list(range(start, min(start + size, 8)))) for start in range(0, 8, size)]
    assert rule_of(base, batch, torch.float32) == "sum"
    names = ["net.0", "net.2", "net.4"]
    found = collect(lora(base, names), data)
    assert_exact(found, exact_factors(base, [batch], names))
    assert found.notes == []


class MeanOfMeans(Tokens):
    """Whose loss is the mean over samples of each one's own."""

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = super().forward(input_ids, labels)["logits"]
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return {"loss": (losses.sum(1) / (labels != -100).sum(1)).mean(), "logits": logits}


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (Tokens, "uneven"),
        (MeanOfMeans, "uneven"),
        (MeanOfMeans, "prompts"),
        pytest.param(Tokens, "whole"),
        pytest.param(MeanOfMeans, "whole"),
        pytest.param(Tokens, "prompts"),
    ],
)
def test_the_first_batch_may_not_tell_how_samples_weigh(make, first):
    """Where all samples have as many labels any rule will do for that batch, but not for the next.

    And where none has one in first place, whether that would count.
    """
    base = make(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    data = [whole_batch(4, 6), whole_batch(4, 6, seed=1)]
    uneven = data[0 if first == "uneven" else 1]
    for row in range(4):
        uneven["labels"][row, 2 + row :] = -100
        if first == "prompts":
            data[0]["labels"][row, : 1 + row] = -100
    found = collect(lora(base, ["body.0"]), data)
    assert_exact(found, exact_factors(base, data, ["body.0"]))
    assert found.notes == []


@pytest.mark.parametrize(
    "padded",
    [
        True,
        pytest.param(
            False,
        ),
    ],
)
def test_an_auxiliary_loss_that_mixes_samples(padded):
    base = tiny_mixtral()
    batch = token_batch(4, 12, padded=padded)
    if not padded:
        batch["labels"] = batch["input_ids"].clone()
    found = collect(wrap(copy.deepcopy(base), target_modules=["q_proj", "v_proj"]), [batch])
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)))


# Against another implementation.


class Classes(nn.Module):
    """A classifier of vectors: one token a sample."""

    def __init__(self, reduction="mean"):
        super().__init__()
        torch.manual_seed(0)
        self.reduction = reduction
        self.net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8, bias=False), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": functional.cross_entropy(logits, labels, reduction=self.reduction), "logits": logits}


class Sequences(Classes):
    """The same for sequences, each of whose tokens has a label; the loss is the mean over tokens."""

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": functional.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}


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
    found = collect(lora(base, names), batches)
    for name in names:
        theirs = name.removeprefix("net.") if T == 1 else name
        A, B = operator._input_covariances[theirs], operator._gradient_covariances[theirs]
        factors = found.kronecker[name]
        assert factors.tokens == N * T
        assert relative(factors.inputs, A) < 1e-5
        assert relative(factors.outputs, B / T**2 if reduction == "mean" else B / (N * T**3)) < 1e-5


# Invariance.


def wider(batch, by=5):
    return {k: functional.pad(v, (0, by), value=-100 if k == "labels" else 0) for k, v in batch.items()}


def reordered(batch, order):
    return {key: value[order] for key, value in batch.items()}


def collated(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("tokens", ["attention", "labels"])
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


# Shared inputs.


def together(statistics):
    """Return the sets of layers that hold one tensor."""
    by_tensor = {}
    for name, factors in statistics.kronecker.items():
        by_tensor.setdefault(id(factors.inputs), set()).add(name.rpartition("layers.")[2])
    return sorted(map(sorted, by_tensor.values()))


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_layers_that_read_one_input_share_one_tensor(reentrant):
    model = wrap(tiny_llama())
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = collect(model, [token_batch()])
    assert together(found) == sorted(
        sorted(f"{layer}.{name}" for name in names)
        for layer in (0, 1)
        for names in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        )
    )
    for one, factors in found.kronecker.items():
        for other, theirs in found.kronecker.items():
            assert (found.groups[one] == found.groups[other]) == (factors.inputs is theirs.inputs)


def test_cross_attention_shares_the_encoders_states():
    found = collect(wrap(tiny_t5(), target_modules=["k", "v"]), [pair_batch()])
    cross = [factors for name, factors in found.kronecker.items() if "EncDec" in name]
    assert len(cross) == 4
    assert all(factors.inputs is cross[0].inputs for factors in cross)


class Branching(nn.Module):
    """Two or three layers that read one tensor, or not, as the first token of the batch says."""

    def __init__(self, d=6):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.kind = lambda x: 0

    def forward(self, x):
        match self.kind(x):
            case 0:  # one tensor
                return self.a(x).tanh() * self.b(x) + self.c(x)
            case 1:  # another one with the same values in it
                return self.a(x).tanh() * self.b(x.clone()) + self.c(x)
            case 2:  # other values
                return self.a(x).tanh() * self.b(2 * x + 1) + self.c(x)
            case 3:  # b is not called
                return self.a(x).tanh() + self.c(x)
            case 4:  # called a second time
                return self.a(x).tanh() * self.b(self.a(self.b(x)))
            case 5:  # another order
                return self.c(x) * self.b(x) + self.a(x)
            case 6:  # twice on one input
                return self.a(x) * self.a(x) + self.b(x).tanh() * self.b(x) + self.c(x) * self.c(x)
            case 7:  # one after the other
                return self.a(self.b(self.c(x).tanh()).tanh())
            case 8:  # only one of them twice
                return self.a(x) * self.a(x) + self.b(x).tanh() + self.c(x)
            case 9:  # none
                return x.tanh()
        raise AssertionError


BRANCHES = ["body.a", "body.b", "body.c"]


@pytest.mark.parametrize("later", range(1, 10))
@pytest.mark.parametrize("size", [1, 2])
def test_layers_that_share_inputs_at_first_only(later, size):
    base = Tokens(Branching())
    # Which way to go is told by the value that the first token was embedded as, the same in every batch size.
    kinds = torch.tensor([0, 0, 0, later, 0, later, 5, later])
    batch = whole_batch(8, 5)
    batch["input_ids"][:, 0] = kinds
    with torch.no_grad():
        base.embed.weight[:10, 0] = torch.arange(10) / 10
    base.body.kind = lambda x: round(10 * float(x.detach()[0, 0, 0]))
    order = kinds.argsort(stable=True) if size > 1 else torch.arange(8)
    batch = reordered(batch, order)
    kinds = kinds[order].tolist()
    if size > 1:
        # Batches of samples that go one way.
        data = [
            reordered(batch, [row for row in range(8) if kinds[row] == kind][start : start + size])
            for kind in dict.fromkeys(kinds)
            for start in range(0, kinds.count(kind), size)
        ]
    else:
        data = singles(batch)
    found = collect(lora(base, BRANCHES), data)
    assert_exact(found, exact_factors(base, data, BRANCHES))
    assert found.samples == 8
    if later not in (5, 6, 9):
        assert len({id(factors.inputs) for factors in found.kronecker.values()}) == 3


@pytest.mark.parametrize("kind", [4, 6, 7, 8])
def test_layers_called_twice_in_one_forward_pass(kind):
    base = Tokens(Branching())
    base.body.kind = lambda x: kind
    batch = uneven_batch(4, 6)
    names = BRANCHES if kind != 4 else BRANCHES[:2]
    found = collect(lora(base, names), [batch])
    assert_exact(found, exact_factors(base, [batch], names))


def test_layers_that_do_not_share_in_the_first_sample_may_later():
    base = Tokens(Branching())
    kinds = iter([1])
    base.body.kind = lambda x: next(kinds, 0)
    model = lora(base, BRANCHES)
    found = collect(model, singles(whole_batch()))
    base.body.kind = lambda x: 0
    assert_exact(found, exact_factors(base, [whole_batch()], BRANCHES))


def test_only_some_of_the_layers_ask_for_factors():
    base = tiny_llama()
    model = wrap(copy.deepcopy(base), target_modules=["q_proj", "k_proj", "v_proj"])
    layers = named(model)
    wanted = {
        name: Wants(gradient="exact")
        if "q_proj" in name
        else Wants(gradient="exact", outputs="full" if "k_proj" in name else "diagonal")
        for name in layers
    }
    (found,) = prepare(model, layers, wanted, [token_batch()], 4).passes()
    exact = exact_factors(base, [token_batch()], list(layers))
    assert set(found.gradients) == set(layers)
    for name in layers:
        assert relative(found.gradients[name], exact[name].gradient) < 2e-5
    assert_exact(found, {name: each for name, each in exact.items() if "q_proj" not in name})


class Overwriting(nn.Module):
    """Changes the input of one layer in place before another one reads it."""

    def __init__(self, d=6):
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        x = x * 1.0
        y = self.a(x)
        x.add_(1.0)
        return y + self.b(x).tanh()


def test_a_shared_input_changed_in_place_is_never_summed_wrongly():
    """Nor can such a model be trained: its first adapter needs the input that was overwritten."""
    base = Tokens(Overwriting())
    model = lora(base, ["body.a", "body.b"])
    with pytest.raises(RuntimeError, match="inplace"):
        model(**whole_batch())["loss"].backward()
    with pytest.raises(RuntimeError, match="inplace"):
        collect(model, [whole_batch()])
    # The model is given back as it was.
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


# Failures.


@pytest.mark.parametrize("make, batch", [(tiny_bert, class_batch()), (tiny_vit, image_batch())])
def test_labels_of_classes_are_not_labels_of_tokens(make, batch):
    with pytest.raises(hs.DataError, match=r"tokens='labels'.*have none a token"):
        collect(wrap(make(), target_modules=["query", "q_proj"]), [batch], tokens="labels")


class Poisoned(nn.Module):
    """Gives its second layer NaN, or infinity, for the first token, which the loss may not depend on."""

    def __init__(self, value, d=6):
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)
        self.value = value

    def forward(self, x):
        x = self.a(x).tanh()
        poison = torch.zeros_like(x)
        poison[:, 0] = self.value
        return x + self.b(x + poison)


@pytest.mark.parametrize("gradient", ["exact", "no"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_an_input_names_the_layer(value, gradient):
    model = lora(Tokens(Poisoned(value), loss_from=1), ["body.a", "body.b"])
    assert model(**whole_batch())["loss"].isfinite()
    with pytest.raises(hs.LayerError, match=r"layer 'body\.b'.*NaN or infinity"):
        collect(model, [whole_batch()], gradient=gradient)


@pytest.mark.parametrize(
    "method",
    [
        "lora-da:samples=4",
        "lora-da:samples=4,fisher=full",
        "lora-one:samples=4",
        "lora-one:samples=4,gradients=sketch",
    ],
)
def test_nan_in_an_input_reaches_no_factor(method):
    model = lora(Tokens(Poisoned(math.nan), loss_from=1), ["body.a", "body.b"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(hs.LayerError, match=r"body\.b"):
        hs.initialize_(model, method, data=[whole_batch()])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_overflowing_squares_name_the_layer():
    """Finite numbers whose squares float32 can't hold."""
    model = lora(Tokens(Poisoned(1e25), loss_from=1), ["body.a", "body.b"])
    with pytest.raises(hs.LayerError, match=r"layer 'body\.b'.*NaN or infinity"):
        collect(model, [whole_batch()])


def test_no_nan_where_no_token_counts():
    batch = whole_batch()
    batch["attention_mask"][:] = 0
    found = collect(lora(Tokens(Branching()), BRANCHES), [batch])
    for factors in found.kronecker.values():
        for value in (factors.inputs, factors.outputs, factors.mean_input, factors.mean_output):
            assert value.isfinite().all()


class Unused(nn.Module):
    """One layer that is used, one that isn't, and one whose output is cut off from the loss."""

    def __init__(self, d=6):
        super().__init__()
        self.used, self.unused, self.cut = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        return self.used(x).tanh() + self.cut(x).detach()


UNUSED = ["body.used", "body.unused", "body.cut"]


@pytest.mark.parametrize("outputs", ["diagonal", "full"])
def test_layers_that_no_gradient_reached_are_missing(outputs):
    base = Tokens(Unused())
    found = collect(lora(base, UNUSED), [uneven_batch(4, 6)], outputs=outputs)
    assert set(found.layers) == set(UNUSED)
    assert set(found.kronecker) == set(found.gradients) == set(found.groups) == {"body.used"}
    assert_exact(found, exact_factors(base, [uneven_batch(4, 6)], ["body.used"]))


def test_strict_refuses_an_unused_layer():
    model = lora(Tokens(Unused()), UNUSED)
    with pytest.raises(hs.LayerError, match=r"body\.unused.*no gradient"):
        hs.initialize_(model, "lora-da:samples=4", data=[whole_batch()], strict=True)
    with pytest.warns(HeadstartWarning, match="no gradient"):
        report = hs.initialize_(model, "lora-da:samples=4", data=[whole_batch()])
    notes = {layer.name: layer.note for layer in report.layers}
    assert not notes["body.used"] and notes["body.unused"] and notes["body.cut"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_no_layer_reached_at_all():
    with pytest.raises(hs.DataError, match="no gradient reached any"):
        collect(lora(Tokens(Unused()), UNUSED[1:]), [whole_batch()])
