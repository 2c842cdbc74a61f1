"""Which pivot tokens stand where a source token stands, counted over a corpus: the statistics of FuseChat's MS map."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from scipy import sparse

from fusekit.alignment.alignment import TokenAlignment, align
from fusekit.alignment.surfaces import Surfaces, vocabulary_surfaces
from fusekit.errors import AlignmentError
from fusekit.types import IntArray


@dataclass(frozen=True, eq=False)
class MappingStatistics:
    """Counts of aligned token pairs.

    Attributes:
        counts: scipy.sparse CSR int64 [V_source, V_pivot].
        texts: how many texts were counted.
        fingerprint: SHA-256, hex, of the counts.
    """

    counts: sparse.csr_matrix
    texts: int
    fingerprint: str


def pairs_of(alignment: TokenAlignment) -> tuple[IntArray, IntArray]:
    """The aligned pairs of a text, ``(source ids, pivot ids)``: every source position in A(i) with position i."""
    first, stop = alignment.matched
    counts = np.maximum(stop - first, 0)
    pivot_at = np.repeat(np.arange(len(first)), counts)
    source_at = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    return alignment.source_ids[source_at], alignment.pivot_ids[pivot_at]


def count_mappings(
    texts: Iterable[str], pivot_tokenizer: Any, source_tokenizer: Any, method: str = "span"
) -> MappingStatistics:
    """Count aligned pairs of tokens over ``texts``.

    Args:
        texts: the corpus, read once.
        pivot_tokenizer, source_tokenizer: see :func:`fusekit.alignment.align`.
        method: ``span``: pairs that share bytes of the text; ``dtw``: pairs on the warping path, as the papers count.

    Raises:
        AlignmentError: the corpus is a single string, has no aligned pair, or a text cannot be aligned.
    """
    if isinstance(texts, str):
        raise AlignmentError(
            "a corpus is several texts; a single string would be counted letter by letter: pass [text]"
        )
    pivot, source = vocabulary_surfaces(pivot_tokenizer), vocabulary_surfaces(source_tokenizer)
    shape = (len(source), len(pivot))
    counts = sparse.csr_matrix(shape, dtype=np.int64)
    number = 0
    batch: list[tuple[IntArray, IntArray]] = []
    for text in texts:
        number += 1
        batch.append(pairs_of(align(text, pivot_tokenizer, source_tokenizer, method)))
        if len(batch) == 4096:  # bounded memory over a corpus of any size
            counts, batch = counts + _counted(batch, shape), []
    counts = (counts + _counted(batch, shape)).tocsr() if batch else counts
    if not counts.nnz:
        raise AlignmentError(f"the corpus of {number} texts holds no aligned pair of tokens: is it empty?")
    counts.sort_indices()
    digest = hashlib.sha256(repr(shape).encode())
    for array in (counts.indptr, counts.indices, counts.data):
        digest.update(np.ascontiguousarray(array, np.int64).tobytes())
    return MappingStatistics(counts, number, digest.hexdigest())


def _counted(batch: list[tuple[IntArray, IntArray]], shape: tuple[int, int]) -> sparse.csr_matrix:
    rows, columns = np.concatenate([s for s, _ in batch]), np.concatenate([p for _, p in batch])
    return sparse.coo_matrix((np.ones(len(rows), np.int64), (rows, columns)), shape=shape).tocsr()


def _strings(a: bytes, b: bytes) -> tuple[str, str]:
    """Two surfaces as the papers compare them: without word-start marks unless nothing else is left."""
    stripped = a.removeprefix(b" "), b.removeprefix(b" ")
    if stripped[0] and stripped[1]:
        a, b = stripped
    try:
        return a.decode(), b.decode()
    except UnicodeDecodeError:
        return a.decode("latin-1"), b.decode("latin-1")


def most_frequent(statistics: MappingStatistics, source: Surfaces, pivot: Surfaces, allowed: set[int]) -> IntArray:
    """MS as the paper means it: the most frequent pivot token; of equally frequent ones the nearest, then the first.

    Returns int64 [V_source], -1 for tokens that the corpus does not hold.
    """

    def rank(a: bytes, b: bytes, count: int) -> tuple[float, float]:
        return -count, Levenshtein.distance(*_strings(a, b))

    return _choose(statistics, source, pivot, allowed, rank)


def released(statistics: MappingStatistics, source: Surfaces, pivot: Surfaces, allowed: set[int]) -> IntArray:
    """MS as FuseChat's released code has it: least distance x (0.1 if one contains the other) x sigmoid(count).

    The sigmoid stands inside a minimum, so it prefers *rare* pairs; kept for fidelity. Returns as
    :func:`most_frequent`.
    """

    def rank(a: bytes, b: bytes, count: int) -> tuple[float, float]:
        left, right = _strings(a, b)
        weight = 0.1 if left in right or right in left else 1.0
        return Levenshtein.distance(left, right) * weight / (1.0 + float(np.exp(-float(count)))), 0.0

    return _choose(statistics, source, pivot, allowed, rank)


def _choose(statistics: MappingStatistics, source: Surfaces, pivot: Surfaces, allowed: set[int], rank: Any) -> IntArray:
    counts = statistics.counts
    if counts.shape != (len(source), len(pivot)):
        raise AlignmentError(
            f"the statistics are over {counts.shape[0]} source and {counts.shape[1]} pivot entries, but {source.name} "
            f"has {len(source)} and {pivot.name} {len(pivot)}: count them with these tokenizers"
        )
    chosen = np.full(len(source), -1, np.int64)
    for a in np.flatnonzero(np.diff(counts.indptr)).tolist():
        span = slice(counts.indptr[a], counts.indptr[a + 1])
        options = [
            (rank(source.of[a], pivot.of[b], count), b)
            for b, count in zip(counts.indices[span].tolist(), counts.data[span].tolist(), strict=True)
            if b in allowed
        ]
        if options:
            chosen[a] = min(options)[1]
    return chosen
