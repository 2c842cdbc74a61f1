"""SCE: select, calculate, erase. Merging the targets of one pivot matrix by matrix.

Source: FuseChat, arXiv 2408.07990, section 3.4, Algorithm 1, equations 5-9. The variants are told apart in
docs/merge-methods.md.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fusekit.errors import MergeError
from fusekit.merge_methods.fusion_vectors import (
    FusionVectors,
    NonFiniteError,
    Scratch,
    add_to_base,
    check_finite,
    check_weights,
    compare,
    compute_dtype,
    count_where,
    for_each_chunk,
    is_finite,
    nonzero,
    on_cpu,
    shares,
)

Variant = Literal["paper", "renormalized", "fuseai"]


@dataclass(frozen=True)
class SCEMerge:
    """What SCE made of one parameter matrix.

    tensor: the merged matrix, shape and dtype of the inputs. coefficients: η, float64 [K], sums to 1.
    selected: share of all elements that the Select step kept. erased: per target, share of its non-zero merged entries
    that the Erase step dropped, float64 [K]; None unless asked for.
    """

    tensor: Tensor
    coefficients: np.ndarray
    selected: float
    erased: np.ndarray | None = None


@torch.no_grad()
def sce(
    base: Tensor | None,
    targets: Sequence[Tensor],
    *,
    select_topk: float = 1.0,
    variant: Variant = "paper",
    weights: Sequence[float] | None = None,
    count_erased: bool = False,
) -> SCEMerge:
    """Merge K fine-tunes into their base by SCE, one parameter matrix. arXiv 2408.07990, section 3.4.

    Args:
        base: θ, any shape; float16, bfloat16, float32 or float64; CPU or CUDA. None: the targets are fusion vectors.
        targets: a list of φ_1..φ_K, of the same shape, dtype and device.
        select_topk: τ in (0, 1], the share of the elements with non-zero variance to keep; 1 keeps all elements.
        variant: "paper" is equation 9 as printed; "renormalized" divides each element by the sum of the η that survived
            there, as mergekit's `sce` means to; "fuseai" merges unselected vectors, as the authors' repository does.
        weights: K factors w of the contributions; None is 1 for all, which changes no bit. Selection and η are as
            without them; what is voted on, erased and added is w_j δ̂_j, so that 0 leaves a fusion vector out.
        count_erased: also count what the Erase step drops.

    Returns:
        The merged tensor with its coefficients. Arithmetic is float32 (float64 for float64 inputs) with float64 sums.
        Scaling all fusion vectors by a constant changes neither coefficients nor selection, down to the smallest
        float32; in float64 between 1e-150 and 1e150. Elements where no fusion vector survives are the base's, bit for
        bit. Scratch memory is at most about one tensor of the compute dtype, whatever K is. Inputs are not modified;
        the result carries no gradient.

    Raises:
        MergeError: no targets; mixed shapes, dtypes or devices; parameters out of range; one target with
            select_topk < 1 (no variance to rank); NaN or Inf.

    Example:
        >>> import torch
        >>> from fusekit.merge_methods import sce
        >>> base = torch.zeros(2)
        >>> merged = sce(base, [torch.tensor([3.0, 0.0]), torch.tensor([-1.0, 0.0])])
        >>> merged.coefficients.tolist()
        [0.9, 0.1]
        >>> merged.tensor
        tensor([2.7000, 0.0000])
    """
    vectors = FusionVectors.of(base, targets)
    check_parameters(len(targets), select_topk, variant)
    factors = check_weights(weights, len(targets))
    selection = _select(vectors, select_topk)
    energies = vectors.energies(None if selection is None else selection.indices)
    check_finite(energies)
    coefficients = shares(energies)
    etas = coefficients.tolist()
    kept_of = None if variant == "fuseai" else selection
    result = vectors.empty_result()

    def update(scratch: Scratch, start: int, stop: int) -> np.ndarray:
        out = result[start:stop]
        # Energies were taken of the selected elements: elsewhere nothing has looked at the base yet.
        if selection is not None and vectors.base is not None and not is_finite(vectors.base[start:stop]):
            raise NonFiniteError(range(len(etas)))
        positions = None if kept_of is None else kept_of.indices(start)
        theta, deltas, vote = vectors.chunk(scratch, start, stop, positions, factors)
        assert vote is not None
        for delta, factor in zip(deltas, factors, strict=True):
            if factor != 1:
                delta.mul_(factor)
        counts = np.zeros((2, len(etas)), dtype=np.int64)
        kept = counts if count_erased else None
        merged = add_to_base(theta, _merge_chunk(scratch, deltas, vote, etas, divide=variant != "paper", counts=kept))
        if positions is None:
            out.copy_(merged)
            return counts
        if vectors.base is None:
            out.zero_()
        else:
            out.copy_(vectors.base[start:stop])
        out.index_copy_(0, positions, merged.to(out.dtype))
        return counts

    counts = for_each_chunk(update, vectors.numel, vectors.device)
    erased = None
    if count_erased:
        nonzero, kept = np.sum(counts, axis=0) if counts else np.zeros((2, len(etas)))
        erased = np.divide(nonzero - kept, nonzero, out=np.zeros(len(etas)), where=nonzero > 0)
    selected = 1.0 if selection is None else selection.count / vectors.numel
    return SCEMerge(result.reshape(vectors.shape), coefficients, selected, erased)


@torch.no_grad()
def select(deltas: Sequence[Tensor], select_topk: float) -> Tensor:
    """The Select step alone: a bool mask of the elements of highest variance, shape of the inputs.

    deltas: K >= 2 tensors of one shape, dtype and device (fusion vectors or targets: the variance is the same).
    Of equal variances the lower flat index is selected. Raises MergeError as `sce` does. arXiv 2408.07990 eq. 5.
    """
    vectors = FusionVectors.of(None, deltas)
    check_parameters(len(deltas), select_topk, "paper")
    mask = torch.zeros(vectors.numel, dtype=torch.bool, device=vectors.device)
    selection = _select(vectors, select_topk)
    if selection is None:
        return mask.fill_(True).reshape(vectors.shape)
    for start in selection.chunks:
        mask[start + selection.indices(start)] = True
    return mask.reshape(vectors.shape)


def check_parameters(targets: int, select_topk: float, variant: str) -> None:
    """Raise MergeError if SCE cannot run on this many targets with these parameters."""
    if not 0 < select_topk <= 1:
        raise MergeError(f"select_topk is {select_topk}, it must lie in (0, 1]: 0.1 keeps a tenth, 1 keeps everything")
    if variant not in get_args(Variant):
        raise MergeError(f"variant is {variant!r}, it must be one of {', '.join(get_args(Variant))}")
    if targets == 1 and select_topk < 1:
        raise MergeError(
            f"select_topk is {select_topk} with one target: a single fusion vector has no variance to rank; "
            "use select_topk: 1, merge more models, or none"
        )


def _select(vectors: FusionVectors, select_topk: float) -> Selection | None:
    """None if everything is selected."""
    if select_topk == 1 or not vectors.numel:
        return None
    try:
        return select_top_variance(vectors.targets, select_topk)
    except OverflowError:
        check_finite(vectors.energies())
        raise MergeError(
            f"the differences between targets overflow {vectors.dtype}: their entries are too large for "
            f"{vectors.targets[0].dtype} weights; check the models, or cast them to float64"
        ) from None


def _merge_chunk(
    scratch: Scratch,
    deltas: list[Tensor],
    vote: Tensor,
    etas: list[float],
    *,
    divide: bool,
    counts: np.ndarray | None,
) -> Tensor:
    """Σ_j η_j δ'_j. The tensors are overwritten. counts: [2, K] to fill with non-zero and kept entries."""
    size, dtype = vote.numel(), deltas[0].dtype
    sign = scratch.get("sign", size, dtype).copy_(vote.sign_())
    sign.mul_(2).add_(1).sign_()  # -1, 0, 1 -> -1, 1, 1: a zero sum counts as plus
    merged = scratch.get("merged", size, dtype).zero_()
    divisor = scratch.get("divisor", size, dtype).zero_()
    kept = scratch.get("kept", size, dtype)
    for j, (delta, eta) in enumerate(zip(deltas, etas, strict=True)):
        if counts is not None:
            counts[0, j] = count_where(operator.ne, delta, 0)
        delta.mul_(sign).clamp_min_(0)  # |δ'_j|: exact, and zero where the signs differ
        if counts is not None:
            counts[1, j] = count_where(operator.ne, delta, 0)
        if divide:
            divisor.add_(torch.sign(delta, out=kept).mul_(eta))
        merged.add_(delta.mul_(eta))
    if divide:
        divisor.add_(torch.sign(divisor, out=kept).neg_().add_(1))  # zero -> 1
        merged.div_(divisor)
    return merged.mul_(sign)


# ---------------------------------------------------------------- the Select step

_SAMPLE = 1 << 16
# Up to this share of the elements only those near or above the threshold are kept, 8 bytes each; beyond it all scores.
_SPARSE_SHARE = 0.25
# Where the largest score is below this, or not finite, scores are computed again from scaled differences, whose squares
# neither underflow nor overflow. And the powers of two that a dtype can be scaled by.
_TINY = {torch.float32: 2.0**-40, torch.float64: 2.0**-800}
_EXPONENTS = {torch.float32: (-126, 100), torch.float64: (-1022, 1000)}


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
    """Which elements are selected: those above the threshold, and the first of those that equal it.

    chunks: scores by the start of the chunk. threshold: the score of the last selected element. count: the number of
    selected elements. ties: by chunk, how many threshold-equal elements are selected; None if all are.
    """

    chunks: dict[int, ChunkScores]
    threshold: float
    count: int
    ties: dict[int, int] | None = None

    def indices(self, start: int) -> Tensor:
        """Positions of the selected elements of the chunk at `start`, relative to it: int64 [m], ascending."""
        chunk = self.chunks[start]
        selected = compare(operator.ge, chunk.scores, self.threshold)
        if self.ties is not None:
            equal = nonzero(compare(operator.eq, chunk.scores, self.threshold))
            selected[equal[self.ties[start] :]] = False
        positions = nonzero(selected)
        return positions if chunk.positions is None else chunk.positions[positions].long()


def variance_scores(targets: Sequence[Tensor], scratch: Scratch, out: Tensor, scale: float = 1.0) -> Tensor:
    """Write K² times the population variance across `targets`, times scale², into `out`, and return it.

    targets: K flat tensors [n] of one dtype. The variance of fusion vectors φ_j - θ is that of the φ_j, and it is that
    of φ_j - φ_1, which is small where φ is not: no digits are lost, and equal targets give exactly zero.
    out: [n], float64 for float64 targets, else float32. scale: a power of two, by which differences are multiplied
    before they are squared, so that scores neither underflow nor overflow.
    """
    size = out.numel()
    first = scratch.get("first", size, out.dtype).copy_(targets[0])
    difference = scratch.get("difference", size, out.dtype)
    total = scratch.get("total", size, out.dtype).zero_()
    out.zero_()
    for target in targets[1:]:
        difference.copy_(target).sub_(first)
        if scale != 1:
            difference.mul_(scale)
        total.add_(difference)
        out.add_(difference.mul_(difference))
    return out.mul_(len(targets)).sub_(total.mul_(total))  # K Σd² - (Σd)²


def select_top_variance(targets: Sequence[Tensor], select_topk: float) -> Selection:
    """Find the top `select_topk` of the elements that vary at all: floor(select_topk * their number).

    targets: K >= 2 flat tensors [numel]. Scratch: 8 bytes per selected element up to a quarter of them, else one
    tensor of the compute dtype. Scaling all fusion vectors by a power of two changes nothing; an element varies if its
    differences are above 1e-11 of the largest ones (float32). Raises OverflowError for differences that are not finite.
    """
    scale = 1.0
    low, chunks = _candidates(targets, select_topk, scale)
    largest = float(np.max([chunk.largest for chunk in chunks.values()]))  # NaN if any is
    if not _TINY[compute_dtype(targets[0].dtype)] < largest < math.inf:
        scale = _scale(targets)
        low, chunks = _candidates(targets, select_topk, scale)
    count = math.floor(select_topk * sum(chunk.varying for chunk in chunks.values()))
    if count == 0:
        return Selection(chunks, math.inf, 0)
    if low > 0 and sum(chunk.scores.numel() for chunk in chunks.values()) < count:
        chunks = _score(targets, 0.0, scale)  # the sample misled
    scores = [chunk.scores for chunk in chunks.values()]
    threshold = kth_largest(scores, count)
    above = sum(count_where(operator.gt, each, threshold) for each in scores)
    equal = np.array([count_where(operator.eq, each, threshold) for each in scores])
    if above + equal.sum() == count:
        return Selection(chunks, threshold, count)
    before = np.cumsum(equal) - equal
    taken = np.clip(count - above - before, 0, equal).tolist()
    return Selection(chunks, threshold, count, dict(zip(chunks, taken, strict=True)))


def _candidates(targets: Sequence[Tensor], select_topk: float, scale: float) -> tuple[float, dict[int, ChunkScores]]:
    """The score from which elements are kept, 0 for all, and their scores."""
    low = _sampled_bound(targets, select_topk, scale) if select_topk <= _SPARSE_SHARE else 0.0
    return low, _score(targets, low, scale)


def _scale(targets: Sequence[Tensor]) -> float:
    """The power of two that brings the largest difference between targets near 1. Raises OverflowError without one."""
    dtype = compute_dtype(targets[0].dtype)

    def largest(scratch: Scratch, start: int, stop: int) -> float:
        first = scratch.get("first", stop - start, dtype).copy_(targets[0][start:stop])
        difference = scratch.get("difference", stop - start, dtype)
        sizes = [difference.copy_(target[start:stop]).sub_(first).abs_().max() for target in targets[1:]]
        return float(torch.stack(sizes).max())

    found = float(np.max(for_each_chunk(largest, targets[0].numel(), targets[0].device)))
    if not math.isfinite(found):
        raise OverflowError  # NaN, Inf, or a difference beyond the dtype: the caller finds out which
    lowest, highest = _EXPONENTS[dtype]
    return 2.0 ** min(max(-math.frexp(found)[1], lowest), highest) if found else 1.0


def _score(targets: Sequence[Tensor], low: float, scale: float) -> dict[int, ChunkScores]:
    """Scores of all elements, or, with `low` above zero, of those with a score of at least `low`."""
    numel, device = targets[0].numel(), targets[0].device
    dtype = compute_dtype(targets[0].dtype)
    everything = torch.empty(0 if low > 0 else numel, dtype=dtype, device=device)

    def score(scratch: Scratch, start: int, stop: int) -> tuple[int, ChunkScores]:
        out = scratch.get("scores", stop - start, dtype) if low > 0 else everything[start:stop]
        scores = variance_scores([target[start:stop] for target in targets], scratch, out, scale)
        varying, largest = count_where(operator.gt, scores, 0.0), float(scores.max())
        if low <= 0:
            return start, ChunkScores(None, scores, varying, largest)
        positions = nonzero(compare(operator.ge, scores, low))
        return start, ChunkScores(positions.int(), scores[positions], varying, largest)

    return dict(for_each_chunk(score, numel, device))


def _sampled_bound(targets: Sequence[Tensor], select_topk: float, scale: float) -> float:
    """A score that the threshold is above, unless the sample is an unusual one; 0 where nothing can be said.

    The sample is pseudo-random, so that the rows of a matrix do not show in it, and fixed, so that runs repeat.
    """
    numel, device = targets[0].numel(), targets[0].device
    if numel <= _SAMPLE:
        return 0.0
    positions = torch.from_numpy(np.random.default_rng(0).integers(0, numel, _SAMPLE)).to(device)
    out = torch.empty(_SAMPLE, dtype=compute_dtype(targets[0].dtype), device=device)
    variance_scores([target[positions] for target in targets], Scratch(device), out, scale)
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
        above_middle = sum(count_where(operator.gt, each, number(middle)) for each in values)
        if above_middle >= k:
            low, inside = middle + 1, above_middle - above
        else:
            high, inside, above = middle, inside - (above_middle - above), above_middle
    if low == high:
        return number(low)
    few = torch.cat(
        [
            each[nonzero(compare(operator.ge, each, number(low)) & compare(operator.le, each, number(high)))]
            for each in values
        ]
    )
    if on_cpu(few):
        position = few.numel() - (k - above)
        return float(np.partition(few.numpy(), position)[position])
    return float(torch.topk(few, k - above).values[-1])
