"""Which tokens of two tokenisations end at the same place: the exact alignment.

A pivot token and a source token are linked when both models have consumed exactly the same bytes once they have read
it. Of several tokens with one end on one side (a lone dummy space, a token of no width), only the last links.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from fusekit.alignment.ends import tokenize
from fusekit.alignment.papers import MAX_CELLS, cost_matrix, warp
from fusekit.alignment.surfaces import Surfaces, vocabulary_surfaces
from fusekit.errors import AlignmentError
from fusekit.types import IntArray, TokenizedText


def _link(pivot: TokenizedText, source: TokenizedText) -> IntArray:
    """``source_at`` of :class:`TokenAlignment` by equal ends. O(n + m) up to a logarithm, vectorised.

    Ends are intervals (see :class:`fusekit.types.TokenizedText`): two boundaries are the same where theirs meet.
    """
    linked = np.full(len(pivot), -1, np.int64)
    ours = np.arange(len(pivot)) if pivot.exact else np.flatnonzero(pivot.lows <= pivot.ends)
    theirs = np.arange(len(source)) if source.exact else np.flatnonzero(source.lows <= source.ends)
    if not len(ours) or not len(theirs):
        return linked
    # Intervals are in order and at most touch, so the last that begins before this one ends is the only candidate.
    at = np.searchsorted(source.lows[theirs], pivot.ends[ours], side="right") - 1
    meets = (at >= 0) & (source.ends[theirs[np.maximum(at, 0)]] >= pivot.lows[ours])
    ours, at = ours[meets], at[meets]
    last = np.append(at[:-1] != at[1:], np.ones(min(len(at), 1), bool))
    linked[ours[last]] = theirs[at[last]]
    return linked


def _overlaps(pivot: TokenizedText, source: TokenizedText, source_at: IntArray) -> tuple[IntArray, IntArray]:
    """For every pivot token the source tokens ``[first, stop)`` that share bytes with it, within its group.

    Tokens without width take the neighbours that end where they do.
    """
    closed = np.flatnonzero(source_at >= 0)
    group = np.searchsorted(closed, np.arange(len(source_at)), side="left")
    stops = np.append(source_at[closed] + 1, len(source))
    low, high = np.concatenate([[0], stops[:-1]])[group], stops[group]
    pivot_starts, source_starts = (np.concatenate([[0], side.ends])[:-1].astype(np.int64) for side in (pivot, source))
    first = np.searchsorted(source.ends, pivot_starts, side="right")
    stop = np.searchsorted(source_starts, pivot.ends, side="left")
    first = np.clip(first, low, np.maximum(high - 1, low))
    return first, np.clip(np.maximum(stop, first + 1), first, high)


@dataclass(frozen=True, eq=False)
class TokenAlignment:
    """Two tokenisations of one text and which of their tokens end at the same place.

    Attributes:
        text: the text.
        pivot, source: the tokens with their byte ends as intervals; the arrays below are taken from them.
        source_at: int64 [n], the source position that has consumed the same text as each pivot position, or -1. The
            last such source token; of several pivot tokens with one end only the last has one.
        method: ``span`` (exact) or ``dtw`` (the papers').
        path: for ``dtw`` the source positions ``[first, stop)`` that the path matches with each pivot position.
    """

    text: str
    pivot: TokenizedText
    source: TokenizedText
    source_at: IntArray
    method: str
    path: tuple[IntArray, IntArray] | None = field(default=None, repr=False)

    @property
    def pivot_ids(self) -> IntArray:
        """int64 [n]."""
        return self.pivot.ids

    @property
    def source_ids(self) -> IntArray:
        """int64 [m]."""
        return self.source.ids

    @property
    def pivot_ends(self) -> IntArray:
        """int64 [n]: bytes of ``text.encode("utf-8")`` consumed at each pivot token; the last is all of them."""
        return self.pivot.ends

    @property
    def source_ends(self) -> IntArray:
        """int64 [m], as ``pivot_ends``."""
        return self.source.ends

    @cached_property
    def matched(self) -> tuple[IntArray, IntArray]:
        """A(i) of the papers: the source positions ``[first, stop)`` of each pivot position, int64 [n] twice.

        For ``span`` the source tokens that share bytes with the pivot token.
        """
        return self.path if self.path is not None else _overlaps(self.pivot, self.source, self.source_at)

    @cached_property
    def groups(self) -> list[tuple[slice, slice]]:
        """The 1-1, 1-n, n-1 and m-n groups between common ends: ``(pivot slice, source slice)`` each, in order.

        Together they hold every token of both sides once; empty where one side has no token at all.
        """
        closed = np.flatnonzero(self.source_at >= 0)
        if not len(closed):
            return []
        # Tokens after the last link have no common end to close a group; they go with the last one.
        pivot = [0, *(closed[:-1] + 1).tolist(), len(self.pivot)]
        source = [0, *(self.source_at[closed[:-1]] + 1).tolist(), len(self.source)]
        starts, stops = zip(pivot, source, strict=True), zip(pivot[1:], source[1:], strict=True)
        return [(slice(a, b), slice(c, d)) for (a, c), (b, d) in zip(starts, stops, strict=False)]

    def __str__(self) -> str:
        """Both tokenisations over the text: a column per group, ``·`` between the tokens of one group."""
        head = (
            f"{self.method}: {len(self.pivot)} pivot and {len(self.source)} source tokens, "
            f"{int((self.source_at >= 0).sum())} linked, {len(self.groups)} groups"
        )
        pivot, source = (pieces(tokens, self.text.encode()) for tokens in (self.pivot, self.source))
        columns = [
            (visible(b"".join(pivot[p])), "·".join(map(visible, pivot[p])), "·".join(map(visible, source[s])))
            for p, s in self.groups
        ]
        return head + "\n" + _side_by_side(columns, width=100)


def align(text: str, pivot_tokenizer: Any, source_tokenizer: Any, method: str = "span") -> TokenAlignment:
    """Align the tokens of two tokenizers over one text. No special tokens are added; ``print`` the result to see both.

    Args:
        text: the text, as the user wrote it.
        pivot_tokenizer, source_tokenizer: fast ones of ``transformers``, or of ``tokenizers``.
        method: ``span``: by equal ends in the text's bytes, exact, linear in time. ``dtw``: dynamic time warping over
            the token strings with a Levenshtein cost, as FuseLLM (arXiv 2401.10491) and FuseChat (arXiv 2408.07990) do;
            quadratic, and wrong for a few percent of the tokens, for fidelity studies.

    Raises:
        AlignmentError: a tokenizer cannot be handled exactly, the text cannot be encoded or is too long for ``dtw``, or
            the method is unknown.
    """
    if method not in ("dtw", "span"):
        raise AlignmentError(f"unknown alignment method {method!r}: choose one of dtw, span")
    surfaces = vocabulary_surfaces(pivot_tokenizer), vocabulary_surfaces(source_tokenizer)
    pivot, source = (tokenize(text, side) for side in surfaces)
    return warped(text, pivot, source, surfaces) if method == "dtw" else align_tokens(text, pivot, source)


def align_tokens(text: str, pivot: TokenizedText, source: TokenizedText) -> TokenAlignment:
    """Align tokens whose ends are known, by equal ends: the exact method of :func:`align`.

    For tokens with special ones around the text: ``tokenize(text, tokenizer).opened(bos_id).closed(end_of_turn_id)``.
    They pair by their place, not by their strings.
    """
    return TokenAlignment(text, pivot, source, _link(pivot, source), "span")


def warped(
    text: str, pivot: TokenizedText, source: TokenizedText, surfaces: tuple[Surfaces, Surfaces]
) -> TokenAlignment:
    """The method ``dtw`` of :func:`align`, of tokens of these vocabularies.

    A link is a common end that the path claims: where the next pivot token shares no source token with this one.
    """
    n, m = len(pivot), len(source)
    linked, first, stop = np.full(n, -1, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
    if n * m > MAX_CELLS:
        raise AlignmentError(
            f"dtw of {n} pivot by {m} source tokens needs a table of {n * m:,} cells, more than {MAX_CELLS:,}: "
            "cut the text, or use method='span'"
        )
    if n and m:
        strings = [
            [side.of[i] for i in tokens.ids.tolist()] for tokens, side in zip((pivot, source), surfaces, strict=True)
        ]
        first, stop = warp(cost_matrix(*strings))
        closes = np.append(first[1:] >= stop[:-1], True)
        linked[closes] = stop[closes] - 1
    return TokenAlignment(text, pivot, source, linked, "dtw", (first, stop))


def pieces(tokens: TokenizedText, data: bytes) -> list[bytes]:
    """The bytes of the text that each token consumes."""
    return [data[start:end] for start, end in pairwise([0, *tokens.ends.tolist()])]


_VISIBLE = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}


def visible(piece: bytes) -> str:
    """``piece`` with what cannot be seen made visible, and bytes that are not UTF-8 as ``\\xNN``; ``∅`` if empty."""

    def shown(character: str) -> str:
        # Joiners and other spaces cannot be seen either; variation selectors could only be seen on what is before them.
        hidden = unicodedata.category(character)[0] in "CZ" or "\ufe00" <= character <= "\ufe0f"
        return _VISIBLE.get(character) or (f"\\u{ord(character):04x}" if hidden else character)

    return "".join(map(shown, piece.decode(errors="backslashreplace"))) if piece else "∅"


def _columns(text: str) -> int:
    """Terminal columns that ``text`` takes."""
    marks = sum(unicodedata.category(character) == "Mn" for character in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def _side_by_side(found: list[tuple[str, str, str]], width: int) -> str:
    """Rows of text, pivot and source, a column per group, folded at ``width`` terminal columns."""
    names = ("text  ", "pivot ", "source")
    blocks: list[list[str]] = []
    used = width
    for texts in found:
        size = max(map(_columns, texts))
        if used + size + 1 > width:
            blocks.append([name + " │" for name in names])
            used = len(names[0]) + 2
        used += size + 1
        for row, text in enumerate(texts):
            blocks[-1][row] += text + " " * (size - _columns(text)) + "│"
    return "\n\n".join("\n".join(block) for block in blocks)
