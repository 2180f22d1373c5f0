"""in_order: jobs on any number of workers give the same, in the order of the items, failures too."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from surgery.core.workers import in_order

WORKERS = [1, 2, 5]


def uneven(item: int) -> int:
    """The earlier, the slower."""
    time.sleep(0.01 / (1 + item % 4))
    return item * item


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_results_stand_in_the_order_of_the_items(count: int, workers: int) -> None:
    before = torch.get_num_threads()
    assert list(in_order(uneven, range(count), workers)) == [item * item for item in range(count)]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("workers", WORKERS)
def test_each_job_has_one_thread_of_torch(workers: int) -> None:
    found = list(in_order(lambda _: (torch.get_num_threads(), threading.get_ident()), range(20), workers))
    assert {count for count, _ in found} == {1}
    assert (threading.get_ident() in {thread for _, thread in found}) == (workers == 1)


def test_two_jobs_run_at_once() -> None:
    both = threading.Barrier(2, timeout=10)
    assert sorted(in_order(lambda _: both.wait(), range(2), 2)) == [0, 1]


@pytest.mark.parametrize("workers", WORKERS)
def test_the_first_failure_in_order_is_told_and_stops_the_rest(workers: int) -> None:
    begun: list[int] = []

    def job(item: int) -> int:
        begun.append(item)
        if item == 7:
            time.sleep(0.05)  # item 8 fails before it
        if item in (7, 8):
            raise ValueError(item)
        return item

    stop, before, found, threads = threading.Event(), torch.get_num_threads(), [], threading.enumerate()
    with pytest.raises(ValueError, match="7"):
        found.extend(in_order(job, range(1000), workers, stop))
    assert max(begun) <= 7 + 2 * workers + 1
    assert torch.get_num_threads() == before
    assert stop.is_set() or workers == 1
    assert {*threading.enumerate()} <= {*threads}


@pytest.mark.parametrize("workers", WORKERS)
def test_items_are_taken_only_a_few_ahead(workers: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:
            yield taken
            taken += 1

    results = in_order(lambda item: item, items(), workers)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert taken <= 10 + 2 * workers
    results.close()  # type: ignore[attr-defined]  # it is a generator
