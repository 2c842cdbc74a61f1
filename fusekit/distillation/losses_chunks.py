"""Walking over the rows of a batch a few at a time, on several threads, with one result however it is done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusekit.threads import side_by_side

CPU_CHUNK = 2**20  # logits whose float32 copy stays in the cache, and whose operations outlast the interpreter's
ACCELERATOR_CHUNK = 2**26  # large enough to fill a GPU, small against its memory
MAX_THREADS = 8  # more would wait for the interpreter's lock

Work = Callable[[int, int], None]


def for_each_chunk(new_worker: Callable[[], Work], rows: int, logits: Tensor, chunk: int | None) -> None:
    """Call a worker with (start, stop) for chunks that cover ``range(rows)``, each once.

    On the CPU chunks run side by side, a worker and one torch thread for each.

    Args:
        new_worker: makes a worker, which may own scratch memory; workers write to rows of their own.
        rows: how many.
        logits: [rows or more, V], for its size and device.
        chunk: logits per chunk; None chooses.
    """
    on_cpu = logits.device.type == "cpu"
    threads = min(torch.get_num_threads(), MAX_THREADS) if on_cpu else 1
    size = chunk or (CPU_CHUNK if on_cpu else ACCELERATOR_CHUNK)
    each = max(1, min(size // max(logits.shape[1], 1), -(-rows // threads)))
    bounds = [(start, min(start + each, rows)) for start in range(0, rows, each)]
    threads = min(threads, len(bounds))
    if threads > 1:
        side_by_side(new_worker, bounds, threads)
        return
    work = new_worker()
    for start, stop in bounds:
        work(start, stop)
