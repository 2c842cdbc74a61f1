"""From tokens with byte ends in a rendered text to tokens with their place in the contents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fusekit.alignment.arrays import BoolArray, IntArray
from fusekit.alignment.ends import TokenizedText
from fusekit.representation.tokenized_row import Part, TokenizedRow


class Stretch(NamedTuple):
    """A stretch of a rendered text.

    Attributes:
        text: what is encoded.
        id: of the control token that it is, or -1.
        content: whether it is a message's content.
        message: which message it belongs to.
        closes: whether it is the end of that message's turn.
        label: whether it is learnt.
    """

    text: str
    id: int
    content: bool
    message: int
    closes: bool
    label: bool


class Content(NamedTuple):
    """Where a content, or a part of it, stands, in bytes.

    Attributes:
        message: its number.
        start, stop: in the rendered text.
        first, last: which of the content's bytes stand there; both -1 where what stands there is no part of it.
        size: bytes of the content up to the next part, those that the template drops included.
        low: where the part before it ended, 0 for the first.
    """

    message: int
    start: int
    stop: int
    first: int
    last: int
    size: int
    low: int = 0


def coordinates(
    key: str,
    tokens: TokenizedText,
    at: IntArray,
    stretches: Sequence[Stretch],
    contents: Sequence[Content],
    *,
    learn_all: bool,
) -> TokenizedRow:
    """A row's tokens with their coordinates.

    Args:
        key: the row's.
        tokens: of the whole rendered text, T of them.
        at: int64, position of the token of each stretch that is a control token.
        stretches: of the rendered text, in order.
        contents: in order.
        learn_all: whether every token but the first is a label.
    """
    n = len(tokens)
    highs, lows = tokens.ends, tokens.lows
    uncertain = lows > highs
    # Where the token's own text ends: not what was dropped after it.
    reach = np.where(uncertain, highs, lows)
    starts = np.concatenate([[0], highs[:-1]]).astype(np.int64) if n else np.zeros(0, np.int64)
    stretches = [stretch for stretch in stretches if stretch.text]
    stops = np.cumsum([len(stretch.text.encode()) for stretch in stretches], dtype=np.int64)
    message = _stretch_messages(starts, reach, stops, stretches)
    part = np.full(n, int(Part.TEMPLATE), np.int64)
    ends, bottoms = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for content in contents:
        _place(content, starts, reach, tokens, message=message, part=part, ends=ends, bottoms=bottoms)
    closing = [stretch.closes for stretch in stretches if stretch.id >= 0]
    known = {content.message for content in contents if content.first >= 0}
    for position, closes in zip(at.tolist(), closing, strict=True):
        if closes and int(message[position]) in known:
            part[position] = Part.END
    labels = np.ones(n, bool) if learn_all else _labels(starts, reach, stops, stretches)
    labels[:1] = False
    exact = np.array_equal(bottoms, ends)
    return TokenizedRow(key, tokens.ids, message, part, ends, ends if exact else bottoms, labels)


def _stretch_messages(starts: IntArray, reach: IntArray, stops: IntArray, stretches: Sequence[Stretch]) -> IntArray:
    """The message of the stretch in which each token ends; one without width belongs to what follows it."""
    if not len(stops):
        return np.zeros(len(starts), np.int64)
    of = np.array([stretch.message for stretch in stretches], np.int64)
    inside = np.searchsorted(stops, reach, side="left")
    empty = reach <= starts
    inside[empty] = np.searchsorted(stops, reach[empty], side="right")
    messages: IntArray = of[np.minimum(inside, len(of) - 1)]
    return np.maximum.accumulate(messages)


def _place(
    content: Content,
    starts: IntArray,
    reach: IntArray,
    tokens: TokenizedText,
    *,
    message: IntArray,
    part: IntArray,
    ends: IntArray,
    bottoms: IntArray,
) -> None:
    """Write the coordinates of the tokens of one message."""
    highs, lows = tokens.ends, tokens.lows
    begin, stop, first, size = content.start, content.stop, content.first, content.size
    mine = message == content.message
    after = mine & (starts >= stop) & ~((reach <= begin) & (starts < begin))
    ends[after] = bottoms[after] = size
    if first < 0:
        return
    inside = (reach > begin) & (starts < stop) if stop > begin else np.zeros(len(starts), bool)
    message[inside], part[inside] = content.message, Part.CONTENT
    certain = inside & (lows <= highs)
    ends[inside] = np.where(highs[inside] >= stop, size, highs[inside] - begin + first)
    bottoms[inside] = np.where(lows[inside] >= stop, content.last, lows[inside] - begin + first)
    unsure = inside & ~certain
    bottoms[unsure] = ends[unsure] + 1
    before = np.flatnonzero(mine & ~inside & ~after)
    if len(before):  # the last token before the content has what is dropped in front of it
        opener = before[-1]
        dropped = max(int(highs[opener]) - begin, 0)
        ends[opener] = size if stop == begin and size else first + dropped
        bottoms[opener] = content.low


def _labels(starts: IntArray, reach: IntArray, stops: IntArray, stretches: Sequence[Stretch]) -> BoolArray:
    """Tokens that reach into a stretch that is learnt, or stand without width where one begins."""
    learnt = np.array([stretch.label for stretch in stretches], bool)
    edges = np.diff(np.concatenate([[False], learnt, [False]]).astype(np.int64))
    bounds = np.concatenate([[0], stops])
    labels = np.zeros(len(starts), bool)
    for begin, end in zip(bounds[np.flatnonzero(edges == 1)], bounds[np.flatnonzero(edges == -1)], strict=True):
        labels |= (starts < end) & ((reach > begin) | (starts >= begin))
    return labels
