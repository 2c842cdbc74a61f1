"""Ensembles that choose token by token, and the function that runs every mode.

Sources: UniTE (mean over the union of the models' top-k) and SAFE (ICLR 2026: average only where the text ends at a
token boundary of every model and the main one is unsure). Boundaries are exact byte ends.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from fusekit.alignment.vocabulary_map import VocabularyMap, build_vocabulary_map
from fusekit.generation.cool_fusion import cool
from fusekit.generation.reader import Cursor, Next, Reader, load_readers, unfinished
from fusekit.generation.settings import Generation, GenerationError, GenerationSettings, Segment, drain
from fusekit.types import Message

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
            models, pairs of a model and its tokenizer, or :func:`fusekit.generation.reader.load_readers` of them.
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
    conversations = [_conversation(prompt, asked.raw) for prompt in _several(prompts)]
    readers = load_readers(models)
    write = MODES[asked.mode](readers, asked)
    answers = []
    for number, messages in enumerate(conversations, first):
        cursors = [Cursor(reader, reader.prompt(messages, raw=asked.raw)) for reader in readers]
        running = write(cursors, np.random.default_rng([asked.seed, number]))
        segments, finish = drain(running, partial(on_segment, number) if on_segment is not None else None, asked.stop)
        answers.append(Generation("".join(segment.text for segment in segments), segments, finish))
    return answers


def _several(prompts: Any) -> list[Any]:
    """The prompts, of which there may be one: a text, or a conversation."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], (Message, dict))):
        return [prompts]
    if not prompts:
        raise GenerationError("there is no prompt")
    return list(prompts)


def _conversation(prompt: Any, raw: bool) -> tuple[Message, ...]:
    """The messages of a prompt; a text is one of the user. Raises GenerationError."""
    messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    try:
        messages = tuple(m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in messages)
    except (KeyError, TypeError) as error:
        raise GenerationError(f"a message has a role and a content, unlike those of {prompt!r:.80}") from error
    if not messages or not any(isinstance(m.content, str) and m.content for m in messages):
        raise GenerationError("a prompt is empty")
    if raw and len(messages) > 1:
        raise GenerationError(f"raw text is one text, not {len(messages)} messages: leave raw out, or join them")
    if not raw and messages[-1].role == "assistant":
        raise GenerationError("a conversation ends with an assistant's message: leave out the answer to be written")
    return messages


class _Pieces:
    """Tokens become segments once their characters are whole; the probabilities of a character's tokens multiply."""

    def __init__(self) -> None:
        self.text = b""
        self._waiting, self._score, self._scores = b"", 1.0, dict[str, float]()

    @property
    def part(self) -> bytes:
        """The begun character at the end of the text."""
        return self._waiting

    def add(self, text: bytes, probability: float, scores: dict[str, float], model: str) -> Iterator[Segment]:
        """Append a token's bytes; yields a segment unless they end within a character."""
        self.text += text
        self._waiting += text
        self._score *= probability
        self._scores = {name: self._scores.get(name, 1.0) * score for name, score in scores.items()}
        if not unfinished(self._waiting):
            yield Segment(self._waiting.decode(), model, self._score, self._scores)
            self._waiting, self._score, self._scores = b"", 1.0, {}


def _pick(probabilities: np.ndarray[Any, np.dtype[np.float64]], temperature: float, random: np.random.Generator) -> int:
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
        union = {
            text: None for cursor, row in zip(voters, rows, strict=True) for text in _proposed(cursor, row, settings)
        }
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
    row = cursor.next(part)
    while (
        (need := cursor.need)
        and (best := row.best()[0]) is not None
        and need.startswith(cursor.reader.surfaces.of[best])
    ):
        cursor.push(best)
        row = cursor.next(part)
    return row


def _proposed(cursor: Cursor, row: Next, settings: GenerationSettings) -> list[bytes | None]:
    """The bytes of a model's top-k tokens, None for the end of the turn, without what the lead needs."""
    values, ids = row.tokens.topk(min(settings.top_k, len(row.tokens)))
    need, of = len(cursor.need), cursor.reader.surfaces.of
    found: list[bytes | None] = [of[i][need:] for v, i in zip(values.tolist(), ids.tolist(), strict=True) if v > 0]
    if row.end > (float(values[-1]) if len(found) == settings.top_k else 0.0):
        found = [None, *found[: settings.top_k - 1]]
    return [text for text in found if text != b""]


def _probability(cursor: Cursor, row: Next, text: bytes | None) -> float:
    if text is None:
        return row.end
    id_ = cursor.reader.first_piece(cursor.need + text)
    return float(row.tokens[id_]) if id_ is not None and id_ < len(row.tokens) else 0.0


# ---------------------------------------------------------------- SAFE


class _Other(NamedTuple):
    cursor: Cursor
    into_main: VocabularyMap


def safe(
    cursors: Sequence[Cursor], maps: Sequence[VocabularyMap], settings: GenerationSettings, random: np.random.Generator
) -> Segments:
    """The first model writes; where it is unsure at a boundary of every tokenizer, the mean of all of them does.

    Boundary: every other tokenizer, given the text and the first model's best token, ends a token where the text ends.
    maps: from the vocabulary of each other model into that of the first one.
    """
    main, others = cursors[0], [_Other(c, m) for c, m in zip(cursors[1:], maps, strict=True)]
    surfaces, name = main.reader.surfaces, main.reader.name
    pieces = _Pieces()
    for _ in range(settings.max_new_tokens):
        if any(len(cursor) >= cursor.reader.limit for cursor in cursors):
            return "context"
        row = main.next(pieces.part)
        best, probability = row.best()
        draft = surfaces.of[best] if best is not None else b""
        fused = probability < settings.threshold and not pieces.part and not main.need
        fused = fused and all(other.cursor.is_boundary(pieces.text, draft) for other in others)
        rows = [row, *(_in_main(other, row, pieces.text, settings.top_k) for other in others)] if fused else [row]
        mean = np.mean([np.append(r.tokens.double().numpy(), r.end) for r in rows], axis=0)
        if not mean.any():
            return "end"  # the vocabulary cannot finish the begun character
        chosen = _pick(mean, settings.temperature, random)
        if chosen == len(row.tokens):
            return "end"
        values = [float(r.tokens[chosen]) for r in rows]
        scores = dict(zip([cursor.reader.name for cursor in cursors], values, strict=False))
        writer = name if chosen == best else max(scores, key=lambda model: scores[model])
        if written := main.push(chosen):  # nothing of the text, where it is the lead of the template
            yield from pieces.add(written, float(mean[chosen]), scores, writer)
    return "length"


def _in_main(other: _Other, main: Next, text: bytes, top_k: int) -> Next:
    """What another model expects, in the main vocabulary; what its top-k leave out is as the main model has it."""
    other.cursor.follow(text)
    row = other.cursor.next()
    values, ids = row.tokens.double().topk(min(top_k, len(row.tokens)))
    listed = values > 0
    left_out = max(1.0 - row.end - float(values.sum()), 0.0)
    with np.errstate(divide="ignore"):
        logprobs = np.log(values[listed].numpy())[None]
    mapped = other.into_main.project(ids[listed].numpy()[None], logprobs, np.array([row.end + left_out]))
    rest = max(float(mapped.tail[0]) - row.end, 0.0)
    tokens = main.tokens.double() * rest
    known = (mapped.ids[0] >= 0) & (mapped.ids[0] < len(tokens))
    tokens[torch.from_numpy(mapped.ids[0][known])] += torch.from_numpy(np.exp(mapped.logprobs[0][known]))
    return Next(tokens, row.end + rest * main.end)


# ---------------------------------------------------------------- modes

Write = Callable[[Sequence[Cursor], np.random.Generator], Segments]


def _safe(readers: Sequence[Reader], settings: GenerationSettings) -> Write:
    main = readers[0].tokenizer
    maps = [build_vocabulary_map(main, reader.tokenizer, method="prefix") for reader in readers[1:]]
    return lambda cursors, random: safe(cursors, maps, settings, random)


MODES: dict[str, Callable[[Sequence[Reader], GenerationSettings], Write]] = {
    "cool": lambda _, settings: lambda cursors, __: cool(cursors, settings),
    "unite": lambda _, settings: lambda cursors, random: unite(cursors, settings, random),
    "safe": _safe,
}
