"""The Select step of SCE: the elements whose fusion vectors vary most across the targets.

Source: FuseChat, arXiv 2408.07990, section 3.4, step 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusekit.merge_methods import chunks as _chunks
from fusekit.merge_methods.chunks import Scratch, compute_dtype, for_each_chunk

_SAMPLE = 1 << 16
# Up to this share of the elements only those near or above the threshold are kept, 8 bytes each; beyond it all scores.
_SPARSE_SHARE = 0.25


@dataclass(frozen=True)
class ChunkScores:
    """Scores of a chunk: K² times the population variance across the targets.

    That orders as the variance does, and it is exact where the fusion vectors are small multiples of one power of two,
    so that equal variances are equal numbers. positions: of the elements that have a score here, relative to the
    chunk, int32 [m], ascending; None if all have. scores: [m]. varying: elements of the chunk that vary at all.
    largest: the largest score of the chunk.
    """

    positions: Tensor | None
    scores: Tensor
    varying: int
    largest: float


@dataclass(frozen=True)
class Selection:
    """Which elements are selected: those above the threshold, and the first `ties` of those that equal it.

    chunks: scores by the start of the chunk. threshold: the score of the last selected element. count: the number of
    selected elements. ties_before: for every chunk, the number of threshold-equal elements in the chunks before it;
    None if every threshold-equal element is selected.
    """

    chunks: dict[int, ChunkScores]
    threshold: float
    count: int
    ties: int = 0
    ties_before: dict[int, int] | None = None

    def indices(self, start: int) -> Tensor:
        """Positions of the selected elements of the chunk at `start`, relative to it: int64 [m], ascending."""
        chunk = self.chunks[start]
        if self.count == 0:
            return torch.empty(0, dtype=torch.int64, device=chunk.scores.device)
        if self.ties_before is None:
            selected = nonzero(compare(np.greater_equal, chunk.scores, self.threshold))
        else:
            above = compare(np.greater, chunk.scores, self.threshold)
            equal = nonzero(compare(np.equal, chunk.scores, self.threshold))
            above[equal[: max(0, self.ties - self.ties_before[start])]] = True
            selected = nonzero(above)
        return selected if chunk.positions is None else chunk.positions[selected].long()


def variance_scores(targets: Sequence[Tensor], scratch: Scratch, out: Tensor) -> Tensor:
    """Write K² times the population variance across `targets` into `out`, and return it.

    targets: K flat tensors [n] of one dtype. The variance of fusion vectors φ_j - θ is that of the φ_j, and it is that
    of φ_j - φ_1, which is small where φ is not: no digits are lost, and equal targets give exactly zero.
    out: [n], float64 for float64 targets, else float32.
    """
    size = out.numel()
    first = scratch.get("first", size, out.dtype).copy_(targets[0])
    difference = scratch.get("difference", size, out.dtype)
    total = scratch.get("total", size, out.dtype).zero_()
    out.zero_()
    for target in targets[1:]:
        difference.copy_(target).sub_(first)
        total.add_(difference)
        out.add_(difference.mul_(difference))
    return out.mul_(len(targets)).sub_(total.mul_(total))  # K Σd² - (Σd)²


def select_top_variance(targets: Sequence[Tensor], select_topk: float, chunk_size: int | None = None) -> Selection:
    """Find the top `select_topk` of the elements that vary at all: floor(select_topk * their number).

    targets: K >= 2 flat tensors [numel]. Scratch: 8 bytes per selected element up to a quarter of them, else one
    tensor of the compute dtype. Raises OverflowError if a variance is not finite.
    """
    low = _sampled_bound(targets, select_topk) if select_topk <= _SPARSE_SHARE else 0.0
    chunks = _score(targets, low, chunk_size)
    if not all(math.isfinite(chunk.largest) for chunk in chunks.values()):
        raise OverflowError  # NaN, Inf, or deltas beyond 1e19: the caller knows the tensors and finds out which
    count = math.floor(select_topk * sum(chunk.varying for chunk in chunks.values()))
    if count == 0:
        return Selection(chunks, math.inf, 0)
    if low > 0 and sum(chunk.scores.numel() for chunk in chunks.values()) < count:
        chunks = _score(targets, 0.0, chunk_size)  # the sample misled
    scores = [chunk.scores for chunk in chunks.values()]
    threshold = kth_largest(scores, count)
    above = sum(_count(compare(np.greater, each, threshold)) for each in scores)
    equal = [_count(compare(np.equal, each, threshold)) for each in scores]
    ties = count - above
    if ties == sum(equal):
        return Selection(chunks, threshold, count)
    before = dict(zip(chunks, np.cumsum([0, *equal[:-1]]).tolist(), strict=True))
    return Selection(chunks, threshold, count, ties, before)


def _score(targets: Sequence[Tensor], low: float, chunk_size: int | None) -> dict[int, ChunkScores]:
    """Scores of all elements, or, with `low` above zero, of those with a score of at least `low`."""
    numel, device = targets[0].numel(), targets[0].device
    dtype = compute_dtype(targets[0].dtype)

    everything = torch.empty(0 if low > 0 else numel, dtype=dtype, device=device)

    def score(scratch: Scratch, start: int, stop: int) -> tuple[int, ChunkScores]:
        out = scratch.get("scores", stop - start, dtype) if low > 0 else everything[start:stop]
        scores = variance_scores([target[start:stop] for target in targets], scratch, out)
        varying, largest = _count(compare(np.greater, scores, 0.0)), float(scores.max())
        if low <= 0:
            return start, ChunkScores(None, scores, varying, largest)
        positions = nonzero(compare(np.greater_equal, scores, low))
        return start, ChunkScores(positions.int(), scores[positions], varying, largest)

    return dict(for_each_chunk(score, numel, device, chunk_size))


def _sampled_bound(targets: Sequence[Tensor], select_topk: float) -> float:
    """A score that the threshold is above, unless the sample is an unusual one; 0 where nothing can be said.

    The sample is pseudo-random, so that the rows of a matrix do not show in it, and fixed, so that runs repeat.
    """
    numel, device = targets[0].numel(), targets[0].device
    if numel <= _SAMPLE:
        return 0.0
    positions = torch.from_numpy(np.random.default_rng(0).integers(0, numel, _SAMPLE)).to(device)
    out = torch.empty(_SAMPLE, dtype=compute_dtype(targets[0].dtype), device=device)
    variance_scores([target[positions] for target in targets], Scratch(device), out)
    sample = np.sort(out.cpu().numpy())[::-1]
    rank = select_topk * np.count_nonzero(sample > 0)
    bound = float(sample[min(int(rank + 4 * math.sqrt(rank) + 4), _SAMPLE - 1)])
    # An atom at the bound, such as one step of bfloat16, may hold far more elements than are wanted: keep all scores.
    return bound if np.count_nonzero(sample >= bound) <= 1.5 * _SPARSE_SHARE * _SAMPLE else 0.0


def kth_largest(values: Sequence[Tensor], k: int) -> float:
    """The k-th largest element of several tensors.

    values: float32 or float64 tensors of one dtype [n_i], all finite and not negative; 1 <= k <= Σ n_i. Halves a
    bracket on the bit patterns, which order as the numbers do, by passes of counting, until few elements are left.
    """
    real, integer = (np.float64, np.int64) if values[0].dtype == torch.float64 else (np.float32, np.int32)

    def number(bits: int) -> float:
        return float(integer(bits).view(real))

    def bits(number: float) -> int:
        return int(real(number).view(integer))

    total = sum(each.numel() for each in values)
    low, high, above = 0, bits(max(float(each.max()) for each in values if each.numel())), 0
    inside = total
    while low < high and inside > max(total // 16, _SAMPLE):
        middle = low + (high - low) // 2
        above_middle = sum(_count(compare(np.greater, each, number(middle))) for each in values)
        if above_middle >= k:
            low, inside = middle + 1, above_middle - above
        else:
            high, inside, above = middle, inside - (above_middle - above), above_middle
    if low == high:
        return number(low)
    few = torch.cat([each[_between(each, number(low), number(high))] for each in values])
    return _kth_largest_of_few(few, k - above)


def _between(values: Tensor, low: float, high: float) -> Tensor:
    return nonzero(compare(np.greater_equal, values, low) & compare(np.less_equal, values, high))


def _kth_largest_of_few(candidates: Tensor, k: int) -> float:
    if _chunks.on_cpu(candidates):
        position = candidates.numel() - k
        return float(np.partition(candidates.numpy(), position)[position])
    return float(torch.topk(candidates, k).values[-1])


_TORCH_COMPARISONS: dict[object, Callable[..., Tensor]] = {
    np.greater: torch.gt,
    np.greater_equal: torch.ge,
    np.less_equal: torch.le,
    np.equal: torch.eq,
}


def compare(comparison: Callable[..., np.ndarray], values: Tensor, bound: float) -> Tensor:
    """Elementwise comparison with a number: bool, shape of `values`. numpy's is much faster than torch's on the CPU."""
    if not _chunks.on_cpu(values):
        return _TORCH_COMPARISONS[comparison](values, bound)
    array = values.numpy()
    return torch.from_numpy(comparison(array, array.dtype.type(bound)))


def nonzero(mask: Tensor) -> Tensor:
    """Positions of the true elements of a flat mask: int64 [m], ascending."""
    if _chunks.on_cpu(mask):
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _count(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy())) if _chunks.on_cpu(mask) else int(mask.sum())
