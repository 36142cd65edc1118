"""The programs that train around an adapter: Trainer, SFTTrainer, accelerate launch, FSDP2; each the real thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import headstart as hs
from conftest import logits, started, tiny_llama, token_batch, word_tokenizer, wrap
from programs import train as program
from programs.train import FORMS
from test_processes import together, whole

TESTS = Path(__file__).parent


def close(found, expected, tolerance=2e-4):
    """Compare two sets of factors, each tensor relative to its norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def moved(found, form):
    """That the factors are not those of the start, so that comparing them says something."""
    start = program.factors(program.prepare(form))
    assert any((found[name] - start[name]).norm() > 1e-2 * start[name].norm() for name in start)


@pytest.mark.parametrize("form", FORMS)
def test_accumulating_gradients_is_a_bigger_batch(form, tmp_path):
    several = program.train(program.prepare(form), tmp_path / "a", steps=4, batch_size=2, gradient_accumulation_steps=4)
    one = program.train(program.prepare(form), tmp_path / "b", steps=4, batch_size=8)
    assert program.losses(several) == pytest.approx(program.losses(one), rel=1e-4)
    close(program.factors(several.model), program.factors(one.model))
    moved(program.factors(one.model), form)


@pytest.fixture(scope="module")
def sums():
    """A tokenizer of numbers, and prompts with completions."""
    pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = word_tokenizer(["<pad>", "<eos>", *map(str, range(90))], unknown="<pad>")
    rows = [{"prompt": f"{i} {i + 1} " * (1 + i % 2), "completion": f"{i + 2} {i + 3}"} for i in range(16)]
    return tokenizer, Dataset.from_list(rows)


@torch.no_grad()
def completion_loss(model, tokenizer, rows):
    """The mean loss over the completions' tokens and the end, one row at a time."""
    total = count = 0.0
    for row in rows:
        prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        scores = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(scores.gather(1, ids[0, len(prompt) :, None]).sum())
        count += len(answer) + 1
    return total / count


@pytest.mark.parametrize("form", FORMS)
def test_sft_trainer_on_prompts_and_completions(form, sums, tmp_path):
    import trl

    tokenizer, rows = sums
    model = program.prepare(form)
    start = completion_loss(model.eval(), tokenizer, rows)
    if form == "anchored":
        assert start == pytest.approx(completion_loss(tiny_llama().eval(), tokenizer, rows), rel=1e-6)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=16,
        learning_rate=0.5 if form == "core" else 2e-2,  # a core's few numbers move little else
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    found = program.losses(trainer)
    assert found[1] == pytest.approx(start, rel=1e-4)
    assert found[6] < found[1] - 0.05
    # What was trained is what leaves.
    hs.save_lora(trainer.model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    after = completion_loss(model.eval(), tokenizer, rows)
    assert after < start - 0.05
    assert completion_loss(plain, tokenizer, rows) == pytest.approx(after, rel=1e-5)


def lost_in_an_evaluation(method, folder, **changes):
    """Train a little, evaluate in bfloat16 and save: how much of the update isn't what it was, by way of saving."""
    batch = token_batch()
    model = started(tiny_llama(), method, **changes)
    trainer = program.train(model, folder / "run", steps=4, batch_size=8, learning_rate=1e-4, bf16_full_eval=True)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trained = logits(trainer.model, batch)
    trainer.evaluate(program.Rows())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    hs.save_lora(trainer.model, folder / "lora")
    hs.save_checkpoint(trainer.model, folder / "checkpoint")
    loaded = {
        "lora": PeftModel.from_pretrained(tiny_llama(), folder / "lora"),
        "checkpoint": hs.load_checkpoint(tiny_llama(), folder / "checkpoint"),
    }
    update = trained - logits(tiny_llama(), batch)
    # Beside the whole outputs it is as small as what bfloat16 rounds.
    assert 1e-3 < update.norm() / trained.norm() < 1e-2
    return {way: float((logits(each, batch) - trained).norm() / update.norm()) for way, each in loaded.items()}


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_an_evaluation_in_bfloat16_rounds_what_was_trained_and_no_more(method, tmp_path):
    """The Trainer casts the model for it, and leaves it so: numbers of bfloat16 are off by up to 1/256."""
    assert max(lost_in_an_evaluation(method, tmp_path).values()) < 2**-8


def test_an_evaluation_in_bfloat16_takes_much_of_a_residual_form(tmp_path):
    """There the factors are rounded whole, start and all."""
    assert min(lost_in_an_evaluation("pissa", tmp_path, form="residual").values()) > 0.1


def test_accelerate_launch_with_two_processes(tmp_path):
    command = [
        # With --cpu it starts one process whatever it is told; --multi_gpu is its name for several on one machine, and
        # the script asks for the CPU.
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
        str(TESTS / "programs" / "train.py"), str(tmp_path / "two"), json.dumps({"steps": 4, "batch_size": 4}),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    program.main(tmp_path / "one", {"steps": 4, "batch_size": 8})
    for form in FORMS:
        first, second = (load_file(tmp_path / "two" / form / f"factors-{rank}.safetensors") for rank in (0, 1))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(second[name], value), name
        expected = load_file(tmp_path / "one" / form / "factors-0.safetensors")
        close(first, expected)
        moved(expected, form)
        two, one = (json.loads((tmp_path / each / form / "losses.json").read_text()) for each in ("two", "one"))
        assert two == pytest.approx(one, rel=1e-4)


HALVES = [token_batch(3, 12, seed=seed, padded=False) for seed in (1, 2)]


def steps(model, batches):
    """Train for a few steps on the same batches, at each on the mean of their losses; return the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(3):
        loss = sum(model(**batch).loss for batch in batches) / len(batches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


CASES = [("anchored", "before"), ("anchored", "after"), ("core", "before"), ("kept", "after")]


def sharded(rank, folder):
    """Train in an FSDP2 model, initialised before or after it is sharded, each process on its half of the data.

    All processes save it, twice, to the same place.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    found = []
    for form, when in CASES:
        model = program.prepare(form) if when == "before" else wrap(tiny_llama())
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if when == "after":
            program.initialize(model, form)
        losses = steps(model, [HALVES[rank]])
        hs.save_lora(model, folder / f"{form}-{when}-lora")
        hs.save_checkpoint(model, folder / f"{form}-{when}-checkpoint")
        found.append((losses, {name: whole(p) for name, p in model.named_parameters() if "lora_" in name}))
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, together(folder, sharded, folder)


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_parameters_sharded_by_fsdp2_train_alike(index, both):
    form, when = CASES[index]
    folder, processes = both
    (first, parts), (second, others) = (each[index] for each in processes)
    model = program.prepare(form)
    expected = steps(model, HALVES)
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
    close(parts, program.factors(model))
    close(others, program.factors(model))
    moved(parts, form)
    # What it saved is what it trained.
    again = hs.load_checkpoint(tiny_llama(), folder / f"{form}-{when}-checkpoint")
    for name, value in program.factors(again).items():
        assert torch.equal(value, parts[name]), name
    plain = PeftModel.from_pretrained(tiny_llama(), folder / f"{form}-{when}-lora")
    assert (logits(plain, HALVES[0]) - logits(again, HALVES[0])).norm() <= 1e-5 * logits(again, HALVES[0]).norm()
