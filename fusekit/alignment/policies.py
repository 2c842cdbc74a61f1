"""Which source row teaches which pivot position: the exact rule, and those of the papers by name.

The papers decide by the strings of aligned tokens, not by the text consumed, so their rules also take rows that answer
another question than the pivot's; they are here for fidelity studies. A rule gives, per pivot position, the source
position whose row is used, or -1: there the papers put a one-hot on the next label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusekit.alignment.alignment import TokenAlignment
from fusekit.alignment.vocabulary_map import VocabularyMap
from fusekit.errors import AlignmentError
from fusekit.types import IntArray


@dataclass(frozen=True, eq=False)
class _Matched:
    """An alignment as the papers see it: A(i), the source positions of pivot position i, and the tokens' surfaces."""

    first: IntArray
    stop: IntArray
    pivot_ids: IntArray
    source_ids: IntArray
    pivot: list[bytes]
    source: list[bytes]
    mapped: IntArray  # the pivot id that each source token maps to, -1 for none

    def unmarked(self, side: list[bytes], at: int) -> bytes:
        return side[at].removeprefix(b" ")


def source_positions(alignment: TokenAlignment, vocabulary_map: VocabularyMap, rule: str = "exact") -> IntArray:
    """The source position whose row each pivot position takes, or -1: int64 [n].

    Args:
        alignment: of either method; the papers' rules are meant for ``dtw``.
        vocabulary_map: made with the same tokenizers; ``mined`` asks it where a source token maps.
        rule: ``exact``: where both have consumed the same text. ``em`` and ``mined`` (arXiv 2401.10491): where A(i) is
            one token and it equals the pivot's, for ``mined`` also where it maps to it. ``ms`` (arXiv 2408.07990): 1-1
            and n-1 where one of the two tokens ends with the other; 1-n where the pieces spell the pivot's token, the
            row of the last.

    Raises:
        AlignmentError: unknown rule.
    """
    if rule == "exact":
        return np.array(alignment.source_at)
    if rule not in RULES:
        raise AlignmentError(f"unknown position rule {rule!r}: there are exact, {', '.join(sorted(RULES))}")
    pivot, source = vocabulary_map.pivot, vocabulary_map.source
    targets, _ = vocabulary_map.entries
    matched = _Matched(
        *alignment.matched,
        alignment.pivot_ids,
        alignment.source_ids,
        [pivot.of[i] for i in alignment.pivot_ids.tolist()],
        [source.of[i] for i in alignment.source_ids.tolist()],
        targets[alignment.source_ids, 0],
    )
    return RULES[rule](matched)


def _em(matched: _Matched) -> IntArray:
    return _single(matched, lambda i, j: matched.pivot[i] == matched.source[j])


def _mined(matched: _Matched) -> IntArray:
    def fits(i: int, j: int) -> bool:
        return matched.pivot[i] == matched.source[j] or bool(matched.mapped[j] == matched.pivot_ids[i])

    return _single(matched, fits)


def _ms(matched: _Matched) -> IntArray:
    def ends_alike(i: int, j: int) -> bool:
        a, b = matched.pivot[i], matched.source[j]
        return a.endswith(b) or b.endswith(a)

    rows = _single(matched, ends_alike)
    for i in np.flatnonzero(matched.stop - matched.first > 1).tolist():
        span = range(int(matched.first[i]), int(matched.stop[i]))
        spelled = b"".join(matched.source[j] for j in span).removeprefix(b" ")
        if spelled == matched.unmarked(matched.pivot, i):
            rows[i] = span[-1]
    return rows


def _single(matched: _Matched, fits: Callable[[int, int], bool]) -> IntArray:
    """The positions whose A(i) is one token that fits."""
    rows = np.full(len(matched.first), -1, np.int64)
    for i in np.flatnonzero(matched.stop - matched.first == 1).tolist():
        j = int(matched.first[i])
        if fits(i, j):
            rows[i] = j
    return rows


RULES: dict[str, Callable[[_Matched], IntArray]] = {"em": _em, "mined": _mined, "ms": _ms}
