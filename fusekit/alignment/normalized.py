"""Positions in a normalised text, carried back to the original one.

``tokenizers`` reports offsets through a normaliser, but they miss what NFC and NFKC compose: of ``e`` followed by a
combining accent the offsets cover the ``e`` alone. So the text is cut into pieces that normalise independently of one
another, and the cut is *checked*: the normalised pieces must spell the normalised text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusekit.types import IntArray

_RUNS = re.compile(r"[\x00-\x7f]+|[^\x00-\x7f]")


def joins_previous(character: str) -> bool:
    """Whether a normaliser may merge or reorder ``character`` with the one before it."""
    if character < "\u0300":
        return False
    first = unicodedata.normalize("NFKD", character)[0]
    # Jamo vowels and final consonants compose into Hangul syllables and are no combining characters.
    jamo = "\u1160" <= first <= "\u11ff" or "\ud7b0" <= first <= "\ud7fb"
    return jamo or unicodedata.category(first)[0] == "M" or unicodedata.combining(first) != 0


def independent_pieces(text: str) -> list[str]:
    """``text`` cut where no character joins the previous one; runs of ASCII stay whole."""
    pieces: list[str] = []
    for match in _RUNS.finditer(text):
        run = match[0]
        if pieces and joins_previous(run[0]):
            base = pieces.pop()
            if base.isascii() and len(base) > 1:
                pieces.append(base[:-1])
                base = base[-1]
            pieces.append(base + run)
        else:
            pieces.append(run)
    return pieces


def _cut_further(piece: str, normalize: Callable[[str], str]) -> list[str]:
    """A piece that changes, cut where both parts normalise by themselves: the smaller it is, the less it blurs."""
    if piece.isascii():
        return list(piece)
    parts = []
    start = 0
    for stop in range(1, len(piece)):
        if normalize(piece[start:stop]) + normalize(piece[stop:]) == normalize(piece[start:]):
            parts.append(piece[start:stop])
            start = stop
    return [*parts, piece[start:]]


@dataclass(frozen=True, eq=False)
class NormalizedText:
    """A normalised text with the way back.

    Attributes:
        normalized: its bytes.
        ends: int64 [p], where each piece ends in ``normalized``.
        original_ends: int64 [p], where it ends in the original bytes.
        unchanged: bool [p], whether the piece is the same in both.
    """

    normalized: bytes
    ends: IntArray
    original_ends: IntArray
    unchanged: np.ndarray

    def back(self, cuts: IntArray) -> tuple[IntArray, IntArray]:
        """Where positions in ``normalized`` (int64 [n], non-decreasing) lie in the original bytes.

        Returns the lowest and highest original position of each, which differ where the normaliser dropped text. A
        cut within a changed piece has no place in the original: it gets ``low = high + 1`` at the piece's end.
        """
        first = np.searchsorted(self.ends, cuts, side="left")
        last = np.searchsorted(self.ends, cuts, side="right") - 1
        starts = np.concatenate([[0], self.ends])
        original_starts = np.concatenate([[0], self.original_ends])
        at_end = last >= first
        inside = np.minimum(first, len(self.ends) - 1)
        low = original_starts[inside] + (cuts - starts[inside])
        high = low.copy()
        low[at_end] = self.original_ends[first[at_end]]
        high[at_end] = self.original_ends[last[at_end]]
        at_start = cuts == 0
        low[at_start] = 0
        high[at_start & ~at_end] = 0
        nowhere = ~at_end & ~at_start & ~self.unchanged[inside]
        high[nowhere] = self.original_ends[inside[nowhere]]
        low[nowhere] = high[nowhere] + 1
        return low, high


def normalize_with_ends(text: str, normalize: Callable[[str], str]) -> NormalizedText | None:
    """Normalise ``text`` and keep the way back, or None where its pieces do not normalise independently."""
    normalized = normalize(text)
    image_of: dict[str, str] = {}
    pieces: list[str] = []
    for piece in independent_pieces(text):
        if piece not in image_of:
            image_of[piece] = normalize(piece)
        pieces.extend([piece] if image_of[piece] == piece else _cut_further(piece, normalize))
    for piece in set(pieces) - image_of.keys():
        image_of[piece] = normalize(piece)
    images = [image_of[piece] for piece in pieces]
    if "".join(images) != normalized:
        return None
    ends = np.cumsum([len(image.encode()) for image in images], dtype=np.int64)
    original_ends = np.cumsum([len(piece.encode()) for piece in pieces], dtype=np.int64)
    unchanged = np.fromiter((a == b for a, b in zip(images, pieces, strict=True)), bool, len(pieces))
    return NormalizedText(normalized.encode(), ends, original_ends, unchanged)
