"""WIDEN: merging by how far magnitudes and directions of weights moved, and which of them moved most.

Source: arXiv 2408.03092. The scores are computed in float64 from squared distances of unit vectors: the cosine of an
ordinary fine-tune in float32 is rounding noise, and so would its ranks be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fusekit.errors import MergeError
from fusekit.merge_methods.fusion_vectors import FusionVectors, add_to_base, check_finite

Ties = Literal["index", "average"]

_CHUNK_ELEMENTS = 1 << 22
"""Of one model that are in float64 at a time."""


@dataclass(frozen=True)
class WidenMerge:
    """What WIDEN made of one parameter tensor.

    tensor: shape and dtype of the inputs. scores: the mean weight of each model's fusion vector, float64 [N]; they need
    not sum to 1.
    """

    tensor: Tensor
    scores: np.ndarray


@torch.no_grad()
def widen(
    base: Tensor,
    targets: Sequence[Tensor],
    *,
    threshold: float = 1.0,
    score: float = 1.0,
    ties: Ties = "average",
    columns_are_rows: bool = False,
) -> WidenMerge:
    """Merge N models into their backbone by WIDEN, one parameter tensor: W0 + Σ_n S_n (W_n - W0).

    A matrix [out, in] is taken apart into the magnitudes and the unit directions of its columns. Within each model the
    columns are ranked by how much either changed; S is the mean of both softmaxes over the models of these ranks, and
    ``score`` where a rank is above ``threshold`` times its model's mean. A vector's S is the softmax over the models of
    ``abs(δ)``, and ``score`` where ``abs(δ)`` is above ``threshold`` times its mean. Tensors of three dimensions are
    merged slice by slice along the first. One model alone is given back.

    >>> base, first, second = torch.ones(3), torch.tensor([1.1, 1.0, 1.02]), torch.tensor([1.0, 1.3, 1.01])
    >>> widen(base, [first, second]).tensor
    tensor([1.1000, 1.3000, 1.0150])

    Args:
        base: W0, up to 3 dimensions; float16, bfloat16, float32 or float64; CPU or CUDA.
        targets: W_1..W_N, of the same shape, dtype and device.
        threshold: t of the paper, above 0.
        score: s of the paper.
        ties: equal ranks for equal changes ("average"), or by the order of the columns, as published ("index"), which
            gives columns that no model changed different scores.
        columns_are_rows: the rows take the part of the columns: for an input embedding, whose rows are tokens.

    Returns:
        Arithmetic is float64; inputs are not modified, and the result carries no gradient.

    Raises:
        MergeError: no targets, mismatched inputs, more than 3 dimensions, a threshold that is not above 0, NaN or Inf.
    """
    vectors = FusionVectors.of(base, targets)
    if base.ndim > 3:
        raise MergeError(f"widen merges tensors of at most 3 dimensions, not {base.ndim}: {tuple(base.shape)}")
    if not threshold > 0:
        raise MergeError(f"threshold is {threshold}, it must be above 0")
    if ties not in ("index", "average"):
        raise MergeError(f"ties is {ties!r}, it must be index or average")
    check_finite(vectors.energies())
    if base.numel() == 0:
        return WidenMerge(base.clone(), np.zeros(len(targets)))
    if base.ndim < 2:
        scores = _vector_scores(base.reshape(-1), [t.reshape(-1) for t in targets], threshold, score)
        vector = _update(base.reshape(-1), [t.reshape(-1) for t in targets], scores)
        return WidenMerge(vector.reshape(base.shape), scores.mean(1).cpu().numpy())
    experts = [t.unsqueeze(0) if t.ndim == 2 else t for t in (base, *targets)]
    if columns_are_rows:
        experts = [t.transpose(1, 2) for t in experts]
    merged: list[Tensor] = []
    means: list[np.ndarray] = []
    for first, *others in zip(*experts, strict=True):
        matrix, scores = _merge_matrix(first, others, threshold, score, ties)
        merged.append(matrix.T if columns_are_rows else matrix)
        means.append(scores.mean(1).cpu().numpy())
    result = torch.stack(merged) if base.ndim == 3 else merged[0].contiguous()
    return WidenMerge(result, np.mean(means, axis=0))


def _merge_matrix(
    base: Tensor, targets: Sequence[Tensor], threshold: float, score: float, ties: Ties
) -> tuple[Tensor, Tensor]:
    """The merged matrix, and the scores of its columns, float64 [N, columns]."""
    parts = _pieces(base)
    magnitudes, directions = (torch.cat(x, 1) for x in zip(*(_changes(base, targets, at) for at in parts), strict=True))
    scores = (_scores(magnitudes, threshold, score, ties) + _scores(directions, threshold, score, ties)) / 2
    result = torch.empty_like(base)
    for at in parts:
        result[:, at] = _update(base[:, at], [target[:, at] for target in targets], scores[:, at])
    return result, scores


def _pieces(base: Tensor) -> list[slice]:
    """Whole columns, about ``_CHUNK_ELEMENTS`` elements at a time."""
    rows, columns = base.shape
    width = max(1, _CHUNK_ELEMENTS // rows)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def _changes(base: Tensor, targets: Sequence[Tensor], at: slice) -> tuple[Tensor, Tensor]:
    """Of some columns: how much magnitude and direction changed in each model, float64 [N, columns] both.

    1 - cos is half the squared distance of the unit vectors. A column of zeros has no direction: no change to another
    of zeros, one of 1 to any other.
    """
    magnitude, direction = _polar(base[:, at])
    changed = [_polar(target[:, at]) for target in targets]
    magnitudes = torch.stack([(m - magnitude).abs() for m, _ in changed])
    directions = torch.stack([(d - direction).square().sum(0) / 2 for _, d in changed])
    zero = torch.stack([(m == 0) != (magnitude == 0) for m, _ in changed])
    return magnitudes, torch.where(zero, 1.0, directions)


def _polar(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes [columns] and unit vectors [rows, columns] in float64; columns of zeros stay zeros."""
    exact = columns.double()
    length = exact.square().sum(0).sqrt()
    return length, exact / torch.where(length == 0, 1.0, length)


def _scores(changes: Tensor, threshold: float, score: float, ties: Ties) -> Tensor:
    """Scores of changes float64 [N, columns], of the same shape."""
    count = changes.shape[1]
    mantissas, exponents = changes.frexp()
    changes = torch.ldexp((mantissas * 2**30).round(), exponents)  # equal but for rounding is equal
    order = changes.argsort(dim=1, stable=True)
    places = torch.arange(count, dtype=torch.float64, device=changes.device).expand_as(changes)
    ranks = torch.empty_like(changes).scatter_(1, order, places)
    if ties == "average":
        for row, values in zip(ranks, changes, strict=True):
            _, group = values.unique(return_inverse=True)
            sums = torch.zeros(int(group.max()) + 1, dtype=torch.float64, device=row.device)
            row.copy_((sums.index_add(0, group, row) / group.bincount())[group])
    important = ranks > threshold * (count - 1) / 2  # the mean of all ranks, without rounding
    return torch.where(important, score, (ranks / count).softmax(0))


def _vector_scores(base: Tensor, targets: Sequence[Tensor], threshold: float, score: float) -> Tensor:
    changes = torch.stack([(target.double() - base.double()).abs() for target in targets])
    return torch.where(changes > threshold * changes.mean(1, keepdim=True), score, changes.softmax(0))


def _update(base: Tensor, targets: Sequence[Tensor], scores: Tensor) -> Tensor:
    """base + Σ_n scores[n] (target_n - base), the scores spread over the rows."""
    exact = base.double()
    update = torch.zeros_like(exact)
    for target, weights in zip(targets, scores, strict=True):
        update += weights * (target.double() - exact)
    return add_to_base(exact, update).to(base.dtype)
