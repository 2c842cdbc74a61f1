"""Several models write one text: the three modes, and the function that runs them.

UniTE (arXiv 2410.03777): the mean over the union of the models' top-k. SAFE (ICLR 2026): average only where the text
ends at a token boundary of every model and the main one is unsure; boundaries are exact byte ends. Cool-Fusion (arXiv
2407.19807, ACL 2025): all models write and score segments; all take the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from fusekit.alignment.vocabulary_map import VocabularyMap
from fusekit.errors import GenerationError
from fusekit.generation.reader import Cursor, Next, load_readers, unfinished
from fusekit.settings import GenerationSettings
from fusekit.types import FloatArray, Message


class Segment(NamedTuple):
    """A piece of an answer, of whole characters.

    model: who wrote it: in ``unite``, and where ``safe`` averages, the model that found it most probable. score:
    ``cool``: mean perplexity, lower is better; else the probability that it was chosen with. scores: the same of every
    model that took part.
    """

    text: str
    model: str
    score: float
    scores: dict[str, float]


class Generation(NamedTuple):
    """An answer: the text of its segments together.

    finish: ``end`` of turn, ``stop`` (a text of ``stop``), ``length`` (``max_new_tokens``), or ``context`` (a model can
    read no more).
    """

    text: str
    segments: list[Segment]
    finish: str


Prompt = str | Sequence[Message | dict[str, str]]
Segments = Generator[Segment, None, str]
"""The segments of an answer as they are written; returns why it ended (:attr:`Generation.finish`)."""


def generate(
    models: Sequence[Any],
    prompts: Prompt | Sequence[Prompt],
    *,
    on_segment: Callable[[int, Segment], None] | None = None,
    first: int = 0,
    **settings: Any,
) -> list[Generation]:
    """Let several models write each answer together.

    Args:
        models: at least two, the main one first: ids, folders, :class:`fusekit.capturing.models.ModelChoice`, loaded
            models, or pairs of a model and its tokenizer.
        prompts: a text, a conversation (messages, or dicts with role and content), or a list of them. A text is a
            user's message under each model's own chat template, or continued as it is with ``raw=True``.
        on_segment: is told each segment as it is written, with the number of its prompt.
        first: number of the first prompt, which goes into the seed of each: a part of a list samples as the whole does.
        settings: fields of :class:`GenerationSettings`: ``mode="cool"``, ``"unite"`` or ``"safe"``, ...

    Returns:
        One :class:`Generation` for each prompt, in order. The same settings, seed included, give the same answers.

    Raises:
        GenerationError: one model, an empty prompt, unknown settings, a model without a chat template.
        CaptureError: a model cannot be found or loaded.
        AlignmentError: the tokens of a model do not stand for fixed bytes.

    Example:
        >>> from fusekit.generation import generate
        >>> models = ["demo/models/pivot", "demo/sources/llama", "demo/sources/qwen"]
        >>> [answer] = generate(models, "Capital of Peru?", mode="unite", max_new_tokens=8)
    """
    asked = GenerationSettings.of(settings)
    if not prompts:
        raise GenerationError("there is no prompt, or it is empty")
    alone = isinstance(prompts, str) or isinstance(prompts[0], (Message, dict))
    conversations = [_conversation(prompt, asked.raw) for prompt in ([prompts] if alone else prompts)]
    readers = load_readers(models)
    answers = []
    for number, messages in enumerate(conversations, first):
        cursors = [Cursor(reader, reader.prompt(messages, raw=asked.raw)) for reader in readers]
        running = MODES[asked.mode](cursors, asked, np.random.default_rng([asked.seed, number]))
        segments, finish = drain(running, partial(on_segment, number) if on_segment is not None else None, asked.stop)
        answers.append(Generation("".join(segment.text for segment in segments), segments, finish))
    return answers


def drain(
    running: Segments, on_segment: Callable[[Segment], None] | None = None, stop: Sequence[str] = ()
) -> tuple[list[Segment], str]:
    """All segments of an answer that is being written, up to a text of ``stop``, and why it ended.

    on_segment: called with each as it comes; with ``stop`` once it is known to stay.
    """
    segments: list[Segment] = []
    text, finish, shown = "", "", 0
    while not finish:
        try:
            segments.append(next(running))
            text += segments[-1].text
        except StopIteration as stopped:
            finish = str(stopped.value)
        if found := [text.index(one) for one in stop if one in text]:
            running.close()
            segments, finish = _cut(segments, min(found)), "stop"
        certain = len(text) if finish or not stop else len(text) - max(map(len, stop)) + 1
        while shown < len(segments) and sum(len(segment.text) for segment in segments[: shown + 1]) <= certain:
            if on_segment is not None:
                on_segment(segments[shown])
            shown += 1
    return segments, finish


def _cut(segments: Sequence[Segment], size: int) -> list[Segment]:
    """The first ``size`` characters."""
    kept = []
    for segment in segments:
        if size > 0:
            kept.append(segment._replace(text=segment.text[:size]))
        size -= len(segment.text)
    return kept


def _conversation(prompt: Any, raw: bool) -> tuple[Message, ...]:
    """The messages of a prompt; a text is one of the user. Raises GenerationError."""
    messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    try:
        messages = tuple(m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in messages)
    except (KeyError, TypeError) as error:
        raise GenerationError(f"a message has a role and a content, unlike those of {prompt!r:.80}") from error
    if not any(message.content for message in messages):
        raise GenerationError("a prompt is empty")
    if raw and len(messages) > 1:
        raise GenerationError(f"raw text is one text, not {len(messages)} messages: leave raw out, or join them")
    if not raw and messages[-1].role == "assistant":
        raise GenerationError("a conversation ends with an assistant's message: leave out the answer to be written")
    return messages


class _Pieces:
    """Tokens become segments once their characters are whole; the probabilities of a character's tokens multiply.

    text: so far. part: the begun character at its end.
    """

    def __init__(self) -> None:
        self.text = self.part = b""
        self._score, self._scores = 1.0, dict[str, float]()

    def add(self, text: bytes, probability: float, scores: dict[str, float], model: str) -> Iterator[Segment]:
        """Append a token's bytes; yields a segment unless they end within a character."""
        self.text += text
        self.part += text
        self._score *= probability
        self._scores = {name: self._scores.get(name, 1.0) * score for name, score in scores.items()}
        if not unfinished(self.part):
            yield Segment(self.part.decode(), model, self._score, self._scores)
            self.part, self._score, self._scores = b"", 1.0, {}


def _pick(probabilities: FloatArray, temperature: float, random: np.random.Generator) -> int:
    """The largest, the first of several; or one drawn. float64 [n], not all zero; they need not sum to 1."""
    if not temperature:
        return int(probabilities.argmax())
    with np.errstate(divide="ignore"):
        scaled = np.log(probabilities) / temperature
    weights = np.exp(scaled - scaled.max())
    return int(random.choice(len(weights), p=weights / weights.sum()))


# ---------------------------------------------------------------- UniTE


def unite(cursors: Sequence[Cursor], settings: GenerationSettings, random: np.random.Generator) -> Segments:
    """The mean of all models over the union of their top-k, at every token.

    A token that a vocabulary lacks counts by the first of the tokens that the model writes for it. A model that cannot
    write the begun character that the text ends with sits out until it is whole.
    """
    pieces = _Pieces()
    for _ in range(settings.max_new_tokens):
        if any(len(cursor) >= cursor.reader.limit for cursor in cursors):
            return "context"
        voters = [cursor for cursor in cursors if not pieces.text or cursor.follow(pieces.text)]
        rows = [_after_lead(cursor, pieces.part) for cursor in voters]
        union = {text for pair in zip(voters, rows, strict=True) for text in _proposed(*pair, settings.top_k)}
        if not union:
            return "end"  # no vocabulary can finish the begun character
        options = sorted(union, key=lambda text: (text is None, text or b""))
        table = np.array([[_probability(*pair, text) for text in options] for pair in zip(voters, rows, strict=True)])
        mean = table.mean(axis=0)
        chosen = _pick(mean, settings.temperature, random)
        text = options[chosen]
        if text is None:
            return "end"
        scores = {cursor.reader.name: float(p) for cursor, p in zip(voters, table[:, chosen], strict=True)}
        yield from pieces.add(text, float(mean[chosen]), scores, max(scores, key=lambda name: scores[name]))
    return "length"


def _after_lead(cursor: Cursor, part: bytes) -> Next:
    """What a model expects next; where it would write the lead of its template alone, it does so first."""
    while True:
        row = cursor.next(part)
        best, _ = row.best()
        if not (need := cursor.need) or best is None or not need.startswith(cursor.reader.surfaces.of[best]):
            return row
        cursor.push(best)


def _proposed(cursor: Cursor, row: Next, top_k: int) -> list[bytes | None]:
    """The bytes of a model's top-k tokens, None for the end of the turn, without what the lead needs."""
    values, ids = row.tokens.topk(min(top_k, len(row.tokens)))
    need, of = len(cursor.need), cursor.reader.surfaces.of
    found: list[bytes | None] = [of[i][need:] for v, i in zip(values.tolist(), ids.tolist(), strict=True) if v > 0]
    if row.end > (float(values[-1]) if len(found) == top_k else 0.0):
        found = [None, *found[: top_k - 1]]
    return [text for text in found if text != b""]


def _probability(cursor: Cursor, row: Next, text: bytes | None) -> float:
    if text is None:
        return row.end
    id_ = cursor.reader.first_piece(cursor.need + text)
    return float(row.tokens[id_]) if id_ is not None and id_ < len(row.tokens) else 0.0


# ---------------------------------------------------------------- SAFE


def safe(cursors: Sequence[Cursor], settings: GenerationSettings, random: np.random.Generator) -> Segments:
    """The first model writes; where it is unsure at a boundary of every tokenizer, the mean of all of them does.

    Boundary: every other tokenizer, given the text and the first model's best token, ends a token where the text ends.
    """
    main, *others = cursors
    maps = [other.reader.map_into(main.reader) for other in others]
    surfaces, names = main.reader.surfaces, [cursor.reader.name for cursor in cursors]
    pieces = _Pieces()
    for _ in range(settings.max_new_tokens):
        if any(len(cursor) >= cursor.reader.limit for cursor in cursors):
            return "context"
        row = main.next(pieces.part)
        best, probability = row.best()
        ahead = pieces.text + (surfaces.of[best] if best is not None else b"")
        rows = [row]
        if (
            probability < settings.threshold
            and not pieces.part
            and not main.need
            and all(len(other.lead) + len(pieces.text) in other.boundaries(ahead) for other in others)
        ):
            rows += [_in_main(o, m, row, pieces.text, settings.top_k) for o, m in zip(others, maps, strict=True)]
        mean = np.mean([np.append(r.tokens.double().numpy(), r.end) for r in rows], axis=0)
        if not mean.any():
            return "end"  # the vocabulary cannot finish the begun character
        chosen = _pick(mean, settings.temperature, random)
        if chosen == len(row.tokens):
            return "end"
        scores = dict(zip(names, (float(r.tokens[chosen]) for r in rows), strict=False))
        writer = names[0] if chosen == best else max(scores, key=lambda model: scores[model])
        if written := main.push(chosen):  # nothing of the text, where it is the lead of the template
            yield from pieces.add(written, float(mean[chosen]), scores, writer)
    return "length"


def _in_main(other: Cursor, into_main: VocabularyMap, main: Next, text: bytes, top_k: int) -> Next:
    """What another model expects, in the main vocabulary; what its top-k leave out is as the main model has it."""
    other.follow(text)
    row = other.next()
    values, ids = row.tokens.double().topk(min(top_k, len(row.tokens)))
    listed = values > 0
    left_out = max(1.0 - row.end - float(values.sum()), 0.0)
    with np.errstate(divide="ignore"):
        logprobs = np.log(values[listed].numpy())[None]
    mapped = into_main.project(ids[listed].numpy()[None], logprobs, np.array([row.end + left_out]))
    rest = max(float(mapped.tail[0]) - row.end, 0.0)
    tokens = main.tokens.double() * rest
    known = (mapped.ids[0] >= 0) & (mapped.ids[0] < len(tokens))
    tokens[torch.from_numpy(mapped.ids[0][known])] += torch.from_numpy(np.exp(mapped.logprobs[0][known]))
    return Next(tokens, row.end + rest * main.end)


# ---------------------------------------------------------------- Cool-Fusion


def mean_perplexity(nats: Sequence[Sequence[float]]) -> tuple[float, list[float]]:
    """The score of a segment: the arithmetic mean over models of exp(mean nats of the model's tokens); lower is better.

    nats: per model, the negative log-likelihood of each of its tokens. Returns also the perplexity of each model.
    """
    perplexities = [math.exp(min(sum(values) / len(values), 700.0)) for values in nats]
    return sum(perplexities) / len(perplexities), perplexities


def cool(cursors: Sequence[Cursor], settings: GenerationSettings, _random: np.random.Generator) -> Segments:
    """The best of the models' segments, greedily.

    With ``rerank`` the models also write an answer alone, and the one of lowest perplexity is yielded, once all are
    there.
    """
    if not settings.rerank:
        return (yield from _fused(cursors, settings))
    names = [cursor.reader.name for cursor in cursors]
    segments, finish = drain(_fused(cursors, settings))
    answers = [("".join(segment.text for segment in segments).encode(), finish)]
    for cursor in cursors:
        cursor.rewind(0)
        text, _, why = _write(cursor, settings.max_new_tokens)
        answers.append((text, why))
        cursor.rewind(0)
    scores = [mean_perplexity([_nats(cursor, b"", text) for cursor in cursors]) for text, _ in answers]
    best = min(range(len(answers)), key=lambda number: scores[number][0])
    text, finish = answers[best]
    if best == 0:
        yield from segments
    elif text:
        mean, perplexities = scores[best]
        yield Segment(text.decode(), names[best - 1], mean, dict(zip(names, perplexities, strict=True)))
    return finish


def _fused(cursors: Sequence[Cursor], settings: GenerationSettings) -> Segments:
    names = [cursor.reader.name for cursor in cursors]
    text, written = b"", 0
    while written < settings.max_new_tokens:
        if any(len(cursor) + settings.max_segment >= cursor.reader.limit for cursor in cursors):
            return "context"
        most = min(settings.max_segment, settings.max_new_tokens - written)
        drafts: dict[bytes, tuple[str, int]] = {}  # writer and tokens by candidate; an empty one ends the turn
        own: list[tuple[bytes, list[float]]] = []  # each model's candidate, and its nats for it
        for cursor in cursors:
            start = len(cursor.ids)
            if settings.segment == "aligned":
                others = [other for other in cursors if other is not cursor]
                segment, tokens = _to_common_boundary(cursor, others, text, most)
            else:
                segment, tokens, _ = _write(cursor, most, word=True)
            drafts.setdefault(segment, (cursor.reader.name, tokens))
            own.append((segment, cursor.nll(start) if segment else [cursor.end_nll()]))
            cursor.rewind(start)
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
        written += drafts[best][1]
        for cursor in cursors:
            cursor.follow(text)
        mean, perplexities = scores[best]
        yield Segment(best.decode(), drafts[best][0], mean, dict(zip(names, perplexities, strict=True)))
    return "length"


def _nats(cursor: Cursor, text: bytes, segment: bytes) -> list[float]:
    """The nats of a model for its tokens of a segment behind the text, or of the end of the turn where it is empty."""
    if not segment:
        return [cursor.end_nll()]
    before = cursor.ids[:], cursor.ends[:]
    cursor.follow(text + segment)
    place = len(cursor.lead) + len(text) if text else 0
    nats = cursor.nll(next(number for number, end in enumerate(cursor.ends) if end > place))
    cursor.ids, cursor.ends = before
    return nats


def _begun(text: bytes) -> bytes:
    """The begun character at the end of a text."""
    return text[len(text) - (unfinished(text) or 0) :]


def _write(cursor: Cursor, most: int, *, word: bool = False) -> tuple[bytes, int, str]:
    """A model's own greedy text in whole characters, its number of tokens, and why it ended.

    word: end before the next word, white space after something else. The limit ``most`` is passed where it would cut a
    character. Leaves the tokens on the cursor.
    """
    start, text, of = len(cursor.ids), b"", cursor.reader.surfaces.of
    why = "length"
    while not (len(cursor.ids) - start >= most and text and not _begun(text)):
        if len(cursor) >= cursor.reader.limit:
            why = "context"
            break
        best, _ = cursor.next(part := _begun(text)).best()
        if best is None or (word and text.strip() and not part and of[best][:1].isspace()):
            why = "end"
            break
        text += cursor.push(best)
    text = _whole(cursor, text)
    return text, len(cursor.ids) - start, why


def _to_common_boundary(cursor: Cursor, others: Sequence[Cursor], text: bytes, most: int) -> tuple[bytes, int]:
    """A model's tokens up to the first of their ends that is a token end of every model, one more token looked at.

    The last token is only looked at: what follows a token decides whether another tokenizer ends one there.
    """
    start, segment = len(cursor.ids), b""
    ends: list[int] = []  # bytes of the segment at the end of each token
    while True:
        best, _ = cursor.next(part := _begun(segment)).best()
        if best is None or (len(ends) >= most and segment and not part):
            segment = _whole(cursor, segment)
            return segment, len(cursor.ids) - start
        ahead = segment + cursor.reader.surfaces.of[best][len(cursor.need) :]
        common = set.intersection(*({e - len(o.lead) for e in o.boundaries(text + ahead)} for o in others))
        for number, end in enumerate(ends):
            if end and unfinished(segment[:end]) == 0 and len(text) + end in common:
                cursor.rewind(start + number + 1)
                return segment[:end], number + 1
        segment += cursor.push(best)
        ends.append(len(segment))


def _whole(cursor: Cursor, text: bytes) -> bytes:
    """A draft without the tokens of a character that its writer cannot finish."""
    while unfinished(text):
        text = text[: max(len(text) - len(cursor.reader.surfaces.of[cursor.ids[-1]]), 0)]
        cursor.rewind(len(cursor.ids) - 1)
    return text


MODES: dict[str, Callable[[Sequence[Cursor], GenerationSettings, np.random.Generator], Segments]] = {
    "cool": cool,
    "unite": unite,
    "safe": safe,
}
