"""Dynamic time warping over token strings, as FuseLLM and FuseChat align: for studies of fidelity to the papers.

Cost: Levenshtein distance of two token strings without their word-start mark (arXiv 2401.10491, section 3.2; the
released code of arXiv 2408.07990 for the order of the backtrace). The distances are computed once per pair of different
strings; each row of the table is one vectorised scan, exact because all costs are integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusekit.types import IntArray

# A table of int32 for two rows of this many cells is 400 MB; beyond it the method is not worth waiting for.
MAX_CELLS = 100_000_000


def cost_matrix(pivot: Sequence[bytes], source: Sequence[bytes]) -> IntArray:
    """Levenshtein distances of token surfaces without word-start marks: int64 [n, m].

    Over characters; over bytes where one of the two is no UTF-8. Where one of the two is nothing but the mark, neither
    loses it.
    """
    pivot_kinds, pivot_at = _unique(pivot)
    source_kinds, source_at = _unique(source)
    costs = _distances(pivot_kinds, source_kinds)
    return costs[np.ix_(pivot_at, source_at)]


def _unique(surfaces: Sequence[bytes]) -> tuple[list[bytes], IntArray]:
    index: dict[bytes, int] = {}
    at = np.fromiter((index.setdefault(surface, len(index)) for surface in surfaces), np.int64, len(surfaces))
    return list(index), at


def _distances(pivot: list[bytes], source: list[bytes]) -> IntArray:
    bare = [[surface.removeprefix(b" ") or surface for surface in side] for side in (pivot, source)]
    text, other = ([decoded(surface) for surface in side] for side in bare)
    strings = [[string or "" for string in side] for side in (text, other)]
    costs: IntArray = cdist(*strings, scorer=Levenshtein.distance, dtype=np.int32).astype(np.int64)
    # As bytes where one of the two is no UTF-8; latin-1 gives every byte a character of its own.
    ours, theirs = ([surface.decode("latin-1") for surface in side] for side in bare)
    rows, columns = ([i for i, string in enumerate(side) if string is None] for side in (text, other))
    if rows:
        costs[rows] = cdist([ours[i] for i in rows], theirs, scorer=Levenshtein.distance, dtype=np.int32)
    if columns:
        costs[:, columns] = cdist(ours, [theirs[j] for j in columns], scorer=Levenshtein.distance, dtype=np.int32)
    for i in [i for i, surface in enumerate(pivot) if surface == b" "]:
        costs[i] = [distance(b" ", surface) for surface in source]
    for j in [j for j, surface in enumerate(source) if surface == b" "]:
        costs[:, j] = [distance(surface, b" ") for surface in pivot]
    return costs


def decoded(surface: bytes) -> str | None:
    """A surface's text, None where it is no UTF-8."""
    try:
        return surface.decode()
    except UnicodeDecodeError:
        return None


def comparable(a: bytes, b: bytes) -> tuple[str, str]:
    """Two surfaces as the papers compare them: without word-start marks unless nothing else is left."""
    stripped = a.removeprefix(b" "), b.removeprefix(b" ")
    if stripped[0] and stripped[1]:
        a, b = stripped
    try:
        return a.decode(), b.decode()
    except UnicodeDecodeError:
        return a.decode("latin-1"), b.decode("latin-1")


def distance(a: bytes, b: bytes) -> int:
    """The Levenshtein distance of two surfaces, as the papers compare them."""
    return Levenshtein.distance(*comparable(a, b))


def warp(costs: IntArray) -> tuple[IntArray, IntArray]:
    """The cheapest warping path through a table of integer costs.

    D[i, j] = costs[i, j] + min(D[i-1, j], D[i, j-1], D[i-1, j-1]). Going back, of equal predecessors the diagonal one
    comes first, then (i-1, j), the earlier pivot token, then (i, j-1).

    Args:
        costs: int64 [n, m], n pivot tokens by m source tokens, both at least 1.

    Returns:
        The path from (0, 0) to (n-1, m-1) as two int64 arrays of one length, pivot and source positions.
    """
    return _backtrace(_table(costs))


def _table(costs: IntArray) -> IntArray:
    """D, row by row.

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


def _backtrace(table: IntArray) -> tuple[IntArray, IntArray]:
    i, j = table.shape[0] - 1, table.shape[1] - 1
    rows: list[int] = [i]
    columns: list[int] = [j]
    get = table.item
    while i and j:
        diagonal, up, left = get(i - 1, j - 1), get(i - 1, j), get(i, j - 1)
        if diagonal <= up and diagonal <= left:
            i, j = i - 1, j - 1
        elif up <= left:
            i -= 1
        else:
            j -= 1
        rows.append(i)
        columns.append(j)
    rows.extend(range(i - 1, -1, -1))
    columns.extend([0] * i)
    columns.extend(range(j - 1, -1, -1))
    rows.extend([0] * j)
    return np.array(rows[::-1], np.int64), np.array(columns[::-1], np.int64)


def matches_of_path(rows: IntArray, columns: IntArray, n: int) -> tuple[IntArray, IntArray]:
    """A(i) of the papers: per pivot token the source tokens on the path, always a contiguous range [first, stop)."""
    first = np.searchsorted(rows, np.arange(n), side="left")
    last = np.searchsorted(rows, np.arange(n), side="right") - 1
    return columns[first], columns[last] + 1


def links_of_path(first: IntArray, stop: IntArray) -> IntArray:
    """The common ends that a path claims: where the next pivot token shares no source token with this one.

    Returns int64 [n]: the last source position of a group at the group's last pivot position, -1 elsewhere.
    """
    linked = np.full(len(first), -1, np.int64)
    closes = np.ones(len(first), bool)
    closes[:-1] = first[1:] >= stop[:-1]
    linked[closes] = stop[closes] - 1
    return linked


BLOCK_CELLS = 32_000_000  # distances held at once: 32 MB for short strings, 128 MB for strings over 254 characters
_FAR = np.iinfo(np.int64).max


def nearest(queries: Sequence[str], candidates: Sequence[str]) -> tuple[IntArray, IntArray]:
    """For each query the candidate of least Levenshtein distance; of several, the first.

    Args:
        queries: q strings.
        candidates: c strings.

    Returns:
        int64 [q] indices into ``candidates`` (-1 where there is none) and int64 [q] distances.
    """
    index = np.full(len(queries), -1, np.int64)
    distance = np.full(len(queries), _FAR, np.int64)
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
    order = np.argsort(lengths, kind="stable")
    starts = np.flatnonzero(np.diff(lengths[order], prepend=-1))
    return {int(lengths[part[0]]): part for part in np.split(order, starts[1:]) if len(part)}


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
