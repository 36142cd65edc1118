from collections.abc import Iterator

import pytest
import torch

from headstart.linalg.precision import one_thread_each


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_order_and_each_call_has_one_thread(threads: int) -> None:
    assert one_thread_each(lambda item: (item, torch.get_num_threads()), range(7)) == [(item, 1) for item in range(7)]
    assert torch.get_num_threads() == threads


def test_a_failure_comes_through_and_leaves_the_threads_alone(threads: int) -> None:
    def fails(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        return item

    with pytest.raises(KeyError, match="2"):
        one_thread_each(fails, range(5))
    assert torch.get_num_threads() == threads


def test_nothing_to_do(threads: int) -> None:
    assert one_thread_each(fail_if_called, []) == []


def fail_if_called(item: object) -> None:
    raise AssertionError(item)
