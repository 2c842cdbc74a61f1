"""A row as one model reads it, and what the model said about it.

The position of a token is written as *(message, bytes of its content consumed)*, so two models whose templates and
tokenizers differ can be linked wherever both have consumed the same content.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from fusekit.alignment.arrays import BoolArray, FloatArray, IntArray
from fusekit.alignment.ends import TokenizedText
from fusekit.alignment.projection import Rows


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
        key: the row's (:attr:`fusekit.representation.rows.Row.key`).
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
        labels: bool [T], whether the token is one to be learnt; never the first.
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
        exact = np.array_equal(ends, lows)
        return TokenizedText(self.ids[start:stop], ends, ends if exact else lows), start

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
    rows: Rows
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
