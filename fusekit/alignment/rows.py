"""From links to rows: what a source's predictions teach at the pivot's positions (row_cases.py says where and how)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusekit.alignment.alignment import TokenAlignment
from fusekit.alignment.cases import HAS_ROW, Case, Steps, beginning_in_text, begins_with, plan_rows, source_positions
from fusekit.alignment.projection import checked_rows, merge_entries
from fusekit.alignment.surfaces import Kind, Surfaces
from fusekit.alignment.vocabulary_map import VocabularyMap
from fusekit.errors import AlignmentError
from fusekit.types import BoolArray, FloatArray, IntArray, TopK

_WORDS = (Kind.ORDINARY, Kind.BYTE, Kind.ADDED)
LOGPROB_TOLERANCE = 1e-3  # stored log-probabilities are rounded
TAILS = ("back_off", "pivot_share", "listed_share", "drop", "keep")
NEED_PIVOT = ("back_off", "pivot_share")
"""Of :data:`TAILS`: those that need the pivot's own predictions."""

RowsLike = TopK | tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says after each of n tokens of a text.

    Attributes:
        rows: top-k rows [n, k] over its own vocabulary.
        actual: float64 [n], the log-probability of the next token; NaN where it is not known. The last is not used.
    """

    rows: RowsLike
    actual: npt.ArrayLike


@dataclass(frozen=True, eq=False)
class AlignedRows:
    """Targets at the pivot's positions.

    Attributes:
        rows: top-k rows over the pivot's vocabulary, [n, k]; empty with tail 1 where there is none.
        cases: int64 [n], a :class:`Case` each.
        source_at: int64 [n], the source position whose row was used, or -1.
    """

    rows: TopK
    cases: IntArray
    source_at: IntArray

    @property
    def taught(self) -> BoolArray:
        """bool [n]: whether the position has a row."""
        return np.isin(self.cases, list(HAS_ROW))

    @property
    def counts(self) -> dict[str, int]:
        """How many positions are of each case, by its lower-case name."""
        number = np.bincount(self.cases, minlength=len(Case))
        return {case.name.lower(): int(number[case]) for case in Case}


def project_rows(
    alignment: TokenAlignment,
    vocabulary_map: VocabularyMap,
    source_rows: RowsLike,
    actual_logprobs: npt.ArrayLike,
    *,
    pivot: Predictions | None = None,
    tail: str = "listed_share",
    conditioning: bool = True,
    one_hot: bool = False,
    collisions: str = "add",
    spelled: bool = True,
) -> AlignedRows:
    """Targets at the pivot's positions from a source's rows over the same text.

    Args:
        alignment: of method ``span`` over the text.
        vocabulary_map: made with the same two tokenizers.
        source_rows: ``(ids [m, k], logprobs [m, k], tail [m])``: row j is the source's prediction after its token j.
        actual_logprobs: float [m], the log-probability that row j gives to source token j + 1; the last is not used.
        pivot: the pivot's own predictions at its n positions; ``back_off`` and ``pivot_share`` need them.
        tail: what becomes of the probability outside the source's top k. At a position inside a source token only the
            part of it may stay whose tokens begin with the bytes b consumed. That part is estimated as

            * ``pivot_share``: the pivot's probability of the tokens that spell b;
            * ``listed_share``: the share of the listed mass that begins with b;
            * ``drop``: nothing. The next token's own probability is known, so something always stays;
            * ``keep``: all of it, which breaks the chain rule: such rows know less than the source;
            * ``back_off``: as ``pivot_share``, and at every position the tail is distributed like the pivot's own row,
              over tokens that the source lists too. Then the probabilities of the labels inside a source token
              multiply to at least that of the token.

            Where the pivot's prediction is not known, ``listed_share`` takes the place of the first and the last.
        conditioning: condition rows on the first bytes of a token: at positions inside a source token on the bytes
            read since, at the end of a label inside a source token on the bytes that are left of it.
        one_hot: put a one-hot on the next label where there is no row, as the papers do.
        collisions: see :meth:`VocabularyMap.project`.
        spelled: the label's probability is that of all source tokens that spell it; False: of the first of them, which
            is right of a group of tokens that begin with it (:func:`fusekit.alignment.groups.pivot_groups`).

    Returns:
        :class:`AlignedRows`. Where a source is certain of the text, its row is certain of the pivot's label.

    Raises:
        AlignmentError: rows that do not fit the alignment or are no distributions, an unknown ``tail``, or one that
            needs ``pivot`` without it.
    """
    if tail not in TAILS:
        raise AlignmentError(f"unknown tail {tail!r}: there are {', '.join(TAILS)}")
    if tail in NEED_PIVOT and pivot is None:
        raise AlignmentError(f"tail {tail!r} needs the pivot's own predictions: pass pivot, or use 'listed_share'")
    if alignment.method != "span":
        raise AlignmentError(f"rows need an alignment of method 'span', not {alignment.method!r}: see source_positions")
    ids, logprobs, rest_of = source_rows
    rows = checked_rows(ids, logprobs, rest_of, vocabulary_map.matrix.shape[0])
    actual = _checked_actual(actual_logprobs, rows, len(alignment.source), "source")
    steps = _readable(plan_rows(alignment, conditioning), alignment, vocabulary_map)
    spaced = np.zeros(len(steps.base), bool)
    if conditioning:
        steps, spaced = _spaced(steps, alignment, vocabulary_map)
    at = np.flatnonzero(steps.base >= 0)
    base = steps.base[at]
    entries = _entries(alignment.source_ids, rows, actual, base)
    label = entries.actual
    if spelled:
        label = label * _completing(steps, at, actual)
        crossing = np.flatnonzero(steps.overhang[at] > 0)
        before, length = steps.spelled[at[crossing]], steps.overhang[at[crossing]]
        begun = _entries(alignment.source_ids, rows, actual, before)
        label[crossing] *= _begun(alignment, vocabulary_map, before, length, begun)
    targets, mass, rest = _carry(alignment, vocabulary_map, steps, at, entries, spaced=spaced)
    ours = _of_pivot(alignment, vocabulary_map, pivot)
    listed = entries.mass.sum(axis=1) + entries.actual
    kept = mass.sum(axis=1) + rest + entries.actual
    share = np.divide(kept, listed, out=np.ones(len(at)), where=listed > 0)
    unlisted = entries.tail * _staying(tail, alignment, steps, at, share=share, ours=ours)
    rest = rest + (entries.actual - label)
    targets = np.concatenate([alignment.pivot_ids[at + 1][:, None], targets], axis=1)
    mass = np.concatenate([label[:, None], mass], axis=1)
    rest = rest + unlisted
    mass = np.where(targets >= 0, mass, 0.0)
    # A conditioned row has lost the entries that the text has ruled out since.
    total = np.where(steps.consumed[at] > 0, mass.sum(axis=1) + rest, 1.0)
    scale = 1.0 / np.where(total > 0, total, 1.0)
    rest = np.where(total > 0, rest * scale, 1.0)
    merged = merge_entries(targets, mass * scale[:, None], rest, collisions)
    if tail == "back_off":
        more, shares = _like_pivot(alignment, at, ours)
        given = (unlisted * scale)[:, None] * shares
        both = np.concatenate([np.exp(merged.logprobs), given], axis=1)
        # Rows are stored with an error, so the pivot's may sum to a little more than 1.
        rest = np.maximum(merged.tail - given.sum(axis=1), 0.0)
        merged = merge_entries(np.concatenate([merged.ids, more], axis=1), both, rest)
    return _placed(alignment, steps.cases.copy(), steps.base, merged, one_hot)


def _of_pivot(alignment: TokenAlignment, into: VocabularyMap, given: Predictions | None) -> Predictions:
    """The pivot's rows and log-probabilities, checked; where there are none, rows of nothing and NaN."""
    n = len(alignment.pivot)
    if given is None:
        return Predictions(TopK(np.zeros((n, 0), np.int64), np.zeros((n, 0)), np.ones(n)), np.full(n, np.nan))
    ids, logprobs, tail = given.rows
    rows = checked_rows(ids, logprobs, tail, into.matrix.shape[1], "pivot")
    known = np.asarray(given.actual, np.float64)
    actual = _checked_actual(np.where(np.isnan(known), 0.0, known), rows, n, "pivot")
    return Predictions(rows, np.where(np.isnan(known), np.nan, actual))


def _checked_actual(actual_logprobs: npt.ArrayLike, rows: TopK, m: int, side: str) -> FloatArray:
    actual = np.asarray(actual_logprobs, np.float64)
    if len(rows.tail) != m or actual.shape != (m,):
        raise AlignmentError(
            f"the text has {m} {side} tokens, but there are {len(rows.tail)} rows and actual_logprobs is {actual.shape}"
        )
    wrong = np.flatnonzero(~(actual[:-1] <= LOGPROB_TOLERANCE))
    if len(wrong):
        raise AlignmentError(f"actual_logprobs[{wrong[0]}] is {actual[wrong[0]]}, not a log-probability")
    # exp(-1000) is 0; an infinity would make the differences of running sums undefined.
    return np.clip(actual, -1000.0, 0.0)


def _readable(steps: Steps, alignment: TokenAlignment, vocabulary_map: VocabularyMap) -> Steps:
    """Count ``consumed`` and ``overhang`` in bytes of surfaces, and leave out positions where they are not the text."""
    consumed, overhang = steps.consumed.copy(), steps.overhang.copy()
    for bytes_read, before in ((consumed, steps.base), (overhang, steps.spelled)):
        inside = np.flatnonzero(bytes_read > 0)
        bytes_read[inside] = beginning_in_text(alignment, vocabulary_map.source, before[inside], bytes_read[inside])
    unclear = np.flatnonzero((consumed < 0) | (overhang < 0))
    cases, base = steps.cases.copy(), steps.base.copy()
    cases[unclear] = np.where(alignment.source_at[unclear] >= 0, Case.NO_ROW, Case.UNLINKED)
    base[unclear] = -1
    return Steps(cases, base, steps.spelled, consumed, overhang)


def _spaced(steps: Steps, alignment: TokenAlignment, vocabulary_map: VocabularyMap) -> tuple[Steps, BoolArray]:
    """Links at which only one side's next token brings a space that the other side has read, or never sees.

    A SentencePiece token at the start of a text, a template's space in the first token of a content, a word of
    WordPiece. Where the source's token brings it, the row is conditioned on it (``consumed`` is 1 then); where the
    pivot's does, entries are looked for with a space in front: bool [n].
    """
    pivot, source = vocabulary_map.pivot, vocabulary_map.source
    links = np.flatnonzero((steps.base >= 0) & (steps.consumed == 0))
    ours, theirs = alignment.pivot_ids[links + 1], alignment.source_ids[steps.base[links] + 1]
    words = np.isin(pivot.kinds[ours], _WORDS) & np.isin(source.kinds[theirs], _WORDS)
    links, ours, theirs = links[words], ours[words], theirs[words]
    of_pivot, of_source = _begin_with_space(pivot, ours), _begin_with_space(source, theirs)
    data = alignment.text.encode()
    # Other white space, which one side's normaliser made a space of, is the text's own.
    differ = np.flatnonzero(of_pivot != of_source)
    own = [at for at in differ.tolist() if _other_space(data, int(alignment.source_ends[steps.base[links[at]]]))]
    of_pivot[own] = of_source[own]
    consumed, spaced = steps.consumed.copy(), np.zeros(len(steps.base), bool)
    consumed[links[of_source & ~of_pivot]] = 1
    spaced[links[of_pivot & ~of_source]] = True
    return Steps(steps.cases, steps.base, steps.spelled, consumed, steps.overhang), spaced


def _other_space(data: bytes, at: int) -> bool:
    character = data[at : at + 4].decode(errors="ignore")[:1]
    return character.isspace() and character != " "


def _begin_with_space(surfaces: Surfaces, ids: IntArray) -> BoolArray:
    flat, starts, lengths = surfaces.flat
    first = flat[np.minimum(starts[ids], len(flat) - 1)]
    return np.asarray((lengths[ids] > 0) & (first == ord(" ")))


@dataclass(frozen=True, eq=False)
class _Entries:
    """Rows taken apart: all entries but the actual next token, that token's probability, and the tail without it."""

    ids: IntArray  # [a, k], -1 for none
    mass: FloatArray  # [a, k]
    actual: FloatArray  # [a]
    tail: FloatArray  # [a]


def _entries(text: IntArray, rows: TopK, actual: FloatArray, base: IntArray) -> _Entries:
    """The rows at positions ``base`` of a text of these tokens."""
    ids, mass = rows.ids[base], np.exp(rows.logprobs[base])
    listed = (ids >= 0) & (ids == text[base + 1][:, None])
    in_list = listed.any(axis=1)
    # A token outside the top k is in the tail; its probability is known, so it becomes an entry of its own.
    outside = np.minimum(np.exp(actual[base]), rows.tail[base])
    probability = np.where(in_list, np.where(listed, mass, 0.0).sum(axis=1), outside)
    tail = np.where(in_list, rows.tail[base], rows.tail[base] - outside)
    return _Entries(np.where(listed, -1, ids), np.where((ids < 0) | listed, 0.0, mass), probability, tail)


def _carry(
    alignment: TokenAlignment,
    vocabulary_map: VocabularyMap,
    steps: Steps,
    at: IntArray,
    entries: _Entries,
    *,
    spaced: BoolArray,
) -> tuple[IntArray, FloatArray, FloatArray]:
    """All entries but s in the pivot's vocabulary: projected at links, conditioned and projected within tokens.

    Returns targets and mass [a, e], and [a] the mass of the entries that map nowhere.
    """
    targets, mass, rest = vocabulary_map.spread(entries.ids, entries.mass)
    within = np.flatnonzero((steps.consumed[at] > 0) | spaced[at])
    if not len(within):
        return targets, mass, rest
    consumed, ids = steps.consumed[at[within]], entries.ids[within]
    keep = begins_with(vocabulary_map.source, alignment.source_ids[steps.base[at[within]] + 1], consumed, ids)
    kinds = vocabulary_map.source.kinds
    keep &= np.isin(kinds[np.clip(ids, 0, len(kinds) - 1)], _WORDS)  # a special token is no text to be continued
    left = _remainders(vocabulary_map, ids, consumed, spaced[at[within]], keep)
    # Where nothing was read yet, what is no text goes to the tail; where something was, the text has ruled it out.
    left_mass = np.where(keep | (spaced[at[within]][:, None] & (ids >= 0)), entries.mass[within], 0.0)
    targets[within], mass[within] = -1, 0.0
    targets[within, : left.shape[1]], mass[within, : left.shape[1]] = left, left_mass
    mass[within] = np.where(targets[within] >= 0, mass[within], 0.0)
    rest[within] = np.where(left < 0, left_mass, 0.0).sum(axis=1)
    return targets, mass, rest


def _staying(
    tail: str, alignment: TokenAlignment, steps: Steps, at: IntArray, *, share: FloatArray, ours: Predictions
) -> FloatArray:
    """The share of the source's tail whose tokens begin with the bytes consumed: float64 [a], 1 at links.

    share: float64 [a], the share of the listed mass that begins with them.
    """
    if tail == "drop":
        share = np.zeros(len(at))
    elif tail == "keep":
        share = np.ones(len(at))
    elif tail in NEED_PIVOT:
        read = _read_by_pivot(alignment, steps, at, np.asarray(ours.actual))
        share = np.where(np.isnan(read), share, np.exp(read))
    return np.where(steps.consumed[at] > 0, share, 1.0)


def _read_by_pivot(alignment: TokenAlignment, steps: Steps, at: IntArray, actual: FloatArray) -> FloatArray:
    """The log-probability that the pivot gave to its tokens since the end of ``base``: float64 [a], NaN if unknown.

    A token that began before that end says how probable the text on both sides is, so it is left out.
    """
    begin = alignment.source_ends[steps.base[at]]
    # The last position at or before that end, or the first one after it.
    first = np.minimum(np.searchsorted(alignment.pivot_ends, begin, side="left"), at)
    last = np.searchsorted(alignment.pivot_ends, begin, side="right") - 1
    first = np.maximum(last, first)
    known = np.concatenate([[0], np.cumsum(~np.isnan(actual))])
    running = np.concatenate([[0.0], np.cumsum(np.nan_to_num(actual))])
    whole = known[at] - known[first] == at - first
    return np.where(whole & (first < at), running[at] - running[first], np.nan)


def _like_pivot(alignment: TokenAlignment, at: IntArray, ours: Predictions) -> tuple[IntArray, FloatArray]:
    """The pivot's own rows at positions ``at``, the label an entry of its own: ids and probabilities [a, k' + 1]."""
    actual = np.asarray(ours.actual)
    known = ~np.isnan(actual[at])
    ids, logprobs, tail = ours.rows
    rows = TopK(np.asarray(ids), np.asarray(logprobs), np.asarray(tail))
    entries = _entries(alignment.pivot_ids, rows, np.nan_to_num(actual), at)
    ids = np.concatenate([alignment.pivot_ids[at + 1][:, None], entries.ids], axis=1)
    mass = np.concatenate([entries.actual[:, None], entries.mass], axis=1)
    return np.where(known[:, None], ids, -1), np.where(known[:, None], mass, 0.0)


def _remainders(
    vocabulary_map: VocabularyMap, ids: IntArray, consumed: IntArray, spaced: BoolArray, keep: BoolArray
) -> IntArray:
    """Pivot ids of what is left of the kept entries' surfaces, after a space where ``spaced``; -1 for nothing."""
    found = np.full(ids.shape, -1, np.int64)
    rows, columns = np.nonzero(keep)
    if len(rows):
        triples = np.stack([ids[rows, columns], consumed[rows], spaced[rows]])
        unique, inverse = np.unique(triples, axis=1, return_inverse=True)
        of = vocabulary_map.source.of
        remains = [b" " * space + of[id_][length:] for id_, length, space in unique.T.tolist()]
        found[rows, columns] = vocabulary_map.remainders(remains)[inverse.ravel()]
    return found


def _completing(steps: Steps, at: IntArray, actual: FloatArray) -> FloatArray:
    """The probability of the source tokens after s that complete t: 1 where s alone reaches its end."""
    running = np.concatenate([[0.0], np.cumsum(actual[:-1])])
    product: FloatArray = np.exp(np.minimum(running[steps.spelled[at]] - running[steps.base[at] + 1], 0.0))
    return product


def _begun(
    alignment: TokenAlignment,
    vocabulary_map: VocabularyMap,
    before: IntArray,
    length: IntArray,
    entries: _Entries,
) -> FloatArray:
    """The probability, in the rows after positions ``before``, of the entries that begin with what is left of t."""
    begun = begins_with(vocabulary_map.source, alignment.source_ids[before + 1], length, entries.ids)
    total: FloatArray = entries.actual + entries.mass.sum(axis=1, where=begun)
    return np.minimum(total, 1.0)


def _placed(alignment: TokenAlignment, cases: IntArray, base: IntArray, merged: TopK, one_hot: bool) -> AlignedRows:
    """Rows at their positions, with one-hots where asked for."""
    n, width, at = len(alignment.pivot), max(merged.ids.shape[1], 1 if one_hot else 0), np.flatnonzero(base >= 0)
    ids, logprobs, tail = np.full((n, width), -1, np.int64), np.full((n, width), -np.inf), np.ones(n)
    ids[at, : merged.ids.shape[1]], logprobs[at, : merged.ids.shape[1]], tail[at] = merged
    if one_hot:
        bare = np.flatnonzero(np.isin(cases, [Case.NO_ROW, Case.UNLINKED]))
        ids[bare, 0], logprobs[bare, 0], tail[bare] = alignment.pivot_ids[bare + 1], 0.0, 0.0
        cases[bare] = Case.ONE_HOT
    return AlignedRows(TopK(ids, logprobs, tail), cases, base)


def project_rows_by_rule(
    alignment: TokenAlignment,
    vocabulary_map: VocabularyMap,
    source_rows: TopK | tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
    rule: str,
    *,
    collisions: str = "max",
) -> AlignedRows:
    """Targets by one of the papers' position rules: the aligned row projected as it is, else a one-hot on the label.

    Args:
        alignment: of method ``dtw`` for the papers' own.
        vocabulary_map, source_rows: as in :func:`project_rows`.
        rule: see :func:`fusekit.alignment.cases.source_positions`.
        collisions: ``max`` is the papers'.

    Raises:
        AlignmentError: as :func:`project_rows`; unknown rule.
    """
    ids, logprobs, tail = source_rows
    rows = checked_rows(ids, logprobs, tail, vocabulary_map.matrix.shape[0])
    if len(rows.tail) != len(alignment.source):
        raise AlignmentError(f"the text has {len(alignment.source)} source tokens, but there are {len(rows.tail)} rows")
    base = source_positions(alignment, vocabulary_map, rule)
    n = len(base)
    if n:
        base[-1] = -1
    cases = np.where(base >= 0, Case.RULE, Case.UNLINKED).astype(np.int64)
    if n:
        cases[-1] = Case.LAST
    at = np.flatnonzero(base >= 0)
    merged = vocabulary_map.project(rows.ids[base[at]], rows.logprobs[base[at]], rows.tail[base[at]], collisions)
    return _placed(alignment, cases, base, merged, one_hot=True)
