"""Work side by side on threads, one torch thread each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def side_by_side(
    new_worker: Callable[[], Callable[[int, int], Result]], bounds: Sequence[tuple[int, int]], threads: int
) -> list[Result]:
    """Call workers with every (start, stop), each once; the results in the order of ``bounds``.

    Splitting every torch operation over the threads instead would make each wait for its slowest part, long on a busy
    machine, and sums would depend on how they are split.

    Args:
        new_worker: called once per thread; a worker may own scratch memory, and runs without gradients.
        bounds: what the workers are called with.
        threads: how many, at least 1.

    Raises:
        Whatever a worker raises first; nothing new is begun then.
    """
    results: dict[int, Result] = {}
    queue = iter(range(len(bounds)))  # next() on it is atomic
    failed = threading.Event()

    def run() -> None:
        work = new_worker()
        with torch.no_grad():  # grad mode is per thread
            for index in queue:
                if failed.is_set():
                    return
                try:
                    results[index] = work(*bounds[index])
                except BaseException:
                    failed.set()
                    raise

    configured = torch.get_num_threads()
    try:
        # In a worker this sets that thread's own limit, and with it the value that new threads start from ...
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for future in [pool.submit(run) for _ in range(threads)]:
                future.result()
    finally:
        torch.set_num_threads(configured)  # ... which is put back here
    return [results[index] for index in range(len(bounds))]
