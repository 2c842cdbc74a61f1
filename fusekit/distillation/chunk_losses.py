"""Losses that compare stretches of text, each of which may be several tokens to the student: published baselines.

Written for autograd, a few stretches at a time, whose softmax is made again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusekit.distillation.targets import Members, SparseTargets
from fusekit.errors import DistillationError

BLOCK = 2**24
"""Logits of the stretches that are done at once."""

ALM_TEMPERATURE = 100.0
ALM_EPSILON = 1e-6
"""arXiv 2503.20083: what likelihoods are raised to one part of, and what keeps them below 1."""


class _Chunks(NamedTuple):
    """Some chunks of text. at: int64 [b], the chunk of each label; log_q, ids: [c, k], their rows; -1 for no entry."""

    at: Tensor
    log_q: Tensor
    ids: Tensor
    members: Members | None
    log_reach: Tensor | None


def p_kl(logits: Tensor, labels: Tensor, chunks: _Chunks) -> Tensor:  # noqa: ARG001 - one signature for all
    """Σ_u q(u) (log q(u) - log p(u)) over the listed source tokens u, of the means over a chunk. float [c].

    p is the student's distribution projected into the source's vocabulary, by the members' shares, and renormalised
    over all tokens that any row of the batch lists; q is renormalised over those that its row lists. X-Token's
    projection KL (arXiv 2605.21699).
    """
    at, log_q, ids, members, log_reach = chunks
    if members is None or members.shares is None or log_reach is None:
        raise DistillationError("the loss p_kl needs the shares of the student's tokens in those of the targets")
    c, k = ids.shape
    log_p = logits.log_softmax(1)
    entry, place = members.of(ids[at].reshape(-1))
    row = entry // k
    logs = log_p[row, members.tokens[place]] + members.shares[place].to(log_p.dtype).log()
    listed = _log_sums(logs, at[row] * k + entry % k, c * k).view(c, k)
    whole = _log_sums((log_p + log_reach.to(log_p.dtype)).logsumexp(1), at, c)  # the means' divisors cancel
    log_q = log_q.masked_fill(ids < 0, -math.inf)
    log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return torch.where(log_q > -math.inf, log_q.exp() * (log_q - listed + whole[:, None]), 0.0).sum(1)


def alm(logits: Tensor, labels: Tensor, chunks: _Chunks) -> Tensor:
    """The divergence of two coins, the likelihoods of a chunk to the power of 1/τ, times τ; τ = 100. float [c].

    Approximate likelihood matching (arXiv 2503.20083) with the binary divergence. Times τ the gradient keeps its size:
    for large τ the value is A log(A / S) + S - A, with A and S the nats of the teacher and of the student.
    """
    own = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    student = torch.zeros_like(chunks.log_q[:, 0]).index_add(0, chunks.at, own)
    a, b = (log / ALM_TEMPERATURE - ALM_EPSILON for log in (chunks.log_q[:, 0], student))
    return ALM_TEMPERATURE * (a.exp() * (a - b) - a.expm1() * (_log_rest(a) - _log_rest(b)))


def _log_rest(log: Tensor) -> Tensor:
    """log(1 - exp(log)), for log < 0."""
    return (-log.expm1()).log()


def _log_sums(logs: Tensor, at: Tensor, size: int) -> Tensor:
    """The log-sum-exp of the numbers that go to one place. logs, at: [m]. Returns [size], -inf where none goes."""
    top = logs.new_full((size,), -math.inf).scatter_reduce(0, at, logs.detach(), "amax")
    top = torch.where(top == -math.inf, 0.0, top)
    return torch.zeros_like(top).index_add(0, at, (logs - top[at]).exp()).log() + top


CHUNK_LOSSES: dict[str, Callable[[Tensor, Tensor, _Chunks], Tensor]] = {"p_kl": p_kl, "alm": alm}
"""By the name that a recipe has for them: (logits [b, V], labels [b], chunks) -> [c]."""


def chunk_loss(  # noqa: PLR0917 - what a loss is of
    loss: str, logits: Tensor, rows: Tensor, labels: Tensor, targets: SparseTargets, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted sum of a loss over all chunks, and the plain one, in nats.

    A chunk counts once, with the mean weight of its labels.

    Args:
        loss: a name in :data:`CHUNK_LOSSES`.
        logits: float [N, V].
        rows: int64 [n], which rows predict the labels.
        labels: int64 [n].
        targets: n rows with ``chunks``; p_kl: ids of the source, with ``members``. alm: the logarithm of the teacher's
            likelihood of the chunk, as the only entry.
        weight: float [n].

    Raises:
        DistillationError: targets without chunks.
    """
    if targets.chunks is None:
        raise DistillationError(f"the loss {loss} compares chunks of text, and the targets have none")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    there = (targets.taught & (targets.chunks >= 0)).nonzero()[:, 0]
    _, at, sizes = torch.unique_consecutive(targets.chunks[there], return_inverse=True, return_counts=True)
    first = there[torch.cumsum(sizes, 0) - sizes]
    ids, log_q = targets.ids[first], targets.logprobs[first].to(dtype)
    mean_weight = torch.zeros(len(sizes), dtype=dtype, device=logits.device).index_add(0, at, weight[there]) / sizes
    log_reach = _log_reach(targets.members, ids, logits.shape[1]) if targets.members is not None else None

    def values(logits: Tensor, part: Tensor, labels: Tensor, chunks: _Chunks) -> Tensor:
        scaled = logits[part].to(dtype) / targets.temperature
        return CHUNK_LOSSES[loss](scaled, labels, chunks) * targets.temperature**2

    total, plain = logits.new_zeros((), dtype=dtype), torch.zeros((), dtype=torch.float64, device=logits.device)
    most = max(BLOCK // logits.shape[1], int(sizes.max()) if len(sizes) else 1)
    for start, stop in _blocks(sizes.tolist(), most):
        inside = (at >= start) & (at < stop)
        chunks = _Chunks(at[inside] - start, log_q[start:stop], ids[start:stop], targets.members, log_reach)
        part = there[inside]
        found: Tensor = checkpoint(values, logits, rows[part], labels[part], chunks, use_reentrant=False)
        total = total + (found * mean_weight[start:stop]).sum()
        plain += found.detach().double().sum()
    return total, plain


def _blocks(sizes: list[int], most: int) -> list[tuple[int, int]]:
    """Runs of chunks that have at most so many labels."""
    bounds, held = [0], 0
    for number, size in enumerate(sizes):
        if held and held + size > most:
            bounds.append(number)
            held = 0
        held += size
    return list(zip(bounds, [*bounds[1:], len(sizes)], strict=True)) if sizes else []


def _log_reach(members: Members, ids: Tensor, vocabulary: int) -> Tensor:
    """The logarithm of each student token's share in all listed tokens together: float64 [V]."""
    entry, place = members.of(torch.unique(ids[ids >= 0]))
    reach = torch.zeros(vocabulary, dtype=torch.float64, device=ids.device)
    shares = torch.ones_like(entry, dtype=torch.float64) if members.shares is None else members.shares[place].double()
    return reach.index_add_(0, members.tokens[place], shares).log()
