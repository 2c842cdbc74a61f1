"""Which vocabulary entries begin with given bytes, for many rows of entries at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from fusekit.alignment.alignment import TokenAlignment
from fusekit.alignment.surfaces import Surfaces
from fusekit.alignment.vocabulary_map import VocabularyMap
from fusekit.errors import AlignmentError
from fusekit.types import BoolArray, IntArray, TokenizedText


def begins_with(surfaces: Surfaces, token: IntArray, length: IntArray, ids: IntArray) -> BoolArray:
    """Whether each entry begins as the surface of another does.

    Args:
        surfaces: of the vocabulary.
        token: int64 [w], the entries to compare with, at least ``length`` bytes long.
        length: int64 [w], how many bytes to compare.
        ids: int64 [w, k], the entries; -1 and ids beyond the vocabulary begin with nothing.
    """
    flat, starts, lengths = surfaces.flat
    known = (ids >= 0) & (ids < len(lengths))
    at = np.where(known, ids, 0)
    keep = known & (lengths[at] >= length[:, None])
    for offset in range(int(length.max(initial=0))):
        rows = np.flatnonzero((length > offset) & keep.any(axis=1))
        if not len(rows):
            break
        wanted = flat[starts[token[rows]] + offset][:, None]
        keep[rows] &= flat[np.minimum(starts[at[rows]] + offset, len(flat) - 1)] == wanted
    return keep


def beginning_in_text(alignment: TokenAlignment, surfaces: Surfaces, before: IntArray, consumed: IntArray) -> IntArray:
    """How many bytes of its surface a source token has given once ``consumed`` bytes of its text are read.

    Args:
        alignment: of the text.
        surfaces: of the source.
        before: int64 [w], the source positions before the tokens.
        consumed: int64 [w], bytes of text since the end of ``before``.

    Returns:
        int64 [w]: ``consumed``; one more for a word of WordPiece, which stands for a space that belongs to the token
        before it in the text; -1 where the surface is not the text, since a normaliser changed it or it is unknown.
    """
    flat, starts, lengths = surfaces.flat
    text = np.frombuffer(alignment.text.encode(), np.uint8)
    token, origin = alignment.source_ids[before + 1], alignment.source.ends[before]
    first = flat[np.minimum(starts[token], len(flat) - 1)]
    skipped = ((first == ord(" ")) & (text[origin] != ord(" "))).astype(np.int64)
    clear = lengths[token] >= consumed + skipped
    for offset in range(int(consumed.max(initial=0))):
        reach = np.flatnonzero((consumed > offset) & clear)
        there = starts[token[reach]] + skipped[reach] + offset
        clear[reach] = flat[there] == text[origin[reach] + offset]
    return np.where(clear, consumed + skipped, -1)


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
WITHIN = {
    Case.SAME: Case.WITHIN_SAME,
    Case.LONGER: Case.WITHIN_LONGER,
    Case.CLOSES: Case.WITHIN_CLOSES,
    Case.CROSSES: Case.WITHIN_CROSSES,
    Case.NO_ROW: Case.UNLINKED,
}


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
    if m:
        # Unlinked: the last source token that ends before this position. Uncertain ends on either side give none.
        certain = np.flatnonzero(source.lows <= source.ends)
        before = np.searchsorted(source.ends[certain], pivot.ends, side="right") - 1
        inside = certain[np.maximum(before, 0)] if len(certain) else np.zeros(n, np.int64)
        within = ~linked & (before >= 0) & (pivot.lows <= pivot.ends) if len(certain) else np.zeros(n, bool)
        within &= source.ends[inside] < pivot.lows
        base = np.where(within, inside, base)
    base[base + 1 >= m] = -1
    cases = np.where(linked, Case.NO_ROW, Case.UNLINKED).astype(np.int64)
    spelled, overhang = base + 1, np.zeros(n, np.int64)
    usable = np.flatnonzero(base[:-1] >= 0) if n else np.zeros(0, np.int64)
    if len(usable):
        found = _compare_next(pivot, source, usable, base[usable])
        cases[usable], spelled[usable], overhang[usable] = found
        for case, within_case in WITHIN.items():
            cases[~linked & (cases == case)] = within_case
    if n:
        cases[-1] = Case.LAST
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


RULES: dict[str, Callable[[bytes, list[bytes], bool], bool]] = {
    "em": lambda pivot, source, _: source == [pivot],
    "mined": lambda pivot, source, mapped: source == [pivot] or (len(source) == 1 and mapped),
    "ms": lambda pivot, source, _: (
        pivot.endswith(source[0]) or source[0].endswith(pivot)
        if len(source) == 1
        else b"".join(source).removeprefix(b" ") == pivot.removeprefix(b" ")
    ),
}
"""Whether a pivot token (its surface) takes the row of the last of the source tokens that are aligned with it (their
surfaces). The last argument: whether the only one maps to it."""


def source_positions(alignment: TokenAlignment, vocabulary_map: VocabularyMap, rule: str) -> IntArray:
    """The source position whose row each pivot position takes by a rule of the papers, or -1: int64 [n].

    Args:
        alignment: of either method; the rules are meant for ``dtw``.
        vocabulary_map: made with the same tokenizers; ``mined`` asks it where a source token maps.
        rule: ``em`` and ``mined`` (arXiv 2401.10491): where A(i) is one token and it equals the pivot's, for ``mined``
            also where it maps to it. ``ms`` (arXiv 2408.07990): 1-1 and n-1 where one of the two tokens ends with the
            other; 1-n where the pieces spell the pivot's token, the row of the last.

    Raises:
        AlignmentError: unknown rule.
    """
    if rule not in RULES:
        raise AlignmentError(f"unknown position rule {rule!r}: there are {', '.join(sorted(RULES))}")
    pivot = [vocabulary_map.pivot.of[i] for i in alignment.pivot_ids.tolist()]
    source = [vocabulary_map.source.of[i] for i in alignment.source_ids.tolist()]
    targets = vocabulary_map.entries[0][alignment.source_ids, 0]
    first, stop = alignment.matched
    rows = np.full(len(first), -1, np.int64)
    for i in np.flatnonzero(stop > first).tolist():
        last = int(stop[i]) - 1
        if RULES[rule](pivot[i], source[first[i] : last + 1], bool(targets[last] == alignment.pivot_ids[i])):
            rows[i] = last
    return rows
