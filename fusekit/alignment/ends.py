"""Where the tokens of a text end in its bytes.

``tokenizers`` reports offsets through a normaliser, but they miss what NFC and NFKC compose: of ``e`` followed by a
combining accent the offsets cover the ``e`` alone. So ends are found by spelling, in the text or in the normalised one,
which is cut into pieces that normalise independently of one another; the cut is *checked*: the normalised pieces must
spell the normalised text. Offsets are the way out for tokenizers that drop text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fusekit.alignment.surfaces import METASPACE, Form, Kind, Surfaces, vocabulary_surfaces
from fusekit.errors import AlignmentError
from fusekit.types import BoolArray, IntArray, TokenizedText

_RUNS = re.compile(r"[\x00-\x7f]+|[^\x00-\x7f]")
_SPACE = b" "
_MARK = METASPACE.encode()
# What the tokenizers' own \s matches; Python's also takes the separators from U+001C to U+001F.
_WHITESPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005"
    "\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
_Ends = tuple[IntArray, IntArray]
"""The lowest and the highest place of each end."""


def _joins_previous(character: str) -> bool:
    """Whether a normaliser may merge or reorder ``character`` with the one before it."""
    if character < "\u0300":
        return False
    first = unicodedata.normalize("NFKD", character)[0]
    # Jamo vowels and final consonants compose into Hangul syllables and are not combining characters.
    jamo = "\u1160" <= first <= "\u11ff" or "\ud7b0" <= first <= "\ud7fb"
    return jamo or unicodedata.category(first)[0] == "M" or unicodedata.combining(first) != 0


def _independent_pieces(text: str) -> list[str]:
    """``text`` cut where no character joins the previous one; runs of ASCII stay whole."""
    pieces: list[str] = []
    for match in _RUNS.finditer(text):
        run = match[0]
        if pieces and _joins_previous(run[0]):
            base = pieces.pop()
            if base.isascii() and len(base) > 1:
                pieces.append(base[:-1])
                base = base[-1]
            run = base + run
        pieces.append(run)
    return pieces


def _cut_further(piece: str, normalize: Callable[[str], str]) -> list[str]:
    """A piece that changes, cut where both parts normalise by themselves: the smaller it is, the less it blurs."""
    if piece.isascii():
        return list(piece)
    parts, start = [], 0
    for stop in range(1, len(piece)):
        if normalize(piece[start:stop]) + normalize(piece[stop:]) == normalize(piece[start:]):
            parts.append(piece[start:stop])
            start = stop
    return [*parts, piece[start:]]


@dataclass(frozen=True, eq=False)
class _NormalizedText:
    """A normalised text with the way back: where its p pieces end here and in the original, and which are unchanged."""

    normalized: bytes
    ends: IntArray
    original_ends: IntArray
    unchanged: BoolArray

    def back(self, cuts: IntArray) -> _Ends:
        """Where positions in ``normalized`` (int64 [n], non-decreasing) lie in the original bytes.

        The lowest and highest place differ where the normaliser dropped text. A cut within a changed piece has no
        place in the original: it gets ``low = high + 1`` at the piece's end.
        """
        first = np.searchsorted(self.ends, cuts, side="left")
        last = np.searchsorted(self.ends, cuts, side="right") - 1
        at_end = last >= first
        inside = np.minimum(first, len(self.ends) - 1)
        starts, original_starts = (np.concatenate([[0], ends]) for ends in (self.ends, self.original_ends))
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


def _normalized(text: str, normalize: Callable[[str], str]) -> _NormalizedText | None:
    """None where the pieces of the text do not normalise independently."""
    image_of = cache(normalize)
    pieces: list[str] = []
    for piece in _independent_pieces(text):
        pieces.extend([piece] if image_of(piece) == piece else _cut_further(piece, normalize))
    images = [image_of(piece) for piece in pieces]
    if "".join(images) != normalize(text):
        return None
    ends, original_ends = (
        np.cumsum([len(part.encode()) for part in side], dtype=np.int64) for side in (images, pieces)
    )
    unchanged = np.fromiter((a == b for a, b in zip(images, pieces, strict=True)), bool, len(pieces))
    return _NormalizedText("".join(images).encode(), ends, original_ends, unchanged)


def tokenize(text: str, tokenizer: Any) -> TokenizedText:
    """Encode ``text`` without special tokens and find every token's end in ``text.encode("utf-8")``.

    Args:
        text: any text that UTF-8 can write.
        tokenizer: see :func:`vocabulary_surfaces`; or its surfaces.

    Raises:
        AlignmentError: the ends cannot be known; names the tokenizer and the reason.
    """
    surfaces = tokenizer if isinstance(tokenizer, Surfaces) else vocabulary_surfaces(tokenizer)
    check_encodable(text)
    if surfaces.drops_space and text:
        return _by_offsets(text, *surfaces.encode_with_offsets(text), surfaces)
    ids = surfaces.encode(text) if text else []
    return _ends_of(ids, text, surfaces, lambda: surfaces.encode_with_offsets(text)[1])


def check_encodable(text: str) -> None:
    """Raises AlignmentError for a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AlignmentError(
            f"the text has a lone surrogate at character {error.start} ({text[error.start]!r}): "
            "no tokenizer can encode it; replace it first"
        ) from error


def _ends_of(ids: list[int], text: str, surfaces: Surfaces, offsets: Callable[[], IntArray]) -> TokenizedText:
    """The ends of the tokens of an encoded text. offsets: gives their character spans [n, 2], where spelling fails."""
    if not ids or not text:  # a dummy space before nothing has no width
        nothing = np.zeros(len(ids), np.int64)
        return TokenizedText.of(ids, nothing, nothing)
    if not surfaces.drops_space:
        found = _carried_back(ids, text, surfaces, _consumed)
        if found is not None:
            lows, highs = found
            highs[-1] = len(text.encode())
            return TokenizedText.of(ids, highs, lows)
    if surfaces.form is Form.BYTE_LEVEL:
        # Its offsets may be trimmed of spaces by the post-processor, so they cannot be used instead.
        steps = ", ".join(sorted(surfaces.types("normalizer"))) or "none"
        raise AlignmentError(
            f"{surfaces.name} is byte-level, but its tokens do not spell the text {text[:40]!r}: its normaliser "
            f"({steps}) changes the text in a way that cannot be undone"
        )
    return _by_offsets(text, ids, offsets(), surfaces)


_Find = Callable[[list[int], bytes, Surfaces], "IntArray | None"]


def _carried_back(ids: list[int], text: str, surfaces: Surfaces, find: _Find) -> _Ends | None:
    """Ends that are found in the text, or in the normalised one and carried back; None where in neither."""
    ends = find(ids, text.encode(), surfaces)
    if ends is not None:
        return ends, ends
    image = _normalized(text, surfaces.normalize) if surfaces.normalizes else None
    ends = find(ids, image.normalized, surfaces) if image is not None else None
    return None if image is None or ends is None else image.back(ends)


def _consumed(ids: list[int], data: bytes, surfaces: Surfaces) -> IntArray | None:
    ends = _spelled(ids, data, surfaces)
    return _walk(ids, data, surfaces) if ends is None else ends


def _spelled(ids: list[int], data: bytes, surfaces: Surfaces) -> IntArray | None:
    """Ends of the tokens in ``data``, or None where their surfaces are not ``data`` after an optional dummy space."""
    try:
        spelled = b"".join([surfaces.of[id_] for id_ in ids])
    except IndexError:
        raise AlignmentError(
            f"{surfaces.name} emitted token id {max(ids)}, but its vocabulary has {len(surfaces)} entries"
        ) from None
    surplus = len(spelled) - len(data)
    if surplus not in (0, 1) or not spelled.endswith(data) or (surplus and not spelled.startswith(_SPACE)):
        return None
    ends: IntArray = np.cumsum(surfaces.lengths[ids])
    return np.maximum(ends - surplus, 0) if surplus else ends


def _walk(ids: list[int], data: bytes, surfaces: Surfaces) -> IntArray | None:
    """Ends by matching each surface in turn, or None at the first that does not match."""
    added, prepends = surfaces.added_tokens, surfaces.prepends
    ends = np.empty(len(ids), np.int64)
    position, fresh = 0, True  # fresh: at the start of a stretch, where a dummy space may stand
    for i, id_ in enumerate(ids):
        token, surface = added.get(id_), surfaces.of[id_]
        if surfaces.kinds[id_] == Kind.BYTE and token is not None:  # a byte, but where the text spells its name out
            name = token.content.encode()
            token, surface = (token, name) if data.startswith(name, position) else (None, surface)
        if token is not None and token.lstrip:
            position = _skip_space(data, position)
        length = _match(surface, data, position, surfaces, fresh)
        if length is None:
            return None
        position += length
        if token is not None and token.rstrip:
            position = _skip_space(data, position)
        # Prepend writes one space, and none after an added token that is looked for in what it has written.
        fresh = (fresh and not length and not prepends) if token is None else not (prepends and token.normalized)
        ends[i] = position
    return ends if position == len(data) else None


def _match(surface: bytes, data: bytes, position: int, surfaces: Surfaces, fresh: bool) -> int | None:
    """Bytes of ``data`` at ``position`` that are the surface, None where they are not."""
    if fresh and surfaces.prepends and surface.startswith(_SPACE):  # also before a space of the text's own
        return 0 if surface == _SPACE else _match(surface[1:], data, position, surfaces, False)
    if surface and data.startswith(surface, position):
        return len(surface)
    if fresh and surface.startswith(_SPACE) and not data.startswith((_SPACE, _MARK), position):
        return len(surface) - 1 if data.startswith(surface[1:], position) else None
    if surfaces.form is Form.METASPACE and _SPACE in surface:  # each space may be a mark that the text itself contains
        stop = position
        for byte in surface:
            if byte == _SPACE[0] and data.startswith(_MARK, stop):
                stop += len(_MARK)
            elif stop < len(data) and data[stop] == byte:
                stop += 1
            else:
                return None
        return stop - position
    return None


def _skip_space(data: bytes, position: int) -> int:
    rest = data[position:].decode(errors="ignore")
    return position + len(rest[: len(rest) - len(rest.lstrip())].encode())


def _by_offsets(text: str, ids: list[int], spans: IntArray, surfaces: Surfaces) -> TokenizedText:
    if not ids:
        return TokenizedText.of(ids, np.zeros(0, np.int64), np.zeros(0, np.int64))
    widths = np.ones(len(text), np.int64) if text.isascii() else [len(character.encode()) for character in text]
    place = np.concatenate([[0], np.cumsum(widths)])  # of every character, in bytes
    # A token whose span begins before the end of an earlier one shares characters with it.
    reached = np.maximum.accumulate(spans[:, 1])
    opens = np.append(True, spans[1:, 0] >= reached[:-1])
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(ids)) - 1
    stops = reached[last]
    resumes = np.append(np.maximum(spans[first[1:], 0], stops[:-1]), len(text))
    lows, highs = place[stops], place[resumes]
    if surfaces.normalizes and not text.isascii():
        for i, stop in enumerate(stops.tolist()):
            end = _composed_until(text, stop, surfaces.normalize)
            if end > stop:  # what the boundary falls before is part of this token
                highs[i] = max(highs[i], place[end])
                lows[i] = place[end] if end <= resumes[i] else highs[i] + 1
    counts = last - first + 1
    all_lows, all_highs = np.repeat(lows, counts), np.repeat(highs, counts)
    for group in np.flatnonzero(counts > 1).tolist():
        begin, end = int(first[group]), int(last[group]) + 1
        start = int(spans[begin:end, 0].min())
        inner = slice(begin, end - 1)
        shared = _split_shared(text[start : int(stops[group])], ids[begin:end], surfaces)
        if shared is None:  # certain for the last token only
            all_lows[inner] = all_highs[inner] + 1
        else:
            all_lows[inner], all_highs[inner] = shared[0] + place[start], shared[1] + place[start]
    all_highs = np.maximum.accumulate(all_highs)
    all_highs[-1] = place[-1]
    return TokenizedText.of(ids, all_highs, all_lows)


def _composed_until(text: str, stop: int, normalize: Callable[[str], str]) -> int:
    """Where combining characters at ``stop`` end if the normaliser merges them with what is before, else ``stop``."""
    if stop >= len(text) or not _joins_previous(text[stop]):
        return stop
    begin, end = max(stop - 1, 0), stop + 1
    while begin > 0 and _joins_previous(text[begin]):
        begin -= 1
    while end < len(text) and _joins_previous(text[end]):
        end += 1
    apart = normalize(text[begin:stop]) + normalize(text[stop:end])
    return stop if normalize(text[begin:end]) == apart else end


def _split_shared(shared: str, ids: list[int], surfaces: Surfaces) -> _Ends | None:
    """Ends, counted from the span's start, of all but the last of the tokens that share a span; None where unknown."""
    if surfaces.of[ids[0]] == _SPACE and not shared.startswith((" ", METASPACE)) and len(ids) > 1:
        # A dummy space by itself has no width.
        rest = _split_shared(shared, ids[1:], surfaces) if len(ids) > 2 else (np.zeros(0, np.int64),) * 2
        return None if rest is None else (np.append(0, rest[0]), np.append(0, rest[1]))
    if any(surfaces.kinds[id_] in (Kind.UNKNOWN, Kind.HOLE) for id_ in ids):
        return None
    found = _carried_back(ids, shared, surfaces, _spelled)
    return None if found is None else (found[0][:-1], found[1][:-1])


class Mark(NamedTuple):
    """A special token in a text: its characters ``[start, stop)`` there and its id."""

    start: int
    stop: int
    id: int


def marked_ends(
    ids: list[int],
    at: Sequence[int],
    text: str,
    marks: Sequence[Mark],
    surfaces: Surfaces,
    *,
    offsets: Callable[[], IntArray],
) -> TokenizedText:
    """Byte ends of an encoded text with special tokens in it: ``marks``, in order, at the positions ``at`` of ``ids``.

    White space that a special token swallows, or that is in no token at all, belongs to the token before it, as an
    interval. offsets: gives the character spans ``[n, 2]`` of ``ids`` in ``text``; called only where spelling fails.
    Raises AlignmentError: the ends cannot be known; names the tokenizer and the reason.
    """
    data, added, spans = text.encode(), surfaces.added_tokens, cache(offsets)
    if b"".join([surfaces.of[id_] for id_ in ids]) == data:
        ends = np.cumsum(surfaces.lengths[ids])
        return TokenizedText.of(ids, ends, ends)
    highs, lows = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    first, start, consumed, swallows = 0, 0, 0, False
    for mark, position in [*zip(marks, at, strict=True), (None, len(ids))]:
        stretch = text[start : mark.start if mark else None]
        if mark and added[mark.id].lstrip:
            stretch = stretch.rstrip(_WHITESPACE)
        stop = start + len(stretch)
        if swallows:
            stretch = stretch.lstrip(_WHITESPACE)
        begin = stop - len(stretch)
        consumed += len(text[start:begin].encode())
        if first:
            highs[first - 1] = consumed
        inside = _ends_of(
            ids[first:position],
            stretch,
            surfaces,
            lambda part=slice(first, position), a=begin, b=stop: np.clip(spans()[part], a, b) - a,  # type: ignore[misc]
        )
        lows[first:position], highs[first:position] = inside.lows + consumed, inside.ends + consumed
        consumed += len(stretch.encode())
        if stretch and not len(inside) and first:  # all of it is in no token
            highs[first - 1] = consumed
        if mark is None:
            break
        consumed += len(text[stop : mark.stop].encode())
        lows[position] = highs[position] = consumed
        first, start, swallows = position + 1, mark.stop, added[mark.id].rstrip
    return TokenizedText.of(ids, highs, lows)
