"""Top-k rows: what is refused as one, and how entries that name one id several times become one row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusekit.errors import AlignmentError
from fusekit.types import FloatArray, IntArray, TopK

# Log-probabilities are stored with an error, so a row may exceed 1 by as much; more than this is another quantity.
MASS_TOLERANCE = 1e-2
NO_ID = -2
"""In place of an id: an entry with a probability, of a token that the vocabulary of the row does not have."""

RowsLike = TopK | tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]


def checked_rows(rows: RowsLike, vocabulary: int, side: str = "source") -> TopK:
    """Rows as int64 and float64, refused unless they are distributions.

    Args:
        rows: as :class:`TopK`.
        vocabulary: ids are below it.
        side: whose rows they are, for messages.

    Raises:
        AlignmentError: shapes that do not fit, ids outside the vocabulary, values that are no probabilities; names the
            first row.
    """
    ids, logprobs, tail = np.asarray(rows[0]).astype(np.int64), *(np.asarray(part, np.float64) for part in rows[1:])
    if ids.ndim != 2 or logprobs.shape != ids.shape or tail.shape != ids.shape[:1]:
        raise AlignmentError(
            f"top-k rows need ids [T, k], logprobs [T, k] and tail [T], not {ids.shape}, {logprobs.shape} and "
            f"{tail.shape}"
        )
    outside = ids[(ids >= vocabulary) | (ids < -1)]
    if len(outside):
        raise AlignmentError(
            f"token id {outside[0]} is outside the {side}'s side of the vocabulary map ({vocabulary} rows): was the "
            f"map built with another tokenizer? A model whose output is padded needs {side}_size=<its vocab_size>"
        )
    mass = np.exp(np.where(ids >= 0, logprobs, -np.inf)).sum(axis=1)
    wrong = np.flatnonzero(~np.isfinite(mass) | ~(tail >= 0) | ~(mass + tail <= 1 + MASS_TOLERANCE))
    if len(wrong):
        raise AlignmentError(
            f"row {wrong[0]} is no distribution: its entries hold {mass[wrong[0]]:.6g} and its tail "
            f"{tail[wrong[0]]:.6g}; logprobs are natural logarithms, tail is a probability"
        )
    return TopK(ids, logprobs, tail)


def merge_entries(targets: IntArray, mass: FloatArray, tail: FloatArray, collisions: str = "add") -> TopK:
    """Rows from entries that may name one id several times: largest first, equal ones by id.

    Args:
        targets: int64 [T, e], -1 for entries that map nowhere, whose mass is in ``tail`` already.
        mass: float64 [T, e], probabilities.
        tail: float64 [T], what the rows leave out already.
        collisions: ``add`` the probabilities of equal ids (the image of the distribution), or keep the ``max`` as the
            papers do, the rest going to the tail.

    Raises:
        AlignmentError: unknown ``collisions``.
    """
    if collisions not in ("add", "max"):
        raise AlignmentError(f"unknown way with collisions {collisions!r}: there are add, max")
    T, e = targets.shape
    if not targets.size:
        return TopK(np.full((T, 0), -1, np.int64), np.full((T, 0), -np.inf), tail)
    mass = np.where(targets >= 0, mass, 0.0)
    order = np.argsort(targets, axis=1, kind="stable")
    targets, mass = np.take_along_axis(targets, order, 1), np.take_along_axis(mass, order, 1)
    opens = np.ones((T, e), bool)
    opens[:, 1:] = targets[:, 1:] != targets[:, :-1]
    slot = np.cumsum(opens, axis=1) - 1 + (np.arange(T) * e)[:, None]
    kept = total = np.bincount(slot.ravel(), mass.ravel(), T * e).reshape(T, e)
    if collisions == "max":
        largest = np.zeros(T * e)
        np.maximum.at(largest, slot.ravel(), mass.ravel())
        kept = largest.reshape(T, e)
        tail = tail + (total - kept).sum(axis=1)
    ids = np.full(T * e, -1, np.int64)
    ids[slot[opens]] = targets[opens]
    ids = np.where(kept > 0, ids.reshape(T, e), -1)
    kept = np.where(ids >= 0, kept, 0.0)
    # Columns that no row uses are cut off.
    order = np.argsort(-kept, axis=1, kind="stable")[:, : int((kept > 0).sum(axis=1).max(initial=0))]
    with np.errstate(divide="ignore"):
        return TopK(np.take_along_axis(ids, order, 1), np.log(np.take_along_axis(kept, order, 1)), tail)
