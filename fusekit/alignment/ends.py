"""Where every token of an encoding ends, in bytes of the original text.

Three ways, from the fastest to the most general; each is certain or gives way to the next:

1. *Spelling*: the surfaces of the tokens, one after the other, are the text (with or without a dummy space in front).
   This checks itself, needs no offsets, and knows where tokens end inside a character.
2. *Walking*: the same token by token, for dummy spaces after special tokens, added tokens that swallow the space around
   them, and text that contains the space mark ``▁`` itself. Both also run on the normalised text where there is a
   normaliser, and are carried back (normalized.py).
3. *Offsets*: the spans that ``tokenizers`` reports, for tokenizers that drop text (WordPiece), unknown tokens, and
   normalisers that cannot be undone piece by piece. A span that several tokens share is split by their surfaces where
   those spell it; otherwise only its end is certain.

An end is a closed interval ``[low, high]``: text that a tokenizer drops belongs to the token before it, and a boundary
matches anywhere in the gap. ``low > high`` marks an end that is at no place of the original text; it never links.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fusekit.alignment.normalized import NormalizedText, joins_previous, normalize_with_ends
from fusekit.alignment.surfaces import METASPACE, Form, Kind, Surfaces, vocabulary_surfaces
from fusekit.errors import AlignmentError
from fusekit.types import IntArray, TokenizedText

_SPACE = b" "
_MARK = METASPACE.encode()


def tokenize(text: str, tokenizer: Any) -> TokenizedText:
    """Encode ``text`` without special tokens and find every token's end in ``text.encode("utf-8")``.

    Args:
        text: any text that UTF-8 can write.
        tokenizer: see :func:`fusekit.alignment.surfaces.vocabulary_surfaces`.

    Raises:
        AlignmentError: the ends cannot be known; names the tokenizer and the reason.
    """
    return tokenize_with(text, vocabulary_surfaces(tokenizer))


def tokenize_with(text: str, surfaces: Surfaces) -> TokenizedText:
    """:func:`tokenize` with the surfaces at hand."""
    if not isinstance(text, str):
        raise AlignmentError(f"the text to align is {type(text).__name__}, not str")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise AlignmentError(
            f"the text has a lone surrogate at character {error.start} ({text[error.start]!r}): "
            "no tokenizer can encode it; replace it first"
        ) from error
    if not text:
        return _exact([], np.zeros(0, np.int64))
    if surfaces.drops_space:
        return _by_offsets(text, data, *surfaces.view.encode_with_offsets(text), surfaces)
    return ends_of(surfaces.view.encode(text), text, surfaces, lambda: surfaces.view.encode_with_offsets(text))


def ends_of(
    ids: list[int], text: str, surfaces: Surfaces, offsets: Callable[[], tuple[list[int], IntArray]]
) -> TokenizedText:
    """The ends of the tokens of a text that is encoded already.

    Args:
        ids: the tokens, no special ones around them.
        text: what they are tokens of.
        surfaces: of the tokenizer.
        offsets: gives the same ids with their character spans ``[n, 2]`` in ``text``; called only where spelling fails.

    Raises:
        AlignmentError: the ends cannot be known; names the tokenizer and the reason.
    """
    data, view = text.encode(), surfaces.view
    if not surfaces.drops_space:
        found = _spell(ids, data, surfaces)
        if found is not None:
            return found
        found = _walk_text(ids, text, data, surfaces)
        if found is not None:
            return found
    if view.backend is None:
        raise AlignmentError(
            f"{view.name} gives no offsets, and its tokens do not spell the text {text[:40]!r}: "
            "it cannot be aligned exactly; use the fast tokenizer of this model if it has one"
        )
    if surfaces.form is Form.BYTE_LEVEL:
        # Its offsets may be trimmed of spaces by the post-processor, so they are no way out.
        raise AlignmentError(
            f"{view.name} is byte-level, but its tokens do not spell the text {text[:40]!r}: its normaliser "
            f"({', '.join(sorted(view.types('normalizer'))) or 'none'}) changes the text in a way that cannot be undone"
        )
    return _by_offsets(text, data, *offsets(), surfaces)


def _exact(ids: list[int], ends: IntArray) -> TokenizedText:
    return TokenizedText(np.array(ids, np.int64), ends, ends)


def _surfaces_of(ids: list[int], surfaces: Surfaces) -> list[bytes]:
    try:
        return [surfaces.of[id_] for id_ in ids]
    except IndexError:
        raise AlignmentError(
            f"{surfaces.name} emitted token id {max(ids)}, but its vocabulary has {len(surfaces)} entries"
        ) from None


def _spelled_ends(ids: list[int], data: bytes, surfaces: Surfaces) -> IntArray | None:
    """Ends of the tokens in ``data``, or None where their surfaces are not ``data`` after an optional dummy space."""
    spelled = b"".join(_surfaces_of(ids, surfaces))
    surplus = len(spelled) - len(data)
    if surplus not in (0, 1) or not spelled.endswith(data) or (surplus and not spelled.startswith(_SPACE)):
        return None
    ends: IntArray = np.cumsum(surfaces.lengths[ids])
    return np.maximum(ends - surplus, 0) if surplus else ends


def _spell(ids: list[int], data: bytes, surfaces: Surfaces) -> TokenizedText | None:
    ends = _spelled_ends(ids, data, surfaces)
    return None if ends is None else _exact(ids, ends)


def _walk_text(ids: list[int], text: str, data: bytes, surfaces: Surfaces) -> TokenizedText | None:
    """Walk the original text, or the normalised one and carry the ends back."""
    view = surfaces.view
    if (ends := _walk(ids, data, surfaces)) is not None:
        return _exact(ids, ends)
    if view.normalize is None or (image := normalize_with_ends(text, view.normalize)) is None:
        return None
    ends = _spelled_ends(ids, image.normalized, surfaces)
    if ends is None:
        ends = _walk(ids, image.normalized, surfaces)
    return None if ends is None else _carried_back(ids, ends, image)


def _carried_back(ids: list[int], ends: IntArray, image: NormalizedText) -> TokenizedText:
    lows, highs = image.back(ends)
    if len(highs):
        highs[-1] = image.original_ends[-1]
    return TokenizedText(np.array(ids, np.int64), highs, highs if np.array_equal(lows, highs) else lows)


def _walk(ids: list[int], data: bytes, surfaces: Surfaces) -> IntArray | None:
    """Ends by matching each surface in turn, or None at the first that does not match."""
    added = surfaces.view.added_tokens
    ends = np.empty(len(ids), np.int64)
    position, fresh = 0, True  # fresh: at the start of a stretch, where a dummy space may stand
    for i, (id_, bytes_of_id) in enumerate(zip(ids, _surfaces_of(ids, surfaces), strict=True)):
        token, surface = added.get(id_), bytes_of_id
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
        prepends = surfaces.view.prepends
        fresh = (fresh and not length and not prepends) if token is None else not (prepends and token.normalized)
        ends[i] = position
    return ends if position == len(data) else None


def _match(surface: bytes, data: bytes, position: int, surfaces: Surfaces, fresh: bool) -> int | None:
    """Bytes of ``data`` at ``position`` that are the surface, None where they are not."""
    if fresh and surfaces.view.prepends and surface.startswith(_SPACE):  # also before a space of the text's own
        return 0 if surface == _SPACE else _match(surface[1:], data, position, surfaces, False)
    if surface and data.startswith(surface, position):
        return len(surface)
    if fresh and surface.startswith(_SPACE) and not data.startswith((_SPACE, _MARK), position):
        rest = surface[1:]
        return len(rest) if data.startswith(rest, position) else None
    if surfaces.form is Form.METASPACE and _SPACE in surface and _MARK in data[position : position + 3 * len(surface)]:
        return _match_marks(surface, data, position)
    return None


def _match_marks(surface: bytes, data: bytes, position: int) -> int | None:
    """As :func:`_match`, where each space of the surface may be a ``▁`` that the text itself contains."""
    start = position
    for byte in surface:
        if byte == _SPACE[0] and data.startswith(_MARK, position):
            position += len(_MARK)
        elif position < len(data) and data[position] == byte:
            position += 1
        else:
            return None
    return position - start


def _skip_space(data: bytes, position: int) -> int:
    rest = data[position:].decode(errors="ignore")
    return position + len(rest[: len(rest) - len(rest.lstrip())].encode())


def _by_offsets(text: str, data: bytes, ids: list[int], spans: IntArray, surfaces: Surfaces) -> TokenizedText:
    if not ids:
        return _exact(ids, np.zeros(0, np.int64))
    if len(spans) != len(ids) or spans.min() < 0 or spans.max() > len(text):
        raise AlignmentError(f"{surfaces.name} gave offsets that are not positions of the text {text[:40]!r}")
    place = np.arange(len(text) + 1) if text.isascii() else _byte_positions(text)
    # A token whose span begins before the end of an earlier one shares characters with it.
    reached = np.maximum.accumulate(spans[:, 1])
    opens = np.ones(len(ids), bool)
    opens[1:] = spans[1:, 0] >= reached[:-1]
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(ids)) - 1
    stops = reached[last]
    resumes = np.append(np.maximum(spans[first[1:], 0], stops[:-1]), len(text))
    lows, highs = place[stops].copy(), place[resumes].copy()
    normalize = surfaces.view.normalize
    if normalize is not None and not text.isascii():
        for i, stop in enumerate(stops.tolist()):
            end = _composed_until(text, stop, normalize)
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
    all_highs[-1] = len(data)
    same = np.array_equal(all_lows, all_highs)
    return TokenizedText(np.array(ids, np.int64), all_highs, all_highs if same else all_lows)


def _byte_positions(text: str) -> IntArray:
    """Byte offset of every character of ``text``, and of its end."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


def _composed_until(text: str, stop: int, normalize: Callable[[str], str]) -> int:
    """Where combining characters at ``stop`` end if the normaliser merges them with what is before, else ``stop``."""
    if stop >= len(text) or not joins_previous(text[stop]):
        return stop
    begin, end = max(stop - 1, 0), stop + 1
    while begin > 0 and joins_previous(text[begin]):
        begin -= 1
    while end < len(text) and joins_previous(text[end]):
        end += 1
    apart = normalize(text[begin:stop]) + normalize(text[stop:end])
    return stop if normalize(text[begin:end]) == apart else end


def _split_shared(shared: str, ids: list[int], surfaces: Surfaces) -> tuple[IntArray, IntArray] | None:
    """Lowest and highest ends, counted from the span's start, of all but the last of the tokens that share a span.

    By their surfaces, where those spell the span or its normalised form; None where they do not.
    """
    if surfaces.of[ids[0]] == _SPACE and not shared.startswith((" ", METASPACE)) and len(ids) > 1:
        # A dummy space by itself has no width.
        rest = _split_shared(shared, ids[1:], surfaces) if len(ids) > 2 else (np.zeros(0, np.int64),) * 2
        return None if rest is None else (np.append(0, rest[0]), np.append(0, rest[1]))
    if any(surfaces.kinds[id_] in (Kind.UNKNOWN, Kind.HOLE) for id_ in ids):
        return None
    ends = _spelled_ends(ids, shared.encode(), surfaces)
    if ends is not None:
        return ends[:-1], ends[:-1]
    normalize = surfaces.view.normalize
    image = normalize_with_ends(shared, normalize) if normalize is not None else None
    ends = _spelled_ends(ids, image.normalized, surfaces) if image is not None else None
    return None if image is None or ends is None else image.back(ends[:-1])
