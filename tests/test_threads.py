"""Work on threads: everything once, in order, errors told, torch's own setting as it was."""

from __future__ import annotations

import threading

import pytest
import torch

from fusekit.threads import side_by_side

BOUNDS = [(start, start + 3) for start in range(0, 60, 3)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_bounds(threads):
    workers = []

    def new_worker():
        seen: list[tuple[int, int]] = []
        workers.append(seen)

        def work(start: int, stop: int) -> tuple[int, bool, int]:
            seen.append((start, stop))
            return stop, torch.is_grad_enabled(), torch.get_num_threads()

        return work

    configured = torch.get_num_threads()
    found = side_by_side(new_worker, BOUNDS, threads)
    assert found == [(stop, False, 1) for _, stop in BOUNDS]
    assert len(workers) == threads
    assert sorted(bound for seen in workers for bound in seen) == BOUNDS
    assert torch.get_num_threads() == configured
    assert torch.is_grad_enabled()


def test_the_first_error_is_raised_and_nothing_new_begun():
    begun, both = [], threading.Barrier(2, timeout=60)

    def work(start: int, stop: int) -> None:
        begun.append(start)
        both.wait()  # the other thread has begun its first one, too
        raise ValueError(f"at {start}")

    configured = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"at [03]"):
        side_by_side(lambda: work, BOUNDS, 2)
    assert sorted(begun) == [0, 3]
    assert torch.get_num_threads() == configured
