"""What a vocabulary would have to predict first to spell a string that it has no token for."""

from __future__ import annotations

import numpy as np

from fusekit.alignment.surfaces import Form, Surfaces
from fusekit.types import IntArray

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
