"""What FuseLLM and FuseChat compute over token strings: time warping, nearest and most frequent tokens.

For studies of fidelity to the papers (arXiv 2401.10491, section 3.2; arXiv 2408.07990 and its released code). Strings
are compared by their Levenshtein distance, without their word-start mark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusekit.alignment.rows import AlignedRows, Case, RowsLike, checked_rows, placed_rows
from fusekit.alignment.surfaces import Surfaces, decoded
from fusekit.errors import AlignmentError
from fusekit.types import IntArray

if TYPE_CHECKING:
    from fusekit.alignment.alignment import TokenAlignment
    from fusekit.alignment.vocabulary_map import VocabularyMap

# A table of int32 for two rows of this many cells is 400 MB; beyond it the method is not worth waiting for.
MAX_CELLS = 100_000_000
BLOCK_CELLS = 32_000_000  # distances held at once: 32 MB for short strings, 128 MB for strings over 254 characters


def _as_bytes(surface: bytes) -> str:
    """A string with a character for each byte."""
    return surface.decode("latin-1")


def _comparable(a: bytes, b: bytes) -> tuple[str, str]:
    """Two surfaces without word-start marks, unless nothing else is left; as bytes where one of them is not UTF-8."""
    stripped = a.removeprefix(b" "), b.removeprefix(b" ")
    if stripped[0] and stripped[1]:
        a, b = stripped
    try:
        return a.decode(), b.decode()
    except UnicodeDecodeError:
        return _as_bytes(a), _as_bytes(b)


def _distance(a: bytes, b: bytes) -> int:
    return Levenshtein.distance(*_comparable(a, b))


def cost_matrix(pivot: Sequence[bytes], source: Sequence[bytes]) -> IntArray:
    """Levenshtein distances of token surfaces without word-start marks: int64 [n, m].

    Over characters; over bytes where one of the two is not UTF-8. Where one of the two is nothing but the mark, neither
    loses it.
    """
    # Different strings once.
    (ours, rows), (theirs, columns) = (
        np.unique(np.array(side, object), return_inverse=True) for side in (pivot, source)
    )
    bare = [[surface.removeprefix(b" ") or surface for surface in side] for side in (ours, theirs)]
    texts = [[decoded(surface) for surface in side] for side in bare]
    costs = _distances(*([text or "" for text in side] for side in texts))
    readable = np.logical_and.outer(*([text is not None for text in side] for side in texts))
    if not readable.all():
        costs = np.where(readable, costs, _distances(*([_as_bytes(surface) for surface in side] for side in bare)))
    for i in np.flatnonzero(ours == b" "):
        costs[i] = [_distance(b" ", surface) for surface in theirs]
    for j in np.flatnonzero(theirs == b" "):
        costs[:, j] = [_distance(surface, b" ") for surface in ours]
    return costs[np.ix_(rows, columns)]


def _distances(ours: list[str], theirs: list[str]) -> IntArray:
    return cdist(ours, theirs, scorer=Levenshtein.distance, dtype=np.int32).astype(np.int64)


def warp(costs: IntArray) -> tuple[IntArray, IntArray]:
    """A(i) of the papers: the source tokens ``[first, stop)`` on the cheapest warping path, int64 [n] twice.

    D[i, j] = costs[i, j] + min(D[i-1, j], D[i, j-1], D[i-1, j-1]). Going back, of equal predecessors the diagonal one
    comes first, then (i-1, j), the earlier pivot token, then (i, j-1).

    Args:
        costs: int64 [n, m], n pivot tokens by m source tokens, both at least 1.
    """
    get = _table(costs).item
    i, j = costs.shape[0] - 1, costs.shape[1] - 1
    first, stop = np.zeros(i + 1, np.int64), np.zeros(i + 1, np.int64)
    stop[i] = j + 1
    while i and j:
        diagonal, up, left = get(i - 1, j - 1), get(i - 1, j), get(i, j - 1)
        if left < diagonal and left < up:
            j -= 1
            continue
        first[i] = j
        j -= diagonal <= up
        i -= 1
        stop[i] = j + 1
    stop[:i] = 1  # the pivot tokens before are all with the first source token
    return first, stop


def _table(costs: IntArray) -> IntArray:
    """D, row by row: exact, because all costs are integers.

    Within a row D[j] = c[j] + min(m[j], D[j-1]), where m is the better of the two from the row above. With C the
    running sum of c this is C[j] + min over k <= j of (m[k] - C[k-1]): one cumulative sum and one cumulative minimum.
    """
    n, m = costs.shape
    table = np.empty((n, m), np.int64)
    np.cumsum(costs[0], out=table[0])
    running = np.cumsum(costs, axis=1)
    above = np.empty(m, np.int64)
    for i in range(1, n):
        previous = table[i - 1]
        above[0] = previous[0]
        np.minimum(previous[1:], previous[:-1], out=above[1:])
        above[1:] -= running[i, :-1]
        np.minimum.accumulate(above, out=above)
        np.add(above, running[i], out=table[i])
    return table


def nearest(queries: Sequence[str], candidates: Sequence[str]) -> tuple[IntArray, IntArray]:
    """For each query the candidate of least Levenshtein distance; of several, the first.

    Args:
        queries: q strings.
        candidates: c strings.

    Returns:
        int64 [q] indices into ``candidates`` (-1 where there is none) and int64 [q] distances.
    """
    index = np.full(len(queries), -1, np.int64)
    distance = np.full(len(queries), np.iinfo(np.int64).max, np.int64)
    candidate_buckets = _by_length(candidates)
    for length, rows in _by_length(queries).items():
        spread = max((abs(other - length) for other in candidate_buckets), default=-1)
        for gap in range(spread + 1):
            for other in {length - gap, length + gap} & candidate_buckets.keys():
                # An equal distance matters too: its candidate may come earlier.
                active = rows[distance[rows] >= gap]
                if len(active):
                    _improve(active, candidate_buckets[other], (queries, candidates), (index, distance))
            if not (distance[rows] > gap).any():
                break
    return index, distance


def _by_length(strings: Sequence[str]) -> dict[int, IntArray]:
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    return {length: np.flatnonzero(lengths == length) for length in np.unique(lengths).tolist()}


def _improve(
    rows: IntArray,
    columns: IntArray,
    strings: tuple[Sequence[str], Sequence[str]],
    best: tuple[IntArray, IntArray],
) -> None:
    """Compare the queries at ``rows`` with the candidates at ``columns``; keep what is nearer, or as near and first."""
    (queries, candidates), (index, distance) = strings, best
    options = [candidates[j] for j in columns.tolist()]
    longest = max(len(options[0]), len(queries[int(rows[0])]))
    block = max(1, BLOCK_CELLS // len(options))
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        worst = int(distance[part].max())
        found = cdist(
            [queries[i] for i in part.tolist()],
            options,
            scorer=Levenshtein.distance,
            score_cutoff=None if worst >= longest else worst,
            dtype=np.uint8 if longest < 255 else np.int32,
            workers=-1,
        )
        at = found.argmin(axis=1)
        value, candidate = found[np.arange(len(part)), at].astype(np.int64), columns[at]
        better = (value < distance[part]) | ((value == distance[part]) & (candidate < index[part]))
        distance[part[better]], index[part[better]] = value[better], candidate[better]


def mined(surfaces: list[bytes], pivot: Surfaces) -> IntArray:
    """MinED over characters: the pivot's id of least distance to each surface, the lowest of several.

    Pivot entries that are not UTF-8 compare as bytes. Surfaces that are not UTF-8 go by their longest prefix in the
    pivot, or by their distance over bytes if it has none. Returns int64 [len(surfaces)].
    """
    options = sorted((id_, surface) for surface, id_ in pivot.id_of.items())
    readable = [surface for surface in surfaces if decoded(surface) is not None]
    best, least = np.full(len(readable), -1, np.int64), np.full(len(readable), np.iinfo(np.int64).max)
    for whole, string_of in ((True, bytes.decode), (False, _as_bytes)):
        some = [(id_, surface) for id_, surface in options if (decoded(surface) is not None) == whole]
        index, distance = nearest(list(map(string_of, readable)), [string_of(surface) for _, surface in some])
        ids = np.array([*(id_ for id_, _ in some), -1], np.int64)[index]
        better = (distance < least) | ((distance == least) & (ids < best))
        best, least = np.where(better, ids, best), np.where(better, distance, least)
    by_text = dict(zip(readable, best.tolist(), strict=True))
    found = [by_text[surface] if surface in by_text else pivot.longest_prefix(surface) for surface in surfaces]
    lone = [i for i, id_ in enumerate(found) if id_ < 0]
    index, _ = nearest([_as_bytes(surfaces[i]) for i in lone], [_as_bytes(surface) for _, surface in options])
    for i, at in zip(lone, index.tolist(), strict=True):
        found[i] = options[at][0]
    return np.array(found, np.int64)


def _most_frequent(a: bytes, b: bytes, count: int) -> tuple[float, float]:
    """MS as the paper means it: the most frequent pivot token, of equally frequent ones the nearest."""
    return -count, _distance(a, b)


def _released(a: bytes, b: bytes, count: int) -> tuple[float, float]:
    """MS as FuseChat's released code has it: least distance x (0.1 if one contains the other) x sigmoid(count).

    The sigmoid stands inside a minimum, so it prefers *rare* pairs; kept for fidelity.
    """
    left, right = _comparable(a, b)
    weight = 0.1 if left in right or right in left else 1.0
    return _distance(a, b) * weight / (1.0 + float(np.exp(-float(count)))), 0.0


COUNTING: dict[str, Callable[[bytes, bytes, int], tuple[float, float]]] = {
    "ms": _most_frequent,
    "ms_released": _released,
}
"""How pivot tokens that a corpus aligns with a source token are ranked, by the surfaces and the count: least first."""


_RULES: dict[str, Callable[[bytes, list[bytes], bool], bool]] = {
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
    if rule not in _RULES:
        raise AlignmentError(f"unknown position rule {rule!r}: choose one of {', '.join(sorted(_RULES))}")
    pivot = [vocabulary_map.pivot.of[i] for i in alignment.pivot_ids.tolist()]
    source = [vocabulary_map.source.of[i] for i in alignment.source_ids.tolist()]
    targets = vocabulary_map.targets[alignment.source_ids]
    first, stop = alignment.matched
    rows = np.full(len(first), -1, np.int64)
    for i in np.flatnonzero(stop > first).tolist():
        last = int(stop[i]) - 1
        if _RULES[rule](pivot[i], source[first[i] : last + 1], bool(targets[last] == alignment.pivot_ids[i])):
            rows[i] = last
    return rows


def project_rows_by_rule(
    alignment: TokenAlignment,
    vocabulary_map: VocabularyMap,
    source_rows: RowsLike,
    rule: str,
    *,
    collisions: str = "max",
) -> AlignedRows:
    """Targets by one of the papers' position rules: the aligned row projected as it is, else a one-hot on the label.

    Args:
        alignment: of method ``dtw`` for the papers' own.
        vocabulary_map, source_rows: as in :func:`project_rows`.
        rule: see :func:`source_positions`.
        collisions: ``max`` is the papers'.

    Raises:
        AlignmentError: as :func:`project_rows`; unknown rule.
    """
    rows = checked_rows(source_rows, len(vocabulary_map.targets))
    if len(rows.tail) != len(alignment.source):
        raise AlignmentError(f"the text has {len(alignment.source)} source tokens, but there are {len(rows.tail)} rows")
    base = source_positions(alignment, vocabulary_map, rule)
    base[-1:] = -1
    cases = np.where(base >= 0, Case.RULE, Case.UNLINKED).astype(np.int64)
    cases[-1:] = Case.LAST
    at = base[base >= 0]
    merged = vocabulary_map.project(rows.ids[at], rows.logprobs[at], rows.tail[at], collisions)
    return placed_rows(alignment, cases, base, merged, one_hot=True)
