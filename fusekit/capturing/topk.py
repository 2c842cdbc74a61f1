"""Logits to top-k rows: exact, in float32, with the mass that a row leaves out and the label's log-probability."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusekit.capturing.settings import Selection

# Ids are compared in groups: the k best ids are all in the k groups with the highest maxima. 128 is a vector register's
# worth of loads, and leaves a thousand maxima of a vocabulary of 152 k to choose from.
GROUP = 128

# On a CPU a few rows at a time stay in the cache for all passes over them.
CACHED_BYTES = 4 << 20

_LOW_32_BITS = (1 << 32) - 1


class Scores(NamedTuple):
    """What n rows of logits say about n labels, on the device of the logits.

    Attributes:
        ids: int64 [n, k], the most probable first, equal ones in the order of their ids, -1 where there are fewer.
        logprobs: float64 [n, k], natural logarithms, -inf where there is no entry.
        tail: float64 [n], the probability of every id that is not listed; 0 when all are, never negative.
        actual: float64 [n], the log-probability of each label.
        nll: float64 [n], minus the log-probability of each label at temperature 1.
        finite: bool [n], whether the row is a distribution that gives its label some probability: False for NaN or
            infinite logits.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    tail: torch.Tensor
    actual: torch.Tensor
    nll: torch.Tensor
    finite: torch.Tensor


def score_logits(
    logits: torch.Tensor, labels: torch.Tensor, selection: Selection, invalid: torch.Tensor | None = None
) -> Scores:
    """Top-k entries, remaining mass and label log-probabilities of rows of logits.

    Args:
        logits: [n, V] of any floating dtype; computed with in float32. Overwritten if it is float32.
        labels: int64 [n], below V.
        selection: what to keep.
        invalid: int64 ids that are no tokens (rows that only pad the matrix): they get no mass.

    Returns:
        :class:`Scores`. The remaining mass is summed over what is left out, not 1 minus a sum, so it keeps its relative
        precision (about 1e-6) however small it is.
    """
    n, vocabulary = logits.shape
    step = max(1, CACHED_BYTES // (4 * vocabulary)) if logits.device.type == "cpu" else max(n, 1)
    pieces = [
        _score_piece(logits[start : start + step], labels[start : start + step], selection, invalid)
        for start in range(0, max(n, 1), step)
    ]
    return Scores(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _score_piece(
    logits: torch.Tensor, labels: torch.Tensor, selection: Selection, invalid: torch.Tensor | None
) -> Scores:
    x = logits.float()
    if invalid is not None and invalid.numel():
        x.index_fill_(1, invalid, -torch.inf)
    values, ids = top_entries(x, selection.k)
    best = values[:, :1].clone()
    label = x.gather(1, labels[:, None]) - best
    values = values - best
    x.sub_(best)
    at_one = None
    if selection.temperature != 1:
        at_one = label[:, 0].double() - x.exp().sum(1).double().log()
        for scaled in (x, values, label):
            scaled.div_(selection.temperature)
    # One pass of exponentials gives the normaliser, and without the listed ids the tail.
    rest = x.exp_().scatter_(1, ids, 0.0).sum(1).double()
    values = values.double()
    total = values.exp().sum(1) + rest
    logprobs = values - total.log()[:, None]
    actual = label[:, 0].double() - total.log()
    nll = -actual if at_one is None else -at_one
    finite = torch.isfinite(total) & torch.isfinite(actual) & torch.isfinite(nll)
    return _truncated(Scores(ids, logprobs, rest / total, actual, nll, finite), selection)


def _truncated(scores: Scores, selection: Selection) -> Scores:
    """The scores without entries beyond ``keep_mass`` and entries that have no mass, k wide."""
    n, width = scores.ids.shape
    mass = scores.logprobs.exp()
    kept = scores.logprobs > -torch.inf
    tail = scores.tail
    if selection.keep_mass < 1:
        kept &= mass.cumsum(1) - mass < selection.keep_mass
        tail = tail + mass.masked_fill(kept, 0.0).sum(1)
    ids = scores.ids.masked_fill(~kept, -1)
    logprobs = scores.logprobs.masked_fill(~kept, -torch.inf)
    if width < selection.k:
        missing = (n, selection.k - width)
        ids = torch.cat([ids, ids.new_full(missing, -1)], 1)
        logprobs = torch.cat([logprobs, logprobs.new_full(missing, -torch.inf)], 1)
    return scores._replace(ids=ids, logprobs=logprobs, tail=tail)


def top_entries(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest values of each row, falling, equal ones by rising id: the same on every device.

    x: float32 [n, V]. Returns (values float32, ids int64), [n, min(k, V)] each. A row with NaN gets any ids.

    A pass of maxima over groups of ids replaces the search through all of them: if an id is among the k first, fewer
    than k groups can come before its own, by maximum and then by place.
    """
    n, vocabulary = x.shape
    k = min(k, vocabulary)
    whole = vocabulary // GROUP
    if whole < 2 * k:
        everything = torch.arange(vocabulary, device=x.device).expand(n, vocabulary)
        return _first(x, everything, k)
    maxima = x[:, : whole * GROUP].view(n, whole, GROUP).amax(2)
    if whole * GROUP < vocabulary:
        maxima = torch.cat([maxima, x[:, whole * GROUP :].amax(1, keepdim=True)], 1)
    groups = torch.arange(maxima.shape[1], device=x.device).expand(n, maxima.shape[1])
    _, chosen = _first(maxima, groups, k)
    candidates = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=x.device)).flatten(1)
    outside = candidates >= vocabulary
    values = x.gather(1, candidates.clamp(max=vocabulary - 1)).masked_fill_(outside, -torch.inf)
    found, ids = _first(values, candidates, k)
    # Only in a row of NaN, which sorts below -inf when its sign bit is set, can a place past the end come first.
    return found, ids.clamp_(max=vocabulary - 1)


def _first(values: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k first of [n, m] values with ids, by falling value and rising id."""
    # A float's bits as an integer in the same order (the lower bits of negative ones are reversed; + 0.0 makes -0 a 0),
    # then the id: no two keys are equal, so any algorithm finds the same ones.
    bits = (values + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (order << 32) | (_LOW_32_BITS - ids)
    first = keys.topk(k, dim=1).values
    order = (first >> 32).int()
    found = torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)
    return found, _LOW_32_BITS - (first & _LOW_32_BITS)
