"""How a pivot position comes by its row: the cases of a position, told by the tokens alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from fusekit.types import IntArray, TokenizedText

if TYPE_CHECKING:  # it imports rapidfuzz
    from fusekit.alignment.alignment import TokenAlignment


class Case(IntEnum):
    """How a pivot position comes by its row. t is the pivot's next token, s the source's.

    The cases of a link, where both have consumed the same bytes:

    * ``SAME``: s and t are the same bytes. The row is projected, s goes to t.
    * ``LONGER``: s is longer than t. The row is projected, s goes to t, its first piece here.
    * ``CLOSES``: s is shorter, and a source token ends where t ends. t gets the product of the probabilities of the
      source tokens that spell it; what is left of s goes to the tail; the other entries are projected.
    * ``CROSSES``: s is shorter and t ends inside a later source token. As ``CLOSES``, and the last factor is the
      probability of the entries that begin with what is left of t, in the row before that token.
    * ``NO_ROW``: none of these is certain.

    The same where the pivot stands inside a source token, after conditioning the row before that token on the bytes
    consumed since: ``WITHIN_SAME`` to ``WITHIN_CROSSES``; ``UNLINKED`` where that gives no row. ``LAST`` is the text's
    last token, which has no label. Without conditioning there is neither ``CROSSES`` nor any ``WITHIN``.
    """

    LAST = 0
    SAME = 1
    LONGER = 2
    CLOSES = 3
    CROSSES = 4
    NO_ROW = 5
    WITHIN_SAME = 6
    WITHIN_LONGER = 7
    WITHIN_CLOSES = 8
    WITHIN_CROSSES = 9
    UNLINKED = 10
    ONE_HOT = 11  # no row by the cases above, a one-hot on the label by request, as in the papers
    RULE = 12  # a row taken by one of the papers' rules, whatever the next tokens are


HAS_ROW = frozenset(Case) - {Case.LAST, Case.NO_ROW, Case.UNLINKED}
_WITHIN = Case.WITHIN_SAME - Case.SAME
"""From a case of a link, ``SAME`` to ``NO_ROW``, to the one inside a source token."""


@dataclass(frozen=True, eq=False)
class Steps:
    """The plan of a row: which source row each pivot position takes and how; made from the tokens alone.

    Attributes:
        cases: int64 [n].
        base: int64 [n], the source position whose row is used, -1 for none.
        spelled: int64 [n], the last source position whose token lies within t (CLOSES, CROSSES), else ``base + 1``.
        consumed: int64 [n], bytes consumed since the end of ``base`` (0 at links).
        overhang: int64 [n], bytes of t that token ``spelled + 1`` begins with (0 but for CROSSES).
    """

    cases: IntArray
    base: IntArray
    spelled: IntArray
    consumed: IntArray
    overhang: IntArray


def plan_rows(alignment: TokenAlignment, conditioning: bool = True) -> Steps:
    """Sort the pivot's positions into cases.

    Args:
        alignment: of method ``span``.
        conditioning: whether rows are conditioned on the first bytes of a token, at either end of t.
    """
    pivot, source = alignment.pivot, alignment.source
    n, m = len(pivot), len(source)
    linked = alignment.source_at >= 0
    base = alignment.source_at.copy()
    certain = np.flatnonzero(source.lows <= source.ends)
    if len(certain):
        # Unlinked: the last source token that ends before this position. Uncertain ends on either side give none.
        before = np.searchsorted(source.ends[certain], pivot.ends, side="right") - 1
        inside = certain[np.maximum(before, 0)]
        within = ~linked & (before >= 0) & (pivot.lows <= pivot.ends) & (source.ends[inside] < pivot.lows)
        base = np.where(within, inside, base)
    base[base + 1 >= m] = -1
    cases = np.full(n, int(Case.NO_ROW), np.int64)
    spelled, overhang = base + 1, np.zeros(n, np.int64)
    usable = np.flatnonzero(base[:-1] >= 0)
    if len(usable):
        found = _compare_next(pivot, source, usable, base[usable])
        cases[usable], spelled[usable], overhang[usable] = found
    cases = np.where(linked, cases, cases + _WITHIN)
    cases[-1:] = Case.LAST
    if not conditioning:
        cases[linked & (cases == Case.CROSSES)] = Case.NO_ROW
        cases[~linked & (cases != Case.LAST)] = Case.UNLINKED
    used = np.isin(cases, list(HAS_ROW))
    base, overhang = np.where(used, base, -1), np.where(used, overhang, 0)
    consumed = np.where(linked | (base < 0), 0, pivot.ends - source.ends[np.maximum(base, 0)] if m else 0)
    return Steps(cases, base, spelled, consumed, overhang)


def _compare_next(
    pivot: TokenizedText, source: TokenizedText, at: IntArray, base: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Cases, ``spelled`` and ``overhang`` of positions ``at`` with rows ``base``, as if they were linked."""
    t_low, t_high = pivot.lows[at + 1], pivot.ends[at + 1]
    s_low, s_high = source.lows[base + 1], source.ends[base + 1]
    certain = np.flatnonzero(source.lows <= source.ends)
    # The last source token whose end is not beyond the end of t.
    inner = certain[np.maximum(np.searchsorted(source.lows[certain], t_high, side="right") - 1, 0)]
    sure = (s_low <= s_high) & (t_low <= t_high)
    shorter = sure & (inner > base)
    crossing = np.minimum(inner + 1, len(source) - 1)
    crosses = shorter & (crossing > inner) & (source.lows[crossing] > t_high)
    crosses &= source.lows[crossing] <= source.ends[crossing]
    conditions = [
        sure & (s_low <= t_high) & (s_high >= t_low),
        sure & (s_low > t_high),
        shorter & (source.ends[inner] >= t_low),
        crosses & (source.ends[inner] < t_high),
    ]
    kind = np.select(conditions, [Case.SAME, Case.LONGER, Case.CLOSES, Case.CROSSES], Case.NO_ROW)
    spelled = np.where(np.isin(kind, [Case.CLOSES, Case.CROSSES]), inner, base + 1)
    return kind, spelled, np.where(kind == Case.CROSSES, t_high - source.ends[inner], 0)
