"""What a vocabulary would have to predict first to spell a string that it has no token for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusekit.alignment.surfaces import Form, Surfaces
from fusekit.errors import AlignmentError
from fusekit.types import FloatArray, IntArray, TopK

# Before a string this keeps a dummy space away from it; no vocabulary merges across it unless the string begins with
# white space, and then the check below falls back to the longest prefix.
_GUARD = "\n"


def longest_prefix(strings: list[bytes], surfaces: Surfaces) -> IntArray:
    """Ids of the longest entries that the strings begin with, -1 where not even the first byte is one: int64."""
    id_of = surfaces.id_of
    longest = int(surfaces.lengths.max(initial=0))
    found = np.full(len(strings), -1, np.int64)
    for i, string in enumerate(strings):
        for length in range(min(len(string), longest), 0, -1):
            if (id_ := id_of.get(string[:length])) is not None:
                found[i] = id_
                break
    return found


def first_pieces(strings: list[bytes], surfaces: Surfaces) -> IntArray:
    """Ids of the first token of the vocabulary's own tokenisation of each string, -1 for none: int64.

    The tokenisation is that within a text, without a dummy space. A string that is no UTF-8 cannot be tokenised and
    takes its longest prefix, as does one whose tokenisation does not begin with its bytes (a normaliser changed it).
    """
    found = np.full(len(strings), -1, np.int64)
    readable, texts = [], []
    for i, string in enumerate(strings):
        try:
            texts.append(string.decode())
        except UnicodeDecodeError:
            continue
        readable.append(i)
    # With a dummy space in front no string would come back as it is, so none is tried.
    plain = surfaces.view.encode_many(texts) if surfaces.form is not Form.METASPACE else [[] for _ in texts]
    guarded: list[int] = []
    for i, ids in zip(readable, plain, strict=True):
        if b"".join(surfaces.of[id_] for id_ in ids) == strings[i]:
            found[i] = _first(ids, strings[i], surfaces)
        else:
            guarded.append(i)
    again = surfaces.view.encode_many([_GUARD + strings[i].decode() for i in guarded])
    for i, ids in zip(guarded, again, strict=True):
        found[i] = _after_guard(ids, strings[i], surfaces)
    missing = np.flatnonzero(found < 0).tolist()
    found[missing] = longest_prefix([strings[i] for i in missing], surfaces)
    return found


def _first(ids: list[int], string: bytes, surfaces: Surfaces) -> int:
    for id_ in ids:
        if surfaces.of[id_]:
            # The emitted id stands for its surface; a special token never continues a text.
            return surfaces.id_of.get(surfaces.of[id_], -1) if string.startswith(surfaces.of[id_]) else -1
    return -1


def _after_guard(ids: list[int], string: bytes, surfaces: Surfaces) -> int:
    """The first token after the guard, or -1 where the guard is not a token by itself."""
    guard = _GUARD.encode()
    consumed = b""
    for at, id_ in enumerate(ids):
        consumed += surfaces.of[id_]
        if consumed.removeprefix(b" ") == guard:
            return _first(ids[at + 1 :], string, surfaces)
    return -1


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
