"""The likelihood of labels and the distance to sparse targets, with their gradient made on the way.

Rows of logits are done a chunk at a time, forward only, in the memory that is given. The listed outcomes are gathered
and taken out of a row; one exponential per logit gives the log-sum-exp of the rest and, times one number per row, its
part of the gradient; the outcomes' slopes give the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.devices import side_by_side
from fusekit.distillation.distances import (
    CHUNK_LOSSES,
    DISTANCES,
    Members,
    SparseTargets,
    chunk_loss,
    log_sums,
    with_ranked,
)
from fusekit.errors import DistillationError

__all__ = ["IGNORE", "LOSSES", "TRUNCATIONS", "FusionLoss", "Members", "SparseTargets", "fusion_loss"]

IGNORE = -100
"""The ignored label, as everywhere in transformers."""

LOSSES = (*DISTANCES, *CHUNK_LOSSES)
TRUNCATIONS = ("tail", "renormalize")

CPU_CHUNK = 2**20  # logits whose float32 copy stays in the cache, and whose operations outlast the interpreter's
ACCELERATOR_CHUNK = 2**26  # large enough to fill a GPU, small against its memory
MAX_THREADS = 8  # more would wait for the interpreter's lock


class FusionLoss(NamedTuple):
    """What :func:`fusion_loss` returns.

    Attributes:
        total: scalar, float32 (float64 for float64 logits): Σ lm_weight · lm + Σ fusion_weight · fusion. The only one
            that carries gradients.
        lm: scalar, float64: the sum of the labels' negative log-likelihoods, nats, at temperature 1.
        fusion: scalar, float64: the sum of the distances over the taught labels, T² included.
        labels, taught: how many labels, and how many of them have a target.
    """

    total: Tensor
    lm: Tensor
    fusion: Tensor
    labels: int
    taught: int


@dataclass(frozen=True, eq=False)
class _Batch:
    """Everything but the logits. n labels, none of them ignored; where: their rows, None for all in order."""

    labels: Tensor
    where: Tensor | None
    targets: SparseTargets | None
    lm_weight: Tensor
    fusion_weight: Tensor
    loss: str
    truncation: str
    temperature: float
    with_gradient: bool
    overwrite: bool
    chunk: int | None


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
        labels: int64 [n], :data:`IGNORE` for those that are ignored.
        targets: n rows, in ids below V (``uld_topk``: any vocabulary; ``grouped_kl`` and ``p_kl``: ids of ``members``),
            captured at ``temperature``; None for the likelihood alone.
        positions: int64 [n], increasing: which rows of the logits, flattened to [-1, V], predict the labels. None: all
            of them, in order. Passing whole logits and positions spares the copy that slicing makes.
        loss: one of :data:`LOSSES` (docs/losses.md).
        truncation: ``tail``: everything that the target does not list is one more outcome, on both sides.
            ``renormalize``: the listed probabilities are scaled to 1 and the student keeps its whole softmax.
        temperature: T; the student's logits are divided by it in the distance (not in the likelihood), and the distance
            is multiplied by T², so that its gradient keeps its size (arXiv 1503.02531).
        lm_weight, fusion_weight: a number, or float [n] per label.
        overwrite_logits: let the gradient take the logits' memory. The logits are useless after the call; where
            autograd needs them elsewhere, it says so in ``backward``.
        chunk: logits per chunk, for measurements.

    Without labels zeros, connected to the logits. A target with mass on a logit of -inf gives an infinite loss.
    ``backward`` works once. Raises DistillationError for what does not fit together.
    """
    _refuse_settings(loss, truncation, temperature)
    flat, where = _flattened(logits, labels, positions), positions
    if targets is not None:
        targets.check(len(labels), _ids_below(loss, targets, flat), temperature, without_ids=loss == "gold")
        if targets.ids.device != flat.device:
            raise DistillationError(f"targets are on {targets.ids.device}, logits on {flat.device}: use targets.to()")
    lm_weight = _per_label(lm_weight, "lm_weight", labels, flat)
    fusion_weight = _per_label(fusion_weight, "fusion_weight", labels, flat)
    kept = labels != IGNORE
    if not bool(kept.all()):
        where = (torch.arange(len(labels), device=flat.device) if where is None else where)[kept]
        if targets is not None and targets.chunks is not None:  # without those of which a label is ignored
            broken = torch.isin(targets.chunks, targets.chunks[~kept])
            targets = replace(targets, taught=targets.taught & ~broken)
        targets = None if targets is None else targets.select(kept)
        labels, lm_weight, fusion_weight = labels[kept], lm_weight[kept], fusion_weight[kept]
    of_chunks = targets if loss in CHUNK_LOSSES else None
    batch = _Batch(
        labels,
        where,
        targets if of_chunks is None else None,
        lm_weight,
        fusion_weight,
        loss if loss in DISTANCES else "ce",
        truncation,
        temperature,
        with_gradient=torch.is_grad_enabled() and flat.requires_grad,
        overwrite=overwrite_logits and of_chunks is None,
        chunk=chunk,
    )
    total, lm, fusion = _Fusion.apply(flat, batch)  # type: ignore[no-untyped-call]
    if of_chunks is not None:
        at = torch.arange(len(flat), device=flat.device) if where is None else where
        more, fusion = chunk_loss(loss, flat, at, labels, of_chunks, fusion_weight)
        total = total + more
    return FusionLoss(total, lm, fusion, len(labels), 0 if targets is None else int(targets.taught.sum()))


def _refuse_settings(loss: str, truncation: str, temperature: float) -> None:
    if loss not in (known := {**DISTANCES, **CHUNK_LOSSES}):  # a user may have registered more than LOSSES
        raise DistillationError(f"there is no loss {loss!r}: it is one of {', '.join(known)}")
    if truncation not in TRUNCATIONS:
        raise DistillationError(f"there is no truncation {truncation!r}: it is one of {', '.join(TRUNCATIONS)}")
    if (loss, truncation) == ("reverse_kl", "renormalize"):
        raise DistillationError(
            "reverse_kl with renormalize is infinite: the renormalised target is zero where the student is not; use "
            "truncation tail"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise DistillationError(f"temperature is {temperature}, it must be a number above 0")


def _flattened(logits: Tensor, labels: Tensor, positions: Tensor | None) -> Tensor:
    """The logits as [-1, V]. Raises DistillationError for labels and positions that do not fit them."""
    flat = logits.reshape(-1, logits.shape[-1])
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise DistillationError(f"labels are {labels.dtype} {tuple(labels.shape)}: they must be int64 [n]")
    if positions is None and len(labels) != len(flat):
        raise DistillationError(f"{len(labels)} labels for {len(flat)} rows of logits: pass the positions that predict")
    if positions is not None and (positions.shape != labels.shape or positions.dtype != torch.int64):
        found = f"{positions.dtype} {tuple(positions.shape)}"
        raise DistillationError(f"positions are {found}: they must be int64, one for each of {len(labels)} labels")
    wrong = ((labels < 0) | (labels >= flat.shape[1])) & (labels != IGNORE)
    astray = torch.zeros_like(wrong)
    if positions is not None and len(positions):
        before = torch.cat([positions.new_tensor([-1]), positions[:-1]])
        astray = (positions <= before) | (positions >= len(flat))
    problems = torch.stack([wrong.any(), astray.any()]).tolist()  # one wait for the device
    if problems[0]:
        at = int(wrong.nonzero()[0])
        raise DistillationError(f"label {at} is token id {int(labels[at])}, the logits have {flat.shape[1]} columns")
    if problems[1] and positions is not None:
        at = int(astray.nonzero()[0])
        raise DistillationError(
            f"position {at} is {int(positions[at])}: positions must increase and stay below {len(flat)}"
        )
    return flat


def _ids_below(loss: str, targets: SparseTargets, flat: Tensor) -> int | None:
    """How many ids targets may have, None for any."""
    if (loss in ("grouped_kl", "p_kl")) != (targets.members is not None):
        needs = "needs members, the tokens that stand for each id" if targets.members is None else "takes no members"
        raise DistillationError(f"the loss {loss} {needs}")
    if targets.members is not None:
        return len(targets.members.starts) - 1
    return None if loss in ("uld_topk", "alm") else flat.shape[1]


def _compute_dtype(flat: Tensor) -> torch.dtype:
    return torch.float64 if flat.dtype == torch.float64 else torch.float32


def _per_label(weight: float | Tensor, name: str, labels: Tensor, flat: Tensor) -> Tensor:
    values = torch.as_tensor(weight, dtype=_compute_dtype(flat), device=flat.device)
    if values.ndim and values.shape != labels.shape:
        raise DistillationError(
            f"{name} has shape {tuple(values.shape)}: it is a number, or one for each of {len(labels)} labels"
        )
    return values.detach().expand(len(labels))


class _Fusion(torch.autograd.Function):
    """(total, lm, fusion) of flattened logits; the gradient of the total is made on the way."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        # float16 would lose weights like 1 / (labels of a step), so its gradient waits for them in unit scale.
        largest = 0.0
        if batch.with_gradient and flat.dtype == torch.float16 and len(batch.labels):
            largest = float(torch.cat([batch.lm_weight, batch.fusion_weight]).abs().max())
        ctx.unit = largest if largest > 0 else 1.0
        scaled = replace(batch, lm_weight=batch.lm_weight / ctx.unit, fusion_weight=batch.fusion_weight / ctx.unit)
        gradient = _gradient_memory(flat, batch) if batch.with_gradient else None
        nll, distances = _all_rows(flat, scaled, gradient)
        total = _weighted(nll, batch.lm_weight) + _weighted(distances, batch.fusion_weight)
        sums = nll.sum(dtype=torch.float64), distances.sum(dtype=torch.float64)
        ctx.mark_non_differentiable(*sums)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total.to(_compute_dtype(flat)), *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        scale = float(grad_total) * ctx.unit
        return gradient if scale == 1 else gradient.mul_(scale), None


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Σ values · weights in float64; a weight of zero silences an infinite value."""
    return torch.where(weights != 0, values.double() * weights.double(), 0.0).sum()


def _gradient_memory(flat: Tensor, batch: _Batch) -> Tensor:
    """Memory for the gradient; its rows that no label is predicted from are zero."""
    if not batch.overwrite:
        return torch.empty_like(flat) if batch.where is None else torch.zeros_like(flat)
    gradient = flat.detach()  # shares the version counter: autograd notices if the logits are needed elsewhere
    if batch.where is not None:
        others = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        others[batch.where] = False
        gradient[others] = 0
    return gradient


def _all_rows(flat: Tensor, batch: _Batch, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """Likelihoods and distances, [n] each; the gradient's rows of the labels are written.

    On the CPU chunks run side by side, a worker with its scratch memory and one torch thread for each.
    """
    dtype, n = _compute_dtype(flat), len(batch.labels)
    nll, distances = flat.new_zeros(n, dtype=dtype), flat.new_zeros(n, dtype=dtype)

    def new_worker() -> Callable[[int, int], None]:
        scratch = flat.new_empty(0, flat.shape[1], dtype=dtype)

        def work(start: int, stop: int) -> None:
            nonlocal scratch
            part, where = slice(start, stop), _rows_of(batch.where, start, stop)
            source = flat[where]
            direct = gradient is not None and isinstance(where, slice) and flat.dtype == dtype
            if gradient is not None and direct:
                z = gradient[where]
            else:
                if len(scratch) < len(source):
                    scratch = torch.empty_like(source, dtype=dtype)
                z = scratch[: stop - start]
            some = replace(
                batch,
                labels=batch.labels[part],
                targets=None if batch.targets is None else batch.targets.select(part),
                lm_weight=batch.lm_weight[part],
                fusion_weight=batch.fusion_weight[part],
            )
            nll[part], distances[part] = _chunk(some, source, z)
            if gradient is not None and not direct:
                if isinstance(where, slice):
                    gradient[where].copy_(z)
                else:
                    gradient[where] = z.to(gradient.dtype)

        return work

    on_cpu = flat.device.type == "cpu"
    threads = min(torch.get_num_threads(), MAX_THREADS) if on_cpu else 1
    size = batch.chunk or (CPU_CHUNK if on_cpu else ACCELERATOR_CHUNK)
    each = max(1, min(size // max(flat.shape[1], 1), -(-n // threads)))
    bounds = [(start, min(start + each, n)) for start in range(0, n, each)]
    if min(threads, len(bounds)) > 1:
        side_by_side(new_worker, bounds, min(threads, len(bounds)))
    else:
        work = new_worker()
        for start, stop in bounds:
            work(start, stop)
    return nll, distances


def _rows_of(where: Tensor | None, start: int, stop: int) -> slice | Tensor:
    """The chunk's rows of the logits: a slice where they follow each other, which makes no copy."""
    if where is None:
        return slice(start, stop)
    rows = where[start:stop]
    if rows.device.type == "cpu" and int(rows[-1]) - int(rows[0]) == stop - start - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _chunk(batch: _Batch, source: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Likelihoods and distances [c] of logits ``source`` [c, V]. z: [c, V], for the gradient, perhaps the same."""
    T = batch.temperature
    if batch.targets is None or T == 1:
        if z.data_ptr() != source.data_ptr():
            z.copy_(source)
        return _pass(batch, z)
    nothing = torch.zeros_like(batch.lm_weight)
    plain = source.to(z.dtype, copy=True)
    torch.div(plain, T, out=z)
    _, distances = _pass(replace(batch, lm_weight=nothing, fusion_weight=batch.fusion_weight * T), z)
    nll, _ = _pass(replace(batch, targets=None, fusion_weight=nothing), plain)
    if batch.with_gradient:
        z.add_(plain)
    return nll, distances * (T * T)


def _pass(batch: _Batch, z: Tensor) -> tuple[Tensor, Tensor]:
    """Likelihoods and distances [c], with one exponential per logit. z: logits [c, V], replaced by the gradient."""
    outcomes = _outcomes(batch, z)
    labels, lm_weight, fusion_weight = batch.labels[:, None], batch.lm_weight[:, None], batch.fusion_weight[:, None]
    label = z.gather(1, labels)
    members = batch.targets.members if batch.targets is not None else None
    places = _Ids(outcomes) if members is None else _Groups(outcomes, members)
    listed = places.take(z)
    rest_top = z.amax(dim=1, keepdim=True)
    top = torch.maximum(rest_top, listed.amax(dim=1, keepdim=True))
    rest_top = torch.where(rest_top == -math.inf, 0.0, rest_top)  # nothing is left
    rest_sum = _exp_(z.sub_(rest_top)).sum(dim=1, keepdim=True)
    # Relative to the largest logit, so that float32 keeps its digits when logits are large.
    shares = torch.cat([listed - top, rest_sum.log() + (rest_top - top)], dim=1)
    whole = shares.logsumexp(dim=1, keepdim=True)
    log_p, nll = shares - whole, (whole - (label - top))[:, 0]

    # Where the list leaves the student nothing, there is no such outcome and the target's dust on it is dropped.
    log_q = torch.cat([outcomes.log_q[:, :-1], outcomes.log_q[:, -1:].masked_fill(rest_sum == 0, -math.inf)], 1)
    distance = DISTANCES[batch.loss]
    if outcomes.ranked is None:
        values, slopes = distance(log_q, log_p)
    else:
        values, slopes = with_ranked(distance, log_q, log_p, outcomes.ranked)
    values = torch.where(outcomes.taught, values, 0.0)
    if batch.with_gradient:
        slopes = torch.where(outcomes.taught[:, None], slopes, 0.0)
        p = log_p.exp()
        by_outcome = fusion_weight * (slopes - slopes.sum(1, keepdim=True) * p) + lm_weight * p
        z.mul_(torch.where(rest_sum > 0, by_outcome[:, -1:] / rest_sum, 0.0))
        places.put(z, by_outcome[:, :-1])
        z.scatter_add_(1, labels, -lm_weight)
    return nll, values


def _exp_(z: Tensor) -> Tensor:
    """exp in place."""
    if z.device.type == "cpu" and z.dtype == torch.float32:
        # Half the time of exp_, which is most of all. Its relative error, 1e-7 |z|, is small where exp(z) is not.
        return z.mul_(1 / math.log(2.0)).exp2_()
    return z.exp_()


class _Outcomes(NamedTuple):
    """What the targets of a chunk's c rows are to the student. k >= 1.

    ids: int64 [c, k], anything where not used. used: bool [c, k]. log_q: [c, k + 1], the last one for the rest.
    taught: bool [c]. ranked: bool [c, k + 1], the entries that stand for the student's largest others; None for none.
    """

    ids: Tensor
    used: Tensor
    log_q: Tensor
    taught: Tensor
    ranked: Tensor | None = None


def _outcomes(batch: _Batch, z: Tensor) -> _Outcomes:
    targets = batch.targets
    if targets is None or not targets.ids.shape[1]:
        one = torch.zeros(len(z), 1, dtype=torch.int64, device=z.device)
        log_q = torch.full((len(z), 2), -math.inf, dtype=z.dtype, device=z.device)
        return _Outcomes(one, one.bool(), log_q, one.bool()[:, 0])
    ids, taught = targets.ids, targets.taught
    used, listed = (ids >= 0) & taught[:, None], (ids != -1) & taught[:, None]
    log_q = targets.logprobs.to(z.dtype).masked_fill(~listed, -math.inf)
    log_tail = targets.tail.to(z.dtype).log()
    if batch.truncation == "renormalize":
        some = listed.any(dim=1, keepdim=True)
        log_q = torch.where(some, log_q - log_q.logsumexp(dim=1, keepdim=True), log_q)
        log_tail = torch.full_like(log_tail, -math.inf)
    if batch.loss == "uld_topk":  # the student's largest logits in place of ids: as many as there are entries
        k = min(used.shape[1], z.shape[1])
        log_q = log_q.sort(dim=1, descending=True).values
        log_tail = torch.cat([log_q[:, k:], log_tail[:, None]], dim=1).logsumexp(dim=1)
        used = torch.arange(k, device=z.device) < used.sum(dim=1, keepdim=True)
        ids, log_q = z.topk(k, dim=1).indices, log_q[:, :k]
    outcomes = _Outcomes(ids, used, torch.cat([log_q, log_tail[:, None]], dim=1), taught)
    return _rank_others(z, outcomes, listed & ~used) if batch.loss == "gold" else outcomes


def _rank_others(z: Tensor, outcomes: _Outcomes, others: Tensor) -> _Outcomes:
    """The entries without an id, largest first, each for the largest logit of the student that no other stands for.

    z: [c, V], afterwards as it was. others: bool [c, k]. Where the student has no token left an entry stands for none.
    """
    columns = outcomes.log_q[:, :-1].clamp(min=torch.finfo(z.dtype).min)
    order = columns.masked_fill(~others, -math.inf).argsort(dim=1, descending=True, stable=True)
    ids, used, ranked = (entries.gather(1, order) for entries in (outcomes.ids, outcomes.used, others))
    log_q = torch.cat([outcomes.log_q.gather(1, order), outcomes.log_q[:, -1:]], dim=1)
    places = _Ids(outcomes)
    known = z.gather(1, places.where)
    places.take(z)
    largest = z.topk(min(ids.shape[1], z.shape[1]), dim=1)
    z.scatter_(1, places.where, known)
    ids, used = torch.where(ranked, 0, ids), used.clone()
    k = largest.indices.shape[1]
    ids[:, :k] = torch.where(ranked[:, :k], largest.indices, ids[:, :k])
    used[:, :k] |= ranked[:, :k] & (largest.values > -math.inf)
    return _Outcomes(ids, used, log_q, outcomes.taught, torch.nn.functional.pad(ranked, (0, 1)))


class _Ids:
    """Where the logits of outcomes are that are one token each.

    take: their logits [c, k], -inf where there is no outcome; in z, [c, V], they are -inf afterwards. put: add slopes
    [c, k] to the gradient z.
    """

    def __init__(self, outcomes: _Outcomes) -> None:
        self.used = outcomes.used
        ids = torch.where(outcomes.used, outcomes.ids, -1)
        largest = ids.amax(dim=1, keepdim=True)
        self.some = largest >= 0
        self.where = torch.where(outcomes.used, ids, largest.clamp(min=0))  # unused entries repeat one of the row

    def take(self, z: Tensor) -> Tensor:
        listed = z.gather(1, self.where)
        z.scatter_(1, self.where, torch.where(self.some, -math.inf, listed))
        return torch.where(self.used, listed, -math.inf)

    def put(self, z: Tensor, slopes: Tensor) -> None:
        z.scatter_add_(1, self.where, torch.where(self.used, slopes, 0.0))


class _Groups:
    """As :class:`_Ids`, of outcomes that are several tokens each, among which a slope is shared by probability."""

    def __init__(self, outcomes: _Outcomes, members: Members) -> None:
        self.shape = outcomes.ids.shape
        self.group, at = members.of(torch.where(outcomes.used, outcomes.ids, -1).reshape(-1))
        self.row, self.token = self.group // max(self.shape[1], 1), members.tokens[at]

    def take(self, z: Tensor) -> Tensor:
        self.logits = z[self.row, self.token]
        z[self.row, self.token] = -math.inf
        self.total = log_sums(self.logits, self.group, self.shape.numel())
        return self.total.view(self.shape)

    def put(self, z: Tensor, slopes: Tensor) -> None:
        share = torch.where(self.logits == -math.inf, 0.0, (self.logits - self.total[self.group]).exp())
        z.index_put_((self.row, self.token), slopes.reshape(-1)[self.group] * share, accumulate=True)
