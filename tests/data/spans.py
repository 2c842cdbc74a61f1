"""The slow, obvious truth about a row's tokens: what their surfaces spell, and what two models' have read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusekit.alignment.alignment import align_tokens
from fusekit.data.tokenize import RowTokenizer
from fusekit.types import Cut, Message, Part, Row, TokenizedRow

Turns = Sequence[tuple[str, str]]


def row(turns: Turns, cut: Cut | None = None) -> Row:
    return Row(tuple(Message(*turn) for turn in turns), cut=cut)


def spelled(tokens: TokenizedRow, model: RowTokenizer, which: Any) -> str:
    """What some of the tokens spell. which: any index of numpy's."""
    return b"".join(model.encoder.surfaces.of[i] for i in tokens.ids[which].tolist()).decode()


def _whole(data: bytes, start: int, stop: int) -> str:
    """The characters that bytes from start to stop are of, which may be white space beyond ASCII."""
    while start < stop and 0x80 <= data[start] < 0xC0:
        start -= 1
    while start < stop < len(data) and 0x80 <= data[stop] < 0xC0:
        stop += 1
    return data[start:stop].decode()


def assert_links(turns: Turns, pivot: RowTokenizer, source: RowTokenizer) -> None:
    """Check every link of two models over a row: both have spelled the same content, up to white space."""
    a, b = pivot.tokenize(row(turns)), source.tokenize(row(turns))
    for number, (_, content) in enumerate(turns):
        data = content.encode()
        (p, at_p), (s, at_s) = a.content(number), b.content(number)
        assert np.array_equal(p.ids, a.ids[at_p : at_p + len(p)])
        linked = align_tokens(content, p, s).source_at
        ended = [np.flatnonzero((t.part == Part.END) & (t.message == number)) for t in (a, b)]
        if len(ended[0]) and len(ended[1]):
            assert linked[ended[0][0] - at_p] == ended[1][0] - at_s
        for i in np.flatnonzero(linked >= 0).tolist():
            j = linked[i]
            assert max(p.lows[i], s.lows[j]) <= min(p.ends[i], s.ends[j])
            assert _whole(data, *sorted((p.ends[i], s.ends[j]))).strip() == ""
        if len(p) and len(s) and data.strip():
            assert (linked >= 0).any()


def assert_spans(
    turns: Turns, model: RowTokenizer, end: str | None, *, trims: bool = False, swallows: bool = False
) -> TokenizedRow:
    """Hold a row's tokens against its contents, and return them. end: that of an answer, as the model writes it.

    trims: the template strips contents. swallows: a special token takes the white space after it.
    """
    tokens = model.tokenize(row(turns))
    surfaces, ids = model.encoder.surfaces.of, tokens.ids.tolist()
    assert len(tokens) == len(tokens.message) == len(tokens.part) == len(tokens.ends) == len(tokens.labels)
    assert (tokens.message[1:] >= tokens.message[:-1]).all()
    assert not tokens.labels[0]
    for number, message in enumerate(row(turns).messages):
        content = message.content.encode()
        shown = message.content.lstrip() if trims or swallows else message.content
        dropped = len(content) - len(shown.encode())
        kept = (shown.rstrip() if trims else shown).encode()
        mine = [i for i in range(len(tokens)) if tokens.message[i] == number]
        inside = [i for i in mine if tokens.part[i] == Part.CONTENT]
        spelled = b"".join(surfaces[ids[i]] for i in inside)
        # A first token may begin in the template: with a space, or a line feed that merges with the content's own.
        front = spelled.find(kept) if kept else 0
        assert front == 0 or 0 < front < len(surfaces[ids[inside[0]]]), (number, spelled, kept)
        assert spelled[front:].startswith(kept), (number, spelled, kept)
        consumed = -front
        for i in inside:
            consumed += len(surfaces[ids[i]])
            if consumed >= len(kept):
                assert tokens.ends[i] == len(content)
                assert tokens.lows[i] == dropped + len(kept)
            else:
                assert tokens.ends[i] == tokens.lows[i] == dropped + consumed
        ending = [i for i in mine if tokens.part[i] == Part.END]
        assert all(tokens.ends[i] == len(content) for i in ending)
        learned = b"".join(surfaces[ids[i]] for i in mine if tokens.labels[i])
        if message.role != "assistant":
            assert learned == b"", (number, learned)
        else:
            whole = kept + (end or "").encode()
            first = next(i for i in mine if tokens.labels[i])
            assert learned.endswith(whole), (number, learned, whole)
            assert len(learned) - len(whole) <= len(surfaces[ids[first]]) - (tokens.part[first] == Part.CONTENT)
            assert [tokens.labels[i] for i in ending] == [True] * len(ending)
            assert len(ending) == (end is not None)
    return tokens
