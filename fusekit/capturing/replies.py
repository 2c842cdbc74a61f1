"""Log-probabilities as engines report them, to captured rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fusekit.capturing.settings import Selection
from fusekit.errors import CaptureError
from fusekit.types import BoolArray, CapturedRow, FloatArray, IntArray, TokenizedRow, TopK

MOST_MASS = 1 + 1e-3
"""Above it the listed probabilities of a label are no distribution; float32 sums stay within 1e-6."""

MOST_PADDING = 1e-3
"""Probability that ids without a token may hold at one label: an engine cannot mask them."""


class Scorer(Protocol):
    """Scores examples, as :class:`fusekit.capturing.engine.Teacher` does."""

    def score_batches(
        self, rows: Sequence[TokenizedRow], datasets: Sequence[str] | None = None
    ) -> Iterator[list[tuple[int, CapturedRow | str]]]:
        """(index into ``rows``, what was captured or why it is quarantined), each index once, in any order."""
        ...


class Reply(NamedTuple):
    """What an engine says about n labels: int64 [n, m] ids in any order, perhaps twice, -1 for none; float64 natural
    logarithms at temperature 1, of those and [n] of the labels.
    """

    ids: IntArray
    logprobs: FloatArray
    actual: FloatArray


NO_LABELS = Reply(np.zeros((0, 1), np.int64), np.zeros((0, 1)), np.zeros(0))
"""About an example without labels, which no engine is asked for."""


class Vocabulary:
    """The ids that an engine may list. valid: int64, those that are tokens. size: every id is below it."""

    def __init__(self, valid: IntArray, size: int) -> None:
        self.is_token: BoolArray = np.zeros(size, bool)
        self.is_token[valid[valid < size]] = True
        self.size, self.tokens = size, int(self.is_token.sum())


def prompt_of(row: TokenizedRow) -> list[int]:
    """The tokens up to the last label, whose log-probability an engine reports with its prompt's."""
    return row.ids[: int(row.label_positions[-1]) + 1].tolist() if row.labels.any() else []


def captured(
    row: TokenizedRow, dataset: str, reply: Reply, selection: Selection, vocabulary: Vocabulary
) -> CapturedRow | str:
    """The captured row, or why the engine gives no distribution for it.

    The remaining mass is 1 minus the listed ones in float64, where float32 log-probabilities leave an error of about
    1e-6; it is never negative, and 0 where every token is listed. Ids that are no tokens count towards it.

    Raises CaptureError where ids that are no tokens, or are outside the vocabulary, hold more than MOST_PADDING.
    """
    n, k = len(reply.actual), selection.k
    reply = Reply(reply.ids, np.minimum(reply.logprobs, 0.0), np.minimum(reply.actual, 0.0))
    ids, logprobs = _ordered(reply)
    if np.isnan(logprobs).any() or not np.isfinite(reply.actual).all():
        return "NaN or infinite log-probabilities"
    mass = np.exp(logprobs)
    if n and (most := float(mass.sum(1).max())) > MOST_MASS:
        return f"the listed probabilities of a label add up to {most:.4f}"
    outside = ids >= vocabulary.size
    padding = (ids >= 0) & (outside | ~vocabulary.is_token[np.where(outside, 0, ids)])
    if n and (most := float(np.where(padding, mass, 0.0).sum(1).max())) > MOST_PADDING:
        worst = int(ids[padding][np.argmax(mass[padding])])
        raise CaptureError(
            f"example {row.key}: {most:.4f} of the probability of a label is on ids that are no tokens of the "
            f"tokenizer (id {worst}; it has {vocabulary.tokens} tokens), more than {MOST_PADDING:g}. An engine "
            "cannot mask them: capture this model with the engine transformers, or check that the tokenizer is its own"
        )
    logprobs = np.where(padding, -np.inf, logprobs)
    ids, logprobs = _ordered(Reply(np.where(padding, -1, ids), logprobs, reply.actual))
    ids, logprobs = ids[:, :k], logprobs[:, :k]
    mass = np.exp(logprobs)
    if selection.keep_mass < 1:
        logprobs = np.where(mass.cumsum(1) - mass < selection.keep_mass, logprobs, -np.inf)
    ids = np.where(logprobs > -np.inf, ids, -1)
    tail = np.where((ids >= 0).sum(1) == vocabulary.tokens, 0.0, np.maximum(0.0, 1 - np.exp(logprobs).sum(1)))
    wide = [(0, 0), (0, k - ids.shape[1])]
    rows = TopK(np.pad(ids, wide, constant_values=-1), np.pad(logprobs, wide, constant_values=-np.inf), tail)
    return CapturedRow(row, dataset, rows, reply.actual, -float(reply.actual.sum()))


def _ordered(reply: Reply) -> tuple[IntArray, FloatArray]:
    """ids and log-probabilities [n, m] by falling log-probability and rising id, each id once, gaps at the end."""
    ids, logprobs = reply.ids, np.where(reply.ids < 0, -np.inf, reply.logprobs)
    order = np.lexsort((-logprobs, ids))
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    again = np.zeros(ids.shape, bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    ids, logprobs = np.where(again, -1, ids), np.where(again, -np.inf, logprobs)
    order = np.lexsort((ids, -logprobs))
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
