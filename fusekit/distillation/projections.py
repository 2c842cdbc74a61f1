"""How a source's rows come to stand at the pivot's positions: one strategy for each way to compare them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fusekit.alignment.alignment import METHODS, TokenAlignment
from fusekit.alignment.cases import Case
from fusekit.alignment.groups import pivot_groups, source_pieces
from fusekit.alignment.projection import NO_ID, checked_rows, merge_entries
from fusekit.alignment.rows import NEED_PIVOT, AlignedRows, Predictions, RowsLike, project_rows, project_rows_by_rule
from fusekit.alignment.vocabulary_map import VocabularyMap
from fusekit.errors import DistillationError
from fusekit.types import FloatArray, IntArray, TokenizedText, TopK


@dataclass(frozen=True, eq=False)
class Projection:
    """How a source's rows come to stand at the pivot's positions.

    Attributes:
        vocabulary_map: from the source's vocabulary into the pivot's. None: rows stay as they are, taken where both
            have read the same bytes, whatever comes next.
        tokens: ``span``: where both have read the same bytes, exact. ``dtw``: the papers' time warping with the
            position rule of the map's method; positions without a row get a one-hot on the label, as there.
            ``grouped``: as ``span``, over groups of the pivot's tokens that the source cannot tell apart
            (:func:`fusekit.alignment.groups.pivot_groups`), for the loss ``grouped_kl``.
            ``matched``: rows as they are, as without a map; an entry that maps nowhere stays as one without an id.
            ``pieces``: the mean of the source's rows over each stretch between two common ends, for the loss ``p_kl``.
            ``chunks``: the source's log-likelihood of each such stretch, for the loss ``alm``.
        tail, conditioning, one_hot, collisions: see :func:`fusekit.alignment.project_rows`.
    """

    vocabulary_map: VocabularyMap | None
    tokens: str = "span"
    tail: str = "listed_share"
    conditioning: bool = True
    one_hot: bool = False
    collisions: str = "add"

    def __post_init__(self) -> None:
        if self.tokens not in _PROJECT:
            raise DistillationError(f"unknown token alignment {self.tokens!r}: there are {', '.join(sorted(_PROJECT))}")
        if self.vocabulary_map is None and self.tokens != "span":
            raise DistillationError(f"without a vocabulary map rows are taken where tokens='span', not {self.tokens!r}")

    @property
    def into_pivot(self) -> bool:
        """Whether rows are carried into the pivot's vocabulary, or groups of it, rather than taken as they are."""
        return self.vocabulary_map is not None and self.tokens in ("span", "dtw", "grouped")

    @property
    def needs_pivot(self) -> bool:
        """Whether the pivot's own predictions take part."""
        return self.into_pivot and self.tokens != "dtw" and self.tail in NEED_PIVOT

    @property
    def of_chunks(self) -> bool:
        """Whether a row is of a stretch of text, which may be several tokens."""
        return self.tokens in ("pieces", "chunks")

    @property
    def own_ids(self) -> bool:
        """Whether the ids of its rows mean something of this source alone, so that no other's can stand beside them."""
        return self.tokens in ("grouped", "pieces")

    @cached_property
    def groups(self) -> IntArray | None:
        """Of ``grouped``, the token that stands for the group of each pivot token: int64 [V]; else None."""
        if self.vocabulary_map is None or self.tokens != "grouped":
            return None
        return pivot_groups(self.vocabulary_map)

    @cached_property
    def members(self) -> tuple[IntArray, IntArray, FloatArray | None] | None:
        """Which pivot tokens stand for an id of the rows; :class:`fusekit.distillation.targets.Members` as arrays."""
        if self.vocabulary_map is None or not self.own_ids:
            return None
        sources, pivots = self.vocabulary_map.matrix.shape
        if self.groups is not None:
            size, tokens, shares = pivots, np.flatnonzero(self.groups >= 0), None
            ids = self.groups[tokens]
        else:
            size = sources
            tokens, ids, shares = source_pieces(self.vocabulary_map)
        order = np.argsort(ids, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=size))])
        return starts, tokens[order], None if shares is None else shares[order]

    def grouped(self, rows: TopK) -> TopK:
        """Rows over the pivot's vocabulary as rows over its groups, where there are any."""
        if self.groups is None:
            return rows
        mass = np.where(rows.ids >= 0, np.exp(rows.logprobs), 0.0)
        targets = np.where(rows.ids >= 0, self.groups[np.maximum(rows.ids, 0)], -1)
        return merge_entries(targets, mass, rows.tail + np.where(targets < 0, mass, 0.0).sum(axis=1))

    def nll(self, rows: TopK, labels: IntArray) -> FloatArray | None:
        """Nats per label of the pivot, or per group of it; None for rows that are taken as they are."""
        if not self.into_pivot:
            return None
        return label_nll(rows, labels if self.groups is None else self.groups[labels])

    def apply(self, alignment: TokenAlignment, said: Predictions, pivot: Predictions | None = None) -> AlignedRows:
        """What a source said after each of its tokens, at the pivot's positions. pivot: what the pivot itself said."""
        if self.vocabulary_map is None:
            return _as_they_are(alignment, TopK(*said.rows))
        return _PROJECT[self.tokens](alignment, said, pivot, self, self.vocabulary_map)


def label_nll(rows: TopK, labels: IntArray) -> FloatArray:
    """Minus the log-probability that rows give to labels: nats, float64 [n].

    A label outside the entries has at most the tail and the least entry; that bound stands in for it.
    """
    if not rows.ids.shape[1]:
        found, bound = np.zeros(len(labels)), rows.tail
    else:
        hit = rows.ids == labels[:, None]
        found = np.where(hit, np.exp(rows.logprobs), 0.0).sum(axis=1)
        least = np.exp(np.where(rows.ids >= 0, rows.logprobs, 0.0)).min(axis=1)
        bound = np.minimum(rows.tail, least)
    with np.errstate(divide="ignore"):
        nll: FloatArray = -np.log(np.where(found > 0, found, bound))
    return nll


def _by_span(
    alignment: TokenAlignment, said: Predictions, pivot: Predictions | None, how: Projection, into: VocabularyMap
) -> AlignedRows:
    return project_rows(
        alignment,
        into,
        said.rows,
        said.actual,
        pivot=pivot,
        tail=how.tail,
        conditioning=how.conditioning,
        one_hot=how.one_hot,
        collisions=how.collisions,
        spelled=how.tokens == "span",
    )


def _by_group(
    alignment: TokenAlignment, said: Predictions, pivot: Predictions | None, how: Projection, into: VocabularyMap
) -> AlignedRows:
    found = _by_span(alignment, said, pivot, how, into)
    return replace(found, rows=how.grouped(found.rows))


def _by_warping(
    alignment: TokenAlignment, said: Predictions, _pivot: Predictions | None, how: Projection, into: VocabularyMap
) -> AlignedRows:
    rule = _RULE_OF_MAP.get(into.method, "em")
    return project_rows_by_rule(warp_tokens(alignment, into), into, said.rows, rule, collisions=how.collisions)


def _as_they_are(alignment: TokenAlignment, rows: TopK) -> AlignedRows:
    at = alignment.source_at
    linked = (at >= 0) & (at < len(alignment.source) - 1)
    base = np.maximum(at, 0)
    taken = TopK(rows.ids[base], rows.logprobs[base], rows.tail[base])
    cases = np.where(linked, int(Case.RULE), int(Case.UNLINKED))
    return AlignedRows(taken, cases, np.where(linked, at, -1))


_Project = Callable[[TokenAlignment, Predictions, "Predictions | None", Projection, VocabularyMap], AlignedRows]


def _matched(
    alignment: TokenAlignment, said: Predictions, _pivot: Predictions | None, _how: Projection, into: VocabularyMap
) -> AlignedRows:
    rows = _checked(said.rows, into)
    known = into.matrix.shape[1]
    targets = into.entries[0][np.maximum(rows.ids, 0), 0]
    # Apart while the probabilities of source tokens with equal strings are added.
    targets = np.where(targets >= 0, targets, known + rows.ids)
    merged = merge_entries(np.where(rows.ids >= 0, targets, -1), np.exp(rows.logprobs), rows.tail)
    return _as_they_are(alignment, merged._replace(ids=np.where(merged.ids >= known, NO_ID, merged.ids)))


def _by_chunks(
    alignment: TokenAlignment, said: Predictions, _pivot: Predictions | None, how: Projection, into: VocabularyMap
) -> AlignedRows:
    """The row of a stretch of text at every position that predicts a token of it; ``source_at`` tells which it is."""
    rows, actual = _checked(said.rows, into), np.asarray(said.actual, np.float64)
    at = alignment.source_at
    stretches = [
        (ours, slice(theirs.start - 1, theirs.stop - 1))  # the rows that predict its tokens
        for ours, theirs in alignment.groups
        if ours.start
        and theirs.start
        and at[ours.stop - 1] == theirs.stop - 1
        and not np.isnan(actual[theirs.start - 1 : theirs.stop - 1]).any()
    ]
    if how.tokens == "chunks":
        nats = np.array([min(actual[theirs].sum(), 0.0) for _, theirs in stretches])
        merged = TopK(np.zeros((len(nats), 1), np.int64), nats[:, None], -np.expm1(nats))
    else:
        merged = _means(rows, [theirs for _, theirs in stretches], how)
    number, base = np.full(len(alignment.pivot), -1), np.full(len(alignment.pivot), -1)
    for i, (ours, theirs) in enumerate(stretches):
        if (merged.ids[i] >= 0).any():
            number[ours.start - 1 : ours.stop - 1], base[ours.start - 1 : ours.stop - 1] = i, theirs.start
    there = number >= 0
    if not there.any():
        merged, number = TopK(np.full((1, 0), -1), np.zeros((1, 0)), np.ones(1)), np.zeros_like(number)
    ids, logprobs, tail = (part[number] for part in merged)
    cases = np.where(there, int(Case.RULE), int(Case.UNLINKED))
    return AlignedRows(TopK(ids, logprobs, tail), cases, base)


def _checked(rows: RowsLike, into: VocabularyMap) -> TopK:
    ids, logprobs, tail = rows
    return checked_rows(ids, logprobs, tail, into.matrix.shape[0])


def _means(rows: TopK, stretches: list[slice], how: Projection) -> TopK:
    """The mean of the rows of each stretch, without entries that no pivot token stands for."""
    assert how.members is not None
    sizes = np.array([part.stop - part.start for part in stretches], np.int64)
    steps = np.arange(sizes.max(initial=0))
    at = np.array([part.start for part in stretches], np.int64)[:, None] + np.minimum(steps, sizes[:, None] - 1)
    inside = steps < sizes[:, None]
    ids = np.where(inside[..., None], rows.ids[at], -1).reshape(len(sizes), -1)
    mass = np.exp(np.where(inside[..., None], rows.logprobs[at], -np.inf)).reshape(len(sizes), -1) / sizes[:, None]
    known = (ids >= 0) & (np.diff(how.members[0])[np.maximum(ids, 0)] > 0)
    tail = np.where(inside, rows.tail[at], 0.0).sum(axis=1) / sizes
    return merge_entries(np.where(known, ids, -1), mass, tail + np.where(~known, mass, 0.0).sum(axis=1))


_PROJECT: dict[str, _Project] = {
    "span": _by_span,
    "dtw": _by_warping,
    "grouped": _by_group,
    "matched": _matched,
    "pieces": _by_chunks,
    "chunks": _by_chunks,
}
_RULE_OF_MAP = {"em": "em", "mined": "mined", "ms": "ms", "ms_released": "ms"}


def warp_tokens(alignment: TokenAlignment, vocabulary_map: VocabularyMap) -> TokenAlignment:
    """The alignment by dynamic time warping of tokens that :func:`fusekit.alignment.align_tokens` has aligned.

    The tokens before a content correspond by their place, and so do the tokens that end it where both sides have one:
    the papers compare strings, and role strings of two templates have nothing to compare.

    Args:
        alignment: of a message's content, opened and perhaps closed on either side.
        vocabulary_map: made with the same tokenizers; tells the tokens' strings.

    Raises:
        AlignmentError: a text too long for the quadratic table.
    """
    size = len(alignment.text.encode())
    ours, theirs = _inside(alignment.pivot, size), _inside(alignment.source, size)
    n, m = len(alignment.pivot), len(alignment.source)
    pivot, source = _part(alignment.pivot, ours), _part(alignment.source, theirs)
    links, path = METHODS["dtw"](pivot, source, vocabulary_map.pivot, vocabulary_map.source)
    at, first, stop = np.full(n, -1, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
    at[ours] = np.where(links >= 0, links + theirs.start, -1)
    assert path is not None  # this method has one
    first[ours], stop[ours] = path[0] + theirs.start, path[1] + theirs.start
    if ours.start and theirs.start:
        at[0], first[0], stop[0] = 0, 0, 1
    if ours.stop < n and theirs.stop < m:
        at[n - 1], first[n - 1], stop[n - 1] = m - 1, m - 1, m
    return TokenAlignment(alignment.text, alignment.pivot, alignment.source, at, "dtw", (first, stop))


def _inside(tokens: TokenizedText, size: int) -> slice:
    """The tokens between the one that opens a content of ``size`` bytes and those that end it."""
    opened = int(len(tokens) > 0 and tokens.ends[0] == 0)
    return slice(opened, max(opened, int(np.searchsorted(tokens.ends, size, side="right"))))


def _part(tokens: TokenizedText, part: slice) -> TokenizedText:
    ends = tokens.ends[part]
    return TokenizedText(tokens.ids[part], ends, ends if tokens.exact else tokens.lows[part])
