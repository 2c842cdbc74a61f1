"""SCE: select, calculate, erase. Merging the targets of one pivot matrix by matrix.

Source: FuseChat, arXiv 2408.07990, section 3.4, Algorithm 1, equations 5-9. The variants are told apart in
docs/merge-methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fusekit.errors import MergeError
from fusekit.merge_methods.fusion_vectors import (
    Chunk,
    FusionVectors,
    NonFiniteError,
    Scratch,
    add_to_base,
    check_finite,
    check_weights,
    count_where,
    dense,
    dense_shares,
    for_each_chunk,
    is_finite,
    shares,
)
from fusekit.merge_methods.selection import Selection, select_top_variance

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
    chunk_size: int | None = None,
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
        chunk_size: elements per chunk, a multiple of 4096; changes nothing but speed.

    Returns:
        The merged tensor with its coefficients. Arithmetic is float32 (float64 for float64 inputs) with float64 sums.
        Scaling all fusion vectors by a constant changes neither coefficients nor selection, down to the smallest
        float32; in float64 between 1e-150 and 1e150. Elements where no fusion vector survives are the base's, bit for
        bit. Scratch memory is at most about one tensor of the compute dtype, whatever K is. Inputs are not modified;
        the result carries no gradient.

    Raises:
        MergeError: no targets, or one tensor in place of a list; mixed shapes, dtypes or devices; parameters out of
            range; one target with select_topk < 1 (no variance to rank); NaN or Inf.

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
    selection = _select(vectors, select_topk, chunk_size)
    energies = vectors.energies(None if selection is None else selection.indices, chunk_size)
    check_finite(energies)
    coefficients = shares(energies)
    etas = coefficients.tolist()
    kept_of = None if variant == "fuseai" else selection
    result = vectors.empty_result()

    def update(scratch: Scratch, start: int, stop: int) -> np.ndarray:
        out = result[start:stop]
        if selection is not None and vectors.base is not None:
            # Energies were taken of the selected elements: elsewhere nothing has looked at the base yet.
            part = vectors.base[start:stop]
            if not is_finite(part) and not bool(torch.isfinite(part).all()):
                raise NonFiniteError(range(len(etas)))
        positions = None if kept_of is None else kept_of.indices(start)
        chunk = vectors.chunk(scratch, start, stop, positions, vote=factors)
        for vector, factor in zip(chunk.vectors, factors, strict=True):
            if factor != 1:
                vector.mul_(factor)
        counts = np.zeros((2, len(etas)), dtype=np.int64)
        merged = _merge_chunk(scratch, chunk, etas, variant != "paper", counts if count_erased else None)
        merged = add_to_base(chunk.base, merged)
        if positions is None:
            out.copy_(merged)
            return counts
        if vectors.base is None:
            out.zero_()
        else:
            out.copy_(vectors.base[start:stop])
        out.index_copy_(0, positions, merged.to(out.dtype))
        return counts

    counts = for_each_chunk(update, vectors.numel, vectors.device, chunk_size)
    erased = None
    if count_erased:
        nonzero, kept = np.sum(counts, axis=0) if counts else np.zeros((2, len(etas)))
        erased = np.divide(nonzero - kept, nonzero, out=np.zeros(len(etas)), where=nonzero > 0)
    selected = 1.0 if selection is None else selection.count / vectors.numel
    return SCEMerge(result.reshape(vectors.shape), coefficients, selected, erased)


@torch.no_grad()
def sce_fusion_vector(
    deltas: Sequence[Tensor],
    *,
    select_topk: float = 1.0,
    variant: Variant = "paper",
    count_erased: bool = False,
    chunk_size: int | None = None,
) -> SCEMerge:
    """SCE on fusion vectors: the merged fusion vector Σ η_j δ'_j, without a pivot.

    deltas: K tensors of one shape, dtype and device. Everything else as `sce`; `tensor` is the merged fusion vector.
    """
    return sce(None, deltas, select_topk=select_topk, variant=variant, count_erased=count_erased, chunk_size=chunk_size)


@torch.no_grad()
def select(deltas: Sequence[Tensor], select_topk: float) -> Tensor:
    """The Select step alone: a bool mask of the elements of highest variance, shape of the inputs.

    deltas: K >= 2 tensors of one shape, dtype and device (fusion vectors or targets: the variance is the same).
    Of equal variances the lower flat index is selected. Raises MergeError as `sce` does. arXiv 2408.07990 eq. 5.
    """
    vectors = FusionVectors.of(None, deltas)
    check_parameters(len(deltas), select_topk, "paper")
    mask = torch.zeros(vectors.numel, dtype=torch.bool, device=vectors.device)
    selection = _select(vectors, select_topk, None)
    if selection is None:
        return mask.fill_(True).reshape(vectors.shape)
    for start in selection.chunks:
        mask[start + selection.indices(start)] = True
    return mask.reshape(vectors.shape)


@torch.no_grad()
def merge_coefficients(deltas: Sequence[Tensor]) -> np.ndarray:
    """The Calculate step alone: η_j = Σ δ_j² / Σ_j Σ δ_j². arXiv 2408.07990 eq. 6-7; also W_j of 2402.16107 eq. 7.

    deltas: K tensors of one shape, dtype and device. Returns float64 [K], sums to 1; uniform only if all are zero.
    Raises MergeError on mismatched inputs, NaN and Inf.
    """
    energies = FusionVectors.of(None, deltas).energies()
    check_finite(energies)
    return shares(energies)


def check_parameters(targets: int, select_topk: float, variant: str) -> None:
    """Raise MergeError if SCE cannot run on this many targets with these parameters."""
    if not 0 < select_topk <= 1:
        raise MergeError(f"select_topk is {select_topk}, it must lie in (0, 1]: 0.1 keeps a tenth, 1 keeps everything")
    if variant not in get_args(Variant):
        raise MergeError(f"variant is {variant!r}, it must be one of {', '.join(get_args(Variant))}")
    if targets == 1 and select_topk < 1:
        raise MergeError(
            f"select_topk is {select_topk} with one target: a single fusion vector has no variance to rank; "
            "use select_topk: 1, or add a target"
        )


def _select(vectors: FusionVectors, select_topk: float, chunk_size: int | None) -> Selection | None:
    """None if everything is selected."""
    if select_topk == 1 or not vectors.numel:
        return None
    try:
        return select_top_variance(vectors.targets, select_topk, chunk_size)
    except OverflowError:
        check_finite(vectors.energies(chunk_size=chunk_size))
        raise MergeError(
            f"the differences between targets overflow {vectors.dtype}: their entries are too large for "
            f"{vectors.targets[0].dtype} weights; check the models, or cast them to float64"
        ) from None


def _merge_chunk(
    scratch: Scratch, chunk: Chunk, weights: list[float], divide: bool, counts: np.ndarray | None
) -> Tensor:
    """Σ_j η_j δ'_j. The chunk is overwritten. counts: [2, K] to fill with non-zero and kept entries."""
    assert chunk.vote is not None
    size, dtype = chunk.vote.numel(), chunk.vectors[0].dtype
    sign = scratch.get("sign", size, dtype).copy_(chunk.vote.sign_())
    sign.mul_(2).add_(1).sign_()  # -1, 0, 1 -> -1, 1, 1: a zero sum counts as plus
    merged = scratch.get("merged", size, dtype).zero_()
    divisor = scratch.get("divisor", size, dtype).zero_()
    kept = scratch.get("kept", size, dtype)
    for j, (vector, weight) in enumerate(zip(chunk.vectors, weights, strict=True)):
        if counts is not None:
            counts[0, j] = count_where(np.not_equal, vector, 0)
        vector.mul_(sign).clamp_min_(0)  # |δ'_j|: exact, and zero where the signs differ
        if counts is not None:
            counts[1, j] = count_where(np.not_equal, vector, 0)
        if divide:
            divisor.add_(torch.sign(vector, out=kept).mul_(weight))
        merged.add_(vector.mul_(weight))
    if divide:
        divisor.add_(torch.sign(divisor, out=kept).neg_().add_(1))  # zero -> 1
        merged.div_(divisor)
    return merged.mul_(sign)


def sce_with_gradients(
    base: Tensor, targets: Sequence[Tensor], *, select_topk: float, variant: Variant, weights: Sequence[float]
) -> Tensor:
    """The tensor of `sce` by dense operations of autograd, with gradients to base and targets.

    mergekit keeps the autograd connections of module parameters that are merged in memory, so its methods do too.
    Slower and larger than the chunked form, the same numbers up to rounding; selection and signs are constants.
    """
    deltas = dense(base, targets)
    mask = torch.ones_like(base, dtype=torch.bool) if select_topk == 1 else select(targets, select_topk)
    coefficients = dense_shares(deltas * mask)
    factors = torch.tensor(weights, dtype=torch.float64, device=base.device).reshape(-1, *[1] * base.ndim)
    merged = (deltas if variant == "fuseai" else deltas * mask) * factors.to(deltas.dtype)
    with torch.no_grad():  # Σ_j δ_j as the chunked form has it: before the differences are rounded, where that is exact
        wide = torch.stack([target.double() for target in targets])
        if base.dtype == torch.float64:
            vote = (wide.sub(base) * factors).sum(0)
        else:
            vote = (wide * factors).sum(0) - sum(weights) * base.double()
    kept = torch.where(vote >= 0, merged > 0, merged < 0)
    update = (coefficients * merged * kept).sum(0)
    if variant != "paper":
        divisor = (coefficients * kept).sum(0)
        update = update / torch.where(divisor == 0, 1, divisor)
    return (base.to(deltas.dtype) + update).to(base.dtype)
