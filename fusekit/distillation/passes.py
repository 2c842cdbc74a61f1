"""A chunk of rows of logits: likelihoods, distances and the gradient, forward only, in the memory that is given.

The listed outcomes are gathered and taken out of a row; one exponential per logit gives the log-sum-exp of the rest
and, times one number per row, its part of the gradient; the outcomes' slopes give the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.devices import side_by_side
from fusekit.distillation.distances import Distance, with_ranked
from fusekit.distillation.targets import Members, SparseTargets

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
        label = z.gather(1, labels)
        members = self.batch.targets.members if self.batch.targets is not None else None
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
            places.put(z, by_outcome[:, :-1])
            z.scatter_add_(1, labels, -lm_weight[:, None])
        return nll, values


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
        top = self.logits.new_full((self.shape.numel(),), -math.inf)
        top.scatter_reduce_(0, self.group, self.logits, "amax")
        finite = torch.where(top == -math.inf, 0.0, top)
        sums = torch.zeros_like(top).index_add_(0, self.group, (self.logits - finite[self.group]).exp())
        self.total = sums.log() + finite
        return self.total.view(self.shape)

    def put(self, z: Tensor, slopes: Tensor) -> None:
        share = torch.where(self.logits == -math.inf, 0.0, (self.logits - self.total[self.group]).exp())
        z.index_put_((self.row, self.token), slopes.reshape(-1)[self.group] * share, accumulate=True)


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
