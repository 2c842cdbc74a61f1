"""Which tokens of two tokenisations end at the same place: the exact alignment.

A pivot token and a source token are linked when both models have consumed exactly the same bytes once they have read
it. Of several tokens with one end on one side (a lone dummy space, a token of no width), only the last links.
"""

from __future__ import annotations

import numpy as np

from fusekit.types import IntArray, TokenizedText


def link_ends(pivot_ends: IntArray, source_ends: IntArray) -> IntArray:
    """Link positions by equal ends. O(n + m) up to a logarithm, vectorised.

    Args:
        pivot_ends: int64 [n], non-decreasing; any coordinate that both sides share, bytes of the text above all.
        source_ends: int64 [m], non-decreasing.

    Returns:
        int64 [n]: the last source position with the same end, or -1; of equal pivot ends only the last has one.
    """
    if not len(pivot_ends) or not len(source_ends):
        return np.full(len(pivot_ends), -1, np.int64)
    at: IntArray = np.searchsorted(source_ends, pivot_ends, side="right") - 1
    linked = source_ends[np.maximum(at, 0)] == pivot_ends
    linked[:-1] &= pivot_ends[:-1] != pivot_ends[1:]
    return np.where(linked & (at >= 0), at, -1)


def link(pivot: TokenizedText, source: TokenizedText) -> IntArray:
    """Link the tokens of two tokenisations of one text.

    Ends are intervals (see :mod:`fusekit.alignment.ends`): two boundaries are the same where their intervals meet.

    Returns:
        int64 [n]: the source position that each pivot position is linked to, or -1.
    """
    if pivot.exact and source.exact:
        return link_ends(pivot.ends, source.ends)
    linked = np.full(len(pivot), -1, np.int64)
    pivot_certain = np.flatnonzero(pivot.lows <= pivot.ends)
    source_certain = np.flatnonzero(source.lows <= source.ends)
    if not len(pivot_certain) or not len(source_certain):
        return linked
    lows, highs = source.lows[source_certain], source.ends[source_certain]
    # Intervals are in order and at most touch, so the last that begins before this one ends is the only candidate.
    at = np.searchsorted(lows, pivot.ends[pivot_certain], side="right") - 1
    meets = (at >= 0) & (highs[np.maximum(at, 0)] >= pivot.lows[pivot_certain])
    rows, at = pivot_certain[meets], at[meets]
    last = np.ones(len(at), bool)
    last[:-1] = at[:-1] != at[1:]
    linked[rows[last]] = source_certain[at[last]]
    return linked


def overlaps(pivot: TokenizedText, source: TokenizedText, source_at: IntArray) -> tuple[IntArray, IntArray]:
    """For every pivot token the source tokens that share bytes with it, within its group: a contiguous range.

    Returns ``(first, stop)``, int64 [n] each; tokens without width take the neighbours that end where they do.
    """
    pivot_starts = np.concatenate([[0], pivot.ends])[:-1].astype(np.int64)
    source_starts = np.concatenate([[0], source.ends])[:-1].astype(np.int64)
    first = np.searchsorted(source.ends, pivot_starts, side="right")
    stop = np.searchsorted(source_starts, pivot.ends, side="left")
    low, high = group_range(source_at, len(source))
    first = np.clip(first, low, np.maximum(high - 1, low))
    return first, np.clip(np.maximum(stop, first + 1), first, high)


def group_range(source_at: IntArray, m: int) -> tuple[IntArray, IntArray]:
    """The source tokens ``[first, stop)`` of the group that each pivot token is in, int64 [n] each."""
    n = len(source_at)
    closed = np.flatnonzero(source_at >= 0)
    group = np.searchsorted(closed, np.arange(n), side="left")
    stops = np.append(source_at[closed] + 1, m)
    firsts = np.concatenate([[0], stops[:-1]])
    return firsts[group], stops[group]


def groups(source_at: IntArray, m: int) -> list[tuple[slice, slice]]:
    """The stretches between consecutive links: ``(pivot slice, source slice)``, in order.

    Together they hold every token of both sides once (where the ends of the text are linked, as they are unless one
    side has no token at all).
    """
    closed = np.flatnonzero(source_at >= 0)
    if not len(closed):
        return []
    pivot_stops, source_stops = (closed + 1).tolist(), (source_at[closed] + 1).tolist()
    pivot_starts, source_starts = [0, *pivot_stops[:-1]], [0, *source_stops[:-1]]
    # Tokens after the last link have no common end to close a group; they go with the last one.
    pivot_stops[-1], source_stops[-1] = len(source_at), m
    return [
        (slice(a, b), slice(c, d))
        for a, b, c, d in zip(pivot_starts, pivot_stops, source_starts, source_stops, strict=True)
    ]
