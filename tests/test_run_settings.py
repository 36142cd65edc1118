"""A run's settings: read, overridden, refused in one sentence, and known by a key."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import RunError
from headstart.runs.read import flat_settings, read_run
from headstart.runs.trainers import _arguments
from headstart.runs.tree import Optimizer, Run
from headstart.tasks.registry import parse_task

# Settings that are none, and what the sentence about them says.
BAD = {
    "unknown": ("optimiser: {lr: 1e-4}", r"no setting 'optimiser'\. Did you mean 'optimizer'\?"),
    "unknown within": ("optimizer: {learning_rate: 1e-4}", "no setting 'learning_rate' in optimizer"),
    "in the wrong place": ("lr: 1e-4", r"no setting 'lr'\. Did you mean 'optimizer\.lr'\?"),
    "no settings": ("optimizer: 3", r"optimizer must hold settings \(name, lr"),
    "no number": ("optimizer: {lr: fast}", "optimizer.lr='fast' should be a valid number"),
    "negative rate": ("optimizer: {lr: -1}", "optimizer.lr=-1.* greater than 0"),
    "no finite rate": ("optimizer: {lr: .inf}", "optimizer.lr=inf should be a finite number"),
    "unknown word": ("schedule: {kind: cosin}", r"one of 'cosine', .* Did you mean 'cosine'\?"),
    "two lengths": ("schedule: {epochs: 1, steps: 3}", "schedule: epochs and steps are both given"),
    "warm-up": ("schedule: {warmup: 1.5}", "warmup=1.5 is neither a share below 1 nor a whole number"),
    "half a rank": ("adapter: {r: 4.5}", "adapter.r=4.5 should be a valid integer"),
    "no rank": ("adapter: {r: 0}", "adapter.r=0 should be greater than or equal to 1"),
    "pattern": ("adapter: {rank_pattern: {q_proj: x}}", "adapter.rank_pattern.q_proj='x' should be a valid integer"),
    "targets": ("adapter: {targets: 5}", "adapter.targets=5 should be"),
    "dropout": ("adapter: {dropout: 1}", "adapter.dropout=1.* less than 1"),
    "bits": ("model: {bits: 3}", "model.bits=3 must be one of 4, 8 or 16"),
    "dtype": ("model: {dtype: fp32}", r"model.dtype='fp32' must be one of .* Did you mean"),
    "packing": ("batch: {packing: maybe}", "batch.packing='maybe' should be a valid boolean"),
    "best of nothing": ("evaluation: {keep: best}", "evaluation: keep=best needs a measurement"),
    "no interval": (
        "evaluation: {every: epok}",
        "evaluation.every: 'epok' is neither a whole number of steps nor 'epoch'",
    ),
    "half a step": ("evaluation: {every: 0.5}", "evaluation.every: 0.5 is neither"),
    "no step": ("evaluation: {every: 0}", "evaluation.every: 0 is neither"),
    "nothing held out": (
        "evaluation: {every: 5}\ndata: {held_out_examples: 0}",
        "evaluation.every has nothing to measure",
    ),
    "a start of no adapter": ("trains: full\nstart: pissa", "trains=full has no adapter, so no start"),
    "an adapter of no adapter": ("trains: bitfit\nadapter: {r: 4}", "trains=bitfit has no adapter: leave adapter out"),
    "two rates of one": ("trains: full\noptimizer: {lora_plus: 4}", "trains=full has no A and B"),
    "4-bit training": ("trains: full\nmodel: {bits: 4}", "can't train weights of 4 bits"),
    "LoRA+ and SGD": ("optimizer: {name: sgd, lora_plus: 4}", "lora_plus is made for adamw"),
    "VeRA with DoRA": ("adapter: {kind: vera, dora: true}", "adapter.kind=vera goes with neither"),
    "float16 without scaling": ("model: {dtype: float16}", "trains with precision=float16 alone"),
    "given twice": ("seed: 1\nseed: 2", "line 2: 'seed' is given twice"),
    "no YAML": ("a: [", "line 2?1?: "),
    "a list": ("- seed", "holds no settings"),
    "a word": ("seed", "holds no settings"),
    "half a seed": ("seed: 1.5", "seed=1.5 should be a valid integer"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_settings_are_one_sentence(what, tmp_path):
    text, words = BAD[what]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(RunError, match=words) as error:
        read_run(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", r"'seed' must read key=value"),
        ("=3", "must read key=value"),
        ("batch.siz=3", r"no setting 'siz' in batch\. Did you mean 'size'\?"),
        ("optimizer.lr.x=3", "optimizer.lr="),
        ("seed.x=3", "seed="),
        ("optimizer=[", "can't be read as YAML"),
    ],
)
def test_bad_overrides_are_one_sentence(override, words):
    with pytest.raises(RunError, match=words):
        read_run(None, [override])


def test_no_file_and_no_recipe(tmp_path):
    with pytest.raises(RunError, match="no recipe of that name"):
        read_run(tmp_path / "none.yaml")
    with pytest.raises(RunError, match="is a folder"):
        read_run(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: caf\xe9".encode("latin-1"))
    with pytest.raises(RunError, match="is not UTF-8"):
        read_run(tmp_path / "latin.yaml")


def test_overrides_win_and_every_value_says_where_it_came_from(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: some/model\noptimizer: {lr: 1e-4, name: sgd}\nstart:\n  form: residual\n")
    overrides = ["start=lora-da:samples=64,layers=attention", "optimizer.lr=2e-4", "seed=1", "report_to=wandb"]
    run, origins = read_run(path, overrides)
    assert (run.model.name, run.optimizer.lr, run.optimizer.name, run.seed) == ("some/model", 2e-4, "sgd", 1)
    assert (run.start.method, run.start.form) == ("lora-da:samples=64,layers=attention", "residual")
    assert run.report_to == ("wandb",)
    assert origins == {
        "model.name": "run.yaml",
        "optimizer.name": "run.yaml",
        "start.form": "run.yaml",
        "start.method": overrides[0],
        "optimizer.lr": overrides[1],
        "seed": overrides[2],
        "report_to": overrides[3],
    }
    assert origins.keys() < flat_settings(run).keys()


def test_a_branch_given_as_a_word_and_further_settings_go_together(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("start: pissa\n")
    run, _ = read_run(path, ["start.form=residual"])
    assert (run.start.method, run.start.form) == ("pissa", "residual")


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert read_run(tmp_path / "run.yaml")[0] == Run()


# The key.


def test_the_key_is_of_what_differs_from_the_defaults():
    assert Run().key == Run.model_validate({"optimizer": {"lr": Optimizer().lr}, "seed": 0}).key
    changes = [{"seed": 1}, {"optimizer": {"lr": 1e-4}}, {"start": {"method": "pissa"}}, {"batch": {"packing": True}}]
    keys = {Run.model_validate(change).key for change in changes}
    assert len(keys | {Run().key}) == 5
    # Where progress is reported to changes no number.
    assert Run(report_to=("wandb",)).key == Run().key


def test_a_new_setting_with_a_default_changes_no_key():
    class Later(Run):
        more: int = 3

    assert Later().key == Run().key and Later(seed=2).key == Run(seed=2).key != Later(seed=2, more=4).key


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 9),
            "optimizer": st.fixed_dictionaries({}, optional={"lr": st.floats(1e-6, 1.0)}),
            "data": st.fixed_dictionaries({}, optional={"train": st.text(max_size=5)}),
            "start": st.fixed_dictionaries({}, optional={"method": st.sampled_from(["lora", "pissa", "a/b:c=1"])}),
        },
    )
)
def test_what_was_written_is_read_as_it_was(changes):
    run = Run.model_validate(changes)
    again = Run.model_validate(json.loads(json.dumps(run.model_dump(mode="json"))))
    assert again == run and again.key == run.key
    name = run.folder_name
    assert name.endswith(run.key) and "/" not in name and len(name) < 100


@pytest.mark.parametrize(("asked", "measured", "answered"), [({}, 4, 8), ({"evaluation": {"batch_size": 3}}, 3, 3)])
def test_how_many_are_measured_and_answered_at_a_time(asked, measured, answered, tmp_path):
    run = Run(batch={"size": 4}, **asked)
    assert run.answers_at_once == answered
    arguments = _arguments(run, parse_task("gsm8k"), tmp_path)
    assert arguments["per_device_eval_batch_size"] == measured and arguments["per_device_train_batch_size"] == 4
