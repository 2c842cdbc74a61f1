"""Walking over flat tensors in cache-sized chunks, with one result whatever the chunking.

Sums are float64 sums over blocks of 4096 elements, added in index order. A chunk is a whole number of blocks, so chunk
size and thread count change nothing. Elementwise work uses separate, correctly rounded operations (never a fused
multiply-add, whose use varies with the position in a vector register), so it gives the same bits everywhere too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fusekit.errors import MergeError
from fusekit.threads import side_by_side

BLOCK = 4096
CPU_CHUNK = 64 * BLOCK  # a chunk's fusion vectors fit the cache, its operations outlast the interpreter's
MAX_THREADS = 4  # every thread has buffers of its own; more would wait for the interpreter's lock
ACCELERATOR_CHUNK = 4096 * BLOCK  # large enough to fill a GPU, small against its memory

Result = TypeVar("Result")


class Scratch:
    """Named buffers that are reused from chunk to chunk. capacity: elements of a whole chunk."""

    def __init__(self, device: torch.device, capacity: int = 0) -> None:
        self._device = device
        self._capacity = capacity  # from the start: buffers that grow with each selection fragment the heap
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised 1-D buffer of `size` elements; the same memory at every call with this name and dtype."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(max(size, self._capacity), dtype=dtype, device=self._device)
            self._buffers[name, dtype] = buffer
        return buffer[:size]


def for_each_chunk(
    work: Callable[[Scratch, int, int], Result], numel: int, device: torch.device, chunk_size: int | None = None
) -> list[Result]:
    """Call `work(scratch, start, stop)` for every chunk of `range(numel)`; the results in index order.

    On the CPU chunks run side by side on as many threads as torch is set to use, up to four, each with one torch
    thread.
    """
    size = chunk_size or (CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK)
    if size <= 0 or size % BLOCK:
        raise MergeError(f"chunk_size {size} is not a positive multiple of {BLOCK}, the block in which sums are taken")
    bounds = [(start, min(start + size, numel)) for start in range(0, numel, size)]
    threads = min(torch.get_num_threads(), len(bounds), MAX_THREADS) if device.type == "cpu" else 1
    if threads <= 1:
        scratch = Scratch(device, min(size, numel))
        return [work(scratch, start, stop) for start, stop in bounds]
    return side_by_side(lambda: partial(work, Scratch(device, size)), bounds, threads)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic on tensors of `dtype`: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_cpu(tensor: Tensor) -> bool:
    """Whether numpy may work on the memory of `tensor`, which it does several times faster than torch in places."""
    return tensor.device.type == "cpu"


def block_sums(values: Tensor, ends: np.ndarray) -> np.ndarray:
    """Sums of consecutive runs of `values`.

    values: float64 [n]; ends: int64 [b], non-decreasing, last one n. Returns float64 [b]; an empty run sums to 0.
    """
    if not on_cpu(values):
        lengths = torch.from_numpy(np.diff(ends, prepend=0)).to(values.device)
        sums: np.ndarray = torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True).cpu().numpy()
        return sums
    starts = np.concatenate(([0], ends[:-1]))
    sums = np.zeros(len(ends))
    filled = ends > starts
    if filled.any():
        sums[filled] = np.add.reduceat(values.numpy(), starts[filled])
    return sums


def whole_blocks(size: int) -> np.ndarray:
    """Ends of the blocks of a chunk of `size` elements: int64 [ceil(size / 4096)]."""
    return np.minimum(np.arange(BLOCK, size + BLOCK, BLOCK), size)


def add_in_order(chunk_sums: Sequence[np.ndarray]) -> np.ndarray:
    """Add block sums in index order. chunk_sums: float64 arrays [K, b_i] of consecutive chunks. Returns float64 [K]."""
    return np.add.accumulate(np.concatenate(chunk_sums, axis=1), axis=1)[:, -1]
