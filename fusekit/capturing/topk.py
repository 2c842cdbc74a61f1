"""Logits to top-k rows: exact, in float32, with the mass that a row leaves out and the label's log-probability.

One pass over blocks of the vocabulary, so that no more than a block of float32 logits is there at a time: of each group
of ids it keeps the maximum and the sum of exponentials, and the logits of the k best groups, which hold the k best ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from fusekit.capturing.settings import Selection

GROUP = 128
"""Ids of a group: a vector register's worth of loads, and a thousand maxima of a vocabulary of 152 k."""

CACHED_BYTES = 8 << 20
"""Of a block of float32 logits on a CPU, which then stays in the cache for all that is done with it."""

_PIECE_BYTES = 512 << 10
"""Of its exponentials at a time."""

_HELD = 3
"""Times k groups whose logits are held, on average over the rows, before those that are no longer among the best go."""

_RANGE = 64.0
"""Of exponents: sums of exponentials of up to this much above their shift stay far from float32's overflow."""

_LOWEST = -3e38
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


def block_width(rows: int, chunk_bytes: int) -> int:
    """Ids of a block of float32 logits of so many rows, a multiple of :data:`GROUP`."""
    return max(1, chunk_bytes // (4 * GROUP * max(rows, 1))) * GROUP


def group_bytes(vocabulary: int, k: int) -> int:
    """Bytes that :func:`score_blocks` holds for a row beside a block: maxima and sums, and the best groups' logits."""
    groups = -(-vocabulary // GROUP)
    return 4 * (2 * groups + GROUP * min((2 * _HELD + 1) * k, 2 * groups))


def score_logits(
    logits: torch.Tensor, labels: torch.Tensor, selection: Selection, invalid: torch.Tensor | None = None
) -> Scores:
    """:func:`score_blocks` of logits [n, V] of any floating dtype."""
    n, vocabulary = logits.shape
    step = min(block_width(n, CACHED_BYTES), vocabulary)
    space = torch.empty(n * step, device=logits.device)

    def blocks() -> Iterator[torch.Tensor]:
        for start in range(0, vocabulary, step):
            part = logits[:, start : start + step]
            yield space[: part.numel()].view(part.shape).copy_(part)

    return score_blocks(blocks(), labels, selection, invalid)


def score_blocks(
    blocks: Iterable[torch.Tensor], labels: torch.Tensor, selection: Selection, invalid: torch.Tensor | None = None
) -> Scores:
    """Top-k entries, remaining mass and label log-probabilities of rows of logits.

    Args:
        blocks: float32 [n, width] each, side by side the logits [n, V]; all but the last a multiple of :data:`GROUP`
            wide. A block is overwritten, and no longer needed when the next is asked for.
        labels: int64 [n], below V.
        selection: what to keep.
        invalid: int64, sorted: ids that are no tokens (rows that only pad the matrix); they get no mass.

    Returns:
        :class:`Scores`. The remaining mass is summed over what is left out, not 1 minus a sum, so it keeps its relative
        precision (about 1e-6) however small it is.
    """
    sums = _Sums(labels, selection.temperature)
    best = _Best(len(labels), selection.k, labels.device)
    start = 0
    for block in blocks:
        x, stop = block, start + block.shape[1]
        if invalid is not None:
            outside = invalid[(invalid >= start) & (invalid < stop)]
            if len(outside):
                x.index_fill_(1, outside - start, -torch.inf)
        if x.shape[1] % GROUP:
            x = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP), value=-torch.inf)
        groups = x.view(len(x), -1, GROUP)
        maxima = groups.amax(2)
        best.add(groups, maxima)
        sums.add(x, maxima.amax(1), start)
        start = stop
    return _truncated(_scores(best, sums, selection.k), selection)


class _Sums:
    """Sums of exponentials of logits / temperature above a shift per row, by group; and the labels' logits."""

    def __init__(self, labels: torch.Tensor, temperature: float) -> None:
        n, device = len(labels), labels.device
        self.labels, self.temperature = labels, temperature
        self.shift = torch.full((n,), _LOWEST, device=device)
        self.groups: list[torch.Tensor] = []
        self._space: torch.Tensor | None = None
        self.at_one = torch.zeros(n, dtype=torch.float64, device=device)
        self.label = torch.full((n,), -torch.inf, device=device)

    def add(self, x: torch.Tensor, highest: torch.Tensor, start: int) -> None:
        """x: a block [n, width] of the ids from ``start`` on. highest: its maxima [n]."""
        inside = (self.labels >= start) & (self.labels < start + x.shape[1])
        at = inside.nonzero()[:, 0]
        self.label[at] = x[at, self.labels[at] - start]
        risen = highest > self.shift + _RANGE * min(self.temperature, 1.0)
        if risen.any():
            shift = torch.where(risen, highest, self.shift)
            change = self.shift.double() - shift.double()
            self.at_one *= change.exp()
            factor = (change / self.temperature).exp().float()[:, None]
            for sums in self.groups:
                sums.mul_(factor)
            self.shift = shift
        sums = x.new_empty((len(x), x.shape[1] // GROUP))
        step = max(1, _PIECE_BYTES // (4 * x.shape[1])) if x.device.type == "cpu" else max(len(x), 1)
        if self._space is None or self._space.shape[1] != x.shape[1]:
            # A tensor of its own each time would be fresh pages, which take longer than the exponentials.
            self._space = x.new_empty((min(step, len(x)), x.shape[1]))
        for first in range(0, len(x), step):
            rows = slice(first, first + step)
            piece = x[rows]
            above = torch.sub(piece, self.shift[rows, None], out=self._space[: len(piece)])
            if self.temperature != 1:
                self.at_one[rows] += above.exp().sum(1, dtype=torch.float64)
                above.div_(self.temperature)
            torch.sum(above.exp_().view(len(above), -1, GROUP), 2, out=sums[rows])
        self.groups.append(sums)

    def above(self, logits: torch.Tensor) -> torch.Tensor:
        """float64: logits [n, ...] less the shift, divided by the temperature."""
        return (logits.double() - self.shift.double().view(-1, *[1] * (logits.ndim - 1))) / self.temperature


class _Best:
    """The logits of the k best groups of ids of each row, among those seen so far.

    If an id is among the k best, fewer than k groups can come before its own, by maximum and then by place. A group
    below the k-th best maximum at some time is not among the best at the end.
    """

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self.n, self.k = n, k
        self.threshold = torch.full((n, 1), -torch.inf, device=device)
        self._maxima: list[torch.Tensor] = []
        self._held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._count = self._groups = 0

    def add(self, groups: torch.Tensor, maxima: torch.Tensor) -> None:
        """A block [n, g, GROUP] and its maxima [n, g]."""
        rows, places = (~(maxima < self.threshold)).nonzero(as_tuple=True)  # NaN too, wherever it sorts
        self._held.append(
            (rows, places + self._groups, groups.flatten(0, 1).index_select(0, rows * maxima.shape[1] + places))
        )
        self._maxima.append(maxima)
        self._count += len(rows)
        self._groups += maxima.shape[1]
        if self._count > _HELD * self.k * self.n:
            self.settle()

    def settle(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the k best groups alone: their logits [n, g, GROUP], and which they are [n, g]."""
        maxima = torch.cat(self._maxima, 1)
        self._maxima = [maxima]
        every = torch.arange(self._groups, device=maxima.device).expand(self.n, self._groups)
        best, chosen = _first(maxima, every, min(self.k, self._groups))
        if chosen.shape[1] == self.k:
            self.threshold = best[:, -1:]
        chosen = chosen.sort(1).values
        rows, places, logits = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        kept = torch.zeros_like(maxima, dtype=torch.bool).scatter_(1, chosen, True)[rows, places].nonzero()[:, 0]
        # Held in the order of blocks, and of rows within one: stable, the groups of a row are then in their order.
        kept = kept[rows[kept].argsort(stable=True)]
        logits = logits.index_select(0, kept)
        self._held = [(rows[kept], places[kept], logits)]
        self._count = len(kept)
        return logits.view(self.n, -1, GROUP), chosen


def _scores(best: _Best, sums: _Sums, k: int) -> Scores:
    """What the blocks amount to, before ``keep_mass``; as wide as there are ids, at most k."""
    logits, groups = best.settle()
    n = len(logits)
    offsets = torch.arange(GROUP, device=logits.device)
    values, places = _first(
        logits.flatten(1), torch.arange(logits[0].numel() if n else 0, device=logits.device).expand(n, -1), k
    )
    ids = (groups[:, :, None] * GROUP + offsets).flatten(1).gather(1, places)
    # The listed ids' own groups are summed again without them: what is left keeps its precision.
    others = torch.cat(sums.groups, 1).scatter_(1, groups, 0.0).sum(1, dtype=torch.float64)
    near = sums.above(logits.flatten(1)).exp_().scatter_(1, places, 0.0).sum(1)
    rest = others + near
    above, label = sums.above(values), sums.above(sums.label)
    total = above.exp().sum(1) + rest
    actual = label - total.log()
    nll = -actual
    if sums.temperature != 1:
        nll = sums.at_one.log() - label * sums.temperature
    finite = torch.isfinite(total) & torch.isfinite(actual) & torch.isfinite(nll)
    return Scores(ids, above - total.log()[:, None], rest / total, actual, nll, finite)


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


def _first(values: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k first of float32 [n, m] values with ids, by falling value and rising id: the same on every device."""
    # A float's bits as an integer in the same order (the lower bits of negative ones are reversed; + 0.0 makes -0 a 0),
    # then the id: no two keys are equal, so any algorithm finds the same ones.
    bits = (values + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (order << 32) | (_LOW_32_BITS - ids)
    first = keys.topk(min(k, keys.shape[1]), dim=1).values
    order = (first >> 32).int()
    found = torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)
    return found, _LOW_32_BITS - (first & _LOW_32_BITS)
