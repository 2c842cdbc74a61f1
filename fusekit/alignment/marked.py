"""Ends of the tokens of a text with special tokens at known places, as a chat template renders it.

A tokenizer cuts the text at its added tokens first and reads each stretch between them by itself: normalised alone,
with a dummy space of its own. So the ends are found stretch by stretch, and a special token's are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken

from fusekit.alignment.ends import ends_of
from fusekit.alignment.surfaces import Surfaces
from fusekit.errors import AlignmentError
from fusekit.types import IntArray, TokenizedText

# What the tokenizers' own \s matches; Python's also takes the separators from U+001C to U+001F.
_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005"
    "\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


class Mark(NamedTuple):
    """A special token in a text: its characters ``[start, stop)`` there and its id."""

    start: int
    stop: int
    id: int


def marked_ends(
    ids: list[int],
    at: Sequence[int],
    text: str,
    marks: Sequence[Mark],
    surfaces: Surfaces,
    *,
    offsets: Callable[[], IntArray],
) -> TokenizedText:
    """Byte ends of an encoded text with special tokens in it.

    Args:
        ids: the tokens of the whole text.
        at: position in ``ids`` of each mark.
        text: the text.
        marks: in order.
        surfaces: of the tokenizer.
        offsets: gives the character spans ``[n, 2]`` of ``ids`` in ``text``; called only where spelling fails.

    Returns:
        The tokens; white space that a special token swallows, or that is in no token at all, belongs to the token
        before it, as an interval.

    Raises:
        AlignmentError: the ends cannot be known; names the tokenizer and the reason.
    """
    data = text.encode()
    if b"".join([surfaces.of[id_] for id_ in ids]) == data:
        ends = np.cumsum(surfaces.lengths[ids])
        return TokenizedText(np.array(ids, np.int64), ends, ends)
    highs, lows = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    added = surfaces.view.added_tokens
    spans: list[IntArray] = []

    def offsets_once() -> IntArray:
        if not spans:
            spans.append(offsets())
        return spans[0]

    first, start, consumed, previous = 0, 0, 0, None
    for mark, position in [*zip(marks, at, strict=True), (None, len(ids))]:
        before, after = start, start + len(_left_of(text[start : mark.start if mark else None], mark, added))
        if previous is not None and added[previous.id].rstrip:
            before = after - len(text[start:after].lstrip(_SPACE))
        skipped = len(text[start:before].encode())
        if previous is not None:
            highs[first - 1] = consumed + skipped
        consumed += skipped
        stretch, begin, end = text[before:after], before, after
        inside = _stretch(
            ids[first:position],
            stretch,
            surfaces,
            offsets=lambda f=first, p=position, b=begin, e=end: (  # type: ignore[misc]
                _within(offsets_once()[f:p], b, e)
            ),
        )
        size = len(stretch.encode())
        lows[first:position], highs[first:position] = inside.lows + consumed, inside.ends + consumed
        if size and not len(inside) and first:  # all of it is in no token
            highs[first - 1] = consumed + size
        consumed += size
        if mark is None:
            break
        consumed += len(text[after : mark.stop].encode())
        lows[position] = highs[position] = consumed
        first, start, previous = position + 1, mark.stop, mark
    if len(ids) and highs[-1] != len(data) and highs[-1] != consumed:
        raise AlignmentError(f"{surfaces.name}: the tokens of {text[:40]!r} do not reach its end")
    exact = np.array_equal(lows, highs)
    return TokenizedText(np.array(ids, np.int64), highs, highs if exact else lows)


def _left_of(stretch: str, mark: Mark | None, added: dict[int, AddedToken]) -> str:
    """The stretch without the white space that the special token after it swallows."""
    return stretch.rstrip(_SPACE) if mark is not None and added[mark.id].lstrip else stretch


def _within(spans: IntArray, begin: int, end: int) -> IntArray:
    return np.clip(spans, begin, end) - begin


def _stretch(ids: list[int], text: str, surfaces: Surfaces, *, offsets: Callable[[], IntArray]) -> TokenizedText:
    if not ids or not text:  # a dummy space before nothing has no width
        nothing = np.zeros(len(ids), np.int64)
        return TokenizedText(np.array(ids, np.int64), nothing, nothing)
    return ends_of(ids, text, surfaces, lambda: (ids, offsets()))
