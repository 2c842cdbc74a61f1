"""The arithmetic of a few rows of the vocabulary: likelihood, distance, and the gradient in place of the logits.

The listed ids are taken out of the row, so that what is left of it is the complement: its log-sum-exp is exact however
little it holds (never the logarithm of 1 minus a sum), and its gradient is its own softmax times one number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.distillation.losses_outcomes import Distance, with_ranked
from fusekit.distillation.losses_targets import SparseTargets


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
