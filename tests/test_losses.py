"""A sample's own loss from the logits: told by value and gradient, never guessed, and without holding the logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import VOCABULARY, tiny_llama, tiny_mixtral, token_batch, wrap
from headstart.statistics.confirmed import unmodelled
from headstart.statistics.losses import OwnLoss, find_own_loss, predicts_next
from oracles import exact_factors, relative
from passes import Tokens, assert_exact, collect, lora, singles, uneven_batch


def found(loss_of, logits, labels):
    logits = logits.requires_grad_(True)
    loss = loss_of(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    own = find_own_loss(loss.detach(), logits.detach(), gradient, labels)
    return own and own.kind


def next_token(logits, labels, **settings):
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), **settings)


def own_token(logits, labels, **settings):
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), **settings)


def one_class(logits, labels, **settings):
    return functional.cross_entropy(logits, labels, **settings)


def tokens(size=1, length=9, classes=11, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(size, length, classes, generator=generator)
    labels = torch.randint(0, classes, (size, length), generator=generator)
    labels[:, :3] = -100
    return logits.to(dtype), labels


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 10.0])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("loss_of", "kind"), [(next_token, "next token"), (own_token, "token")])
def test_losses_of_tokens_are_told_apart_however_alike(loss_of, kind, size, scale, dtype):
    """Logits that are all zero give every token the same loss: what a position predicts shows in the gradient."""
    assert found(loss_of, *tokens(size, scale=scale, dtype=dtype)) == kind


@pytest.mark.parametrize("loss_of", [next_token, own_token])
@pytest.mark.parametrize(
    "other",
    [
        dict(label_smoothing=0.1),
        dict(reduction="sum"),
        dict(weight=torch.linspace(0.5, 1.5, 11)),
    ],
    ids=["smoothed", "summed", "weighted"],
)
def test_other_losses_of_tokens_are_none_of_ours(loss_of, other):
    assert found(lambda logits, labels: loss_of(logits, labels, **other), *tokens()) is None


def summed_in_lanes(logits, labels):
    """The next token's cross entropy by one running float32 sum a lane, as narrow vector units compute it."""
    rows = logits[:, :-1].flatten(0, 1)
    powers = (rows - rows.detach().amax(1, keepdim=True)).exp()
    # One after another: what a sum along the last axis does is its own affair.
    lanes = powers.unflatten(1, (-1, 8)).unbind(1)
    totals = sum(lanes[1:], start=lanes[0]).sum(1).log() + rows.detach().amax(1)
    return (totals - rows.gather(1, labels[:, 1:].reshape(-1, 1))[:, 0]).mean()


@pytest.mark.parametrize("classes", [8192, 49152])
def test_a_loss_that_sums_many_classes_roughly_is_known(classes):
    """Beside a likely class, terms below float32's last place are lost: no share of the loss, but of the classes."""
    logits = torch.full((1, 5, classes), -16.4, dtype=torch.float32, device="cpu")
    logits[..., ::8] = -30.0
    logits[..., 0] = 0.0
    logits[..., 1] = logits[..., 2] = 1.0
    labels = torch.tensor([[3, 1, 2, 1, 2]], dtype=torch.int64, device="cpu")
    exact = float(functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:]))
    with torch.no_grad():
        assert abs(float(summed_in_lanes(logits, labels)) - exact) > 1e-5 * exact
    assert found(summed_in_lanes, logits, labels) == "next token"


def test_a_loss_beside_the_one_of_the_logits_is_noticed():
    """However small: an auxiliary loss has a gradient of its own."""
    aside = torch.tensor(1e-3)
    assert found(lambda logits, labels: next_token(logits, labels) + aside, *tokens()) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("loss_of", "labels", "kind"),
    [
        (one_class, torch.tensor([2, 0, 1]), "class"),
        (functional.mse_loss, torch.tensor([[0.2, 1.0, 3.0]] * 3), "squares"),
        (functional.binary_cross_entropy_with_logits, torch.tensor([[0.0, 1.0, 1.0]] * 3), "logistic"),
    ],
)
def test_losses_of_samples(loss_of, labels, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    labels = labels.to(dtype) if labels.is_floating_point() else labels
    assert found(loss_of, torch.randn(3, 3, generator=generator).to(dtype), labels) == kind
    assert found(lambda *given: 1.1 * loss_of(*given), torch.randn(3, 3, generator=generator).to(dtype), labels) is None


def test_segments_are_not_guessed_at():
    logits, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    assert found(one_class, logits, labels) is None


@pytest.mark.parametrize("length", [9, 1])
def test_where_labels_are_predicted_is_told_by_the_gradient(length):
    logits, labels = tokens(length=9)
    labels = labels[:, :length] if length > 1 else labels
    for loss_of, shifted in ((next_token, True), (own_token, False)):
        leaf = logits.clone().requires_grad_(True)
        # With whatever beside it that is a loss of the same positions.
        (gradient,) = torch.autograd.grad(loss_of(leaf, labels, label_smoothing=0.3), leaf)
        assert predicts_next(gradient, labels) is shifted
    assert predicts_next(torch.zeros_like(logits), labels) is None


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("kind", ["next token", "token"])
def test_losses_and_gradients_in_pieces_are_those_of_autograd(monkeypatch, kind, with_head):
    monkeypatch.setattr("headstart.statistics.losses._AT_ONCE", 16 * 11)  # sixteen rows a piece
    torch.manual_seed(0)
    head = nn.Linear(5, 11) if with_head else None
    _, labels = tokens(4, 13)
    labels[2, 5:] = -100
    states = torch.randn(4, 13, 5 if with_head else 11, requires_grad=True)
    logits = states if head is None else head(states)
    loss_of = next_token if kind == "next token" else own_token
    losses = torch.stack([loss_of(logits[row : row + 1], labels[row : row + 1]) for row in range(4)])
    (expected,) = torch.autograd.grad(losses.sum(), states)
    values, gradient = OwnLoss(kind).gradient(states.detach(), labels, 4.0, head=head)
    torch.testing.assert_close(values, losses.detach())
    torch.testing.assert_close(gradient, 4 * expected)


class Smoothed(nn.Module):
    """A language model whose training loss smooths labels."""

    def __init__(self, body):
        super().__init__()
        self.body, self.config = body, body.config

    def forward(self, labels=None, **given):
        logits = self.body(**given).logits
        return {"loss": next_token(logits, labels, label_smoothing=0.1), "logits": logits}


def capped(**changes):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = Gemma2Config(vocab_size=97, num_key_value_heads=2, final_logit_softcapping=0.5, **sizes, **changes)
    return Gemma2ForCausalLM(config)


def scaled():
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return CohereForCausalLM(CohereConfig(vocab_size=97, logit_scale=0.3, **sizes))


MODELS = {
    "plain": (tiny_llama, False),
    "soft caps": (capped, False),
    "scaled logits": (scaled, False),
    "smoothed": (lambda: Smoothed(tiny_llama()), True),
    "router loss": (tiny_mixtral, True),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_change_their_logits_or_their_loss(name):
    make, apart = MODELS[name]
    base = make()
    batch = token_batch(4, 12)
    targets = ["q_proj", "v_proj"]
    model = lora(base, targets) if name == "smoothed" else wrap(copy.deepcopy(base), target_modules=targets)
    result = collect(model, [batch])
    assert_exact(result, exact_factors(base, [batch], list(result.kronecker)))
    assert [("one at a time" in note) for note in result.notes] == [True] * apart


class Weighted(Tokens):
    """Its loss has more to it than the labels that are not -100, as a short sample of ``batches`` doesn't show."""

    def __init__(self, ignored=-100, classes=None, by_mask=False):
        super().__init__(nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh()))
        self.ignored, self.by_mask = ignored, by_mask
        if classes is not None:
            self.head = nn.Linear(6, len(classes))
        self.register_buffer("classes", classes)

    def forward(self, input_ids, labels=None, attention_mask=None, loss_mask=None, loss_weights=None):
        logits = self.head(self.body(self.embed(input_ids)))
        if labels is None:
            return {"logits": logits}
        weight = torch.ones_like(logits[..., 0]) if loss_weights is None else loss_weights[: len(labels)]
        weight = weight * (1 if loss_mask is None else loss_mask)
        if self.by_mask:
            weight = weight * attention_mask
        weight = weight * (labels != self.ignored)
        if self.classes is not None:
            weight = weight * self.classes[labels.clamp_min(0)]
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=self.ignored)
        return {"loss": (losses * weight).sum() / (weight != 0).sum(), "logits": logits}


def labelled(size=4, length=10, seed=0, classes=VOCABULARY, padding=0, lengths=(10, 4, 3, 6)):
    """Every token has a label, above 0; padding has ``padding``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (size, length), generator=generator)
    labels = torch.randint(1, classes, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, until in enumerate(lengths[:size]):
        ids[row, until:], labels[row, until:], mask[row, until:] = 0, padding, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_mask():
    batch = labelled(length=80, lengths=())
    hidden = torch.ones_like(batch["labels"])
    hidden[:, :40] = 0
    return [batch | {"loss_mask": hidden}]


def with_weights():
    batch = labelled(lengths=())
    weights = torch.ones(4, 10)
    weights[1:] = torch.tensor([0.0625, 3.0, 0.1])[:, None]
    return [batch | {"loss_weights": weights}]


def some_zeros():
    batch = labelled(lengths=(), seed=1)
    batch["labels"][2:, 3:6] = 0
    return [labelled(lengths=()), batch]


def classes_apart():
    """Labels of classes that weigh the same come first."""
    return [labelled(lengths=(), classes=3), labelled(lengths=(), classes=6, seed=1)]


# A model, and batches of which the first sample shows plain cross entropy.
HIDDEN = {
    "a mask": (Weighted, with_mask),
    "weights": (Weighted, with_weights),
    "a mask that comes later": (Weighted, lambda: [labelled(lengths=(), padding=-100), *with_mask()]),
    "padding with another label": (lambda: Weighted(0), lambda: [labelled()]),
    "padding that comes later": (lambda: Weighted(by_mask=True), lambda: [labelled(lengths=(), seed=1), labelled()]),
    "padding in a long sample": (lambda: Weighted(by_mask=True), lambda: [labelled(length=90, lengths=(90, 50))]),
    "another label that is ignored": (lambda: Weighted(0), some_zeros),
    "classes that weigh otherwise": (
        lambda: Weighted(classes=torch.tensor([1.0, 1.0, 1.0, 0.5, 2.0, 4.0])),
        classes_apart,
    ),
}


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_short_sample_does_not_show_of_the_loss_is_noticed(monkeypatch, name, size):
    """Also where it only shows once other batches were read: against each sample's own loss, in float64."""
    monkeypatch.setattr("headstart.statistics.confirmed._MOST_LOGITS", 40 * VOCABULARY)
    make, batches = HIDDEN[name]
    base, data = make(), batches()
    if size == 1:
        data = [one for batch in data for one in singles(batch)]
    result = collect(lora(base, ["body.0"]), data, outputs=None)
    expected = exact_factors(base, data, ["body.0"])["body.0"].gradient
    assert relative(result.gradients["body.0"], expected) < 1e-5
    assert result.samples == sum(len(batch["labels"]) for batch in data)
    if size is None:
        assert [note for note in result.notes if "one at a time" in note]


def test_a_token_classifier_that_masks_its_labels_by_attention():
    from transformers import BioGptConfig, BioGptForTokenClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    base = BioGptForTokenClassification(BioGptConfig(vocab_size=VOCABULARY, num_labels=5, pad_token_id=0, **sizes))
    data = [labelled(lengths=(), classes=5), labelled(classes=5)]
    names = [name for name, _ in base.named_modules() if name.endswith("fc1")]
    result = collect(lora(base, ["fc1"]), data, outputs=None)
    expected = exact_factors(base, data, names)
    assert relative(result.gradients[names[0]], expected[names[0]].gradient) < 1e-5


def test_plain_losses_stay_those_of_batches_and_cost_one_more_sample_a_kind(monkeypatch):
    """Neither padding without labels nor labels at padding that the model counts is a reason to read samples alone."""
    sizes = []

    class Counted(Weighted):
        def forward(self, input_ids, labels=None, **given):
            if labels is not None:
                sizes.append(tuple(input_ids.shape))
            return super().forward(input_ids, labels, **given)

    for padding in (-100, 5):
        sizes.clear()
        base, data = Counted(), [labelled(padding=padding, seed=seed) for seed in range(4)] + [labelled(lengths=())]
        result = collect(lora(base, ["body.0"]), data, outputs=None)
        assert not result.notes
        # Found out on one sample, with other labels on it, and once with padding and once without.
        assert len(sizes) <= 6 and all(size == 1 for size, _ in sizes)
        if padding == -100:
            expected = exact_factors(base, data, ["body.0"])["body.0"].gradient
            assert relative(result.gradients["body.0"], expected) < 1e-5


def test_what_may_weigh_a_loss_is_told_by_name_and_size():
    batch = token_batch(2, 6) | {"position_ids": torch.zeros(2, 6), "pixel_values": torch.zeros(2, 2)}
    plain = {"patches": torch.zeros(2, 7, 3), "output_attentions": True, "names": ["a", "b"], "return_dict": None}
    assert unmodelled(batch | plain) is None
    assert unmodelled({"pairs": torch.zeros(2)}) is None  # without labels none of our losses
    for value in (torch.ones(2, 6), torch.ones(2, 1), torch.tensor(2), 2, [0.5, 1.0], {"by": torch.ones(2)}):
        assert unmodelled(batch | plain | {"loss_weights": value}) == "loss_weights"


@pytest.mark.parametrize("cells", [1, 12, 20])
def test_batches_that_are_read_in_parts(monkeypatch, cells):
    monkeypatch.setattr("headstart.statistics.reader._TOKENS_AT_ONCE", {"cpu": cells, "other": cells})
    base, batch = tiny_llama(), token_batch(5, 10)
    result = collect(wrap(copy.deepcopy(base)), [batch])
    assert result.samples == 5
    assert_exact(result, exact_factors(base, [batch], list(result.kronecker)))


def largest_tensor(function):
    """Return the elements of the largest tensor that any operation made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple | list) else (out,):
                if isinstance(part, torch.Tensor):
                    self.largest = max(self.largest, part.numel())
            return out

    with Watch() as watch:
        function()
    return watch.largest


def test_logits_of_a_batch_never_exist(monkeypatch):
    monkeypatch.setattr("headstart.statistics.losses._AT_ONCE", 16 * 4000)
    base = tiny_llama(vocab_size=4000)
    batch = uneven_batch(4, 40)
    model = wrap(base, target_modules=["q_proj"])
    # The embeddings themselves have 4000 times 32 numbers; the logits would have 4 times 40 times 4000.
    assert largest_tensor(lambda: collect(model, [batch], outputs=None)) <= 40 * 4000
