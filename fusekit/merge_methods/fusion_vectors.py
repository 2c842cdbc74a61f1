"""Fusion vectors δ_j = φ_j - θ, read in cache-sized chunks; the chunking does not change the result.

Sums are float64 sums over blocks of 4096 elements, added in index order. A chunk is a whole number of blocks, so chunk
size and thread count change nothing. Elementwise work uses separate, correctly rounded operations (never a fused
multiply-add, whose use varies with the position in a vector register), so it gives the same bits everywhere too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fusekit.devices import side_by_side
from fusekit.errors import MergeError

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


def for_each_chunk(work: Callable[[Scratch, int, int], Result], numel: int, device: torch.device) -> list[Result]:
    """Call `work(scratch, start, stop)` for every chunk of `range(numel)`; the results in index order.

    On the CPU chunks run side by side on as many threads as torch is set to use, up to four.
    """
    size = CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
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


_BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, without a mask where they are."""
    if not on_cpu(tensor):
        total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
        return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())  # finite values may overflow the sum
    # The bits of infinity, and above them those of NaN, are the largest of their sign: a maximum of integers, where a
    # sum in bfloat16 is slow.
    signed, unsigned = _BITS[tensor.element_size()]
    bits = tensor.reshape(-1).view(signed).numpy()
    infinity = torch.tensor(float("inf"), dtype=tensor.dtype).view(signed).item()
    sign = 1 << (8 * tensor.element_size() - 1)
    return bool(bits.max() < infinity and int(bits.view(unsigned).max()) < infinity + sign)


def compare(comparison: Callable[[Any, Any], Any], values: Tensor, bound: float) -> Tensor:
    """Compare each element with a number, by a function of `operator`: bool, shape of `values`."""
    if not on_cpu(values):
        found: Tensor = comparison(values, bound)
        return found
    array = values.numpy()
    return torch.from_numpy(comparison(array, array.dtype.type(bound)))


def nonzero(mask: Tensor) -> Tensor:
    """Positions of the true elements of a flat mask: int64 [m], ascending."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if on_cpu(mask) else mask.nonzero().squeeze(1)


def count_where(comparison: Callable[[Any, Any], Any], values: Tensor, bound: float) -> int:
    """How many elements `compare` finds."""
    mask = compare(comparison, values, bound)
    return int(np.count_nonzero(mask.numpy())) if on_cpu(mask) else int(mask.sum())


def block_sums(values: Tensor, ends: np.ndarray) -> np.ndarray:
    """Sums of consecutive runs of `values` (float64 [n]) that end at `ends` (int64 [b]); an empty run sums to 0."""
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
    """Add block sums [K, b_i] of consecutive chunks in index order: float64 [K]."""
    return np.add.accumulate(np.concatenate(chunk_sums, axis=1), axis=1)[:, -1]


@dataclass(frozen=True)
class FusionVectors:
    """K fusion vectors of one parameter matrix, as flat views of the models' tensors.

    base: [numel], or None if `targets` are fusion vectors already. targets: K tensors [numel].
    """

    base: Tensor | None
    targets: tuple[Tensor, ...]
    shape: torch.Size

    @classmethod
    def of(cls, base: Tensor | None, targets: Sequence[Tensor]) -> FusionVectors:
        """Check and flatten. Contiguous tensors are borrowed, others are copied. Nothing is ever written to them."""
        if not len(targets):
            raise MergeError("no targets to merge: give a list of at least one tensor besides the base")
        tensors = [*targets] if base is None else [base, *targets]
        names = ["base"] * (base is not None) + [f"target {index}" for index in range(len(targets))]
        for name, tensor in zip(names, tensors, strict=True):
            if not tensor.is_floating_point() or tensor.element_size() == 1:
                raise MergeError(
                    f"{name} has dtype {tensor.dtype}: only float16, bfloat16, float32 and float64 are merged"
                )
            for what in ("shape", "dtype", "device"):
                mine, first = getattr(tensor, what), getattr(tensors[0], what)
                if mine != first:
                    raise MergeError(
                        f"{name} has {what} {mine}, {names[0]} has {first}: all tensors must have the same {what}"
                    )
        flat = [tensor.detach().reshape(-1) for tensor in tensors]
        return cls(None if base is None else flat[0], tuple(flat[-len(targets) :]), tensors[0].shape)

    @property
    def numel(self) -> int:
        return self.targets[0].numel()

    @property
    def device(self) -> torch.device:
        return self.targets[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return compute_dtype(self.targets[0].dtype)

    def chunk(
        self,
        scratch: Scratch,
        start: int,
        stop: int,
        positions: Tensor | None = None,
        vote: Sequence[float] | None = None,
    ) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
        """Base, fusion vectors K x [n], and Σ_j w_j δ_j in float64 for the weights `vote`, of some elements.

        These are the elements start:stop, or those of them at `positions` (relative to start), in buffers of `scratch`.
        """

        def load(name: str, source: Tensor) -> Tensor:
            elements = source[start:stop]
            if positions is not None:
                elements = elements.index_select(0, positions)
            return scratch.get(name, elements.numel(), self.dtype).copy_(elements)

        base = None if self.base is None else load("base", self.base)
        vectors = [load(f"vector{j}", target) for j, target in enumerate(self.targets)]
        weights = [] if vote is None else list(vote)
        total = None if vote is None else scratch.get("vote", vectors[0].numel(), torch.float64).zero_()
        # Σ w_j φ_j - Σ w_j θ in float64, before the differences are rounded: exact for narrower dtypes, so that models
        # that cancel out but for their last digits still vote with those.
        early = self.dtype != torch.float64
        if total is not None and base is not None and early:
            for tensor, weight in zip([*vectors, base], [*weights, -sum(weights)], strict=True):
                total.add_(tensor, alpha=weight)
        if base is not None:
            for vector in vectors:
                vector.sub_(base)
        if total is not None and (base is None or not early):
            for vector, weight in zip(vectors, weights, strict=True):
                total.add_(vector, alpha=weight)
        return base, vectors, total

    def energies(self, selected: Callable[[int], Tensor] | None = None) -> np.ndarray:
        """Σ δ_j² over all elements, or over the selected ones: float64 [K].

        selected: gives the positions of the selected elements of the chunk that starts there, relative to it.
        Squares are taken in float64: exact for float32 fusion vectors, and free of underflow.
        """

        def sums(scratch: Scratch, start: int, stop: int) -> np.ndarray:
            positions, ends = None, whole_blocks(stop - start)
            if selected is not None:
                positions = selected(start)
                ends = np.searchsorted(positions.cpu().numpy(), ends)
            _, vectors, _ = self.chunk(scratch, start, stop, positions)
            squares = scratch.get("squares", vectors[0].numel(), torch.float64)
            result = np.empty((len(vectors), len(ends)))
            for j, vector in enumerate(vectors):
                squares.copy_(vector)
                result[j] = block_sums(squares.mul_(squares), ends)
            return result

        if self.numel == 0:
            return np.zeros(len(self.targets))
        return add_in_order(for_each_chunk(sums, self.numel, self.device))

    def empty_result(self) -> Tensor:
        """Uninitialised memory for a merged tensor, flat."""
        return torch.empty_like(self.targets[0], memory_format=torch.contiguous_format)


def shares(energies: np.ndarray) -> np.ndarray:
    """energies / Σ energies, uniform only where the sum is exactly zero. float64 [K] -> float64 [K], sums to 1."""
    total = energies.sum()
    return energies / total if total > 0 else np.full(len(energies), 1 / len(energies))


def add_to_base(base: Tensor | None, update: Tensor) -> Tensor:
    """base + update, in place of `update`; where the update is zero, the bits of the base.

    x - (+0) is x for every x, while -0 + (+0) is +0: so the update is subtracted with its sign turned and its zeros
    made positive.
    """
    if base is None:
        return update
    return torch.sub(base, update.neg_().add_(0.0), out=update)


def check_finite(energies: np.ndarray) -> None:
    """Raise MergeError with the positions of the targets whose fusion vectors have NaN or Inf among them."""
    if not np.isfinite(energies).all():
        raise NonFiniteError(np.flatnonzero(~np.isfinite(energies)).tolist())


def check_weights(weights: Sequence[float] | None, targets: int) -> list[float]:
    """The weights of K targets, all 1 if there are none. Raises MergeError for another number, NaN and Inf."""
    given = [1.0] * targets if weights is None else [float(weight) for weight in weights]
    if len(given) != targets:
        raise MergeError(f"{len(given)} weights for {targets} targets: give one for each")
    if not np.isfinite(given).all():
        raise MergeError(f"the weights {given} are not all finite")
    return given


class NonFiniteError(MergeError):
    """Some fusion vectors contain NaN or Inf. targets: their positions among the targets."""

    def __init__(self, targets: Sequence[int]) -> None:
        super().__init__(f"the fusion vectors of target(s) {list(targets)} (counted from 0) contain NaN or Inf")
