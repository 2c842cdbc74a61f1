"""Cool-Fusion (arXiv 2407.19807, ACL 2025): all models write and score segments; all take the best."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

from fusekit.generation.reader import Cursor, unfinished
from fusekit.generation.settings import GenerationSettings, Segment, drain


class _Draft(NamedTuple):
    """A candidate. text: empty for the end of the turn. tokens: that its writer needed. writer: number of the model."""

    text: bytes
    tokens: int
    writer: int


def mean_perplexity(nats: Sequence[Sequence[float]]) -> tuple[float, list[float]]:
    """The score of a segment: the arithmetic mean over models of exp(mean nats of the model's tokens); lower is better.

    Args:
        nats: per model, the negative log-likelihood of each of its tokens of the segment.

    Returns:
        The mean, and the perplexity of each model.
    """
    perplexities = [math.exp(min(sum(values) / len(values), 700.0)) for values in nats]
    return sum(perplexities) / len(perplexities), perplexities


def cool(cursors: Sequence[Cursor], settings: GenerationSettings) -> Generator[Segment, None, str]:
    """The segments of an answer, greedily; returns why it ended (:attr:`Generation.finish`).

    With ``rerank`` the models also write an answer alone, and the one of lowest perplexity is yielded, once all are
    there.
    """
    if not settings.rerank:
        return (yield from _fused(cursors, settings))
    segments, finish = drain(_fused(cursors, settings))
    alone = []
    for writer, cursor in enumerate(cursors):
        cursor.rewind(0)
        text, tokens, ended = _continue(cursor, settings.max_new_tokens)
        alone.append((_Draft(text, tokens, writer), "end" if ended else "length"))
    for cursor in cursors:
        cursor.rewind(0)
    whole = "".join(segment.text for segment in segments).encode()
    score, _ = _score(cursors, b"", whole)
    scored = [(_score(cursors, b"", draft.text), draft, why) for draft, why in alone]
    (best, perplexities), draft, why = min(scored, key=lambda entry: entry[0][0])
    if score <= best:
        yield from segments
        return finish
    names = [cursor.reader.name for cursor in cursors]
    if draft.text:
        found = dict(zip(names, perplexities, strict=True))
        yield Segment(draft.text.decode(), names[draft.writer], best, found)
    return why


def _fused(cursors: Sequence[Cursor], settings: GenerationSettings) -> Generator[Segment, None, str]:
    text, written = b"", 0
    while written < settings.max_new_tokens:
        if any(len(cursor) + settings.max_segment >= cursor.reader.limit for cursor in cursors):
            return "context"
        most = min(settings.max_segment, settings.max_new_tokens - written)
        starts = [len(cursor.ids) for cursor in cursors]
        drafts: dict[bytes, _Draft] = {}
        own: list[tuple[bytes, list[float]]] = []  # each model's candidate, and its nats for it
        for number, cursor in enumerate(cursors):
            if settings.segment == "aligned":
                others = [other for other in cursors if other is not cursor]
                segment, tokens = _to_common_boundary(cursor, others, text, most)
            else:
                segment, tokens = _to_next_word(cursor, most)
            drafts.setdefault(segment, _Draft(segment, tokens, number))
            own.append((segment, cursor.nll(starts[number]) if segment else [cursor.end_nll()]))
            cursor.rewind(starts[number])
        scores = {}
        for segment in drafts:
            nats = [
                known if mine == segment else _nats(cursor, text, segment)
                for cursor, (mine, known) in zip(cursors, own, strict=True)
            ]
            scores[segment] = mean_perplexity(nats)
        best = min(drafts, key=lambda segment: scores[segment][0])  # the first model's, of equal ones
        if not best:
            return "end"
        text += best
        written += drafts[best].tokens
        for cursor in cursors:
            cursor.follow(text)
        mean, perplexities = scores[best]
        names = [cursor.reader.name for cursor in cursors]
        yield Segment(best.decode(), names[drafts[best].writer], mean, dict(zip(names, perplexities, strict=True)))
    return "length"


def _score(cursors: Sequence[Cursor], text: bytes, segment: bytes) -> tuple[float, list[float]]:
    return mean_perplexity([_nats(cursor, text, segment) for cursor in cursors])


def _nats(cursor: Cursor, text: bytes, segment: bytes) -> list[float]:
    """The nats of a model for its tokens of a segment behind the text, or of the end of the turn where it is empty."""
    if not segment:
        return [cursor.end_nll()]
    before = cursor.state()
    cursor.follow(text + segment)
    place = len(cursor.lead) + len(text) if text else 0
    first = next(number for number, end in enumerate(cursor.ends) if end > place)
    nats = cursor.nll(first)
    cursor.restore(before)
    return nats


def _continue(cursor: Cursor, most: int) -> tuple[bytes, int, bool]:
    """A model's own greedy answer in whole characters, its tokens, and whether it ended the turn."""
    text, part = b"", b""
    for tokens in range(most):
        best, _ = cursor.next(part).best()
        if best is None:
            return text[: len(text) - len(part)], tokens, True
        text += cursor.push(best)
        part = text[len(text) - (unfinished(text) or 0) :]
    return text[: len(text) - len(part)], most, False


def _to_next_word(cursor: Cursor, most: int) -> tuple[bytes, int]:
    """A model's tokens up to its next word: white space after something else. Leaves the tokens on the cursor.

    The limit ``most`` is passed where it would cut a character.
    """
    start, text, part = len(cursor.ids), b"", b""
    of = cursor.reader.surfaces.of
    while True:
        best, _ = cursor.next(part).best()
        if best is None or (text.strip() and not part and of[best][:1].isspace()):
            break
        text += cursor.push(best)
        part = text[len(text) - (unfinished(text) or 0) :]
        if len(cursor.ids) - start >= most and text and not part:
            break
    return _whole(cursor, start, text)


def _to_common_boundary(cursor: Cursor, others: Sequence[Cursor], text: bytes, most: int) -> tuple[bytes, int]:
    """A model's tokens up to the first of their ends that is a token end of every model, one more token looked at.

    The last token is only looked at: what follows a token decides whether another tokenizer ends one there.
    """
    start, segment = len(cursor.ids), b""
    ends: list[int] = []  # bytes of the segment at the end of each token
    while True:
        part = segment[len(segment) - (unfinished(segment) or 0) :]
        best, _ = cursor.next(part).best()
        if best is None or (len(ends) >= most and segment and not part):
            return _whole(cursor, start, segment)
        ahead = segment + cursor.reader.surfaces.of[best][len(cursor.need) :]
        common = set.intersection(*({e - len(o.lead) for e in o.boundaries(text + ahead)} for o in others))
        for number, end in enumerate(ends):
            if end and unfinished(segment[:end]) == 0 and len(text) + end in common:
                cursor.rewind(start + number + 1)
                return segment[:end], number + 1
        segment += cursor.push(best)
        ends.append(len(segment))


def _whole(cursor: Cursor, start: int, text: bytes) -> tuple[bytes, int]:
    """A draft without the tokens of a character that its writer cannot finish."""
    while unfinished(text):
        text = text[: max(len(text) - len(cursor.reader.surfaces.of[cursor.ids[-1]]), 0)]
        cursor.rewind(len(cursor.ids) - 1)
    return text, len(cursor.ids) - start
