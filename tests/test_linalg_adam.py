"""What `adam_lowrank` runs on a device, and the ways of its products, on the CPU."""

import pytest
import torch
from torch import Tensor

from headstart.linalg.adam import Descent, OnDevice, Path, Schedule, descend
from headstart.linalg.lowrank import adam_lowrank
from oracles import published_adam, relative
from test_linalg_lowrank import optimum, problem

SCHEDULE = Schedule(steps=400, lr=5e-3, decay=0.7, decay_every=60, betas=(0.9, 0.999), eps=1e-8)


def stack_path(W: Tensor, A0: Tensor, B0: Tensor, good_enough: Tensor | None = None) -> Path:
    plan = {"good_enough": good_enough, "check_every": 20, "keep_every": 40}
    return descend(W, A0, B0, SCHEDULE, **plan, tell=lambda step: None, stop=lambda: False)  # type: ignore[arg-type]


def test_a_stack_is_each_alone_up_to_rounding() -> None:
    """What a device runs: all matrices in batched products, those that are done taken out on the way."""
    W, A0, B0 = problem(5, 20, 14, 3, torch.float64)
    good_enough = torch.tensor([1.3, 1e9, 0.0, 1.02, 1.1], dtype=torch.float64) * optimum(W, 3)
    stack = stack_path(W, A0, B0, good_enough)
    assert stack.steps[1] == 0 and stack.steps[2] == 400 and len(set(stack.steps)) >= 4
    for i in range(5):
        one = slice(i, i + 1)
        alone = stack_path(W[one], A0[one], B0[one], good_enough[one])
        assert alone.steps == [stack.steps[i]]
        assert relative(stack.A[i], alone.A[0]) < 1e-9 and relative(stack.B[i], alone.B[0]) < 1e-9
        assert [step for step, _ in alone.history[0]] == [step for step, _ in stack.history[i]]
        A, B = published_adam(W[i], A0[i], B0[i], steps=stack.steps[i], lr=5e-3, decay=0.7, decay_every=60)
        assert relative(stack.A[i], A) < 1e-9 and relative(stack.B[i], B) < 1e-9


@pytest.mark.parametrize("first", [0, 37])
def test_steps_of_a_device_are_those_of_a_processor(first: int) -> None:
    W, A0, B0 = problem(3, 20, 14, 3, torch.float64)
    mine, theirs = Descent(W, A0, B0, SCHEDULE), Descent(W, A0, B0, SCHEDULE)
    device = OnDevice(mine, SCHEDULE, first)
    for step in range(first, first + 50):
        device.step()
        theirs.step(*SCHEDULE.divisors(step))
    assert torch.equal(mine.A, theirs.A) and torch.equal(mine.B, theirs.B)


@pytest.mark.parametrize("how", ["absent", "failing"])
def test_products_without_packing_are_the_same_up_to_rounding(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    W, A0, B0 = problem(2, 48, 30, 4)
    expected = adam_lowrank(W, A0, B0, steps=200, lr=1e-3)

    def fail(*args: object) -> None:
        raise NotImplementedError

    if how == "absent":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fail)
    fit = adam_lowrank(W, A0, B0, steps=200, lr=1e-3)
    assert relative(fit.A, expected.A) < 1e-4 and relative(fit.B, expected.B) < 1e-4
