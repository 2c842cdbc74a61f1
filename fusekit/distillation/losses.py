"""Walking over the rows of a batch a few at a time, on several threads, with one result however it is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.alignment.projection import NO_ID
from fusekit.distillation.distances import DISTANCES, Distance, with_ranked
from fusekit.errors import DistillationError
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


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Top-k target distributions of n labels, k entries at most.

    Attributes:
        ids: int64 [n, k], distinct within a row; -1 for no entry, ``NO_ID`` (-2), any number of times, for an entry
            of a token that the student does not have, which only the loss ``gold`` compares.
        logprobs: float32 or float64 [n, k], natural logarithms; ignored where there is no entry.
        tail: float32 or float64 [n], the probability of everything that is not listed.
        taught: bool [n], whether the row teaches at all; False gives no loss, whatever the rest of the row says.
        temperature: what the teacher's logits were divided by before these probabilities were taken.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    taught: Tensor
    temperature: float = 1.0

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.logprobs, self.tail, self.taught

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """The same on another device."""
        ids, logprobs, tail, taught = (t.to(device, non_blocking=non_blocking) for t in self._tensors)
        return SparseTargets(ids, logprobs, tail, taught, self.temperature)

    def pin_memory(self) -> SparseTargets:
        """The same in page-locked memory; what a ``DataLoader`` with ``pin_memory`` calls."""
        ids, logprobs, tail, taught = (t.pin_memory() for t in self._tensors)
        return SparseTargets(ids, logprobs, tail, taught, self.temperature)

    def select(self, rows: Tensor) -> SparseTargets:
        """Some of the rows. rows: int64 or bool index."""
        ids, logprobs, tail, taught = (t[rows] for t in self._tensors)
        return SparseTargets(ids, logprobs, tail, taught, self.temperature)


def check_targets(
    targets: SparseTargets, labels: int, vocabulary: int | None, temperature: float, *, without_ids: bool = False
) -> None:
    """Refuse targets that a loss cannot mean anything with.

    Args:
        targets: what to check.
        labels: n, how many labels they are for.
        vocabulary: ids are below it; None for ids of another model's vocabulary.
        temperature: of the loss.
        without_ids: whether the loss compares entries without an id.

    Raises:
        DistillationError: shapes or dtypes that do not fit, another temperature, ids outside the vocabulary or twice
            in a row, values that are no probabilities.
    """
    ids, logprobs, tail, taught = targets.ids, targets.logprobs, targets.tail, targets.taught
    if ids.ndim != 2 or logprobs.shape != ids.shape or tail.shape != ids.shape[:1] or taught.shape != ids.shape[:1]:
        raise DistillationError(
            "targets need ids [n, k], logprobs [n, k], tail [n] and taught [n], not "
            f"{tuple(ids.shape)}, {tuple(logprobs.shape)}, {tuple(tail.shape)} and {tuple(taught.shape)}"
        )
    if len(ids) != labels:
        raise DistillationError(f"{len(ids)} rows of targets for {labels} labels: there is one row for every label")
    if ids.dtype != torch.int64 or taught.dtype != torch.bool:
        raise DistillationError(f"ids are {ids.dtype} and taught is {taught.dtype}: they must be int64 and bool")
    if not math.isclose(targets.temperature, temperature, rel_tol=1e-6):
        raise DistillationError(
            f"the targets were captured at temperature {targets.temperature:g} and the loss is asked for at "
            f"{temperature:g}: a top-k row cannot be carried to another temperature; capture at {temperature:g}, or "
            f"distil at {targets.temperature:g}"
        )
    _check_values(targets, vocabulary, NO_ID if without_ids else -1)


def _check_values(targets: SparseTargets, vocabulary: int | None, least: int) -> None:
    ids, taught = targets.ids, targets.taught[:, None]
    used = (ids != -1) & taught
    outside = ids < least
    if vocabulary is not None:
        outside = outside | (ids >= vocabulary)
    in_order = torch.where(taught, ids, -1).sort(dim=1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    # Written so that NaN is wrong too.
    wrong = used & ~(targets.logprobs <= 1e-2) | (taught & ~((targets.tail >= 0) & (targets.tail <= 1 + 1e-2))[:, None])
    problems = torch.stack([(outside & taught).any(), twice.any(), wrong.any()]).tolist()  # one wait for the device
    if problems[0]:
        row, entry = (int(x) for x in (outside & taught).nonzero()[0])
        out = "were the targets projected into another vocabulary?"
        if int(ids[row, entry]) == NO_ID:
            out = (
                "that is an entry without an id, which only the loss gold compares; other losses need a vocabulary map"
            )
        raise DistillationError(
            f"row {row} of the targets lists token id {int(ids[row, entry])}, the logits have {vocabulary} columns: "
            f"{out}"
        )
    if problems[1]:
        row, entry = (int(x) for x in twice.nonzero()[0])
        raise DistillationError(
            f"row {row} of the targets lists token id {int(in_order[row, entry])} twice: add up its probabilities "
            "(fusekit.alignment.projection.merge_entries)"
        )
    if problems[2]:
        row = int(wrong.any(dim=1).nonzero()[0])
        raise DistillationError(
            f"row {row} of the targets is no distribution: logprobs {targets.logprobs[row].tolist()}, tail "
            f"{float(targets.tail[row]):g}; logprobs are natural logarithms, tail is a probability"
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Everything but the logits. n labels, none of them ignored; where: their rows, None for all in order."""

    labels: Tensor
    where: Tensor | None
    targets: SparseTargets | None
    lm_weight: Tensor
    fusion_weight: Tensor
    distance: Distance
    loss: str
    truncation: str
    temperature: float
    with_gradient: bool
    overwrite: bool
    chunk: int | None


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


class ChunkOfRows:
    """Some rows of a batch. run() leaves the gradient in the memory that it is given."""

    def __init__(self, batch: Batch, start: int, stop: int, dtype: torch.dtype, unit: float) -> None:
        self.batch, self.part, self.dtype = batch, slice(start, stop), dtype
        self.labels = batch.labels[self.part]
        self.lm_weight = batch.lm_weight[self.part] / unit
        self.fusion_weight = batch.fusion_weight[self.part] / unit

    def run(self, source: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """source: logits [c, V]; z: [c, V] to work in, perhaps the same memory. Returns nll and distances [c]."""
        batch = self.batch
        nothing = torch.zeros_like(self.lm_weight)
        if batch.targets is None or batch.temperature == 1:
            if z.data_ptr() != source.data_ptr():
                z.copy_(source)
            return self._pass(z, self._outcomes(z), self.lm_weight, self.fusion_weight)
        T = batch.temperature
        plain = source.to(self.dtype, copy=True)
        torch.div(plain, T, out=z)
        _, distances = self._pass(z, self._outcomes(z), nothing, self.fusion_weight * T)
        nll, _ = self._pass(plain, _no_outcomes(plain), self.lm_weight, nothing)
        if self.batch.with_gradient:
            z.add_(plain)
        return nll, distances * (T * T)

    def _outcomes(self, z: Tensor) -> _Outcomes:
        targets, batch = self.batch.targets, self.batch
        if targets is None or not targets.ids.shape[1]:
            return _no_outcomes(z)
        ids, taught = targets.ids[self.part], targets.taught[self.part]
        used, listed = (ids >= 0) & taught[:, None], (ids != -1) & taught[:, None]
        log_q = targets.logprobs[self.part].to(self.dtype).masked_fill(~listed, -math.inf)
        log_tail = targets.tail[self.part].to(self.dtype).log()
        if batch.truncation == "renormalize":
            some = listed.any(dim=1, keepdim=True)
            log_q = torch.where(some, log_q - log_q.logsumexp(dim=1, keepdim=True), log_q)
            log_tail = torch.full_like(log_tail, -math.inf)
        if batch.loss == "uld_topk":
            ids, used, log_q, log_tail = _by_rank(z, used, log_q, log_tail)
        outcomes = _Outcomes(ids, used, torch.cat([log_q, log_tail[:, None]], dim=1), taught)
        return _rank_others(z, outcomes, listed & ~used) if batch.loss == "gold" else outcomes

    def _pass(self, z: Tensor, outcomes: _Outcomes, lm_weight: Tensor, fusion_weight: Tensor) -> tuple[Tensor, Tensor]:
        """One exponential per logit. z: [c, V], overwritten. Returns likelihoods and distances [c]."""
        labels = self.labels[:, None]
        rows = _listed(outcomes)
        listed, label = z.gather(1, rows.where), z.gather(1, labels)
        z.scatter_(1, rows.where, torch.where(rows.some, -math.inf, listed))
        listed = torch.where(outcomes.used, listed, -math.inf)
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
        if outcomes.ranked is None:
            values, slopes = self.batch.distance(log_q, log_p)
        else:
            values, slopes = with_ranked(self.batch.distance, log_q, log_p, outcomes.ranked)
        values = torch.where(outcomes.taught, values, 0.0)
        if self.batch.with_gradient:
            slopes = torch.where(outcomes.taught[:, None], slopes, 0.0)
            p = log_p.exp()
            by_outcome = fusion_weight[:, None] * (slopes - slopes.sum(1, keepdim=True) * p) + lm_weight[:, None] * p
            z.mul_(torch.where(rest_sum > 0, by_outcome[:, -1:] / rest_sum, 0.0))
            z.scatter_add_(1, rows.where, torch.where(outcomes.used, by_outcome[:, :-1], 0.0))
            z.scatter_add_(1, labels, -lm_weight[:, None])
        return nll, values


class _Listed(NamedTuple):
    """where: int64 [c, k], a valid id everywhere; unused entries repeat one of the row. some: bool [c, 1], any used."""

    where: Tensor
    some: Tensor


def _listed(outcomes: _Outcomes) -> _Listed:
    ids = torch.where(outcomes.used, outcomes.ids, -1)
    largest = ids.amax(dim=1, keepdim=True)
    return _Listed(torch.where(outcomes.used, ids, largest.clamp(min=0)), largest >= 0)


def _exp_(z: Tensor) -> Tensor:
    """exp in place."""
    if z.device.type == "cpu" and z.dtype == torch.float32:
        # Half the time of exp_, which is most of all. Its relative error, 1e-7 |z|, is small where exp(z) is not.
        return z.mul_(1 / math.log(2.0)).exp2_()
    return z.exp_()


def _no_outcomes(z: Tensor) -> _Outcomes:
    one = torch.zeros(len(z), 1, dtype=torch.int64, device=z.device)
    log_q = torch.full((len(z), 2), -math.inf, dtype=z.dtype, device=z.device)
    return _Outcomes(one, one.bool(), log_q, one.bool()[:, 0])


def _by_rank(z: Tensor, used: Tensor, log_q: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's largest logits in place of ids: as many as the target has entries, or the vocabulary."""
    k = min(used.shape[1], z.shape[1])
    log_q = log_q.sort(dim=1, descending=True).values
    log_tail = torch.cat([log_q[:, k:], log_tail[:, None]], dim=1).logsumexp(dim=1)
    used = torch.arange(k, device=z.device) < used.sum(dim=1, keepdim=True)
    return z.topk(k, dim=1).indices, used, log_q[:, :k], log_tail


def _rank_others(z: Tensor, outcomes: _Outcomes, others: Tensor) -> _Outcomes:
    """The entries without an id, largest first, each for the largest logit of the student that no other stands for.

    z: [c, V], afterwards as it was. others: bool [c, k]. Where the student has no token left an entry stands for none.
    """
    columns = outcomes.log_q[:, :-1].clamp(min=torch.finfo(z.dtype).min)
    order = columns.masked_fill(~others, -math.inf).argsort(dim=1, descending=True, stable=True)
    ids, used, ranked = (entries.gather(1, order) for entries in (outcomes.ids, outcomes.used, others))
    log_q = torch.cat([outcomes.log_q.gather(1, order), outcomes.log_q[:, -1:]], dim=1)
    rows = _listed(outcomes)
    known = z.gather(1, rows.where)
    z.scatter_(1, rows.where, torch.where(rows.some, -math.inf, known))
    largest = z.topk(min(ids.shape[1], z.shape[1]), dim=1)
    z.scatter_(1, rows.where, known)
    ids, used = torch.where(ranked, 0, ids), used.clone()
    k = largest.indices.shape[1]
    ids[:, :k] = torch.where(ranked[:, :k], largest.indices, ids[:, :k])
    used[:, :k] |= ranked[:, :k] & (largest.values > -math.inf)
    return _Outcomes(ids, used, log_q, outcomes.taught, torch.nn.functional.pad(ranked, (0, 1)))


def compute_dtype(flat: Tensor) -> torch.dtype:
    return torch.float64 if flat.dtype == torch.float64 else torch.float32


__all__ = ["IGNORE", "LOSSES", "TRUNCATIONS", "FusionLoss", "SparseTargets", "fusion_loss"]

IGNORE = -100
"""The ignored label, as everywhere in transformers."""

LOSSES = tuple(DISTANCES)
TRUNCATIONS = ("tail", "renormalize")


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
            ``temperature``; None for the likelihood alone.
        positions: int64 [n], increasing: which rows of the logits, flattened to [-1, V], predict the labels. None: all
            of them, in order. Passing whole logits and positions spares the copy that slicing makes.
        loss: ``ce``, ``kl``, ``reverse_kl``, ``js``, ``uld_topk``, ``gold`` (docs/losses.md).
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
        size = None if loss == "uld_topk" else flat.shape[1]
        check_targets(targets, rows, size, temperature, without_ids=loss == "gold")
        if targets.ids.device != flat.device:
            raise DistillationError(f"targets are on {targets.ids.device}, logits on {flat.device}: use targets.to()")
    by_label = _weight(lm_weight, "lm_weight", rows, flat), _weight(fusion_weight, "fusion_weight", rows, flat)
    kept = labels != IGNORE
    if not bool(kept.all()):
        where = (torch.arange(rows, device=flat.device) if where is None else where)[kept]
        labels, by_label = labels[kept], (by_label[0][kept], by_label[1][kept])
        targets = None if targets is None else targets.select(kept)
    with_gradient = torch.is_grad_enabled() and flat.requires_grad
    batch = Batch(
        labels,
        where,
        targets,
        *by_label,
        distance,
        loss,
        truncation,
        temperature,
        with_gradient,
        overwrite_logits,
        chunk,
    )
    total, lm, fusion = _Fusion.apply(flat, batch)  # type: ignore[no-untyped-call]
    taught = 0 if targets is None else int(targets.taught.sum())
    return FusionLoss(total, lm, fusion, len(labels), taught)


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
    if loss not in DISTANCES:
        raise DistillationError(f"there is no loss {loss!r}: it is one of {', '.join(DISTANCES)}")
    if truncation not in TRUNCATIONS:
        raise DistillationError(f"there is no truncation {truncation!r}: it is one of {', '.join(TRUNCATIONS)}")
    if (loss, truncation) == ("reverse_kl", "renormalize"):
        raise DistillationError(
            "reverse_kl with renormalize is infinite: the renormalised target is zero where the student is not; use "
            "truncation tail"
        )
    return DISTANCES[loss]


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
