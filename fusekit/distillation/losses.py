"""The likelihood of labels and the distance to sparse targets, with their gradient made on the way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.distillation.chunk_losses import CHUNK_LOSSES, chunk_loss
from fusekit.distillation.distances import DISTANCES, Distance
from fusekit.distillation.passes import Batch, ChunkOfRows, Work, for_each_chunk
from fusekit.distillation.targets import Members, SparseTargets, check_targets
from fusekit.errors import DistillationError

__all__ = ["IGNORE", "LOSSES", "TRUNCATIONS", "FusionLoss", "Members", "SparseTargets", "fusion_loss"]

IGNORE = -100
"""The ignored label, as everywhere in transformers."""

LOSSES = (*DISTANCES, *CHUNK_LOSSES)
TRUNCATIONS = ("tail", "renormalize")


def compute_dtype(flat: Tensor) -> torch.dtype:
    return torch.float64 if flat.dtype == torch.float64 else torch.float32


class FusionLoss(NamedTuple):
    """What :func:`fusion_loss` returns.

    Attributes:
        total: scalar, float32 (float64 for float64 logits): Σ lm_weight · lm + Σ fusion_weight · fusion. The only one
            that carries gradients.
        lm: scalar, float64, detached: the sum of the labels' negative log-likelihoods, nats, at temperature 1.
        fusion: scalar, float64, detached: the sum of the distances over the taught labels, T² included.
        labels: how many labels.
        taught: how many of them have a target.
    """

    total: Tensor
    lm: Tensor
    fusion: Tensor
    labels: int
    taught: int


def fusion_loss(
    logits: Tensor,
    labels: Tensor,
    targets: SparseTargets | None = None,
    *,
    positions: Tensor | None = None,
    loss: str = "ce",
    truncation: str = "tail",
    temperature: float = 1.0,
    lm_weight: float | Tensor = 1.0,
    fusion_weight: float | Tensor = 1.0,
    overwrite_logits: bool = False,
    chunk: int | None = None,
) -> FusionLoss:
    """Sums of the next-token likelihood and of the distance to the targets, with exact gradients to the logits.

    Sums, not means: divided by the counts of a whole optimizer step (put the divisor in the weights), the result is the
    same however the step is split over batches and processes.

    Args:
        logits: float16, bfloat16, float32 or float64 [..., V]; best contiguous. -inf (padding ids) is fine.
        labels: int64 [n], :data:`IGNORE` for those that are none.
        targets: n rows, in ids below V (``uld_topk``: any vocabulary, the source's unprojected rows), captured at
            ``temperature``; None for the likelihood alone. ``grouped_kl`` and ``p_kl``: in ids of ``members``.
        positions: int64 [n], increasing: which rows of the logits, flattened to [-1, V], predict the labels. None: all
            of them, in order. Passing whole logits and positions spares the copy that slicing makes.
        loss: one of :data:`LOSSES` (docs/losses.md).
        truncation: ``tail``: everything that the target does not list is one more outcome, on both sides.
            ``renormalize``: the listed probabilities are scaled to 1 and the student keeps its whole softmax, as
            published; biased towards peaked students, and not for ``reverse_kl``, which is infinite then.
        temperature: T; the student's logits are divided by it in the distance (not in the likelihood), and the distance
            is multiplied by T², so that its gradient keeps its size (arXiv 1503.02531).
        lm_weight, fusion_weight: a number, or float [n] per label.
        overwrite_logits: let the gradient take the logits' memory. The logits are useless after the call; where
            autograd needs them elsewhere, it says so in ``backward``. Ignored where no gradient is wanted.
        chunk: logits per chunk, for measurements.

    Returns:
        :class:`FusionLoss`. Without labels, zeros, connected to the logits. A target with mass on a logit of -inf
        gives an infinite loss. ``backward`` works once; double backward is refused.

    Raises:
        DistillationError: anything that does not fit together, naming it.
    """
    distance = _distance(loss, truncation)
    flat, labels, rows, where = _flatten(logits, labels, positions)
    if not (math.isfinite(temperature) and temperature > 0):
        raise DistillationError(f"temperature is {temperature}, it must be a number above 0")
    if targets is not None:
        check_targets(targets, rows, _ids_below(loss, targets, flat), temperature, without_ids=loss == "gold")
        if targets.ids.device != flat.device:
            raise DistillationError(f"targets are on {targets.ids.device}, logits on {flat.device}: use targets.to()")
    by_label = _weight(lm_weight, "lm_weight", rows, flat), _weight(fusion_weight, "fusion_weight", rows, flat)
    kept = labels != IGNORE
    if not bool(kept.all()):
        where = (torch.arange(rows, device=flat.device) if where is None else where)[kept]
        targets = None if targets is None else _whole_chunks(targets, kept).select(kept)
        labels, by_label = labels[kept], (by_label[0][kept], by_label[1][kept])
    of_chunks = targets if loss in CHUNK_LOSSES else None
    batch = Batch(
        labels,
        where,
        targets if of_chunks is None else None,
        *by_label,
        distance,
        loss,
        truncation,
        temperature,
        with_gradient=torch.is_grad_enabled() and flat.requires_grad,
        overwrite=overwrite_logits and of_chunks is None,
        chunk=chunk,
    )
    total, lm, fusion = _Fusion.apply(flat, batch)  # type: ignore[no-untyped-call]
    if of_chunks is not None:
        at = torch.arange(len(flat), device=flat.device) if where is None else where
        more, fusion = chunk_loss(loss, flat, at, labels, of_chunks, by_label[1])
        total = total + more
    taught = 0 if targets is None else int(targets.taught.sum())
    return FusionLoss(total, lm, fusion, len(labels), taught)


def _ids_below(loss: str, targets: SparseTargets, flat: Tensor) -> int | None:
    """How many ids targets may have, None for any. Raises DistillationError where members are missing or too many."""
    if (loss in ("grouped_kl", "p_kl")) != (targets.members is not None):
        needs = "needs members, the tokens that stand for each id" if targets.members is None else "takes no members"
        raise DistillationError(f"the loss {loss} {needs}")
    if targets.members is not None:
        return len(targets.members.starts) - 1
    return None if loss in ("uld_topk", "alm") else flat.shape[1]


def _whole_chunks(targets: SparseTargets, kept: Tensor) -> SparseTargets:
    """Without the chunks of which a label is ignored."""
    if targets.chunks is None:
        return targets
    return replace(targets, taught=targets.taught & ~torch.isin(targets.chunks, targets.chunks[~kept]))


class _Fusion(torch.autograd.Function):
    """(total, lm, fusion) of flattened logits; the gradient of the total is made on the way."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        # float16 would lose weights like 1 / (labels of a step), so its gradient waits for them in unit scale.
        unit = _largest(batch) if batch.with_gradient and flat.dtype == torch.float16 else 1.0
        gradient = _gradient_memory(flat, batch) if batch.with_gradient else None
        nll, distances = _all_rows(flat, batch, gradient, unit)
        total = _weighted(nll, batch.lm_weight) + _weighted(distances, batch.fusion_weight)
        sums = nll.sum(dtype=torch.float64), distances.sum(dtype=torch.float64)
        ctx.mark_non_differentiable(*sums)
        ctx.unit = unit
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total.to(compute_dtype(flat)), *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        scale = float(grad_total) * ctx.unit
        return gradient if scale == 1 else gradient.mul_(scale), None


def _all_rows(flat: Tensor, batch: Batch, gradient: Tensor | None, unit: float) -> tuple[Tensor, Tensor]:
    """Likelihoods and distances, [n] each; the gradient's rows of the labels are written."""
    dtype, n = compute_dtype(flat), len(batch.labels)
    nll, distances = flat.new_zeros(n, dtype=dtype), flat.new_zeros(n, dtype=dtype)

    def new_worker() -> Work:
        scratch = flat.new_empty(0, flat.shape[1], dtype=dtype)

        def work(start: int, stop: int) -> None:
            nonlocal scratch
            where = _run(batch.where, start, stop)
            source = flat[where]
            direct = gradient is not None and isinstance(where, slice) and flat.dtype == dtype
            if gradient is not None and direct:
                z = gradient[where]
            else:
                if len(scratch) < len(source):
                    scratch = torch.empty_like(source, dtype=dtype)
                z = scratch[: stop - start]
            rows = ChunkOfRows(batch, start, stop, dtype, unit)
            nll[start:stop], distances[start:stop] = rows.run(source, z)
            if gradient is not None and not direct:
                if isinstance(where, slice):
                    gradient[where].copy_(z)
                else:
                    gradient[where] = z.to(gradient.dtype)

        return work

    for_each_chunk(new_worker, n, flat, batch.chunk)
    return nll, distances


def _distance(loss: str, truncation: str) -> Distance:
    if loss not in (known := {**DISTANCES, **CHUNK_LOSSES}):  # a user may have registered more than LOSSES
        raise DistillationError(f"there is no loss {loss!r}: it is one of {', '.join(known)}")
    if truncation not in TRUNCATIONS:
        raise DistillationError(f"there is no truncation {truncation!r}: it is one of {', '.join(TRUNCATIONS)}")
    if (loss, truncation) == ("reverse_kl", "renormalize"):
        raise DistillationError(
            "reverse_kl with renormalize is infinite: the renormalised target is zero where the student is not; use "
            "truncation tail"
        )
    return DISTANCES.get(loss, DISTANCES["ce"])


def _flatten(logits: Tensor, labels: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """The logits as [-1, V], the labels, their number, and the rows that predict them (None: all in order)."""
    if not logits.is_floating_point() or logits.ndim < 2:
        raise DistillationError(f"logits are {logits.dtype} {tuple(logits.shape)}: they must be floating [..., V]")
    flat = logits.reshape(-1, logits.shape[-1])
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise DistillationError(f"labels are {labels.dtype} {tuple(labels.shape)}: they must be int64 [n]")
    if positions is None and len(labels) != len(flat):
        raise DistillationError(f"{len(labels)} labels for {len(flat)} rows of logits: pass the positions that predict")
    if positions is not None and (positions.shape != labels.shape or positions.dtype != torch.int64):
        raise DistillationError(
            f"positions are {positions.dtype} {tuple(positions.shape)}: they must be int64, one for each of "
            f"{len(labels)} labels"
        )
    V = flat.shape[1]
    wrong = ((labels < 0) | (labels >= V)) & (labels != IGNORE)
    astray = torch.zeros_like(wrong)
    if positions is not None and len(positions):
        before = torch.cat([positions.new_tensor([-1]), positions[:-1]])
        astray = (positions <= before) | (positions >= len(flat))
    problems = torch.stack([wrong.any(), astray.any()]).tolist()
    if problems[0]:
        first = int(wrong.nonzero()[0])
        raise DistillationError(f"label {first} is token id {int(labels[first])}, the logits have {V} columns")
    if problems[1] and positions is not None:
        first = int(astray.nonzero()[0])
        raise DistillationError(
            f"position {first} is {int(positions[first])}: positions must increase and stay below {len(flat)}"
        )
    return flat, labels, len(labels), positions


def _weight(weight: float | Tensor, name: str, rows: int, flat: Tensor) -> Tensor:
    values = torch.as_tensor(weight, dtype=compute_dtype(flat), device=flat.device)
    if values.ndim and values.shape != (rows,):
        raise DistillationError(
            f"{name} has shape {tuple(values.shape)}: it is a number, or one for each of {rows} labels"
        )
    return values.detach().expand(rows)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Σ values · weights in float64; a weight of zero silences an infinite value."""
    return torch.where(weights != 0, values.double() * weights.double(), 0.0).sum()


def _largest(batch: Batch) -> float:
    weights = torch.cat([batch.lm_weight, batch.fusion_weight]).abs()
    largest = float(weights.max()) if len(weights) else 0.0
    return largest if largest > 0 else 1.0


def _gradient_memory(flat: Tensor, batch: Batch) -> Tensor:
    """Memory for the gradient; its rows that no label is predicted from are zero."""
    if not batch.overwrite:
        return torch.empty_like(flat) if batch.where is None else torch.zeros_like(flat)
    gradient = flat.detach()  # shares the version counter: autograd notices if the logits are needed elsewhere
    if batch.where is not None:
        others = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        others[batch.where] = False
        gradient[others] = 0
    return gradient


def _run(where: Tensor | None, start: int, stop: int) -> slice | Tensor:
    """The chunk's rows of the logits: a slice where they follow each other, which makes no copy."""
    if where is None:
        return slice(start, stop)
    rows = where[start:stop]
    if rows.device.type == "cpu" and int(rows[-1]) - int(rows[0]) == stop - start - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
