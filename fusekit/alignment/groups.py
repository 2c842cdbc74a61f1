"""Which pivot tokens begin a text alike to a source that cuts it into other tokens."""

from __future__ import annotations

from itertools import chain

import numpy as np

from fusekit.alignment.projection import first_pieces
from fusekit.alignment.surfaces import Kind, Surfaces
from fusekit.alignment.vocabulary_map import VocabularyMap
from fusekit.types import FloatArray, IntArray

_WORDS = (Kind.ORDINARY, Kind.BYTE, Kind.ADDED)
PIECES = (0.9, 0.09, 0.009)
"""X-Token's weights of the source tokens that spell a pivot token."""


def pivot_groups(into: VocabularyMap) -> IntArray:
    """The finest groups of next tokens that both models can tell apart: of each pivot token one that stands for all.

    Let g(v) be the first source token of a pivot token v's bytes, and f(u) the first pivot token of a source token u's
    bytes, where the map ``into`` carries u. A text that begins with v begins for the source with g(v), and one that
    begins with u for the pivot with f(u); so v and f(g(v)) are told apart by no row of the source, and neither are the
    source tokens with one f by any distribution of the pivot. Following f and g from token to token, each time to a
    shorter one, ends at a token that both have: it stands for the group.

    So the pivot's 201 is in the group of 2, where the source writes 2, 0, 1; and where the pivot writes Stra + ße and
    Stra + fe, the source's Straße and Strafe are in the group of Stra. A pivot token that begins a source token's bytes
    thus has that token's probability in its group: nothing is split and nothing is punished.

    Args:
        into: by the method ``prefix``.

    Returns:
        int64 [V_pivot]: the token that stands for the group, which is in it itself; -1 for tokens that begin no text of
        the source: padding, special tokens without a role in common, bytes that it cannot spell.
    """
    pivot, source = into.pivot, into.source
    V = into.matrix.shape[1]
    carried = into.entries[0][:, 0]
    reached = np.full(V, -1, np.int64)
    words = np.flatnonzero(np.isin(pivot.kinds, _WORDS) & (pivot.lengths > 0))
    first = first_tokens(pivot, source, words)
    reached[words] = np.where(first >= 0, carried[np.maximum(first, 0)], -1)
    specials = carried[(carried >= 0) & ~np.isin(_kinds(source, len(carried)), _WORDS)]
    reached[specials] = specials
    while True:
        further = np.where(reached >= 0, reached[np.maximum(reached, 0)], -1)
        if np.array_equal(further, reached):
            return reached
        reached = further


def first_tokens(pivot: Surfaces, source: Surfaces, ids: IntArray) -> IntArray:
    """g: the first source token of each pivot token's bytes, its own where the source has it; -1 for none: int64."""
    surfaces = [pivot.of[i] for i in ids.tolist()]
    found = np.fromiter((source.id_of.get(surface, -1) for surface in surfaces), np.int64, len(surfaces))
    missing = np.flatnonzero(found < 0)
    found[missing] = first_pieces([surfaces[i] for i in missing.tolist()], source)
    return found


def source_pieces(into: VocabularyMap) -> tuple[IntArray, IntArray, FloatArray]:
    """Which source tokens spell each pivot token, and X-Token's weight of each: of the first three, scaled to sum to 1.

    Special tokens by role, as in ``into``; tokens that the source cannot spell have no piece.

    Returns:
        Pivot ids, source ids and weights, int64, int64 and float64 [m], one of a pair each.
    """
    pivot, source = into.pivot, into.source
    pairs: list[tuple[int, list[int]]] = []
    texts: list[tuple[int, str]] = []
    for id_ in np.flatnonzero(np.isin(pivot.kinds, _WORDS) & (pivot.lengths > 0)).tolist():
        surface = pivot.of[id_]
        if (same := source.id_of.get(surface)) is not None:
            pairs.append((id_, [same]))
            continue
        try:
            texts.append((id_, surface.decode()))
        except UnicodeDecodeError:
            pairs.append((id_, _greedy(surface, source)))
    for (id_, text), ids in zip(texts, source.view.encode_many([text for _, text in texts]), strict=True):
        spelled = [i for i in ids if source.of[i]]
        whole = b"".join(source.of[i] for i in spelled) == text.encode()
        pairs.append((id_, spelled if whole else _greedy(text.encode(), source)))
    carried = into.entries[0][:, 0]
    special = np.flatnonzero((carried >= 0) & ~np.isin(_kinds(source, len(carried)), _WORDS))
    pairs += [(int(carried[u]), [int(u)]) for u in special.tolist()]
    first = [(id_, pieces[: len(PIECES)]) for id_, pieces in pairs if pieces]
    pivots = np.repeat([id_ for id_, _ in first], [len(pieces) for _, pieces in first]).astype(np.int64)
    weights = [np.array(PIECES[: len(pieces)]) / sum(PIECES[: len(pieces)]) for _, pieces in first]
    tokens = np.fromiter(chain.from_iterable(pieces for _, pieces in first), np.int64, len(pivots))
    return pivots, tokens, np.concatenate(weights) if weights else np.zeros(0)


def _greedy(surface: bytes, source: Surfaces) -> list[int]:
    """The first tokens that spell bytes, each the longest that fits; empty where they cannot be spelled."""
    pieces: list[int] = []
    while surface and len(pieces) < len(PIECES):
        lengths = range(min(len(surface), int(source.lengths.max(initial=0))), 0, -1)
        id_ = next((source.id_of[surface[:n]] for n in lengths if surface[:n] in source.id_of), -1)
        if id_ < 0:
            return []
        pieces.append(id_)
        surface = surface[int(source.lengths[id_]) :]
    return pieces


def _kinds(surfaces: Surfaces, size: int) -> IntArray:
    """The kind of each of ``size`` ids; those beyond the vocabulary are holes."""
    return np.pad(surfaces.kinds, (0, max(size - len(surfaces), 0)))[:size].astype(np.int64)
