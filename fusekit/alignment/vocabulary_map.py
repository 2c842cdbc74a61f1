"""Where every token of a source's vocabulary goes in the pivot's, and the maps that are kept on disk."""

from __future__ import annotations

import hashlib
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
from fusekit.alignment.surfaces import ROLES, TEXT_KINDS, Form, Surfaces, vocabulary_surfaces
from fusekit.disk import commit_file
from fusekit.errors import AlignmentError, StorageError
from fusekit.types import FloatArray, IntArray, TopK

log = logging.getLogger(__name__)
FORMAT = "fusekit vocabulary map 2"
MOST_REMAINDERS = 1 << 20  # some 100 MB
# Before a string this keeps a dummy space away from it; no vocabulary merges across it unless the string begins with
# white space, and then the check below falls back to the longest prefix.
_GUARD = "\n"
_PIECES = (0.9, 0.09, 0.009)
"""X-Token's weights of the source tokens that spell a pivot token."""


@dataclass(frozen=True, eq=False)
class MappingStatistics:
    """Counts of aligned token pairs.

    Attributes:
        counts: scipy.sparse CSR int64 [V_source, V_pivot].
        texts: how many texts were counted.
        fingerprint: SHA-256, hex, of the counts.
    """

    counts: sparse.csr_matrix
    texts: int
    fingerprint: str


def count_mappings(
    texts: Iterable[str], pivot_tokenizer: Any, source_tokenizer: Any, method: str = "span"
) -> MappingStatistics:
    """Count aligned pairs of tokens over ``texts``.

    Args:
        texts: the corpus, read once.
        pivot_tokenizer, source_tokenizer: see :func:`fusekit.alignment.align`.
        method: ``span``: pairs that share bytes of the text; ``dtw``: pairs on the warping path, as the papers count.

    Raises:
        AlignmentError: the corpus is a single string, has no aligned pair, or a text cannot be aligned.
    """
    if isinstance(texts, str):
        raise AlignmentError(
            "a corpus is several texts; a single string would be counted letter by letter: pass [text]"
        )
    shape = (len(vocabulary_surfaces(source_tokenizer)), len(vocabulary_surfaces(pivot_tokenizer)))
    counts, number = sparse.csr_matrix(shape, dtype=np.int64), 0
    aligned = (align(text, pivot_tokenizer, source_tokenizer, method) for text in texts)
    while batch := list(islice(aligned, 256)):  # bounded memory over a corpus of any size
        number += len(batch)
        counts = counts + _counted(batch, shape)
    if not counts.nnz:
        raise AlignmentError(f"the corpus of {number} texts holds no aligned pair of tokens: is it empty?")
    counts.sort_indices()
    digest = hashlib.sha256(repr(shape).encode())
    for array in (counts.indptr, counts.indices, counts.data):
        digest.update(np.ascontiguousarray(array, np.int64).tobytes())
    return MappingStatistics(counts, number, digest.hexdigest())


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
        matrix: scipy.sparse CSR float64 [V_source, V_pivot]; rows sum to at most 1, what is missing goes to the tail.
        method: how it was made.
        pivot, source: the surfaces of the two vocabularies.
    """

    matrix: sparse.csr_matrix
    method: str
    pivot: Surfaces
    source: Surfaces

    def __post_init__(self) -> None:
        sums = np.asarray(self.matrix.sum(axis=1)).ravel()
        negative = self.matrix.data.min(initial=0.0) < 0
        if negative or sums.max(initial=0.0) > 1 + 1e-9:
            worst = int(sums.argmax())
            raise AlignmentError(
                f"rows of a vocabulary map are shares of 1: row {worst} sums to {sums[worst]:.6g}"
                + (", and some are negative" if negative else "")
            )

    def __repr__(self) -> str:
        rows, columns = self.matrix.shape
        mapped = int((np.diff(self.matrix.indptr) > 0).sum())
        return f"VocabularyMap({self.method}, {rows} source x {columns} pivot ids, {mapped} mapped)"

    @cached_property
    def entries(self) -> tuple[IntArray, FloatArray]:
        """The matrix as padded arrays: targets int64 [V_source, r] (-1 for none) and shares float64 [V_source, r]."""
        counts = np.diff(self.matrix.indptr)
        width = max(int(counts.max(initial=0)), 1)
        targets = np.full((len(counts), width), -1, np.int64)
        shares = np.zeros((len(counts), width))
        column = np.arange(self.matrix.nnz) - np.repeat(self.matrix.indptr[:-1], counts)
        row = np.repeat(np.arange(len(counts)), counts)
        targets[row, column], shares[row, column] = self.matrix.indices, self.matrix.data
        return targets, shares

    @property
    def special(self) -> IntArray:
        """The source tokens that are no text and map somewhere, by their role: int64, ascending."""
        mapped = self.entries[0][: len(self.source), 0] >= 0
        return np.flatnonzero(mapped & ~np.isin(self.source.kinds, TEXT_KINDS))

    def spread(self, ids: IntArray, mass: FloatArray) -> tuple[IntArray, FloatArray, FloatArray]:
        """Entries ``[T, k]`` carried over: targets and mass ``[T, k * r]``, and the mass ``[T]`` that maps nowhere."""
        targets, shares = self.entries
        used = ids >= 0
        at = np.where(used, ids, 0)
        mass = np.where(used, mass, 0.0)
        mapped = np.where(used[..., None], targets[at], -1)
        carried = mass[..., None] * shares[at]
        lost = (mass - carried.sum(axis=2)).sum(axis=1)
        shape = (len(ids), ids.shape[1] * targets.shape[1])
        return mapped.reshape(shape), carried.reshape(shape), np.maximum(lost, 0.0)

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
            AlignmentError: an id outside the map, a row that is no distribution, unknown ``collisions``.
        """
        rows = checked_rows((ids, logprobs, tail), self.matrix.shape[0])
        targets, mass, lost = self.spread(rows.ids, np.exp(rows.logprobs))
        return merge_entries(targets, mass, rows.tail + lost, collisions)

    def remainders(self, remains: list[bytes]) -> IntArray:
        """Pivot ids for what is left of surfaces once their beginning is known, -1 for none: int64 [len(remains)].

        The pivot's own token where there is one; otherwise, for every method but ``em``, the first piece of the pivot's
        tokenisation, which is what the pivot has to predict next.
        """
        known = self._remainders
        new = list(dict.fromkeys(rest for rest in remains if rest not in known))
        if len(known) + len(new) > MOST_REMAINDERS:
            known.clear()
            new = list(dict.fromkeys(remains))
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
    pivot_size: int | None = None,
    source_size: int | None = None,
    cache: bool | str | Path = True,
) -> VocabularyMap:
    """Map every token of the source's vocabulary into the pivot's.

    Strings are compared as the bytes they stand for, so ``Ġfoo`` and ``▁foo`` are the same token. Special tokens map by
    role (bos, eos, end of turn), never by string; padding and unknown tokens map nowhere.

    Args:
        pivot_tokenizer, source_tokenizer: see :func:`fusekit.alignment.align`.
        method: for tokens that the pivot does not have:
            ``em``: nowhere. ``mined``: the token of least Levenshtein distance over characters, the first of several;
            entries that are no UTF-8 by their longest byte prefix (FuseLLM, arXiv 2401.10491, MinED).
            ``prefix``: the first token of the pivot's own tokenisation, which is what it would have to predict next.
            ``ms``: for all tokens seen in a corpus, the pivot token most often aligned with it, the nearest of equally
            frequent ones (FuseChat, arXiv 2408.07990, MS); unseen ones as ``em``. ``ms_released``: with the released
            code's formula in place of the frequency.
        statistics: for ``ms``: texts, or the result of :func:`fusekit.alignment.count_mappings`.
        pivot_roles, source_roles: ids by role, over what the tokenizers tell; roles are bos, eos, end_of_turn.
        pivot_size, source_size: rows and columns of the map where a model's output is larger than its tokenizer; the
            padding ids get no mass.
        cache: keep the map on disk under the hashes of both vocabularies: True for the user's cache folder
            (``FUSEKIT_CACHE`` or the platform's), a folder, or False.

    Raises:
        AlignmentError: unknown method, missing statistics, a size below the tokenizer's, a tokenizer that cannot be
            handled exactly.
    """
    if method not in _METHODS.keys() | COUNTING.keys():
        known = ", ".join(sorted(_METHODS.keys() | COUNTING.keys()))
        raise AlignmentError(f"unknown vocabulary map {method!r}: there are {known}")
    pivot, source = vocabulary_surfaces(pivot_tokenizer), vocabulary_surfaces(source_tokenizer)
    for side, surfaces, size in (("source", source, source_size), ("pivot", pivot, pivot_size)):
        if size is not None and size < len(surfaces):
            raise AlignmentError(
                f"{side}_size={size} is below the {len(surfaces)} ids of {surfaces.name}: another model's tokenizer?"
            )
    counted = statistics if method in COUNTING else None
    if counted is not None and not isinstance(counted, MappingStatistics):
        counted = count_mappings(counted, pivot_tokenizer, source_tokenizer)

    def make() -> IntArray:
        return _targets(pivot, source, method, counted)

    if cache is False or method == "em":  # em is quicker to make than to look up
        targets = make()
    else:
        key = [FORMAT, method, pivot.fingerprint, source.fingerprint, counted.fingerprint if counted else ""]
        name = f"{method}-{hashlib.sha256(chr(10).join(key).encode()).hexdigest()[:32]}.npz"
        folder = _default_folder() if cache is True else Path(cache)
        targets = _remembered(folder / name, make, (len(source), len(pivot)))
    for source_id, pivot_id in _by_role(pivot, source, pivot_roles, source_roles).items():
        targets[source_id] = pivot_id
    rows = np.flatnonzero(targets >= 0)
    shape = (source_size or len(source), pivot_size or len(pivot))
    matrix = sparse.csr_matrix((np.ones(len(rows)), (rows, targets[rows])), shape=shape)
    return VocabularyMap(matrix, method, pivot, source)


def _default_folder() -> Path:
    """``$FUSEKIT_CACHE``, else ``fusekit`` in the user's cache folder."""
    named = os.environ.get("FUSEKIT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(named) if named else base / "fusekit") / "vocabulary-maps"


def _remembered(path: Path, make: Callable[[], IntArray], shape: tuple[int, int]) -> IntArray:
    """The targets of a map of this shape, from a file, or made and kept there.

    What cannot be read is made again: the file's own checksum tells. A folder that cannot be written costs the cache.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            targets: IntArray = stored["targets"].astype(np.int64)
        if targets.shape == shape[:1] and targets.max(initial=-1) < shape[1]:
            return targets
        log.warning("vocabulary map %s is damaged; it is made again", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("vocabulary map %s cannot be read (%s); it is made again", path, error)
    targets = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        commit_file(path, lambda file: np.savez(file, targets=targets), rank=os.getpid())
    except (OSError, StorageError) as error:
        log.warning("vocabulary map is not kept: %s cannot be written (%s)", path, error)
    return targets


def _targets(pivot: Surfaces, source: Surfaces, method: str, statistics: MappingStatistics | None) -> IntArray:
    """The pivot id of every source id that stands for text, -1 for none and for special tokens: int64 [V_source]."""
    targets, text = np.full(len(source), -1, np.int64), source.text_ids
    targets[text] = [pivot.id_of.get(source.of[i], -1) for i in text.tolist()]
    if method in COUNTING:
        found = _counted_targets(statistics, source, pivot, method)[text]
        targets[text] = np.where(found >= 0, found, targets[text])
    else:
        asked = text[targets[text] < 0]
        targets[asked] = _METHODS[method]([source.of[i] for i in asked.tolist()], pivot)
    return targets


def _counted_targets(statistics: MappingStatistics | None, source: Surfaces, pivot: Surfaces, method: str) -> IntArray:
    """The best pivot token of each source token, of equal ones the first; -1 for what no text holds: [V_source]."""
    if statistics is None:
        raise AlignmentError(
            f"method {method!r} counts aligned tokens over a corpus: pass statistics=<texts>, or "
            "statistics=count_mappings(texts, pivot_tokenizer, source_tokenizer)"
        )
    counts, allowed = statistics.counts, set(pivot.id_of.values())
    if counts.shape != (len(source), len(pivot)):
        raise AlignmentError(
            f"the statistics are over {counts.shape[0]} source and {counts.shape[1]} pivot entries, but {source.name} "
            f"has {len(source)} and {pivot.name} {len(pivot)}: count them with these tokenizers"
        )
    chosen = np.full(len(source), -1, np.int64)
    for a in np.flatnonzero(np.diff(counts.indptr)).tolist():
        span = slice(counts.indptr[a], counts.indptr[a + 1])
        options = [
            (COUNTING[method](source.of[a], pivot.of[b], count), b)
            for b, count in zip(counts.indices[span].tolist(), counts.data[span].tolist(), strict=True)
            if b in allowed
        ]
        chosen[a] = min(options, default=(None, -1))[1]
    return chosen


def _by_role(
    pivot: Surfaces,
    source: Surfaces,
    pivot_roles: Mapping[str, int] | None,
    source_roles: Mapping[str, int] | None,
) -> dict[int, int]:
    """Source special id -> pivot special id. A token with several roles maps by the last of ``ROLES``."""
    ours = {**source.view.roles, **(source_roles or {})}
    theirs = {**pivot.view.roles, **(pivot_roles or {})}
    for name, roles, surfaces in (("source_roles", ours, source), ("pivot_roles", theirs, pivot)):
        for role, id_ in roles.items():
            if role not in ROLES or not 0 <= id_ < len(surfaces):
                raise AlignmentError(
                    f"{name}: {role}={id_} is no role of {surfaces.name}: roles are {', '.join(ROLES)}, ids are below "
                    f"{len(surfaces)}"
                )
    return {ours[role]: theirs[role] for role in ROLES if role in ours and role in theirs}


def _first_pieces(strings: list[bytes], surfaces: Surfaces) -> IntArray:
    """Ids of the first token of the vocabulary's own tokenisation of each string, -1 for none: int64.

    The tokenisation is that within a text, without a dummy space. A string that is no UTF-8 cannot be tokenised and
    takes its longest prefix, as does one whose tokenisation does not begin with its bytes (a normaliser changed it).
    """
    found = np.full(len(strings), -1, np.int64)
    texts: dict[int, str] = {}
    for i, string in enumerate(strings):
        try:
            texts[i] = string.decode()
        except UnicodeDecodeError:
            continue
    # With a dummy space in front no string would come back as it is, so none is tried.
    plain = surfaces.view.encode_many(list(texts.values())) if surfaces.form is not Form.METASPACE else []
    for i, ids in zip(list(texts), plain, strict=False):
        if b"".join(surfaces.of[id_] for id_ in ids) == strings[i]:
            found[i] = _first(ids, strings[i], surfaces)
            del texts[i]
    guarded = surfaces.view.encode_many([_GUARD + text for text in texts.values()])
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
    """The finest groups of next tokens that both models can tell apart: of each pivot token one that stands for all.

    Let g(v) be the first source token of a pivot token v's bytes, and f(u) the first pivot token of a source token u's
    bytes, where the map ``into`` carries u. A text that begins with v begins for the source with g(v), and one that
    begins with u for the pivot with f(u); so v and f(g(v)) are told apart by no row of the source, and neither are the
    source tokens with one f by any distribution of the pivot. Following f and g from token to token, each time to a
    shorter one, ends at a token that both have: it stands for the group.

    So the pivot's 201 is in the group of 2, where the source writes 2, 0, 1; and where the pivot writes Stra + ße and
    Stra + fe, the source's Straße and Strafe are in the group of Stra. A pivot token that begins a source token's bytes
    thus has that token's probability in its group: nothing is split and nothing is punished.

    Args:
        into: by the method ``prefix``.

    Returns:
        int64 [V_pivot]: the token that stands for the group, which is in it itself; -1 for tokens that begin no text of
        the source: padding, special tokens without a role in common, bytes that it cannot spell.
    """
    pivot, source = into.pivot, into.source
    carried = into.entries[0][:, 0]
    words = [pivot.of[i] for i in pivot.text_ids.tolist()]
    first = np.fromiter((source.id_of.get(surface, -1) for surface in words), np.int64, len(words))
    missing = np.flatnonzero(first < 0)
    first[missing] = _first_pieces([words[i] for i in missing.tolist()], source)
    reached = np.full(into.matrix.shape[1], -1, np.int64)
    reached[pivot.text_ids] = np.where(first >= 0, carried[np.maximum(first, 0)], -1)
    specials = carried[into.special]
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
            continue
        try:
            texts[id_] = surface.decode()
        except UnicodeDecodeError:
            spelled[id_] = _longest_pieces(surface, source)
    for id_, ids in zip(texts, source.view.encode_many(list(texts.values())), strict=True):
        whole = b"".join(source.of[i] for i in ids) == pivot.of[id_]
        spelled[id_] = [i for i in ids if source.of[i]] if whole else _longest_pieces(pivot.of[id_], source)
    pairs = [*spelled.items(), *((int(into.entries[0][u, 0]), [u]) for u in into.special.tolist())]
    found = [
        (id_, piece, weight / sum(_PIECES[: len(pieces)]))
        for id_, pieces in pairs
        for piece, weight in zip(pieces, _PIECES, strict=False)
    ]
    pivots, sources, weights = (np.array(part) for part in zip(*found, strict=True)) if found else (np.zeros(0),) * 3
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
