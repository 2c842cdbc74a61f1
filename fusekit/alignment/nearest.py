"""The vocabulary entry of least edit distance, over whole vocabularies: the true and the first minimum.

Two strings are at least as far apart as their lengths, so a query only meets the entries whose length is within its
best distance so far, nearest lengths first. ``rapidfuzz`` does the distances, in blocks that keep memory bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusekit.types import IntArray

BLOCK_CELLS = 32_000_000  # distances held at once: 32 MB for short strings, 128 MB for strings over 254 characters
_FAR = np.iinfo(np.int64).max


def nearest(queries: Sequence[str], candidates: Sequence[str], workers: int = -1) -> tuple[IntArray, IntArray]:
    """For each query the candidate of least Levenshtein distance; of several, the first.

    Args:
        queries: q strings.
        candidates: c strings.
        workers: threads, -1 for all cores.

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
                    _improve(active, candidate_buckets[other], (queries, candidates), (index, distance), workers)
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
    workers: int,
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
            workers=workers,
        )
        at = found.argmin(axis=1)
        value, candidate = found[np.arange(len(part)), at].astype(np.int64), columns[at]
        better = (value < distance[part]) | ((value == distance[part]) & (candidate < index[part]))
        distance[part[better]], index[part[better]] = value[better], candidate[better]
