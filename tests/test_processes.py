"""Two processes against one: the same statistics, the same factors."""

from __future__ import annotations

import copy
import multiprocessing
import os
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import headstart as hs
from conftest import class_batch, factors_of, tiny_bert, tiny_llama, token_batch, wrap
from headstart.layers.find import lora_layers
from headstart.processes import Processes, in_step, owners

METHODS = [
    "lora-da:samples=10",
    "lora-da:samples=10,fisher=full,tokens=labels",
    "lora-one:samples=10",
    "lora-ga:samples=10",
    "lora-ga:samples=10,directions=random",
    "kfac-newton:samples=10",
    "gora:samples=10",
    "keeplora:samples=10",
    "astra:samples=10",
    "sc-lora:samples=10,beta=0.2",
]


def batches():
    """Ten samples of different lengths in four batches."""
    return [
        token_batch(3, 12, seed=1),
        token_batch(3, 9, seed=2),
        token_batch(3, 14, seed=3),
        token_batch(1, 7, seed=4),
    ]


def factors(model):
    return {target.name: tuple(map(whole, factors_of(target.module))) for target in lora_layers(model, "default")}


def whole(parameter):
    value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return value.detach().clone()


def alone(method, make=tiny_llama, data=None, **settings):
    model = wrap(make())
    # Of the same lengths, and so of the same groups of layers, but other tokens.
    kept = [batch | {"input_ids": batch["input_ids"].flip(1)} for batch in batches()]
    report = hs.initialize_(model, method, data=data or batches(), preserve=kept, progress=False, **settings)
    return factors(model), report


def _worker(rank, count, folder, function, arguments):
    torch.set_num_threads(1)
    found, error = None, None
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        found = function(rank, *arguments)
        dist.barrier()
    except BaseException:
        error = traceback.format_exc()
    torch.save((found, error), folder / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def together(folder, function, *arguments, count=2):
    """Run ``function(rank, ...)`` in ``count`` processes; return what each returned."""
    context = multiprocessing.get_context("forkserver")
    # Imported once for all: each process would spend most of its time on that.
    context.set_forkserver_preload(["headstart.initialize", "transformers.trainer", "hypothesis", "pytest"])
    started = [
        context.Process(target=_worker, args=(rank, count, folder, function, arguments)) for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
        process.kill()
    results = []
    for rank in range(count):
        found, error = torch.load(folder / f"{rank}.pt", weights_only=False)
        assert error is None, f"process {rank}: {error}"
        results.append(found)
    return results


def same_data(rank, methods, settings):
    found = []
    for method in methods:
        made, report = alone(method, **settings)
        found.append((made, report.samples, report.tokens, report.plan))
    return found


def divided_data(rank, method):
    """What a DistributedSampler or an accelerated loader gives: each process its own samples."""
    every = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches()
        for i in range(len(batch["labels"]))
    ]
    made, report = alone(method, data=every[rank::2])
    return made, report.samples


def randomly_collated(rank, method):
    """A collator that draws, from a generator that is elsewhere in every process."""
    torch.manual_seed(100 + rank)
    rows = [{key: value[i] for key, value in batches()[0].items()} for i in range(3)] * 2

    def collate(rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        hidden = torch.rand(batch["input_ids"].shape) < 0.3
        return batch | {"input_ids": batch["input_ids"].masked_fill(hidden & (batch["attention_mask"] > 0), 1)}

    made, report = alone(method, data=rows, collator=collate, batch_size=2)
    return made, report.samples


def in_ddp(rank, method):
    model = torch.nn.parallel.DistributedDataParallel(wrap(tiny_llama()))
    hs.initialize_(model, method, data=batches(), progress=False)
    loss = model(**batches()[rank]).loss
    loss.backward()
    gradient = next(target.module.lora_B["default"].weight.grad for target in lora_layers(model.module, "default"))
    return factors(model.module), gradient.clone()


def fails(rank, method):
    data = batches()
    if rank == 1:
        data[1]["labels"][:] = -100
    try:
        alone(method, data=data)
    except hs.HeadstartError as error:
        return str(error)
    return None


def spoil(module, args, output):
    output["loss"] = output.loss * float("nan")
    return output


def infinite(rank, sharded):
    """One process's data give a loss that is not a number, the other's are fine."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = wrap(tiny_llama())
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    every = [{key: value[i : i + 1] for key, value in batches()[0].items()} for i in range(3)] + batches()[1:]
    if rank == 1:
        model.register_forward_hook(spoil)
    try:
        hs.initialize_(model, METHODS[0], data=every, progress=False)
    except hs.DataError as error:
        return str(error)
    return None


def different_memory(rank):
    """Each process has its own idea of what is free."""
    from headstart.statistics import plan

    plan.free_memory = lambda device: 100_000 if rank else 10**9
    made, report = alone(METHODS[0])
    return made, report.plan


def core_too_late(rank):
    model = torch.nn.parallel.DistributedDataParallel(wrap(tiny_llama()))
    try:
        hs.initialize_(model, "lora-xs", progress=False)
    except hs.LayerError as error:
        return str(error)
    return None


def in_fsdp(rank, methods):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    found = []
    for method in methods:
        model = wrap(tiny_llama())
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        hs.initialize_(model, method, data=batches(), progress=False)
        with torch.no_grad():
            loss = float(model(**batches()[0]).loss)
        found.append((factors(model), loss))
    return found


def check(mine, expected, report=None):
    """Compare products; rounding in sums of another order grows with the condition of what is inverted."""
    assert mine.keys() == expected.keys()
    conditions = {layer.name: layer.info.get("condition", 1.0) for layer in report.layers} if report else {}
    for name in expected:
        tolerance = 2e-5 + 4 * torch.finfo(torch.float32).eps * conditions.get(name, 1.0)
        assert tolerance < 0.3
        A, B = (each.double() for each in mine[name])
        A_expected, B_expected = (each.double() for each in expected[name])
        error = (B @ A - B_expected @ A_expected).norm() / (B_expected @ A_expected).norm()
        assert float(error) < tolerance, name


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together(tmp_path_factory.mktemp("two"), same_data, METHODS, {})


@pytest.mark.parametrize("index", range(len(METHODS)), ids=METHODS)
def test_two_processes_find_what_one_finds(two, index):
    expected, report = alone(METHODS[index])
    for made, samples, tokens, _ in (each[index] for each in two):
        assert (samples, tokens) == (report.samples, report.tokens) == (10, report.tokens)
        check(made, expected, report)
    for name, (A, B) in two[0][index][0].items():
        assert torch.equal(A, two[1][index][0][name][0])
        assert torch.equal(B, two[1][index][0][name][1])


def test_two_processes_agree_where_a_choice_is_arbitrary(tmp_path):
    """Of these few tokens many directions have next to nothing, and rounding chooses among them: for all alike."""
    first, second = together(tmp_path, same_data, ["lora-null:samples=10"], {})
    for name, (A, B) in first[0][0].items():
        assert torch.equal(A, second[0][0][name][0])
        assert torch.equal(B, second[0][0][name][1])


def test_two_processes_search_one_scale(tmp_path):
    method = "lora-one:samples=2,scale=search"
    expected, report = alone(method)
    for ((made, *_),) in together(tmp_path, same_data, [method], {}):
        check(made, expected, report)


def test_several_passes_in_two_processes(tmp_path):
    settings = {"memory_budget": "40KB"}
    expected, report = alone(METHODS[0], **settings)
    assert not report.plan.startswith("1 pass,")
    for ((made, *_, plan),) in together(tmp_path, same_data, METHODS[:1], settings):
        assert plan.split(",")[0] == report.plan.split(",")[0]
        check(made, expected, report)


def test_more_processes_than_batches(tmp_path):
    method = "lora-da:samples=10,damping=1e-3"  # fewer tokens than inputs
    expected, report = alone(method, data=batches()[:1])
    for ((made, samples, *_),) in together(tmp_path, same_data, [method], {"data": batches()[:1]}, count=3):
        assert samples == 3
        check(made, expected, report)


def test_data_that_are_already_divided(tmp_path):
    expected, report = alone(METHODS[0])
    for made, samples in together(tmp_path, divided_data, METHODS[0]):
        assert samples == 10
        check(made, expected, report)


def test_a_random_collator_draws_alike_in_every_process(tmp_path):
    """So that its batches are told for the same data, and the start is that of one process."""
    expected, samples = randomly_collated(7, "lora-one:samples=6")
    assert samples == 6
    for made, samples in together(tmp_path, randomly_collated, "lora-one:samples=6"):
        assert samples == 6
        check(made, expected)


def test_a_model_in_ddp(tmp_path):
    expected, report = alone(METHODS[0])
    first, second = together(tmp_path, in_ddp, METHODS[0])
    for made, _ in (first, second):
        check(made, expected, report)
    assert torch.equal(first[1], second[1])


def test_parameters_sharded_by_fsdp2(tmp_path):
    methods = ["lora-da:samples=10", "lora-one:samples=10", "lora-ga:samples=10", "pissa"]
    found = together(tmp_path, in_fsdp, methods)
    for index, method in enumerate(methods):
        model = wrap(tiny_llama())
        report = hs.initialize_(model, method, data=batches(), progress=False)
        with torch.no_grad():
            loss = float(model(**batches()[0]).loss)
        for made, sharded_loss in (each[index] for each in found):
            check(made, factors(model), report)
            assert sharded_loss == pytest.approx(loss, abs=1e-5)


def test_a_failure_in_one_process_ends_all(tmp_path):
    first, second = together(tmp_path, fails, METHODS[0])
    assert "process 1 failed: sample" in first
    assert "has no label left" in second


@pytest.mark.parametrize("sharded", [False, True])
def test_a_loss_that_is_not_finite_in_one_process(tmp_path, sharded):
    first, second = together(tmp_path, infinite, sharded)
    assert "the loss is nan" in first
    assert "the loss is nan" in second


def test_one_plan_for_all(tmp_path):
    expected, report = alone(METHODS[0])
    first, second = together(tmp_path, different_memory)
    assert first[1].split(", about")[0] == second[1].split(", about")[0] != report.plan.split(", about")[0]
    for made, _ in (first, second):
        check(made, expected, report)


def test_a_core_comes_before_ddp(tmp_path):
    assert all("before it is wrapped" in words for words in together(tmp_path, core_too_late))


def test_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch, torch.distributed as dist
            from safetensors.torch import save_file
            torch.set_num_threads(1)
            import headstart as hs
            from conftest import class_batch, tiny_bert, wrap
            from test_processes import factors
            dist.init_process_group("gloo")
            model = wrap(tiny_bert(), target_modules=["query", "dense"])
            data = [class_batch(4, seed=n) for n in range(3)]
            hs.initialize_(model, "lora-da:samples=12,damping=1e-3", data=data)
            if dist.get_rank() == 0:
                pairs = factors(model).items()
                save_file({n + k: v.contiguous() for n, ab in pairs for k, v in zip("AB", ab)}, sys.argv[1])
            dist.destroy_process_group()
            """
        )
    )
    out = tmp_path / "factors.safetensors"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        str(out),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    found = load_file(out)
    model = wrap(tiny_bert(), target_modules=["query", "dense"])
    data = [class_batch(4, seed=n) for n in range(3)]
    report = hs.initialize_(model, "lora-da:samples=12,damping=1e-3", data=data, progress=False)
    check({name: (found[name + "A"], found[name + "B"]) for name in factors(model)}, factors(model), report)


def test_one_process_exchanges_nothing():
    processes = Processes.joined()
    assert not processes.several
    assert processes.gather(3) == [3]
    value = torch.ones(2)
    processes.sum_to(value, 0)
    assert torch.equal(value, torch.ones(2))


@given(st.dictionaries(st.integers(), st.floats(0, 1e6), min_size=1), st.integers(1, 8))
def test_work_is_divided_evenly(costs, count):
    """Longest-processing-time-first is within 4/3 of the best possible, which is at least the mean and the largest."""
    chosen = owners(costs, count)
    load = [sum(costs[item] for item, owner in chosen.items() if owner == rank) for rank in range(count)]
    assert chosen.keys() == costs.keys()
    assert max(load) <= 4 / 3 * sum(costs.values()) / count + max(costs.values()) + 1e-6


@given(st.lists(st.integers(), min_size=1, max_size=5), st.integers(0, 5))
def test_steps_are_filled_up(items, more):
    found = list(in_step(items, len(items) + more, None))
    assert [item for item, counts in found if counts] == items
    assert len(found) == len(items) + more


def test_initialising_is_alone_where_no_data_are_read():
    model = wrap(copy.deepcopy(tiny_llama()))
    assert hs.initialize_(model, "pissa", progress=False).samples == 0


def test_divided_data_and_class_labels_alone():
    model = wrap(tiny_bert(), target_modules=["query"])
    assert hs.initialize_(model, "lora-da:samples=4", data=[class_batch(4)], progress=False).samples == 4
