"""What crosses borders between packages: conversations, token sequences with their places, top-k rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


TEXT = "text"
"""Role of a document of plain text: no template, ended by the end-of-text token."""

FRAGMENT = "fragment"
"""Role of a piece of a document that continues in the next example: as ``TEXT``, without the end."""


class Message(NamedTuple):
    """One message: its content as written, by a ``system``, ``user``, ``assistant``, ``TEXT`` or ``FRAGMENT``."""

    role: str
    content: str


class Cut(NamedTuple):
    """Where a row ends: after ``size`` bytes of the UTF-8 content of message number ``message`` (from 0)."""

    message: int
    size: int


@dataclass(frozen=True)
class Row:
    """A conversation, or a block of plain text.

    Attributes:
        messages: in order. Plain text has only messages of role ``TEXT``, the last one ``FRAGMENT`` if it is cut off.
        dataset: which source of data it came from, for counts by source; no part of the key.
        cut: where the row ends for all models of a run, so that every figure is over the same bytes; None for its end.
        context: numbers of the messages that the data marks as context: they have no labels, whatever their role.
    """

    messages: tuple[Message, ...]
    dataset: str = ""
    cut: Cut | None = None
    context: tuple[int, ...] = ()

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits, the xxh3-128 of messages and context: the same in every store."""
        whole = [*map(list, self.messages), *([list(self.context)] if self.context else [])]
        return xxhash.xxh3_128_hexdigest(json.dumps(whole, ensure_ascii=True, separators=(",", ":")).encode())

    def to_record(self) -> dict[str, Any]:
        """The row as plain JSON values: key, dataset, messages, cut, and context where there is one."""
        record: dict[str, Any] = {"key": self.key, "dataset": self.dataset, "messages": list(map(list, self.messages))}
        record["cut"] = list(self.cut) if self.cut else None
        return record | ({"context": list(self.context)} if self.context else {})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Row:
        """The row that :meth:`to_record` gave. Raises ValueError, KeyError or TypeError where it is another one."""
        messages = tuple(Message(*message) for message in record["messages"])
        cut = Cut(*record["cut"]) if record["cut"] else None
        if not all(isinstance(text, str) for text in [record["dataset"], *chain.from_iterable(messages)]):
            raise TypeError("the data set, a role or a content is not text")
        row = cls(messages, record["dataset"], cut, tuple(record.get("context", ())))
        if row.key != record["key"]:
            raise ValueError(f"its key is {row.key}, not {record['key']}")
        return row

    @property
    def is_text(self) -> bool:
        """Whether it is plain text, which takes no chat template."""
        return all(message.role in (TEXT, FRAGMENT) for message in self.messages)


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """The tokens of a text with their byte ends.

    Attributes:
        ids: int64 [n].
        ends: int64 [n], the bytes consumed once each token is read; non-decreasing, the last is the text's length.
        lows: int64 [n], the lowest position that is the same boundary; ``lows > ends`` where a token ends at no place
            of the original text. The same array as ``ends`` where nothing is dropped or uncertain.
    """

    ids: IntArray
    ends: IntArray
    lows: IntArray

    @classmethod
    def of(cls, ids: npt.ArrayLike, ends: IntArray, lows: IntArray) -> TokenizedText:
        """Tokens with these ends, both int64 [n]."""
        return cls(np.asarray(ids, np.int64), ends, ends if np.array_equal(ends, lows) else lows)

    @property
    def exact(self) -> bool:
        """Whether every token ends at one place."""
        return self.lows is self.ends

    def __len__(self) -> int:
        return len(self.ids)

    def opened(self, id_: int) -> TokenizedText:
        """With a token before the text that stands for none of it (bos): it ends at 0."""
        ends, lows = (np.concatenate([[0], side]).astype(np.int64) for side in (self.ends, self.lows))
        return self.of(np.concatenate([[id_], self.ids]), ends, lows)

    def closed(self, id_: int) -> TokenizedText:
        """With a token after the text that stands for its end (eos, end of turn).

        It ends one past the text, so it links to the other side's end of the text, whatever that is written like, and
        leaves the link of the last token of text alone.
        """
        end = (int(self.ends[-1]) if len(self) else 0) + 1
        return self.of(np.append(self.ids, id_), np.append(self.ends, end), np.append(self.lows, end))


class TopK(NamedTuple):
    """Top-k rows with what they leave out.

    Attributes:
        ids: int64 [T, k], -1 where a row has fewer entries.
        logprobs: float64 [T, k], natural logarithms, -inf where there is no entry; falling within each row.
        tail: float64 [T], the probability of everything else, as a number between 0 and 1.
    """

    ids: IntArray
    logprobs: FloatArray
    tail: FloatArray

    def select(self, rows: Any) -> TopK:
        """Some of the rows, by any index of numpy's."""
        return TopK(self.ids[rows], self.logprobs[rows], self.tail[rows])


class Part(IntEnum):
    """What a token stands for.

    ``TEMPLATE``: nothing of the content. ``CONTENT``: bytes of the content, perhaps with some of the template around
    it. ``END``: the end of the turn, or of the text (end-of-turn, eos).
    """

    TEMPLATE = 0
    CONTENT = 1
    END = 2


@dataclass(frozen=True, eq=False)
class TokenizedRow:
    """The tokens of a row with their coordinates. T tokens.

    Attributes:
        key: the row's (:attr:`fusekit.types.Row.key`).
        ids: int64 [T].
        message: int64 [T], the message that each token belongs to, non-decreasing. What a template writes before a
            content, bos too, belongs to that message; what it writes after the end of a turn to the next one, after
            the last one to message number ``len(messages)``.
        part: int64 [T], a :class:`Part` each.
        ends: int64 [T], bytes of the message's UTF-8 content consumed once the token is read: 0 in what comes before
            it (but for content that the template drops there), all of them at its end and after.
        lows: int64 [T], the lowest position that is the same boundary, as in
            :class:`fusekit.alignment.TokenizedText`: lower than ``ends`` where a template or tokenizer drops text,
            higher where the token ends at no certain place. The same array as ``ends`` where that never happens.
        labels: bool [T], whether the token is one to be learned; never the first.
    """

    key: str
    ids: IntArray
    message: IntArray
    part: IntArray
    ends: IntArray
    lows: IntArray
    labels: BoolArray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def label_positions(self) -> IntArray:
        """int64 [n], the positions of the labels; the row that predicts label j is the output at one before it."""
        return np.flatnonzero(self.labels)

    def content(self, message: int) -> tuple[TokenizedText, int]:
        """The tokens of a message's content and its end, with the token before them, and the first one's position.

        The token before has consumed nothing of it (``TokenizedText.opened``); the end of turn ends one past the
        content (``TokenizedText.closed``). Empty, with position 0, where the row has nothing of that message.
        """
        inside = np.flatnonzero((self.message == message) & (self.part != Part.TEMPLATE))
        if not len(inside):
            nothing = np.zeros(0, np.int64)
            return TokenizedText(nothing, nothing, nothing), 0
        first, stop = int(inside[0]), int(inside[-1]) + 1
        start = max(first - 1, 0)
        ends, lows = self.ends[start:stop].copy(), self.lows[start:stop].copy()
        closing = self.part[start:stop] == Part.END
        ends[closing] += 1
        lows[closing] = ends[closing]
        if start < first and self.message[start] != message:
            ends[0] = lows[0] = 0
        elif start < first:
            lows[0] = 0
        return TokenizedText.of(self.ids[start:stop], ends, lows), start

    @property
    def label_bytes(self) -> int:
        """Bytes of content that the labels cover: the denominator of bits per byte."""
        total = 0
        for message in np.unique(self.message[self.labels]).tolist():
            covered = np.flatnonzero(self.labels & (self.message == message) & (self.part == Part.CONTENT))
            if len(covered):
                first = int(covered[0])
                before = int(self.ends[first - 1]) if first and self.message[first - 1] == message else 0
                total += max(int(min(self.lows[covered[-1]], self.ends[covered[-1]])) - before, 0)
        return total


@dataclass(frozen=True, eq=False)
class CapturedRow:
    """What a model said about the labels of a row. n labels, at most k entries each.

    Attributes:
        tokens: the row as the model read it.
        dataset: which source of data the row came from.
        rows: one per label, in order: ids [n, k] (falling probability, -1 where there are fewer), natural
            log-probabilities [n, k] and the remaining mass [n], at the store's temperature.
        actual: float64 [n], the log-probability of each label at the store's temperature.
        cross_entropy: nats, minus the sum of the labels' log-probabilities at temperature 1, before any rounding.
    """

    tokens: TokenizedRow
    dataset: str
    rows: TopK
    actual: FloatArray
    cross_entropy: float

    @property
    def token_ce(self) -> float:
        """Cross-entropy in nats per label, 0 without labels; not comparable between tokenizers."""
        return self.cross_entropy / max(len(self.actual), 1)

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy in bits per byte of content that the labels cover; comparable between tokenizers."""
        return self.cross_entropy / math.log(2.0) / max(self.tokens.label_bytes, 1)
