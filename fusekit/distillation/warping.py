"""The papers' token alignment between the two tokens that open and close a message: for studies of fidelity."""

from __future__ import annotations

import numpy as np

from fusekit.alignment.alignment import METHODS, TokenAlignment
from fusekit.alignment.vocabulary_map import VocabularyMap
from fusekit.types import TokenizedText


def warp_tokens(alignment: TokenAlignment, vocabulary_map: VocabularyMap) -> TokenAlignment:
    """The alignment by dynamic time warping of tokens that :func:`fusekit.alignment.align_tokens` has aligned.

    The tokens before a content correspond by their place, and so do the tokens that end it where both sides have one:
    the papers compare strings, and role strings of two templates have nothing to compare.

    Args:
        alignment: of a message's content, opened and perhaps closed on either side.
        vocabulary_map: made with the same tokenizers; tells the tokens' strings.

    Raises:
        AlignmentError: a text too long for the quadratic table.
    """
    size = len(alignment.text.encode())
    ours, theirs = _inside(alignment.pivot, size), _inside(alignment.source, size)
    n, m = len(alignment.pivot), len(alignment.source)
    pivot, source = _part(alignment.pivot, ours), _part(alignment.source, theirs)
    links, path = METHODS["dtw"](pivot, source, vocabulary_map.pivot, vocabulary_map.source)
    at, first, stop = np.full(n, -1, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
    at[ours] = np.where(links >= 0, links + theirs.start, -1)
    assert path is not None  # this method has one
    first[ours], stop[ours] = path[0] + theirs.start, path[1] + theirs.start
    if ours.start and theirs.start:
        at[0], first[0], stop[0] = 0, 0, 1
    if ours.stop < n and theirs.stop < m:
        at[n - 1], first[n - 1], stop[n - 1] = m - 1, m - 1, m
    return TokenAlignment(alignment.text, alignment.pivot, alignment.source, at, "dtw", (first, stop))


def _inside(tokens: TokenizedText, size: int) -> slice:
    """The tokens between the one that opens a content of ``size`` bytes and those that end it."""
    opened = int(len(tokens) > 0 and tokens.ends[0] == 0)
    return slice(opened, max(opened, int(np.searchsorted(tokens.ends, size, side="right"))))


def _part(tokens: TokenizedText, part: slice) -> TokenizedText:
    ends = tokens.ends[part]
    return TokenizedText(tokens.ids[part], ends, ends if tokens.exact else tokens.lows[part])
