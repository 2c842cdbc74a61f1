"""Which vocabulary entries begin with given bytes, for many rows of entries at once."""

from __future__ import annotations

import numpy as np

from fusekit.alignment.alignment import TokenAlignment
from fusekit.alignment.surfaces import Surfaces
from fusekit.types import BoolArray, IntArray


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
