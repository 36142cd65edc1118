"""A trainer given as data: its own samples, collator, loss, size and schedule."""

from __future__ import annotations

import copy
import math
import tempfile

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback, TrainingArguments

import headstart as hs
from conftest import tiny_llama, wrap
from headstart.layers.find import lora_layers
from headstart.processes import Processes
from headstart.statistics.prepare import prepare
from headstart.statistics.trainer import from_trainer, known_training

ROWS = 11
LENGTHS = [5 + (3 * row) % 7 for row in range(ROWS)]


def rows(labels=True):
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(1, 60, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row} | ({"labels": row} if labels else {}) for row in ids]


def padded(features):
    width = max(len(feature["input_ids"]) for feature in features)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for feature in features:
        missing = width - len(feature["input_ids"])
        batch["input_ids"].append(feature["input_ids"] + [0] * missing)
        batch["attention_mask"].append([1] * (width - missing) + [0] * missing)
        batch["labels"].append(feature["labels"] + [-100] * missing)
    return {key: torch.tensor(value) for key, value in batch.items()}


def arguments(folder, **changes):
    given = dict(output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4)
    return TrainingArguments(**(given | changes))


def plain_trainer(folder, model, **changes):
    names = ("compute_loss_func",)
    more = {name: changes.pop(name) for name in names if name in changes}
    data = Dataset.from_list([row | {"source": "a file"} for row in rows()])
    return Trainer(model, arguments(folder, **changes), train_dataset=data, data_collator=padded, **more)


def gradients(model, data, samples):
    """Return the mean gradients that the verb would collect, by layer."""
    layers = {target.name: target.module for target in lora_layers(model, "default")}
    wanted = dict.fromkeys(layers, hs.Wants(gradient=True))
    collector = prepare(
        model,
        layers,
        wanted,
        data.batches,
        samples,
        collator=data.collator,
        batch_size=data.batch_size,
        loss=data.loss,
        single=data.single,
        processes=Processes(),
    )
    (statistics,) = collector.passes()
    return statistics.gradients


def oracle(base, losses):
    """Return the mean over samples of the gradient of each one's own loss, in float64."""
    model = copy.deepcopy(base).double().eval()
    weights = {name.removesuffix(".weight"): value for name, value in model.named_parameters() if "proj" in name}
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    for loss in losses:
        for name, gradient in zip(weights, torch.autograd.grad(loss(model), list(weights.values())), strict=True):
            total[name] += gradient / len(losses)
    return total


def assert_close(got, expected, tolerance=1e-4):
    for name, gradient in got.items():
        apart = float((gradient.double() - expected[name]).norm() / expected[name].norm())
        assert apart < tolerance, (name, apart)


def chosen(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(ROWS, generator=generator)[:samples].tolist()


def token_losses(model, row):
    ids = torch.tensor([row["input_ids"]])
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def test_its_data_collator_and_the_models_own_loss(tmp_path):
    base = tiny_llama()
    model = wrap(copy.deepcopy(base))
    trainer = plain_trainer(tmp_path, model)
    data = from_trainer(trainer, 6, seed=3)
    assert data.loss is None and data.batch_size == 4 and not data.single
    expected = oracle(base, [lambda m, row=row: token_losses(m, rows()[row]).mean() for row in chosen(6, 3)])
    assert_close(gradients(model, data, 6), expected)


@pytest.mark.parametrize("kind", ["label smoothing", "compute_loss_func"])
def test_its_own_loss(tmp_path, kind):
    base = tiny_llama()
    model = wrap(copy.deepcopy(base))

    def squared(outputs, labels, num_items_in_batch=None):
        return (outputs.logits[:, -1] ** 2).mean()

    changes = {"label_smoothing_factor": 0.3} if kind == "label smoothing" else {"compute_loss_func": squared}
    trainer = plain_trainer(tmp_path, model, **changes)
    data = from_trainer(trainer, 5, seed=0)
    assert data.loss is not None and data.single

    def loss(m, row):
        ids = torch.tensor([rows()[row]["input_ids"]])
        logits = m(input_ids=ids).logits
        if kind == "compute_loss_func":
            return (logits[:, -1] ** 2).mean()
        log_p = logits[0, :-1].log_softmax(-1)
        nll = -log_p.gather(1, ids[0, 1:, None]).mean()
        return 0.7 * nll - 0.3 * log_p.mean()

    assert_close(gradients(model, data, 5), oracle(base, [lambda m, row=row: loss(m, row) for row in chosen(5)]))


def test_the_verb_takes_it_and_leaves_the_trainer_as_it_was(tmp_path):
    base = tiny_llama()
    starts = []
    for sampler in (1, 2):
        model = wrap(copy.deepcopy(base))
        trainer = plain_trainer(tmp_path, model, seed=sampler)
        report = hs.initialize_(trainer.model, "lora-da:samples=5", data=trainer, progress=False)
        assert report.samples == 5 and trainer.state.global_step == 0
        starts.append({name: value.clone() for name, value in model.state_dict().items() if "lora_" in name})
    # Neither the trainer's seed nor its sampler matter.
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())
    # N is the size of the training set.
    model = wrap(copy.deepcopy(base))
    again = from_trainer(plain_trainer(tmp_path, model), 5, 0)
    known = hs.TrainingData(again.batches, again.collator, again.batch_size, training=hs.Training(ROWS))
    hs.initialize_(model, "lora-da:samples=5", data=known, progress=False)
    assert all(torch.equal(value, starts[0][name]) for name, value in model.state_dict().items() if "lora_" in name)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(max_steps=50, learning_rate=2e-3), 2e-3),
        (dict(max_steps=50, learning_rate=2e-3, warmup_steps=5), 4e-4),
        # Three batches of the eleven rows an epoch.
        (dict(num_train_epochs=10, learning_rate=1e-3, warmup_steps=0.5), 1e-3 / 15),
    ],
)
def test_the_first_rate_of_its_schedule(tmp_path, changes, expected):
    known = known_training(plain_trainer(tmp_path, wrap(tiny_llama()), **changes))
    assert known.population == ROWS and math.isclose(known.first_lr, expected)
    model = wrap(tiny_llama())
    trainer = plain_trainer(tmp_path, model, **changes)
    report = hs.initialize_(model, "lora-sb:samples=4", data=trainer, progress=False)
    assert all(math.isclose(layer.info["lr"], expected) for layer in report.layers)


class Line(torch.nn.Module):
    """A model that trains in no time."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"loss": self.weight * x.mean()}


class FirstRate(TrainerCallback):
    """Notes the first rate above 0 that an optimizer steps at, and ends the training there."""

    rate = None

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        self.rate = optimizer.param_groups[0]["lr"]
        control.should_training_stop = self.rate > 0


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "polynomial": {"power": 2.0},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 1},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    batch=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    epochs=st.sampled_from([1, 2.5, 7]),
    steps=st.sampled_from([-1, -1, 12]),
    warmup=st.sampled_from([0, 0.06, 0.3, 2, 9]),
    drop_last=st.booleans(),
)
def test_the_first_rate_is_the_one_that_training_begins_with(
    schedule, rows, batch, accumulation, epochs, steps, warmup, drop_last
):
    """Whatever the sizes and the schedule: against the optimizer's own rate as the trainer trains."""
    rate = FirstRate()
    with tempfile.TemporaryDirectory() as folder:
        chosen = arguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            max_steps=steps,
            warmup_steps=warmup,
            dataloader_drop_last=drop_last,
            learning_rate=1e-3,
            lr_scheduler_type=schedule,
            lr_scheduler_kwargs=SCHEDULES[schedule],
            save_strategy="no",
        )
        data = [{"x": torch.ones(1)} for _ in range(max(rows, batch if drop_last else 1))]
        trainer = Trainer(Line(), chosen, train_dataset=data, callbacks=[rate])
        before = torch.get_rng_state(), dict(vars(trainer)), list(trainer.accelerator._dataloaders)
        known = known_training(trainer)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert vars(trainer) == before[1] and trainer.accelerator._dataloaders == before[2]
        trainer.train()
    if rate.rate > 0:
        assert known.first_lr == pytest.approx(rate.rate, rel=1e-12)
    else:  # it ended within its warm-up
        assert known.first_lr is None


def test_a_schedule_of_unknown_length_has_no_first_rate(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ()

    trainer = Trainer(Line(), arguments(tmp_path, max_steps=4), train_dataset=Endless())
    assert known_training(trainer).first_lr == trainer.args.learning_rate
    trainer.args.max_steps = -1
    assert known_training(trainer).first_lr is None


def test_a_share_of_its_training_set(tmp_path):
    model = wrap(tiny_llama())
    report = hs.initialize_(model, "lora-sb:share=0.5", data=plain_trainer(tmp_path, model), progress=False)
    assert report.samples == math.ceil(ROWS / 2)


def test_starts_without_data_need_none_of_it(tmp_path):
    model = wrap(tiny_llama())
    trainer = Trainer(model, arguments(tmp_path), data_collator=padded)
    assert hs.initialize_(model, "pissa", data=trainer, progress=False).samples == 0
    with pytest.raises(hs.DataError, match="train_dataset"):
        hs.initialize_(wrap(tiny_llama()), "lora-one:samples=2", data=trainer, progress=False)


def test_its_own_collator_and_loss_are_not_mixed_with_others(tmp_path):
    model = wrap(tiny_llama())
    trainer = plain_trainer(tmp_path, model)
    for more in (dict(collator=padded), dict(loss=lambda model, batch: model(**batch).loss)):
        for data in (trainer, hs.TrainingData([padded(rows()[:2])])):
            with pytest.raises(hs.DataError, match="its own collator and loss"):
                hs.initialize_(model, "lora-one:samples=2", data=data, progress=False, **more)


@pytest.mark.parametrize("given", [float, lambda loss: {"loss": loss}])
def test_a_loss_that_is_no_tensor_is_named(given):
    batch = padded(rows()[:2])
    with pytest.raises(hs.DataError, match=r"loss= returned (float|dict)"):
        hs.initialize_(
            wrap(tiny_llama()),
            "lora-one:samples=2",
            data=[batch],
            loss=lambda model, batch: given(model(**batch).loss),
            progress=False,
        )


@pytest.mark.parametrize("method", ["lora-xs", "lora-sb:samples=2", "eva:samples=2"])
def test_an_optimizer_that_would_not_know_the_parameters_is_refused(tmp_path, method):
    model = wrap(tiny_llama())
    trainer = plain_trainer(tmp_path, model)
    trainer.create_optimizer()
    before = dict(model.named_parameters())
    with pytest.raises(hs.LayerError, match="the trainer's optimizer would not know of"):
        hs.initialize_(model, method, data=trainer, progress=False)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert hs.initialize_(model, "lora-one:samples=2", data=trainer, progress=False).samples == 2


def test_processes_with_fewer_samples_are_not_waited_for(tmp_path):
    """Losses of TRL gather their metrics from all processes."""

    class Gathering(Trainer):
        def compute_loss(self, model, inputs, *more, **named):
            loss = super().compute_loss(model, inputs, *more, **named)
            seen.append(self.accelerator.gather_for_metrics(loss.detach()).mean() + self.accelerator.reduce(loss))
            return loss

    def waits(*_, **__):
        raise AssertionError("another process would be waited for")

    seen, model = [], wrap(tiny_llama())
    trainer = Gathering(model, arguments(tmp_path), train_dataset=rows(), data_collator=padded)
    trainer.accelerator.gather_for_metrics = trainer.accelerator.reduce = waits
    report = hs.initialize_(model, "lora-one:samples=3", data=trainer, progress=False)
    assert report.samples == 3 and len(seen) >= 3
    assert trainer.accelerator.gather_for_metrics is trainer.accelerator.reduce is waits


def test_of_an_iterable_data_set_with_a_length_the_first_samples_are_read(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows())

        def __len__(self):
            return ROWS

    model = wrap(tiny_llama())
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=Stream(), data_collator=padded)
    data = from_trainer(trainer, 3, seed=0)
    assert list(data.batches) == rows()[:3] and data.training.population == ROWS


def test_a_loss_of_ones_own(tmp_path):
    base = tiny_llama()
    model = wrap(copy.deepcopy(base))
    batches = [padded(rows()[:4]), padded(rows()[4:6])]

    def distance(m, batch):
        logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return (logits[batch["attention_mask"] != 0] ** 2).mean()

    hs.initialize_(model, "lora-one:samples=6", data=batches, loss=distance, progress=False)

    def alone(m, row):
        return (m(input_ids=torch.tensor([rows()[row]["input_ids"]])).logits ** 2).mean()

    expected = oracle(base, [lambda m, row=row: alone(m, row) for row in range(6)])
    for target in lora_layers(model, "default"):
        U, S, Vh = torch.linalg.svd(-expected[target.name], full_matrices=False)
        best = U[:, :4] * S[:4] @ Vh[:4] / S[0] / 128
        product = target.module.lora_B["default"].weight @ target.module.lora_A["default"].weight
        assert float((product.double() - best).norm() / best.norm()) < 1e-3


def test_a_trainer_with_a_data_loader_of_its_own_is_named(tmp_path):
    class Mixing(Trainer):
        def get_train_dataloader(self):
            return super().get_train_dataloader()

    model = wrap(tiny_llama())
    trainer = Mixing(model, arguments(tmp_path), train_dataset=Dataset.from_list(rows()), data_collator=padded)
    with pytest.raises(hs.DataError, match=r"Mixing has a get_train_dataloader of its own.*give data="):
        hs.initialize_(model, "lora-one:samples=2", data=trainer, progress=False)
    assert hs.initialize_(model, "lora-one:samples=2", data=trainer.get_train_dataloader(), progress=False).samples == 2
