"""Top-k rows of one vocabulary carried into another: many rows in one call, no probability lost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusekit.errors import AlignmentError
from fusekit.types import FloatArray, IntArray, TopK

# Log-probabilities are stored with an error, so a row may exceed 1 by as much; more than this is another quantity.
MASS_TOLERANCE = 1e-2
COLLISIONS = ("add", "max")
NO_ID = -2
"""In place of an id: an entry with a probability, of a token that the vocabulary of the row does not have."""


def checked_rows(
    ids: npt.ArrayLike, logprobs: npt.ArrayLike, tail: npt.ArrayLike, vocabulary: int, side: str = "source"
) -> TopK:
    """The three arrays of :class:`TopK` as int64 and float64, refused unless they are distributions.

    Args:
        ids, logprobs, tail: see :class:`TopK`.
        vocabulary: ids are below it.
        side: whose rows they are, for messages.

    Raises:
        AlignmentError: shapes that do not fit, ids outside the vocabulary, values that are no probabilities; names the
            first row.
    """
    rows = TopK(np.asarray(ids).astype(np.int64), np.asarray(logprobs, np.float64), np.asarray(tail, np.float64))
    if rows.ids.ndim != 2 or rows.logprobs.shape != rows.ids.shape or rows.tail.shape != rows.ids.shape[:1]:
        raise AlignmentError(
            f"top-k rows need ids [T, k], logprobs [T, k] and tail [T], not {rows.ids.shape}, {rows.logprobs.shape} "
            f"and {rows.tail.shape}"
        )
    if rows.ids.size and (rows.ids.max() >= vocabulary or rows.ids.min() < -1):
        worst = int(rows.ids.max() if rows.ids.max() >= vocabulary else rows.ids.min())
        raise AlignmentError(
            f"token id {worst} is outside the {side}'s side of the vocabulary map ({vocabulary} rows): was the map "
            f"built with another tokenizer? A model whose output is padded needs {side}_size=<its vocab_size>"
        )
    used = rows.ids >= 0
    mass = np.exp(np.where(used, rows.logprobs, -np.inf)).sum(axis=1)
    wrong = ~np.isfinite(mass) | ~(rows.tail >= 0) | ~(mass + rows.tail <= 1 + MASS_TOLERANCE)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise AlignmentError(
            f"row {first} is no distribution: its entries hold {mass[first]:.6g} and its tail {rows.tail[first]:.6g}; "
            "logprobs are natural logarithms, tail is a probability"
        )
    return rows


def merge_entries(targets: IntArray, mass: FloatArray, tail: FloatArray, collisions: str = "add") -> TopK:
    """Rows from entries that may name one id several times.

    Args:
        targets: int64 [T, e], -1 for entries that map nowhere; their mass goes to the tail.
        mass: float64 [T, e], probabilities.
        tail: float64 [T], what the rows leave out already.
        collisions: ``add`` the probabilities of equal ids (the image of the distribution), or keep the ``max`` as the
            papers do, the rest going to the tail.

    Raises:
        AlignmentError: unknown ``collisions``.
    """
    if collisions not in COLLISIONS:
        raise AlignmentError(f"unknown way with collisions {collisions!r}: there are {', '.join(COLLISIONS)}")
    T, e = targets.shape
    mass = np.where(targets >= 0, mass, 0.0)
    unmapped = tail
    if not targets.size:
        return TopK(np.full((T, 0), -1, np.int64), np.full((T, 0), -np.inf), unmapped)
    order = np.argsort(targets, axis=1, kind="stable")
    targets, mass = np.take_along_axis(targets, order, 1), np.take_along_axis(mass, order, 1)
    opens = np.ones((T, e), bool)
    opens[:, 1:] = targets[:, 1:] != targets[:, :-1]
    slot = np.cumsum(opens, axis=1) - 1 + (np.arange(T) * e)[:, None]
    total = np.bincount(slot.ravel(), mass.ravel(), T * e).reshape(T, e)
    kept = total
    if collisions == "max":
        kept = np.zeros(T * e)
        np.maximum.at(kept, slot.ravel(), mass.ravel())
        kept = kept.reshape(T, e)
        unmapped = unmapped + (total - kept).sum(axis=1)
    ids = np.full(T * e, -1, np.int64)
    ids[slot[opens]] = targets[opens]
    ids = np.where(kept > 0, ids.reshape(T, e), -1)
    return _sorted(ids, np.where(ids >= 0, kept, 0.0), unmapped)


def _sorted(ids: IntArray, mass: FloatArray, tail: FloatArray) -> TopK:
    """Largest first, equal ones by id; columns that no row uses are cut off."""
    order = np.argsort(-mass, axis=1, kind="stable")
    width = int((mass > 0).sum(axis=1).max(initial=0))
    order = order[:, :width]
    mass = np.take_along_axis(mass, order, 1)
    with np.errstate(divide="ignore"):
        return TopK(np.take_along_axis(ids, order, 1), np.log(mass), tail)
