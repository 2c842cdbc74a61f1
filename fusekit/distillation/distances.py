"""What a student is taught, the top of a distribution for each label, and its distances from what the student predicts.

A distance comes with its slopes in the student's log-probabilities. An outcome is an id that the target lists, or
"everything else". The student's log-probabilities are z_o - logsumexp(z), so with slopes g_o = dL/d(log p_o) and G
their sum, the gradient in the student's logit of a listed id is g_o - G p_o, and in the logit of an unlisted id v
(g_tail - G p_tail) times its share p_v / p_tail of the rest. That is all that a distance needs to say of itself;
`fusekit.distillation.losses` knows about the vocabulary.

The losses of stretches of text, each of which may be several tokens to the student, are published baselines. They are
written for autograd, a few stretches at a time, whose softmax is made again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusekit.alignment.rows import MASS_TOLERANCE, NO_ID
from fusekit.errors import DistillationError


@dataclass(frozen=True, eq=False)
class Members:
    """Which of the student's tokens stand for each id of the targets: a sparse matrix [U, V], row after row.

    Attributes:
        starts: int64 [U + 1], where the tokens of each id begin.
        tokens: int64 [m], below V.
        shares: float32 [m], which part of a token's probability counts; None for all of it, where no token is listed
            twice.
    """

    starts: Tensor
    tokens: Tensor
    shares: Tensor | None = None

    def to(self, device: torch.device | str) -> Members:
        """The same on another device."""
        shares = None if self.shares is None else self.shares.to(device)
        return Members(self.starts.to(device), self.tokens.to(device), shares)

    def of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of many ids. ids: int64 [e], -1 for none. Returns entry numbers and places in ``tokens``."""
        known = ids.clamp(min=0)
        first = self.starts[known]
        size = torch.where(ids >= 0, self.starts[known + 1] - first, 0)
        entry = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), size)
        before = torch.cumsum(size, 0) - size
        return entry, first[entry] + torch.arange(len(entry), device=ids.device) - before[entry]


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
        members: which of the student's tokens stand for an id, for the losses ``grouped_kl`` and ``p_kl``.
        chunks: int64 [n], the number of the stretch of text that a label is in, for the losses ``p_kl`` and ``alm``;
            labels of one stretch follow each other and have the same row. -1 for none.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    taught: Tensor
    temperature: float = 1.0
    members: Members | None = None
    chunks: Tensor | None = None

    def _changed(self, change: Callable[[Tensor], Tensor]) -> SparseTargets:
        chunks = None if self.chunks is None else change(self.chunks)
        ids, logprobs, tail, taught = map(change, (self.ids, self.logprobs, self.tail, self.taught))
        return replace(self, ids=ids, logprobs=logprobs, tail=tail, taught=taught, chunks=chunks)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """The same on another device."""
        moved = self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved if self.members is None else replace(moved, members=self.members.to(device))

    def pin_memory(self) -> SparseTargets:
        """The same in page-locked memory; what a ``DataLoader`` with ``pin_memory`` calls."""
        return self._changed(Tensor.pin_memory)

    def select(self, rows: Tensor | slice) -> SparseTargets:
        """Some of the rows. rows: int64 or bool index, or a slice."""
        return self._changed(lambda tensor: tensor[rows])

    def check(self, labels: int, vocabulary: int | None, temperature: float, *, without_ids: bool = False) -> None:
        """Raise DistillationError unless these are targets for a loss over so many labels at a temperature.

        vocabulary: ids are below it; None for ids of another model's vocabulary. without_ids: whether the loss compares
        entries without an id.
        """
        ids, logprobs, tail, taught = self.ids, self.logprobs, self.tail, self.taught
        fits = logprobs.shape == ids.shape == (labels, *ids.shape[1:2]) and tail.shape == taught.shape == (labels,)
        if ids.ndim != 2 or not fits or ids.dtype != torch.int64 or taught.dtype != torch.bool:
            given = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in (ids, logprobs, tail, taught))
            raise DistillationError(
                f"targets of {labels} labels need ids int64 [n, k], logprobs [n, k], tail [n] and taught bool [n], one "
                f"row for every label, not {given}"
            )
        if not math.isclose(self.temperature, temperature, rel_tol=1e-6):
            raise DistillationError(
                f"the targets were captured at temperature {self.temperature:g} and the loss is asked for at "
                f"{temperature:g}: a top-k row cannot be carried to another temperature; capture at {temperature:g}, "
                f"or distil at {self.temperature:g}"
            )
        taught = taught[:, None]
        outside = ids < (NO_ID if without_ids else -1)
        if vocabulary is not None:
            outside |= ids >= vocabulary
        outside &= taught
        in_order = torch.where(taught, ids, -1).sort(dim=1).values
        twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
        # Written so that NaN is wrong too.
        is_share = (tail >= 0) & (tail <= 1 + MASS_TOLERANCE)
        wrong = taught & (((ids != -1) & ~(logprobs <= MASS_TOLERANCE)) | ~is_share[:, None])
        found = torch.stack([outside.any(), twice.any(), wrong.any()]).tolist()  # one wait for the device
        if found[0]:
            row, entry = (int(x) for x in outside.nonzero()[0])
            raise DistillationError(
                f"row {row} of the targets lists token id {int(ids[row, entry])}, but the logits have {vocabulary} "
                f"columns: were the targets projected into another vocabulary? Only the loss gold takes the id {NO_ID}"
            )
        if found[1]:
            row, entry = (int(x) for x in twice.nonzero()[0])
            raise DistillationError(
                f"row {row} of the targets lists token id {int(in_order[row, entry])} twice: add up its probabilities "
                "(fusekit.alignment.rows.merge_entries)"
            )
        if found[2]:
            row = int(wrong.any(dim=1).nonzero()[0])
            raise DistillationError(
                f"row {row} of the targets is not a distribution: logprobs {logprobs[row].tolist()}, tail "
                f"{float(tail[row]):g}; logprobs are natural logarithms, tail is a probability"
            )


Distance = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log_q [n, o], log_p [n, o]) -> (value [n], slopes [n, o]): target and student, -inf for no probability."""

UNSEEN = 2.0**-24
"""What a target's probability of exactly zero counts as in the reverse KL divergence: half of the smallest step below 1
in float32, the most that 1 minus the listed probabilities loses by rounding. Without it one such row is infinite."""

MIXTURE = 0.5
"""The target's weight in the mixture of the Jensen-Shannon divergence."""


def _product(weight: Tensor, logarithm: Tensor) -> Tensor:
    """weight * logarithm with 0 * -inf = 0."""
    return torch.where(weight > 0, weight * logarithm, 0.0)


def cross_entropy(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """-Σ q log p. The D of arXiv 2401.10491."""
    q = log_q.exp()
    return -_product(q, log_p).sum(1), -q


def forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Σ q (log q - log p): the cross-entropy less a constant, so its gradient is the same."""
    q = log_q.exp()
    return (_product(q, log_q) - _product(q, log_p)).sum(1), -q


def reverse_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p (log p - log q); a q of exactly zero counts as `UNSEEN`."""
    p = log_p.exp()
    slopes = _product(p, log_p - torch.where(log_q == -math.inf, math.log(UNSEEN), log_q))
    return slopes.sum(1), slopes  # the slope's other part, p, leaves no gradient


def jensen_shannon(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """β Σ q (log q - log m) + (1 - β) Σ p (log p - log m), m = β q + (1 - β) p, β = 1/2. arXiv 2306.13649."""
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.logaddexp(log_q + math.log(MIXTURE), log_p + math.log1p(-MIXTURE))
    slopes = (1 - MIXTURE) * _product(p, log_p - log_m)
    return (MIXTURE * _product(q, log_q - log_m) + slopes).sum(1), slopes


def absolute_difference(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ |p - q|``; over sorted probabilities the universal logit distillation loss, arXiv 2402.12030."""
    difference = log_p.exp() - log_q.exp()
    return difference.abs().sum(1), log_p.exp() * difference.sign()


def with_ranked(distance: Distance, log_q: Tensor, log_p: Tensor, ranked: Tensor) -> tuple[Tensor, Tensor]:
    """A distance, and the absolute difference in its place of the outcomes that stand by rank. ranked: bool [n, o]."""
    value, slopes = distance(log_q.masked_fill(ranked, -math.inf), log_p.masked_fill(ranked, -math.inf))
    sorted_q, sorted_p = log_q.masked_fill(~ranked, -math.inf), log_p.masked_fill(~ranked, -math.inf)
    difference, of_ranked = absolute_difference(sorted_q, sorted_p)
    return value + difference, slopes + of_ranked


DISTANCES: dict[str, Distance] = {
    "ce": cross_entropy,
    "kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": jensen_shannon,
    "grouped_kl": forward_kl,  # of groups of the student's tokens
    "uld_topk": absolute_difference,
    "gold": forward_kl,  # of the entries that have an id; of the others see `with_ranked`
}
"""The distances by the name that a recipe has for them."""

BLOCK = 2**24
"""Logits of the stretches of text that are done at once."""

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
    listed = log_sums(logs, at[row] * k + entry % k, c * k).view(c, k)
    whole = log_sums((log_p + log_reach.to(log_p.dtype)).logsumexp(1), at, c)  # the means' divisors cancel
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
    rest_a, rest_b = ((-log.expm1()).log() for log in (a, b))
    return ALM_TEMPERATURE * (a.exp() * (a - b) - a.expm1() * (rest_a - rest_b))


def log_sums(logs: Tensor, at: Tensor, size: int) -> Tensor:
    """The log-sum-exp of the numbers that go to one place. logs, at: [m]. Returns [size], -inf where none goes."""
    top = logs.new_full((size,), -math.inf).scatter_reduce(0, at, logs.detach(), "amax")
    top = torch.where(top == -math.inf, 0.0, top)
    return torch.zeros_like(top).index_add(0, at, (logs - top[at]).exp()).log() + top


CHUNK_LOSSES: dict[str, Callable[[Tensor, Tensor, _Chunks], Tensor]] = {"p_kl": p_kl, "alm": alm}
"""The losses of stretches by the name that a recipe has for them: (logits [b, V], labels [b], chunks) -> [c]."""


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
    _, at, counts = torch.unique_consecutive(targets.chunks[there], return_inverse=True, return_counts=True)
    first = there[torch.cumsum(counts, 0) - counts]
    ids, log_q = targets.ids[first], targets.logprobs[first].to(dtype)
    mean_weight = torch.zeros(len(counts), dtype=dtype, device=logits.device).index_add(0, at, weight[there]) / counts
    log_reach = _log_reach(targets.members, ids, logits.shape[1]) if targets.members is not None else None

    def values(logits: Tensor, part: Tensor, labels: Tensor, chunks: _Chunks) -> Tensor:
        scaled = logits[part].to(dtype) / targets.temperature
        return CHUNK_LOSSES[loss](scaled, labels, chunks) * targets.temperature**2

    total, plain = logits.new_zeros((), dtype=dtype), torch.zeros((), dtype=torch.float64, device=logits.device)
    sizes = counts.tolist()
    most = max(BLOCK // logits.shape[1], max(sizes, default=1))
    start = 0
    while start < len(sizes):
        stop, held = start, 0
        while stop < len(sizes) and held + sizes[stop] <= most:
            held += sizes[stop]
            stop += 1
        inside = (at >= start) & (at < stop)
        chunks = _Chunks(at[inside] - start, log_q[start:stop], ids[start:stop], targets.members, log_reach)
        part = there[inside]
        found: Tensor = checkpoint(values, logits, rows[part], labels[part], chunks, use_reentrant=False)
        total = total + (found * mean_weight[start:stop]).sum()
        plain += found.detach().double().sum()
        start = stop
    return total, plain


def _log_reach(members: Members, ids: Tensor, vocabulary: int) -> Tensor:
    """The logarithm of each student token's share in all listed tokens together: float64 [V]."""
    entry, place = members.of(torch.unique(ids[ids >= 0]))
    reach = torch.zeros(vocabulary, dtype=torch.float64, device=ids.device)
    shares = torch.ones_like(entry, dtype=torch.float64) if members.shares is None else members.shares[place].double()
    return reach.index_add_(0, members.tokens[place], shares).log()
