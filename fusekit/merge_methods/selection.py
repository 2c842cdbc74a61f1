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

from fusekit.merge_methods import chunks
from fusekit.merge_methods.chunks import Scratch, compute_dtype, for_each_chunk

_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Selection:
    """Which elements are selected: those above the threshold, and the first `ties` of those that equal it.

    scores: [numel], K² times the population variance of every element: the same order, and exact where the fusion
    vectors are small multiples of one power of two, so that equal variances are equal numbers.
    threshold: the score of the last selected element. count: the number of selected elements.
    ties_before: for every chunk, the number of threshold-equal elements in the chunks before it; None if every
    threshold-equal element is selected.
    """

    scores: Tensor
    threshold: float
    count: int
    ties: int = 0
    ties_before: dict[int, int] | None = None

    def indices(self, start: int, stop: int) -> Tensor:
        """Positions of the selected elements of one chunk, relative to `start`: int64 [m], ascending."""
        scores = self.scores[start:stop]
        if self.count == 0:
            return torch.empty(0, dtype=torch.int64, device=scores.device)
        if self.ties_before is None:
            return nonzero(compare(np.greater_equal, scores, self.threshold))
        above = compare(np.greater, scores, self.threshold)
        equal = nonzero(compare(np.equal, scores, self.threshold))
        above[equal[: max(0, self.ties - self.ties_before[start])]] = True
        return nonzero(above)


@dataclass(frozen=True)
class _ChunkScan:
    """What one pass over the scores of a chunk finds out. `inside`: the scores in [low, high], None if too many."""

    start: int
    varying: int
    largest: float
    above: int
    at_least_low: int
    inside: Tensor | None


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

    targets: K >= 2 flat tensors [numel]. Scratch: a little more than one tensor of the compute dtype.
    Raises OverflowError if a variance is not finite.
    """
    numel, device = targets[0].numel(), targets[0].device
    scores = torch.empty(numel, dtype=compute_dtype(targets[0].dtype), device=device)
    low, high = _sampled_bracket(targets, select_topk)

    def scan(scratch: Scratch, start: int, stop: int) -> _ChunkScan:
        chunk = variance_scores([t[start:stop] for t in targets], scratch, scores[start:stop])
        return _scan(chunk, start, low, high)

    scans = for_each_chunk(scan, numel, device, chunk_size)
    if not all(math.isfinite(each.largest) for each in scans):
        raise OverflowError  # NaN, Inf, or deltas beyond 1e19: the caller knows the tensors and finds out which
    count = math.floor(select_topk * sum(each.varying for each in scans))
    if count == 0:
        return Selection(scores, math.inf, 0)
    threshold, ties, equal = _threshold(scores, count, scans, low, high)
    if ties == equal:
        return Selection(scores, threshold, count)
    return Selection(scores, threshold, count, ties, _ties_before(scores, threshold, chunk_size))


def _scan(scores: Tensor, start: int, low: float, high: float) -> _ChunkScan:
    at_least_low = compare(np.greater_equal, scores, low)
    above = compare(np.greater, scores, high)
    counts = _count(at_least_low), _count(above)
    inside = None
    if low < high and counts[0] - counts[1] <= scores.numel() // 4:
        inside = scores[nonzero(at_least_low ^ above)]
    varying = _count(compare(np.greater, scores, 0.0))
    return _ChunkScan(start, varying, float(scores.max()), counts[1], counts[0], inside)


def _threshold(scores: Tensor, count: int, scans: list[_ChunkScan], low: float, high: float) -> tuple[float, int, int]:
    """The count-th largest score, how many scores equal to it are selected, and how many there are."""
    above = sum(each.above for each in scans)
    at_least_low = sum(each.at_least_low for each in scans)
    if above < count <= at_least_low:
        if low == high:
            return low, count - above, at_least_low - above
        inside = [each.inside for each in scans if each.inside is not None]
        if len(inside) == len(scans):
            candidates = torch.cat(inside)
            threshold = _kth_largest_of_few(candidates, count - above)
            above += _count(compare(np.greater, candidates, threshold))
            return threshold, count - above, _count(compare(np.equal, candidates, threshold))
    threshold = kth_largest(scores, count)  # the sample misled, or a quarter of a chunk has nearly one variance
    above = _count_chunked(scores, np.greater, threshold)
    return threshold, count - above, _count_chunked(scores, np.equal, threshold)


def _ties_before(scores: Tensor, threshold: float, chunk_size: int | None) -> dict[int, int]:
    def tally(_: Scratch, start: int, stop: int) -> tuple[int, int]:
        return start, _count(compare(np.equal, scores[start:stop], threshold))

    before, seen = {}, 0
    for start, equal in for_each_chunk(tally, scores.numel(), scores.device, chunk_size):
        before[start] = seen
        seen += equal
    return before


def _sampled_bracket(targets: Sequence[Tensor], select_topk: float) -> tuple[float, float]:
    """Bounds that hold the threshold between them, unless the sample is an unusual one.

    The sample is pseudo-random, so that the rows of a matrix do not show in it, and fixed, so that runs repeat.
    """
    numel, device = targets[0].numel(), targets[0].device
    if numel <= _SAMPLE:
        return 0.0, math.inf
    positions = torch.from_numpy(np.random.default_rng(0).integers(0, numel, _SAMPLE)).to(device)
    out = torch.empty(_SAMPLE, dtype=compute_dtype(targets[0].dtype), device=device)
    variance_scores([target[positions] for target in targets], Scratch(device), out)
    sample = np.sort(out.cpu().numpy())[::-1]
    rank = select_topk * np.count_nonzero(sample > 0)
    margin = 4 * math.sqrt(rank) + 4
    high = float(sample[int(rank - margin)]) if rank > margin else math.inf
    low = float(sample[int(rank + margin)]) if rank + margin < _SAMPLE else 0.0
    return low, high


def kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest element, with neither a sort nor a copy of `values`.

    values: float32 or float64 [n], all finite and not negative; 1 <= k <= n. Bisects the bit patterns, which order as
    the numbers do: at most 31 (63) passes of counting.
    """
    real, integer = (np.float64, np.int64) if values.dtype == torch.float64 else (np.float32, np.int32)

    def number(bits: int) -> float:
        return float(integer(bits).view(real))

    low, high = 0, int(real(float(values.max())).view(integer))
    while low < high:
        middle = low + (high - low) // 2
        if _count_chunked(values, np.greater, number(middle)) >= k:
            low = middle + 1
        else:
            high = middle
    return number(low)


def _kth_largest_of_few(candidates: Tensor, k: int) -> float:
    if chunks.on_cpu(candidates):
        position = candidates.numel() - k
        return float(np.partition(candidates.numpy(), position)[position])
    return float(torch.topk(candidates, k).values[-1])


def _count_chunked(values: Tensor, comparison: Callable[..., np.ndarray], bound: float) -> int:
    """How many elements compare true, without a mask of the whole tensor."""
    return sum(
        for_each_chunk(
            lambda _, start, stop: _count(compare(comparison, values[start:stop], bound)),
            values.numel(),
            values.device,
        )
    )


_TORCH_COMPARISONS: dict[object, Callable[..., Tensor]] = {
    np.greater: torch.gt,
    np.greater_equal: torch.ge,
    np.equal: torch.eq,
}


def compare(comparison: Callable[..., np.ndarray], values: Tensor, bound: float) -> Tensor:
    """Elementwise comparison with a number: bool, shape of `values`. numpy's is much faster than torch's on the CPU."""
    if not chunks.on_cpu(values):
        return _TORCH_COMPARISONS[comparison](values, bound)
    array = values.numpy()
    return torch.from_numpy(comparison(array, array.dtype.type(bound)))


def nonzero(mask: Tensor) -> Tensor:
    """Positions of the true elements of a flat mask: int64 [m], ascending."""
    if chunks.on_cpu(mask):
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _count(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy())) if chunks.on_cpu(mask) else int(mask.sum())
