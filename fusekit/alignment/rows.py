"""From links to rows: what a source's predictions teach at the pivot's positions (cases.py says where and how)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fusekit.alignment.alignment import TokenAlignment
from fusekit.alignment.cases import HAS_ROW, Case, Steps, plan_rows
from fusekit.alignment.projection import RowsLike, checked_rows, merge_entries
from fusekit.alignment.surfaces import TEXT_KINDS, Surfaces
from fusekit.alignment.vocabulary_map import VocabularyMap
from fusekit.errors import AlignmentError
from fusekit.types import BoolArray, FloatArray, IntArray, TopK

_LOGPROB_TOLERANCE = 1e-3  # stored log-probabilities are rounded
TAILS = ("back_off", "pivot_share", "listed_share", "drop", "keep")
NEED_PIVOT = ("back_off", "pivot_share")
"""Of :data:`TAILS`: those that need the pivot's own predictions."""


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
            is right of a group of tokens that begin with it (``pivot_groups`` of ``vocabulary_map.py``).

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
    said = _checked(source_rows, actual_logprobs, alignment.source_ids, vocabulary_map.matrix.shape[0], "source")
    ours = None
    if pivot is not None:
        ours = _checked(pivot.rows, pivot.actual, alignment.pivot_ids, vocabulary_map.matrix.shape[1], "pivot")
    steps = _in_surfaces(plan_rows(alignment, conditioning), alignment, vocabulary_map.source)
    spaced = np.zeros(len(steps.base), bool)
    if conditioning:
        steps, spaced = _spaced(steps, alignment, vocabulary_map)
    at = np.flatnonzero(steps.base >= 0)
    entries = said.entries(steps.base[at])
    targets, mass, rest = _carry(alignment, vocabulary_map, steps, at, entries, spaced=spaced)
    carried = mass.sum(axis=1) + rest
    unlisted = entries.tail * _staying(tail, alignment, steps, at, entries=entries, carried=carried, ours=ours)
    label = _of_label(steps, at, said, entries, vocabulary_map.source) if spelled else entries.actual
    targets = np.concatenate([alignment.pivot_ids[at + 1][:, None], targets], axis=1)
    mass = np.concatenate([label[:, None], mass], axis=1)
    mass = np.where(targets >= 0, mass, 0.0)
    rest = rest + (entries.actual - label) + unlisted
    # A conditioned row has lost the entries that the text has ruled out since.
    total = np.where(steps.consumed[at] > 0, mass.sum(axis=1) + rest, 1.0)
    scale = 1.0 / np.where(total > 0, total, 1.0)
    rest = np.where(total > 0, rest * scale, 1.0)
    merged = merge_entries(targets, mass * scale[:, None], rest, collisions)
    if tail == "back_off" and ours is not None:
        merged = _backed_off(merged, unlisted * scale, ours, at, alignment.pivot_ids[at + 1])
    return _placed(alignment, steps.cases.copy(), steps.base, merged, one_hot)


def _backed_off(rows: TopK, unlisted: FloatArray, ours: _Said, at: IntArray, labels: IntArray) -> TopK:
    """Rows at positions ``at``, their ``unlisted`` mass distributed like the pivot's own row, where that is known."""
    more = ours.entries(at)
    known = ~np.isnan(ours.actual[at])[:, None]
    ids = np.where(known, np.concatenate([labels[:, None], more.ids], axis=1), -1)
    shares = np.where(known, np.concatenate([more.actual[:, None], more.mass], axis=1), 0.0)
    given = unlisted[:, None] * shares
    both = np.concatenate([np.exp(rows.logprobs), given], axis=1)
    # Rows are stored with an error, so the pivot's may sum to a little more than 1.
    rest = np.maximum(rows.tail - given.sum(axis=1), 0.0)
    return merge_entries(np.concatenate([rows.ids, ids], axis=1), both, rest)


@dataclass(frozen=True, eq=False)
class _Entries:
    """Rows taken apart: all entries but the actual next token, that token's probability, and the tail without it."""

    ids: IntArray  # [a, k], -1 for none
    mass: FloatArray  # [a, k]
    actual: FloatArray  # [a]
    tail: FloatArray  # [a]


@dataclass(frozen=True, eq=False)
class _Said:
    """Checked predictions over the tokens of a text. actual: at least -1000, NaN where it is not known."""

    tokens: IntArray
    rows: TopK
    actual: FloatArray

    def entries(self, base: IntArray) -> _Entries:
        """The rows after positions ``base``."""
        rows, actual = self.rows, np.nan_to_num(self.actual[base])
        ids, mass = rows.ids[base], np.exp(rows.logprobs[base])
        listed = (ids >= 0) & (ids == self.tokens[base + 1][:, None])
        in_list = listed.any(axis=1)
        # A token outside the top k is in the tail; its probability is known, so it becomes an entry of its own.
        outside = np.minimum(np.exp(actual), rows.tail[base])
        probability = np.where(in_list, np.where(listed, mass, 0.0).sum(axis=1), outside)
        tail = np.where(in_list, rows.tail[base], rows.tail[base] - outside)
        return _Entries(np.where(listed, -1, ids), np.where((ids < 0) | listed, 0.0, mass), probability, tail)


def _checked(rows: RowsLike, actual_logprobs: npt.ArrayLike, tokens: IntArray, vocabulary: int, side: str) -> _Said:
    """A pivot's log-probabilities may be unknown, a source's may not."""
    checked = checked_rows(rows, vocabulary, side)
    actual = np.asarray(actual_logprobs, np.float64)
    m = len(tokens)
    if len(checked.tail) != m or actual.shape != (m,):
        raise AlignmentError(
            f"the text has {m} {side} tokens, but there are {len(checked.tail)} rows and actual_logprobs is "
            f"{actual.shape}"
        )
    unknown = np.isnan(actual) & (side == "pivot")
    wrong = np.flatnonzero(~(actual[:-1] <= _LOGPROB_TOLERANCE) & ~unknown[:-1])
    if len(wrong):
        raise AlignmentError(f"actual_logprobs[{wrong[0]}] is {actual[wrong[0]]}, not a log-probability")
    # exp(-1000) is 0; an infinity would make the differences of running sums undefined.
    return _Said(tokens, checked, np.clip(actual, -1000.0, 0.0))


def _begins_with(surfaces: Surfaces, token: IntArray, length: IntArray, ids: IntArray) -> BoolArray:
    """Whether the entries ``ids`` (int64 [w, k]) begin with the first ``length`` bytes of ``token`` (int64 [w] each).

    -1 and ids beyond the vocabulary begin with nothing.
    """
    flat, starts, lengths = surfaces.flat
    known = (ids >= 0) & (ids < len(lengths))
    at = np.where(known, ids, 0)
    keep = known & (lengths[at] >= length[:, None])
    for offset in range(int(length.max(initial=0))):
        rows = np.flatnonzero((length > offset) & keep.any(axis=1))
        if not len(rows):
            break
        wanted = flat[starts[token[rows]] + offset][:, None]
        keep[rows] &= flat[np.minimum(starts[at[rows]] + offset, len(flat) - 1)] == wanted
    return keep


def _first_bytes(surfaces: Surfaces, ids: IntArray) -> IntArray:
    """The first byte of each entry, -1 for an empty one."""
    flat, starts, lengths = surfaces.flat
    return np.where(lengths[ids] > 0, flat[np.minimum(starts[ids], len(flat) - 1)].astype(np.int64), -1)


def _given(alignment: TokenAlignment, surfaces: Surfaces, before: IntArray, consumed: IntArray) -> IntArray:
    """How many bytes of its surface a source token has given once ``consumed`` bytes of its text are read.

    Args:
        alignment: of the text.
        surfaces: of the source.
        before: int64 [w], the source positions before the tokens.
        consumed: int64 [w], bytes of text since the end of ``before``.

    Returns:
        int64 [w]: ``consumed``; one more for a word of WordPiece, which stands for a space that belongs to the token
        before it in the text; -1 where the surface is not the text, since a normaliser changed it or it is unknown.
    """
    flat, starts, lengths = surfaces.flat
    text = np.frombuffer(alignment.text.encode(), np.uint8)
    token, origin = alignment.source_ids[before + 1], alignment.source.ends[before]
    skipped = ((_first_bytes(surfaces, token) == ord(" ")) & (text[origin] != ord(" "))).astype(np.int64)
    clear = lengths[token] >= consumed + skipped
    for offset in range(int(consumed.max(initial=0))):
        reach = np.flatnonzero((consumed > offset) & clear)
        there = starts[token[reach]] + skipped[reach] + offset
        clear[reach] = flat[there] == text[origin[reach] + offset]
    return np.where(clear, consumed + skipped, -1)


def _in_surfaces(steps: Steps, alignment: TokenAlignment, source: Surfaces) -> Steps:
    """Count ``consumed`` and ``overhang`` in bytes of surfaces, and leave out positions where they are not the text."""
    consumed, overhang = steps.consumed.copy(), steps.overhang.copy()
    for bytes_read, before in ((consumed, steps.base), (overhang, steps.spelled)):
        inside = np.flatnonzero(bytes_read > 0)
        bytes_read[inside] = _given(alignment, source, before[inside], bytes_read[inside])
    unclear = (consumed < 0) | (overhang < 0)
    none = np.where(alignment.source_at >= 0, Case.NO_ROW, Case.UNLINKED)
    cases, base = np.where(unclear, none, steps.cases), np.where(unclear, -1, steps.base)
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
    words = np.isin(pivot.kinds[ours], TEXT_KINDS) & np.isin(source.kinds[theirs], TEXT_KINDS)
    links, ours, theirs = links[words], ours[words], theirs[words]
    of_pivot, of_source = (_first_bytes(side, ids) == ord(" ") for side, ids in ((pivot, ours), (source, theirs)))
    data = alignment.text.encode()
    # Other white space, which one side's normaliser made a space of, is the text's own.
    for i in np.flatnonzero(of_pivot != of_source).tolist():
        end = int(alignment.source_ends[steps.base[links[i]]])
        character = data[end : end + 4].decode(errors="ignore")[:1]
        if character.isspace() and character != " ":
            of_pivot[i] = of_source[i]
    consumed, spaced = steps.consumed.copy(), np.zeros(len(steps.base), bool)
    consumed[links[of_source & ~of_pivot]] = 1
    spaced[links[of_pivot & ~of_source]] = True
    return replace(steps, consumed=consumed), spaced


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
    consumed, ids, source = steps.consumed[at[within]], entries.ids[within], vocabulary_map.source
    keep = _begins_with(source, alignment.source_ids[steps.base[at[within]] + 1], consumed, ids)
    # A special token is no text to be continued.
    keep &= np.isin(source.kinds[np.clip(ids, 0, len(source) - 1)], TEXT_KINDS)
    left = _remainders(vocabulary_map, ids, consumed, spaced[at[within]], keep)
    # Where nothing was read yet, what is no text goes to the tail; where something was, the text has ruled it out.
    left_mass = np.where(keep | (spaced[at[within]][:, None] & (ids >= 0)), entries.mass[within], 0.0)
    targets[within], mass[within] = -1, 0.0
    targets[within, : left.shape[1]], mass[within, : left.shape[1]] = left, left_mass
    mass[within] = np.where(targets[within] >= 0, mass[within], 0.0)
    rest[within] = np.where(left < 0, left_mass, 0.0).sum(axis=1)
    return targets, mass, rest


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


def _staying(
    tail: str,
    alignment: TokenAlignment,
    steps: Steps,
    at: IntArray,
    *,
    entries: _Entries,
    carried: FloatArray,
    ours: _Said | None,
) -> FloatArray:
    """The share of the source's tail whose tokens begin with the bytes consumed: float64 [a], 1 at links.

    carried: float64 [a], the mass of the listed entries but s that begin with them.
    """
    if tail in ("drop", "keep"):
        return np.where(steps.consumed[at] > 0, float(tail == "keep"), 1.0)
    listed = entries.mass.sum(axis=1) + entries.actual
    share = np.divide(carried + entries.actual, listed, out=np.ones(len(at)), where=listed > 0)
    if tail in NEED_PIVOT and ours is not None:
        # By the log-probability that the pivot gave to its tokens since the end of ``base``. A token that began before
        # that end says how probable the text on both sides is, so it is left out.
        begin = alignment.source_ends[steps.base[at]]
        first = np.minimum(np.searchsorted(alignment.pivot_ends, begin, side="left"), at)
        first = np.maximum(np.searchsorted(alignment.pivot_ends, begin, side="right") - 1, first)
        known = np.concatenate([[0], np.cumsum(~np.isnan(ours.actual))])
        running = np.concatenate([[0.0], np.cumsum(np.nan_to_num(ours.actual))])
        whole = (known[at] - known[first] == at - first) & (first < at)
        share = np.where(whole, np.exp(np.where(whole, running[at] - running[first], 0.0)), share)
    return np.where(steps.consumed[at] > 0, share, 1.0)


def _of_label(steps: Steps, at: IntArray, said: _Said, entries: _Entries, source: Surfaces) -> FloatArray:
    """The probability of t: of s, and of what completes t after s; float64 [a].

    That is the source tokens that lie within t, and, where t ends inside another, the entries in the row before that
    which begin with what is left of t.
    """
    running = np.concatenate([[0.0], np.cumsum(said.actual[:-1])])
    label: FloatArray = entries.actual * np.exp(
        np.minimum(running[steps.spelled[at]] - running[steps.base[at] + 1], 0.0)
    )
    crossing = np.flatnonzero(steps.overhang[at] > 0)
    before, length = steps.spelled[at[crossing]], steps.overhang[at[crossing]]
    last = said.entries(before)
    begun = _begins_with(source, said.tokens[before + 1], length, last.ids)
    label[crossing] *= np.minimum(last.actual + last.mass.sum(axis=1, where=begun), 1.0)
    return label


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


_RULES: dict[str, Callable[[bytes, list[bytes], bool], bool]] = {
    "em": lambda pivot, source, _: source == [pivot],
    "mined": lambda pivot, source, mapped: source == [pivot] or (len(source) == 1 and mapped),
    "ms": lambda pivot, source, _: (
        pivot.endswith(source[0]) or source[0].endswith(pivot)
        if len(source) == 1
        else b"".join(source).removeprefix(b" ") == pivot.removeprefix(b" ")
    ),
}
"""Whether a pivot token (its surface) takes the row of the last of the source tokens that are aligned with it (their
surfaces). The last argument: whether the only one maps to it."""


def source_positions(alignment: TokenAlignment, vocabulary_map: VocabularyMap, rule: str) -> IntArray:
    """The source position whose row each pivot position takes by a rule of the papers, or -1: int64 [n].

    Args:
        alignment: of either method; the rules are meant for ``dtw``.
        vocabulary_map: made with the same tokenizers; ``mined`` asks it where a source token maps.
        rule: ``em`` and ``mined`` (arXiv 2401.10491): where A(i) is one token and it equals the pivot's, for ``mined``
            also where it maps to it. ``ms`` (arXiv 2408.07990): 1-1 and n-1 where one of the two tokens ends with the
            other; 1-n where the pieces spell the pivot's token, the row of the last.

    Raises:
        AlignmentError: unknown rule.
    """
    if rule not in _RULES:
        raise AlignmentError(f"unknown position rule {rule!r}: there are {', '.join(sorted(_RULES))}")
    pivot = [vocabulary_map.pivot.of[i] for i in alignment.pivot_ids.tolist()]
    source = [vocabulary_map.source.of[i] for i in alignment.source_ids.tolist()]
    targets = vocabulary_map.entries[0][alignment.source_ids, 0]
    first, stop = alignment.matched
    rows = np.full(len(first), -1, np.int64)
    for i in np.flatnonzero(stop > first).tolist():
        last = int(stop[i]) - 1
        if _RULES[rule](pivot[i], source[first[i] : last + 1], bool(targets[last] == alignment.pivot_ids[i])):
            rows[i] = last
    return rows


def project_rows_by_rule(
    alignment: TokenAlignment,
    vocabulary_map: VocabularyMap,
    source_rows: RowsLike,
    rule: str,
    *,
    collisions: str = "max",
) -> AlignedRows:
    """Targets by one of the papers' position rules: the aligned row projected as it is, else a one-hot on the label.

    Args:
        alignment: of method ``dtw`` for the papers' own.
        vocabulary_map, source_rows: as in :func:`project_rows`.
        rule: see :func:`source_positions`.
        collisions: ``max`` is the papers'.

    Raises:
        AlignmentError: as :func:`project_rows`; unknown rule.
    """
    rows = checked_rows(source_rows, vocabulary_map.matrix.shape[0])
    if len(rows.tail) != len(alignment.source):
        raise AlignmentError(f"the text has {len(alignment.source)} source tokens, but there are {len(rows.tail)} rows")
    base = source_positions(alignment, vocabulary_map, rule)
    base[-1:] = -1
    cases = np.where(base >= 0, Case.RULE, Case.UNLINKED).astype(np.int64)
    cases[-1:] = Case.LAST
    at = base[base >= 0]
    merged = vocabulary_map.project(rows.ids[at], rows.logprobs[at], rows.tail[at], collisions)
    return _placed(alignment, cases, base, merged, one_hot=True)
