"""Where every token of a source's vocabulary goes in the pivot's, and the maps that are kept on disk."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from fusekit.alignment.alignment import TokenAlignment, align
from fusekit.alignment.papers import COUNTING, mined
from fusekit.alignment.rows import checked_rows, merge_entries
from fusekit.alignment.surfaces import ROLES, Form, Surfaces, decoded, vocabulary_surfaces
from fusekit.disk import commit_file
from fusekit.errors import AlignmentError, StorageError
from fusekit.types import FloatArray, IntArray, TopK

log = logging.getLogger(__name__)
_FORMAT = "fusekit vocabulary map 3"
_MOST_REMAINDERS = 1 << 20  # some 100 MB
# Before a string this keeps a dummy space away from it; no vocabulary merges across it unless the string begins with
# white space, and then the check below falls back to the longest prefix.
_GUARD = "\n"
_PIECES = (0.9, 0.09, 0.009)
"""X-Token's weights of the source tokens that spell a pivot token."""


@dataclass(frozen=True, eq=False)
class MappingStatistics:
    """Counts of aligned token pairs: scipy.sparse CSR int64 [V_source, V_pivot]."""

    counts: sparse.csr_matrix

    @property
    def fingerprint(self) -> str:
        """SHA-256, hex, of the counts."""
        digest = hashlib.sha256(repr(self.counts.shape).encode())
        for array in (self.counts.indptr, self.counts.indices, self.counts.data):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return digest.hexdigest()


def count_mappings(
    texts: Iterable[str], pivot_tokenizer: Any, source_tokenizer: Any, method: str = "span"
) -> MappingStatistics:
    """Count aligned pairs of tokens over ``texts``.

    Args:
        texts: the corpus, read once.
        pivot_tokenizer, source_tokenizer: see :func:`fusekit.alignment.align`.
        method: ``span``: pairs that share bytes of the text; ``dtw``: pairs on the warping path, as the papers count.

    Raises:
        AlignmentError: the corpus is a single string or has no aligned pair, or a text cannot be aligned.
    """
    if isinstance(texts, str):
        raise AlignmentError("a corpus is several texts; one string would be counted letter by letter: pass [text]")
    shape = (len(vocabulary_surfaces(source_tokenizer)), len(vocabulary_surfaces(pivot_tokenizer)))
    counts = sparse.csr_matrix(shape, dtype=np.int64)
    aligned = (align(text, pivot_tokenizer, source_tokenizer, method) for text in texts)
    while batch := list(islice(aligned, 256)):  # bounded memory over a corpus of any size
        counts = counts + _counted(batch, shape)
    if not counts.nnz:
        raise AlignmentError("the corpus holds no aligned pair of tokens: is it empty?")
    counts.sort_indices()
    return MappingStatistics(counts)


def _counted(batch: list[TokenAlignment], shape: tuple[int, int]) -> sparse.csr_matrix:
    """The pairs of these texts: every source position in A(i) with position i."""
    rows, columns = [], []
    for alignment in batch:
        first, stop = alignment.matched
        counts = np.maximum(stop - first, 0)
        source_at = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        rows.append(alignment.source_ids[source_at])
        columns.append(np.repeat(alignment.pivot_ids, counts))
    ones = np.ones(sum(map(len, rows)), np.int64)
    return sparse.coo_matrix((ones, (np.concatenate(rows), np.concatenate(columns))), shape=shape).tocsr()


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Where the probability of every source token goes in the pivot's vocabulary.

    Attributes:
        targets: int64 [V_source], the pivot's id, or -1: the token's probability goes to the tail.
        method: how it was made.
        pivot, source: the surfaces of the two vocabularies.
    """

    targets: IntArray
    method: str
    pivot: Surfaces
    source: Surfaces

    def __repr__(self) -> str:
        mapped = int((self.targets >= 0).sum())
        size = f"{len(self.targets)} source x {len(self.pivot)} pivot ids"
        return f"VocabularyMap({self.method}, {size}, {mapped} mapped)"

    @property
    def matrix(self) -> sparse.csr_matrix:
        """The map as scipy.sparse CSR float64 [V_source, V_pivot]: a one per token that is mapped."""
        rows = np.flatnonzero(self.targets >= 0)
        shape = (len(self.targets), len(self.pivot))
        return sparse.csr_matrix((np.ones(len(rows)), (rows, self.targets[rows])), shape=shape)

    @property
    def fingerprint(self) -> str:
        """SHA-256, hex, of the map and the vocabularies."""
        head = f"{_FORMAT}\n{self.method}\n{self.pivot.fingerprint}\n{self.source.fingerprint}\n"
        return hashlib.sha256(head.encode() + self.targets.tobytes()).hexdigest()

    @property
    def special(self) -> IntArray:
        """The source tokens that are not text and map somewhere, by their role: int64, ascending."""
        return np.flatnonzero((self.targets[: len(self.source)] >= 0) & ~self.source.is_text)

    def spread(self, ids: IntArray, mass: FloatArray) -> tuple[IntArray, FloatArray, FloatArray]:
        """Entries ``[T, k]`` carried over: targets and mass ``[T, k]``, and the mass ``[T]`` that maps nowhere."""
        targets = np.where(ids >= 0, self.targets[np.maximum(ids, 0)], -1)
        lost = np.where((ids >= 0) & (targets < 0), mass, 0.0).sum(axis=1)
        return targets, np.where(targets >= 0, mass, 0.0), lost

    def project(
        self, ids: npt.ArrayLike, logprobs: npt.ArrayLike, tail: npt.ArrayLike, collisions: str = "add"
    ) -> TopK:
        """Carry top-k rows of the source into the pivot's vocabulary. Mass is conserved.

        Args:
            ids: int [T, k] source token ids, -1 where a row has fewer entries.
            logprobs: float [T, k], natural logarithms.
            tail: float [T], the probability that each row leaves out.
            collisions: where several source ids land on one pivot id: ``add`` their probabilities, or keep the
                largest (``max``, as the papers do; the rest goes to the tail).

        Returns:
            :class:`TopK` ``(ids, logprobs, tail)`` over the pivot's vocabulary.

        Raises:
            AlignmentError: an id outside the map, a row that is not a distribution, unknown ``collisions``.
        """
        rows = checked_rows((ids, logprobs, tail), len(self.targets))
        targets, mass, lost = self.spread(rows.ids, np.exp(rows.logprobs))
        return merge_entries(targets, mass, rows.tail + lost, collisions)

    def remainders(self, remains: list[bytes]) -> IntArray:
        """Pivot ids for what is left of surfaces once their beginning is known, -1 for none: int64 [len(remains)].

        The pivot's own token where there is one; otherwise, for every method but ``em``, the first piece of the pivot's
        tokenisation, which is what the pivot has to predict next.
        """
        known = self._remainders
        if len(known) > _MOST_REMAINDERS:
            known.clear()
        new = [rest for rest in dict.fromkeys(remains) if rest not in known]
        known.update((rest, self.pivot.id_of.get(rest, -1)) for rest in new)
        if self.method != "em":
            missing = [rest for rest in new if rest and known[rest] < 0]
            known.update(zip(missing, _first_pieces(missing, self.pivot).tolist(), strict=True))
        return np.fromiter((known[rest] for rest in remains), np.int64, len(remains))

    @cached_property
    def _remainders(self) -> dict[bytes, int]:
        """Those met: the same few come back row after row, and encoding them is a third of an alignment."""
        return {}


def build_vocabulary_map(
    pivot_tokenizer: Any,
    source_tokenizer: Any,
    method: str = "prefix",
    *,
    statistics: MappingStatistics | Iterable[str] | None = None,
    pivot_roles: Mapping[str, int] | None = None,
    source_roles: Mapping[str, int] | None = None,
    source_size: int = 0,
    cache: bool = True,
) -> VocabularyMap:
    """Map every token of the source's vocabulary into the pivot's.

    Strings are compared as the bytes they stand for, so ``Ġfoo`` and ``▁foo`` are the same token. Special tokens map by
    role (bos, eos, end of turn), never by string; padding and unknown tokens map nowhere.

    Args:
        pivot_tokenizer, source_tokenizer: see :func:`fusekit.alignment.align`.
        method: for tokens that the pivot does not have:
            ``em``: nowhere. ``mined``: the token of least Levenshtein distance over characters, the first of several;
            entries that are not UTF-8 by their longest byte prefix (FuseLLM, arXiv 2401.10491, MinED).
            ``prefix``: the first token of the pivot's own tokenisation, which is what it would have to predict next.
            ``ms``: for all tokens seen in a corpus, the pivot token most often aligned with it, the nearest of equally
            frequent ones (FuseChat, arXiv 2408.07990, MS); unseen ones as ``em``. ``ms_released``: with the released
            code's formula in place of the frequency.
        statistics: for ``ms``: texts, or the result of :func:`fusekit.alignment.count_mappings`.
        pivot_roles, source_roles: ids by role, over what the tokenizers tell; roles are bos, eos, end_of_turn.
        source_size: ids of the source's model, where they are more than its tokenizer has; the padding ids map nowhere.
        cache: keep the map in ``FUSEKIT_CACHE``, else the user's cache folder, under the hashes of both vocabularies.

    Raises:
        AlignmentError: unknown method, missing statistics, a tokenizer that cannot be handled exactly.
    """
    known = sorted(_METHODS.keys() | COUNTING.keys())
    if method not in known:
        raise AlignmentError(f"unknown vocabulary map {method!r}: choose one of {', '.join(known)}")
    pivot, source = vocabulary_surfaces(pivot_tokenizer), vocabulary_surfaces(source_tokenizer)
    counted = None
    if method in COUNTING:
        if statistics is None:
            raise AlignmentError(f"method {method!r} counts aligned tokens over a corpus: pass statistics=<texts>")
        if not isinstance(statistics, MappingStatistics):
            statistics = count_mappings(statistics, pivot_tokenizer, source_tokenizer)
        counted = statistics
        if counted.counts.shape != (len(source), len(pivot)):
            raise AlignmentError(f"the statistics are of other tokenizers than {source.name} and {pivot.name}")
    make = _remembered if cache and method != "em" else _targets  # em is quicker to make than to look up
    targets = make(pivot, source, method, counted)
    ours, theirs = source.roles | dict(source_roles or {}), pivot.roles | dict(pivot_roles or {})
    for role in ROLES:  # a token with several roles maps by the last of them
        if role in ours and role in theirs:
            targets[ours[role]] = theirs[role]
    padding = np.full(max(source_size - len(source), 0), -1, np.int64)
    return VocabularyMap(np.concatenate([targets, padding]), method, pivot, source)


def _remembered(pivot: Surfaces, source: Surfaces, method: str, counted: MappingStatistics | None) -> IntArray:
    """The targets from the cache, or made and kept there. A damaged file is made again."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusekit"
    key = [_FORMAT, method, pivot.fingerprint, source.fingerprint, counted.fingerprint if counted else ""]
    name = f"{method}-{hashlib.sha256(chr(10).join(key).encode()).hexdigest()[:32]}.npz"
    path = Path(os.environ.get("FUSEKIT_CACHE") or folder) / "vocabulary-maps" / name
    try:
        return read_targets(path, pivot, source)
    except FileNotFoundError:
        pass
    except StorageError as error:
        log.warning("%s; it is made again", error)
    targets = _targets(pivot, source, method, counted)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(data := io.BytesIO(), targets=targets)
        commit_file(path, data.getvalue(), rank=os.getpid())
    except (OSError, StorageError) as error:
        log.warning("the vocabulary map is not kept: %s cannot be written (%s)", path, error)
    return targets


def read_targets(path: Path, pivot: Surfaces, source: Surfaces) -> IntArray:
    """The targets of a map between these vocabularies that ``np.savez(file, targets=...)`` wrote.

    Raises FileNotFoundError; StorageError for a damaged file (a zip archive has checksums), or one of other ids.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            targets: IntArray = stored["targets"].astype(np.int64)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StorageError(f"the vocabulary map {path} is damaged: {error}") from error
    if len(targets) < len(source) or targets.max(initial=-1) >= len(pivot):
        raise StorageError(
            f"the vocabulary map {path} is damaged, or of other tokenizers than {pivot.name} and {source.name}"
        )
    return targets


def _targets(pivot: Surfaces, source: Surfaces, method: str, statistics: MappingStatistics | None) -> IntArray:
    """The pivot id of every source id that stands for text, -1 for none and for special tokens: int64 [V_source]."""
    targets, text = np.full(len(source), -1, np.int64), source.text_ids
    targets[text] = [pivot.id_of.get(source.of[i], -1) for i in text.tolist()]
    if statistics is not None:
        found = _counted_targets(statistics.counts, source, pivot, COUNTING[method])[text]
        targets[text] = np.where(found >= 0, found, targets[text])
    else:
        asked = text[targets[text] < 0]
        targets[asked] = _METHODS[method]([source.of[i] for i in asked.tolist()], pivot)
    return targets


def _counted_targets(
    counts: sparse.csr_matrix,
    source: Surfaces,
    pivot: Surfaces,
    rank: Callable[[bytes, bytes, int], tuple[float, float]],
) -> IntArray:
    """The best pivot token of each source token, of equal ones the first; -1 for what no text holds: [V_source]."""
    allowed = set(pivot.id_of.values())
    chosen = np.full(len(source), -1, np.int64)
    for a in np.flatnonzero(np.diff(counts.indptr)).tolist():
        span = slice(counts.indptr[a], counts.indptr[a + 1])
        options = [
            (rank(source.of[a], pivot.of[b], count), b)
            for b, count in zip(counts.indices[span].tolist(), counts.data[span].tolist(), strict=True)
            if b in allowed
        ]
        chosen[a] = min(options, default=(None, -1))[1]
    return chosen


def _first_pieces(strings: list[bytes], surfaces: Surfaces) -> IntArray:
    """Ids of the first token of the vocabulary's own tokenisation of each string, -1 for none: int64.

    The tokenisation is that within a text, without a dummy space. A string that is not UTF-8 cannot be tokenised and
    takes its longest prefix, as does one whose tokenisation does not begin with its bytes (a normaliser changed it).
    """
    found = np.full(len(strings), -1, np.int64)
    texts = {i: text for i, string in enumerate(strings) if (text := decoded(string)) is not None}
    # With a dummy space in front no string would come back as it is, so none is tried.
    plain = surfaces.encode_many(list(texts.values())) if surfaces.form is not Form.METASPACE else []
    for i, ids in zip(list(texts), plain, strict=False):
        if b"".join(surfaces.of[id_] for id_ in ids) == strings[i]:
            found[i] = _first(ids, strings[i], surfaces)
            del texts[i]
    guarded = surfaces.encode_many([_GUARD + text for text in texts.values()])
    for i, ids in zip(texts, guarded, strict=True):
        consumed, after = b"", iter(ids)
        for id_ in after:  # as far as the guard is a token by itself
            consumed += surfaces.of[id_]
            if consumed.removeprefix(b" ") == _GUARD.encode():
                found[i] = _first(after, strings[i], surfaces)
                break
    for i in np.flatnonzero(found < 0).tolist():
        found[i] = surfaces.longest_prefix(strings[i])
    return found


def _first(ids: Iterable[int], string: bytes, surfaces: Surfaces) -> int:
    """The emitted id that stands for the first surface; -1 for a special token, which never continues a text."""
    surface = next((surfaces.of[id_] for id_ in ids if surfaces.of[id_]), None)
    return surfaces.id_of.get(surface, -1) if surface is not None and string.startswith(surface) else -1


_METHODS: dict[str, Callable[[list[bytes], Surfaces], IntArray]] = {
    "em": lambda surfaces, _: np.full(len(surfaces), -1, np.int64),
    "mined": mined,
    "prefix": _first_pieces,
}
"""Pivot ids (-1 for none) of surfaces that the pivot does not have."""


def pivot_groups(into: VocabularyMap) -> IntArray:
    """Group the pivot's tokens so that both models can tell any two groups apart by their next token.

    Let g(v) be the first source token of a pivot token v's bytes, and f(u) the pivot token that the map gives a source
    token u. Where the pivot writes v the source's next token is g(v), so v and f(g(v)) look the same to the source.
    Following g and f from token to token, each time to a shorter one, ends at a token that both have: it stands for the
    group. So the pivot's 201 is in the group of 2, where the source writes 2, 0, 1; and where the pivot writes
    Stra + ße and Stra + fe, the source's Straße and Strafe are in the group of Stra.

    Args:
        into: by the method ``prefix``.

    Returns:
        int64 [V_pivot]: the token that stands for the group, which is in it itself; -1 for tokens that begin no text of
        the source: padding, special tokens without a role in common, bytes that it cannot spell.
    """
    pivot, source = into.pivot, into.source
    words = [pivot.of[i] for i in pivot.text_ids.tolist()]
    first = np.fromiter((source.id_of.get(surface, -1) for surface in words), np.int64, len(words))
    missing = np.flatnonzero(first < 0)
    first[missing] = _first_pieces([words[i] for i in missing.tolist()], source)
    reached = np.full(len(pivot), -1, np.int64)
    reached[pivot.text_ids] = np.where(first >= 0, into.targets[np.maximum(first, 0)], -1)
    specials = into.targets[into.special]
    reached[specials] = specials
    while True:
        further = np.where(reached >= 0, reached[np.maximum(reached, 0)], -1)
        if np.array_equal(further, reached):
            return reached
        reached = further


def source_pieces(into: VocabularyMap) -> tuple[IntArray, IntArray, FloatArray]:
    """Which source tokens spell each pivot token, and X-Token's weight of each: of the first three, scaled to sum to 1.

    Special tokens by role, as in ``into``; tokens that the source cannot spell have no piece.

    Returns:
        Pivot ids, source ids and weights, int64, int64 and float64 [m], one of a pair each.
    """
    pivot, source = into.pivot, into.source
    spelled: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    for id_ in pivot.text_ids.tolist():
        surface = pivot.of[id_]
        if (same := source.id_of.get(surface)) is not None:
            spelled[id_] = [same]
        elif (text := decoded(surface)) is not None:
            texts[id_] = text
        else:
            spelled[id_] = _longest_pieces(surface, source)
    for id_, ids in zip(texts, source.encode_many(list(texts.values())), strict=True):
        whole = b"".join(source.of[i] for i in ids) == pivot.of[id_]
        spelled[id_] = [i for i in ids if source.of[i]] if whole else _longest_pieces(pivot.of[id_], source)
    pairs = [*spelled.items(), *((int(into.targets[u]), [u]) for u in into.special.tolist())]
    found = [
        (id_, piece, weight / sum(_PIECES[: len(pieces)]))
        for id_, pieces in pairs
        for piece, weight in zip(pieces, _PIECES, strict=False)
    ]
    pivots, sources, weights = (np.array(part) for part in zip(*found, strict=True))
    return pivots.astype(np.int64), sources.astype(np.int64), weights


def _longest_pieces(surface: bytes, source: Surfaces) -> list[int]:
    """The first tokens that spell bytes, each the longest that fits; empty where they cannot be spelled."""
    pieces: list[int] = []
    while surface and len(pieces) < len(_PIECES):
        id_ = source.longest_prefix(surface)
        if id_ < 0:
            return []
        pieces.append(id_)
        surface = surface[len(source.of[id_]) :]
    return pieces
