"""A causal language model's forward in two halves, hidden states and blocks of logits, and their top-k rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fusekit.settings import Selection

ULPS = 64
"""A head over fewer rows adds up its products in another order: so many last places of the largest logit."""

PADDING_BOUND, HALF_PADDING_BOUND = 0.02, 0.5
"""Nats by which padding may change the log-probabilities of an example, in float32 and in 16 bits: rounding."""


class OtherForwardError(Exception):
    """A model's forward is not a decoder followed by a head."""


class SplitForward:
    """The two halves of a model whose ``forward`` calls one decoder and reads ``last_hidden_state`` of its output.

    For the first half the decoder hands on no position at all, so that the head computes nothing (for a single one it
    would read all of its weights); for the second the decoder is replaced by chosen hidden states, and a linear head by
    a product with some of its rows. What the model does before and after its head (scales, caps) stays the model's.

    Args:
        model: a transformers causal language model.
        float32_head: whether :meth:`blocks` multiplies the weights with float32 sums and output whatever their dtype.
    """

    def __init__(self, model: Any, float32_head: bool = True) -> None:
        self.model, self.float32_head = model, float32_head
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.head = _linear_head(model)
        self._output_class: type[Any] = tuple

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, T, H] of a batch. ids, mask: int64 [B, T], mask 0 for padding, which is on the right.

        Raises OtherForwardError when the model's forward does not pass through its decoder once.
        """
        kept: list[torch.Tensor] = []
        run = self.decoder.forward

        def keep_all(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            self._output_class = type(output)
            kept.append(output[0])
            return self._output(output[0][:1, :0])

        with _replaced_forward(self.decoder, keep_all):
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        if len(kept) != 1 or kept[0].shape[:2] != ids.shape:
            raise OtherForwardError(f"{type(self.model).__name__} does not pass through its decoder once")
        return kept[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of hidden states [n, H], in the model's own dtype. Follows a call of :meth:`hidden`."""
        # The decoder looks at no ids here: the model's forward only passes them on.
        ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        with _replaced_forward(self.decoder, lambda *_args, **_kwargs: self._output(hidden[None])):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0]

    def blocks(self, hidden: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
        """The logits of hidden states [n, H], for ``width`` ids at a time: float32 [n, width], gone with the next."""
        assert self.head is not None
        product = _Product(self.head, len(hidden), width, self.float32_head)
        hidden = product.prepared(hidden)
        for start in range(0, len(self.head.weight), width):
            product.start = start
            with _replaced_forward(self.head, product):
                logits = self.logits(hidden)
            yield product.wide(logits)

    def _output(self, hidden: torch.Tensor) -> Any:
        return (hidden,) if self._output_class is tuple else self._output_class(last_hidden_state=hidden)


class _Product:
    """Some rows of a linear head's weights times hidden states, into memory that is used again for the next rows."""

    def __init__(self, head: torch.nn.Linear, n: int, width: int, float32: bool) -> None:
        self.weight, self.bias, self.n, self.width, self.start = head.weight, head.bias, n, width, 0
        half = self.weight.dtype != torch.float32
        self.float32 = float32 and half
        self._cuda = self.weight.device.type == "cuda"
        self._out = self._space(n, torch.float32)
        self._narrow = self._space(n, self.weight.dtype) if half and not float32 else None
        # A CPU multiplies with float32 output what is float32; products of bfloat16 are as exact and as fast.
        self._rows = self._space(self.weight.shape[1], torch.float32) if self.float32 and not self._cuda else None

    def _space(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        width = min(self.width, len(self.weight))
        return torch.empty(rows * width, dtype=dtype, device=self.weight.device)

    def prepared(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.to(self.weight.device)
        return hidden.float() if self._rows is not None else hidden

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.weight[self.start : self.start + self.width]
        x = hidden.reshape(self.n, -1)
        out = self._out[: self.n * len(weight)].view(self.n, -1)
        if self._rows is not None:
            rows = self._rows[: weight.numel()].view(weight.shape).copy_(weight)
            with _bfloat16_products(self.weight.dtype == torch.bfloat16):
                torch.mm(x.float(), rows.T, out=out)
        elif self.float32:
            out = torch.mm(x.to(weight.dtype), weight.T, out_dtype=torch.float32)
        elif self._narrow is not None:
            out = torch.mm(x, weight.T, out=self._narrow[: out.numel()].view(out.shape))
        else:
            torch.mm(x, weight.T, out=out)
        if self.bias is not None:
            out += self.bias[self.start : self.start + len(weight)]
        return out[None]

    def wide(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.dtype == torch.float32:
            return logits
        return self._out[: logits.numel()].view(logits.shape).copy_(logits)


def _linear_head(model: Any) -> torch.nn.Linear | None:
    """The model's head if it is a plain linear layer whose weights are here as floating-point numbers."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # A forward of its own is that of a hook, which brings weights that are kept elsewhere.
    if type(head) is not torch.nn.Linear or "forward" in head.__dict__ or head.weight.device.type == "meta":
        return None
    return head if head.weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else None


@contextmanager
def _bfloat16_products(wanted: bool) -> Iterator[None]:
    """Let a CPU round the factors of float32 products to bfloat16, which changes none that was bfloat16 before."""
    settings: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - torch sets it when it is imported
    before = settings.fp32_precision
    if wanted:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def plain_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] by one call of the model. ids, mask: int64 [B, T], padding on the right."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def split_forward(model: Any, ids: torch.Tensor, float32_head: bool = True) -> tuple[SplitForward | None, str]:
    """The split forward of a model if it gives the logits of the plain one on a sample, else None and why not.

    Its head is None if the model computes other logits from blocks of it. ids: int64 [B, T], a small batch without
    padding; its last row is tried as if padded.
    """
    mask = torch.ones_like(ids)
    mask[-1, ids.shape[1] // 2 :] = 0
    plain = plain_logits(model, ids, mask)[mask.bool()]
    try:
        split = SplitForward(model, float32_head)
        if split.decoder is model:
            return None, f"{type(model).__name__} has no decoder of its own"
        hidden = split.hidden(ids, mask)[mask.bool()]
        if split.head is not None and not _in_blocks(split, hidden, plain):
            split.head = None
        if split.head is not None or _agree(plain, split.logits(hidden)):
            return split, ""
    except (OtherForwardError, AttributeError, TypeError, IndexError, KeyError, ValueError) as error:
        return None, " ".join(str(error).split())
    return None, f"{type(model).__name__} computes other logits from its hidden states than in one forward"


def _in_blocks(split: SplitForward, hidden: torch.Tensor, plain: torch.Tensor) -> bool:
    try:
        width = -(-plain.shape[1] // 3)
        return _agree(plain, torch.cat([block.clone() for block in split.blocks(hidden, width)], 1))
    except (RuntimeError, TypeError, IndexError, ValueError):  # it does more with its logits than with single ones
        return False


def _agree(plain: torch.Tensor, found: torch.Tensor) -> bool:
    precision = ULPS * max(torch.finfo(plain.dtype).eps, torch.finfo(found.dtype).eps)
    plain, found = plain.float(), found.float()
    scale = float(torch.nan_to_num(plain, nan=0.0, posinf=0.0, neginf=0.0).abs().max())
    return plain.shape == found.shape and torch.allclose(
        plain, found, rtol=precision, atol=precision * scale, equal_nan=True
    )


def padding_error(model: Any, ids: torch.Tensor) -> float:
    """Nats by which padding changes the most probable ids of an example, 0 within rounding.

    A model that ignores the attention mask, and is not causal, reads it. ids: int64 [2, T], without padding.
    """
    length, mask = max(1, ids.shape[1] // 3), torch.ones_like(ids)
    mask[1, length:] = 0
    alone = plain_logits(model, ids[1:, :length], mask[1:, :length])
    beside = plain_logits(model, ids, mask)[1:, :length].float().log_softmax(2)
    best, at = alone.float().log_softmax(2).topk(min(10, alone.shape[2]), dim=2)
    error = float(torch.nan_to_num(beside.gather(2, at) - best, nan=0.0, posinf=0.0, neginf=0.0).abs().max())
    return error if error > (PADDING_BOUND if alone.dtype == torch.float32 else HALF_PADDING_BOUND) else 0.0


@contextmanager
def _replaced_forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let ``module.forward`` be ``function`` while the body runs; hooks and device placement stay as they are."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


GROUP = 128
"""Ids of a group: a vector register's worth of loads, and a thousand maxima of a vocabulary of 152 k."""

CACHED_BYTES = 8 << 20
"""Bytes of a block of float32 logits on a CPU, which then stays in the cache for all that is done with it."""

_PIECE_BYTES = 512 << 10
"""Bytes of its exponentials at a time."""

_HELD = 3
"""Times k groups whose logits are held, on average over the rows, before those that are no longer among the best go."""

_RANGE = 64.0
"""Range of exponents: sums of exponentials of up to this much above their shift stay far from float32's overflow."""

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
