"""What a source's predictions teach at the pivot's positions: where, by which case, and how the rows are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusekit.alignment.surfaces import Surfaces
from fusekit.errors import AlignmentError
from fusekit.types import BoolArray, FloatArray, IntArray, TokenizedText, TopK

if TYPE_CHECKING:  # they import scipy and rapidfuzz, which checking a recipe does not need
    from fusekit.alignment.alignment import TokenAlignment
    from fusekit.alignment.vocabulary_map import VocabularyMap

_LOGPROB_TOLERANCE = 1e-3  # stored log-probabilities are rounded
TAILS = ("back_off", "pivot_share", "listed_share", "drop", "keep")
NEED_PIVOT = ("back_off", "pivot_share")
"""Of :data:`TAILS`: those that need the pivot's own predictions."""
# Log-probabilities are stored with an error, so a row may exceed 1 by as much; more than this is another quantity.
MASS_TOLERANCE = 1e-2
NO_ID = -2
"""In place of an id: an entry with a probability, of a token that the vocabulary of the row does not have."""

RowsLike = TopK | tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]


class Case(IntEnum):
    """How a pivot position comes by its row. t is the pivot's next token, s the source's.

    The cases of a link, where both have consumed the same bytes:

    * ``SAME``: s and t are the same bytes. The row is projected, s goes to t.
    * ``LONGER``: s is longer than t. The row is projected, s goes to t, its first piece here.
    * ``CLOSES``: s is shorter, and a source token ends where t ends. t gets the product of the probabilities of the
      source tokens that spell it; what is left of s goes to the tail; the other entries are projected.
    * ``CROSSES``: s is shorter and t ends inside a later source token. As ``CLOSES``, and the last factor is the
      probability of the entries that begin with what is left of t, in the row before that token.
    * ``NO_ROW``: none of these is certain.

    The same where the pivot stands inside a source token, after conditioning the row before that token on the bytes
    consumed since: ``WITHIN_SAME`` to ``WITHIN_CROSSES``; ``UNLINKED`` where that gives no row. ``LAST`` is the text's
    last token, which has no label. Without conditioning there is neither ``CROSSES`` nor any ``WITHIN``.
    """

    LAST = 0
    SAME = 1
    LONGER = 2
    CLOSES = 3
    CROSSES = 4
    NO_ROW = 5
    WITHIN_SAME = 6
    WITHIN_LONGER = 7
    WITHIN_CLOSES = 8
    WITHIN_CROSSES = 9
    UNLINKED = 10
    ONE_HOT = 11  # no row by the cases above, a one-hot on the label by request, as in the papers
    RULE = 12  # a row taken by one of the papers' rules, whatever the next tokens are


HAS_ROW = frozenset(Case) - {Case.LAST, Case.NO_ROW, Case.UNLINKED}
_WITHIN = Case.WITHIN_SAME - Case.SAME
"""From a case of a link, ``SAME`` to ``NO_ROW``, to the one inside a source token."""


@dataclass(frozen=True, eq=False)
class Steps:
    """The plan of a row: which source row each pivot position takes and how; made from the tokens alone.

    Attributes:
        cases: int64 [n].
        base: int64 [n], the source position whose row is used, -1 for none.
        spelled: int64 [n], the last source position whose token lies within t (CLOSES, CROSSES), else ``base + 1``.
        consumed: int64 [n], bytes consumed since the end of ``base`` (0 at links).
        overhang: int64 [n], bytes of t that token ``spelled + 1`` begins with (0 but for CROSSES).
    """

    cases: IntArray
    base: IntArray
    spelled: IntArray
    consumed: IntArray
    overhang: IntArray


def plan_rows(alignment: TokenAlignment, conditioning: bool = True) -> Steps:
    """Sort the pivot's positions into cases. alignment: of method ``span``. conditioning: see :func:`project_rows`."""
    pivot, source = alignment.pivot, alignment.source
    n, m = len(pivot), len(source)
    linked = alignment.source_at >= 0
    base = alignment.source_at.copy()
    certain = np.flatnonzero(source.lows <= source.ends)
    if len(certain):
        # Unlinked: the last source token that ends before this position. Uncertain ends on either side give none.
        before = np.searchsorted(source.ends[certain], pivot.ends, side="right") - 1
        inside = certain[np.maximum(before, 0)]
        within = ~linked & (before >= 0) & (pivot.lows <= pivot.ends) & (source.ends[inside] < pivot.lows)
        base = np.where(within, inside, base)
    base[base + 1 >= m] = -1
    cases = np.full(n, int(Case.NO_ROW), np.int64)
    spelled, overhang = base + 1, np.zeros(n, np.int64)
    usable = np.flatnonzero(base[:-1] >= 0)
    if len(usable):
        found = _compare_next(pivot, source, usable, base[usable])
        cases[usable], spelled[usable], overhang[usable] = found
    cases = np.where(linked, cases, cases + _WITHIN)
    cases[-1:] = Case.LAST
    if not conditioning:
        cases[linked & (cases == Case.CROSSES)] = Case.NO_ROW
        cases[~linked & (cases != Case.LAST)] = Case.UNLINKED
    used = np.isin(cases, list(HAS_ROW))
    base, overhang = np.where(used, base, -1), np.where(used, overhang, 0)
    consumed = np.where(linked | (base < 0), 0, pivot.ends - source.ends[np.maximum(base, 0)] if m else 0)
    return Steps(cases, base, spelled, consumed, overhang)


def _compare_next(
    pivot: TokenizedText, source: TokenizedText, at: IntArray, base: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Cases, ``spelled`` and ``overhang`` of positions ``at`` with rows ``base``, as if they were linked."""
    t_low, t_high = pivot.lows[at + 1], pivot.ends[at + 1]
    s_low, s_high = source.lows[base + 1], source.ends[base + 1]
    certain = np.flatnonzero(source.lows <= source.ends)
    # The last source token whose end is not beyond the end of t.
    inner = certain[np.maximum(np.searchsorted(source.lows[certain], t_high, side="right") - 1, 0)]
    sure = (s_low <= s_high) & (t_low <= t_high)
    shorter = sure & (inner > base)
    crossing = np.minimum(inner + 1, len(source) - 1)
    crosses = shorter & (crossing > inner) & (source.lows[crossing] > t_high)
    crosses &= source.lows[crossing] <= source.ends[crossing]
    conditions = [
        sure & (s_low <= t_high) & (s_high >= t_low),
        sure & (s_low > t_high),
        shorter & (source.ends[inner] >= t_low),
        crosses & (source.ends[inner] < t_high),
    ]
    kind = np.select(conditions, [Case.SAME, Case.LONGER, Case.CLOSES, Case.CROSSES], Case.NO_ROW)
    spelled = np.where(np.isin(kind, [Case.CLOSES, Case.CROSSES]), inner, base + 1)
    return kind, spelled, np.where(kind == Case.CROSSES, t_high - source.ends[inner], 0)


def checked_rows(rows: RowsLike, vocabulary: int, side: str = "source") -> TopK:
    """Rows as int64 and float64. Raises AlignmentError unless they are distributions over ids below ``vocabulary``."""
    ids, logprobs, tail = np.asarray(rows[0]).astype(np.int64), *(np.asarray(part, np.float64) for part in rows[1:])
    if ids.ndim != 2 or logprobs.shape != ids.shape or tail.shape != ids.shape[:1]:
        raise AlignmentError(
            f"top-k rows need ids [T, k], logprobs [T, k] and tail [T], not {ids.shape}, {logprobs.shape} and "
            f"{tail.shape}"
        )
    outside = ids[(ids >= vocabulary) | (ids < -1)]
    if len(outside):
        raise AlignmentError(
            f"token id {outside[0]} is outside the {side}'s side of the vocabulary map ({vocabulary} ids): was the "
            "map built with another tokenizer? A source whose output is padded needs source_size=<its vocab_size>"
        )
    mass = np.exp(np.where(ids >= 0, logprobs, -np.inf)).sum(axis=1)
    wrong = np.flatnonzero(~np.isfinite(mass) | ~(tail >= 0) | ~(mass + tail <= 1 + MASS_TOLERANCE))
    if len(wrong):
        raise AlignmentError(
            f"row {wrong[0]} is not a distribution: its entries hold {mass[wrong[0]]:.6g} and its tail "
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
        raise AlignmentError(f"unknown collisions {collisions!r}: choose one of add, max")
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
        return {case.name.lower(): int((self.cases == case).sum()) for case in Case}


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
        AlignmentError: rows that do not fit the alignment or are not distributions, an unknown ``tail``, or one that
            needs ``pivot`` without it.
    """
    if tail not in TAILS:
        raise AlignmentError(f"unknown tail {tail!r}: choose one of {', '.join(TAILS)}")
    if tail in NEED_PIVOT and pivot is None:
        raise AlignmentError(f"tail {tail!r} needs the pivot's own predictions: pass pivot, or use 'listed_share'")
    if alignment.method != "span":
        raise AlignmentError(f"rows need an alignment of method 'span', not {alignment.method!r}: see source_positions")
    said = _said(source_rows, actual_logprobs, alignment.source_ids, len(vocabulary_map.targets), "source")
    ours = None
    if pivot is not None:
        ours = _said(pivot.rows, pivot.actual, alignment.pivot_ids, len(vocabulary_map.pivot), "pivot")
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
    return placed_rows(alignment, steps.cases.copy(), steps.base, merged, one_hot)


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


def _said(rows: RowsLike, actual_logprobs: npt.ArrayLike, tokens: IntArray, vocabulary: int, side: str) -> _Said:
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
    (flat, starts), lengths = surfaces.flat, surfaces.lengths
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
    (flat, starts), lengths = surfaces.flat, surfaces.lengths
    return np.where(lengths[ids] > 0, flat[np.minimum(starts[ids], len(flat) - 1)].astype(np.int64), -1)


def _given(alignment: TokenAlignment, surfaces: Surfaces, before: IntArray, consumed: IntArray) -> IntArray:
    """Bytes of its surface that a source token has given once ``consumed`` bytes after its predecessor are read.

    before: int64 [w], the positions of the predecessors. Returns int64 [w]: ``consumed``; one more for a word of
    WordPiece, whose space belongs to the token before it in the text; -1 where a normaliser changed the text, or the
    token is unknown, so that the surface is not the text.
    """
    (flat, starts), lengths = surfaces.flat, surfaces.lengths
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
    """Find the links at which only one side's next token begins with a space, and condition the source's row on it.

    Such are a SentencePiece token at the start of a text, a template's space in the first token of a content, a word of
    WordPiece. Where the source's token begins with it, ``consumed`` becomes 1; where the pivot's does, entries get a
    space in front: bool [n].
    """
    pivot, source = vocabulary_map.pivot, vocabulary_map.source
    links = np.flatnonzero((steps.base >= 0) & (steps.consumed == 0))
    ours, theirs = alignment.pivot_ids[links + 1], alignment.source_ids[steps.base[links] + 1]
    words = pivot.is_text[ours] & source.is_text[theirs]
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
    """All entries but s in the pivot's vocabulary: targets and mass [a, k], and the mass [a] that maps nowhere."""
    targets, mass, rest = vocabulary_map.spread(entries.ids, entries.mass)
    within = np.flatnonzero((steps.consumed[at] > 0) | spaced[at])
    if not len(within):
        return targets, mass, rest
    consumed, ids, source = steps.consumed[at[within]], entries.ids[within], vocabulary_map.source
    keep = _begins_with(source, alignment.source_ids[steps.base[at[within]] + 1], consumed, ids)
    # A special token is not text that another token continues.
    keep &= source.is_text[np.clip(ids, 0, len(source) - 1)]
    left = np.full(ids.shape, -1, np.int64)
    rows, columns = np.nonzero(keep)
    if len(rows):
        triples = np.stack([ids[rows, columns], consumed[rows], spaced[at[within][rows]]])
        unique, inverse = np.unique(triples, axis=1, return_inverse=True)
        remains = [b" " * space + source.of[id_][length:] for id_, length, space in unique.T.tolist()]
        left[rows, columns] = vocabulary_map.remainders(remains)[inverse.ravel()]
    # Where nothing was read yet, what is not text goes to the tail; where something was, the text has ruled it out.
    left_mass = np.where(keep | (spaced[at[within]][:, None] & (ids >= 0)), entries.mass[within], 0.0)
    targets[within], mass[within] = left, np.where(left >= 0, left_mass, 0.0)
    rest[within] = np.where(left < 0, left_mass, 0.0).sum(axis=1)
    return targets, mass, rest


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

    carried: float64 [a], the mass of the listed entries but s that do.
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
    """The probability of t, float64 [a]: of s, of the source tokens after it within t, and of what is left of t.

    The last where t ends inside a source token: of the entries that begin with those bytes.
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


def placed_rows(alignment: TokenAlignment, cases: IntArray, base: IntArray, merged: TopK, one_hot: bool) -> AlignedRows:
    """Rows at their positions, with one-hots where asked for."""
    n, width, at = len(alignment.pivot), max(merged.ids.shape[1], 1 if one_hot else 0), np.flatnonzero(base >= 0)
    ids, logprobs, tail = np.full((n, width), -1, np.int64), np.full((n, width), -np.inf), np.ones(n)
    ids[at, : merged.ids.shape[1]], logprobs[at, : merged.ids.shape[1]], tail[at] = merged
    if one_hot:
        bare = np.flatnonzero(np.isin(cases, [Case.NO_ROW, Case.UNLINKED]))
        ids[bare, 0], logprobs[bare, 0], tail[bare] = alignment.pivot_ids[bare + 1], 0.0, 0.0
        cases[bare] = Case.ONE_HOT
    return AlignedRows(TopK(ids, logprobs, tail), cases, base)
