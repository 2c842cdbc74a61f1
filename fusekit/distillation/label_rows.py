"""A source's rows at the labels of a row of data, message by message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fusekit.alignment.alignment import TokenAlignment, align_tokens
from fusekit.alignment.cases import Case, plan_rows
from fusekit.alignment.rows import AlignedRows, Predictions
from fusekit.distillation.projections import Projection
from fusekit.types import BoolArray, CapturedRow, IntArray, Row, TokenizedRow, TopK


@dataclass(frozen=True, eq=False)
class LabelRows:
    """Rows over the pivot's vocabulary at the labels of a row. n labels.

    Attributes:
        rows: [n, k]; empty with tail 1 where there is none.
        taught: bool [n], whether the label has a row.
        linked: bool [n], whether a source position has consumed the same text as the one that predicts the label.
        cases: int64 [n], a :class:`~fusekit.alignment.cases.Case` each; ``UNLINKED`` where the source has nothing
            of the label: tokens of the pivot's template, text beyond the source's cut.
        chunks: int64 [n], for rows of stretches of text the number of each label's, -1 for none; labels of one stretch
            have one row. None for other rows.
    """

    rows: TopK
    taught: BoolArray
    linked: BoolArray
    cases: IntArray
    chunks: IntArray | None = None

    @classmethod
    def of(cls, own: CapturedRow) -> LabelRows:
        """What the pivot itself said, which it knows of every label."""
        everywhere = np.ones(len(own.actual), bool)
        return cls(own.rows, everywhere, everywhere, np.full(len(own.actual), int(Case.SAME)))


def label_rows(
    row: Row, pivot: TokenizedRow, source: CapturedRow, projection: Projection, own: CapturedRow | None = None
) -> LabelRows:
    """The source's rows at the pivot's labels.

    The row that predicts the label at position p stands at p - 1, on either side. Both sides of a message are aligned
    from the token before its content to its end; labels outside that, which only a template writes, have no teacher.

    Args:
        row: the messages that both have read.
        pivot: the row as the pivot reads it.
        source: what the source said about the same row; it may end earlier.
        projection: how.
        own: what the pivot said about the row, with these tokens; a projection whose ``tail`` is the pivot's needs it.

    Raises:
        DistillationError: the row has no message that the pivot's tokens belong to.
        AlignmentError: the captured rows are no distributions, or of another vocabulary than the map's.
    """
    label_of, known = _label_indices(pivot), _label_indices(source.tokens)
    pieces: list[_Piece] = []
    for message in np.unique(pivot.message[pivot.labels]).tolist():
        if message >= len(row.messages):
            continue  # what the template writes after the last message
        (ours, start), (theirs, source_start) = pivot.content(message), source.tokens.content(message)
        if len(ours) < 2 or len(theirs) < 2:
            continue
        at = label_of[start + 1 : start + len(ours)]
        positions = np.flatnonzero(at >= 0)
        alignment = align_tokens(row.messages[message].content, ours, theirs)
        said, missing = _predictions(source, known, source_start, len(theirs))
        if projection.of_chunks:
            said = Predictions(said.rows, np.where(missing, np.nan, said.actual))
        pivots = None
        if own is not None:
            pivots, unknown = _predictions(own, label_of, start, len(ours))
            pivots = Predictions(pivots.rows, np.where(unknown, np.nan, pivots.actual))
        aligned = projection.apply(alignment, said, pivots)
        certain = _certain(alignment, aligned, missing, projection)
        chunks = None
        if projection.of_chunks:
            partly = np.setdiff1d(np.flatnonzero(aligned.taught), positions)  # a stretch is taught whole or not at all
            certain = ~np.isin(aligned.source_at, aligned.source_at[partly])
            chunks = np.where(certain & aligned.taught, aligned.source_at + source_start, -1)
        pieces.append(_Piece(at[positions], positions, aligned, certain, alignment.source_at >= 0, chunks))
    return _at_labels(len(pivot.label_positions), pieces, projection.of_chunks)


class _Piece(NamedTuple):
    """The aligned rows of one message. ``labels``: numbers of the labels; ``positions``: of what predicts them."""

    labels: IntArray
    positions: IntArray
    aligned: AlignedRows
    certain: BoolArray  # of all positions, as linked and chunks
    linked: BoolArray
    chunks: IntArray | None


def _label_indices(tokens: TokenizedRow) -> IntArray:
    """The number of the label at each position, -1 where there is none: int64 [T]."""
    return np.where(tokens.labels, np.cumsum(tokens.labels) - 1, -1)


def _predictions(source: CapturedRow, known: IntArray, start: int, m: int) -> tuple[Predictions, BoolArray]:
    """What a model said after each of m tokens from ``start``, and where it said nothing (bool [m]).

    What a source is not asked to learn it was not asked about either: such a position has an empty row.
    """
    at = np.full(m, -1, np.int64)
    at[: m - 1] = known[start + 1 : start + m]
    missing = at < 0
    if not len(source.actual):
        width = source.rows.ids.shape[1]
        nothing = TopK(np.full((m, width), -1), np.full((m, width), -np.inf), np.ones(m))
        return Predictions(nothing, np.zeros(m)), missing
    ids = np.where(missing[:, None], -1, source.rows.ids[at])
    logprobs = np.where(missing[:, None], -np.inf, source.rows.logprobs[at])
    tail = np.where(missing, 1.0, source.rows.tail[at])
    return Predictions(TopK(ids, logprobs, tail), np.where(missing, 0.0, source.actual[at])), missing


def _certain(alignment: TokenAlignment, aligned: AlignedRows, missing: BoolArray, how: Projection) -> BoolArray:
    """bool [n]: the positions whose row took nothing that the source was not asked about."""
    base = aligned.source_at
    if not missing[:-1].any():
        return np.ones(len(base), bool)
    gaps = np.concatenate([[0], np.cumsum(missing)])
    first = np.maximum(base, 0)
    stop = first + 1
    if how.tokens == "span" and how.vocabulary_map is not None:
        steps = plan_rows(alignment, how.conditioning)
        # The row at ``base``, the probabilities of the tokens that spell the label, the row before the one crossed.
        stop = np.maximum(stop, np.where(steps.base >= 0, steps.spelled + (steps.overhang > 0), 0))
    certain: BoolArray = (base < 0) | (gaps[stop] == gaps[first])
    return certain


def _at_labels(n: int, pieces: list[_Piece], of_chunks: bool) -> LabelRows:
    width = max((piece.aligned.rows.ids.shape[1] for piece in pieces), default=0)
    ids, logprobs, tail = np.full((n, width), -1, np.int64), np.full((n, width), -np.inf), np.ones(n)
    taught, linked = np.zeros(n, bool), np.zeros(n, bool)
    cases, chunks = np.full(n, int(Case.UNLINKED), np.int64), np.full(n, -1, np.int64)
    for piece in pieces:
        rows, certain = piece.aligned.rows, piece.certain[piece.positions]
        w = rows.ids.shape[1]
        use = certain & piece.aligned.taught[piece.positions]
        to, at = piece.labels[use], piece.positions[use]
        ids[to, :w], logprobs[to, :w], tail[to] = rows.ids[at], rows.logprobs[at], rows.tail[at]
        taught[to] = True
        cases[piece.labels] = np.where(certain, piece.aligned.cases[piece.positions], int(Case.UNLINKED))
        linked[piece.labels] = piece.linked[piece.positions]
        if piece.chunks is not None:
            chunks[piece.labels] = piece.chunks[piece.positions]
    return LabelRows(TopK(ids, logprobs, tail), taught, linked, cases, chunks if of_chunks else None)
