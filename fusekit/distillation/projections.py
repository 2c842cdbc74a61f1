"""A source's rows at the labels of an example, in the pivot's tokens and vocabulary: one way for each loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusekit.alignment.alignment import TokenAlignment, align_tokens, warped
from fusekit.alignment.papers import project_rows_by_rule
from fusekit.alignment.rows import (
    NEED_PIVOT,
    NO_ID,
    AlignedRows,
    Case,
    Predictions,
    checked_rows,
    merge_entries,
    plan_rows,
    project_rows,
)
from fusekit.alignment.surfaces import vocabulary_surfaces
from fusekit.alignment.vocabulary_map import (
    VocabularyMap,
    build_vocabulary_map,
    count_mappings,
    pivot_groups,
    read_targets,
    source_pieces,
)
from fusekit.distillation.distances import Members
from fusekit.distillation.settings import AlignmentSettings
from fusekit.errors import StorageError
from fusekit.types import BoolArray, CapturedRow, FloatArray, IntArray, Part, Row, TokenizedRow, TokenizedText, TopK


@dataclass(frozen=True, eq=False)
class Projection:
    """How a source's rows come to stand at the pivot's positions.

    Attributes:
        vocabulary_map: from the source's vocabulary into the pivot's. None: rows stay as they are, taken where both
            have read the same bytes, whatever comes next.
        tokens: ``span``: where both have read the same bytes, exact. ``dtw``: the papers' time warping with the
            position rule of the map's method (``em`` for ``prefix``); positions without a row get a one-hot on the
            label, as there.
            ``grouped``: as ``span``, over groups of the pivot's tokens that the source cannot tell apart
            (:func:`fusekit.alignment.vocabulary_map.pivot_groups`), for the loss ``grouped_kl``.
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

    @property
    def vocabulary(self) -> str:
        """The map by its name in a recipe."""
        if self.vocabulary_map is None:
            return "none"
        return self.vocabulary_map.method if self.tokens in ("span", "dtw") else self.tokens

    @property
    def as_they_are(self) -> bool:
        """Whether rows stay the source's own, so that they have no probability of the pivot's labels."""
        return self.vocabulary_map is None or self.tokens not in ("span", "dtw", "grouped")

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
    def members(self) -> Members | None:
        """Which tokens of the pivot stand for an id of the rows, for the losses ``grouped_kl`` and ``p_kl``."""
        if self.vocabulary_map is None or not self.own_ids:
            return None
        if self.groups is not None:
            size, tokens, weights = len(self.groups), np.flatnonzero(self.groups >= 0), None
            ids = self.groups[tokens]
        else:
            size = len(self.vocabulary_map.targets)
            tokens, ids, weights = source_pieces(self.vocabulary_map)
        order = np.argsort(ids, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=size))])
        shares = None if weights is None else torch.from_numpy(weights[order]).float()
        return Members(torch.from_numpy(starts), torch.from_numpy(tokens[order]), shares)

    def grouped(self, rows: TopK) -> TopK:
        """Rows over the pivot's vocabulary as rows over its groups, where there are any."""
        if self.groups is None:
            return rows
        mass = np.where(rows.ids >= 0, np.exp(rows.logprobs), 0.0)
        targets = np.where(rows.ids >= 0, self.groups[np.maximum(rows.ids, 0)], -1)
        return merge_entries(targets, mass, rows.tail + np.where(targets < 0, mass, 0.0).sum(axis=1))

    def nll(self, rows: TopK, labels: IntArray) -> FloatArray | None:
        """Nats per label of the pivot, or per group of it; None for rows that are taken as they are."""
        if self.as_they_are:
            return None
        return label_nll(rows, labels if self.groups is None else self.groups[labels])

    def apply(self, alignment: TokenAlignment, said: Predictions, pivot: Predictions | None = None) -> AlignedRows:
        """What a source said after each of its tokens, at the pivot's positions. pivot: what the pivot itself said."""
        into = self.vocabulary_map
        if into is None:
            return _at_links(alignment, TopK(*said.rows))
        if self.tokens == "dtw":
            rule = {"mined": "mined", "ms": "ms", "ms_released": "ms"}.get(into.method, "em")
            return project_rows_by_rule(_warped(alignment, into), into, said.rows, rule, collisions=self.collisions)
        if self.tokens == "matched" or self.of_chunks:
            rows = checked_rows(said.rows, len(into.targets))
            if self.tokens == "matched":
                return _matched(alignment, rows, into)
            return _by_chunks(alignment, rows, np.asarray(said.actual, np.float64), self)
        found = project_rows(
            alignment,
            into,
            said.rows,
            said.actual,
            pivot=pivot,
            tail=self.tail,
            conditioning=self.conditioning,
            one_hot=self.one_hot,
            collisions=self.collisions,
            spelled=self.tokens == "span",
        )
        return replace(found, rows=self.grouped(found.rows))


def needs_pivot(how: Projection | AlignmentSettings) -> bool:
    """Whether the pivot's own predictions take part in carrying a source's rows."""
    return not how.as_they_are and how.tokens != "dtw" and how.tail in NEED_PIVOT


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


@dataclass(frozen=True, eq=False)
class LabelRows(AlignedRows):
    """Rows over the pivot's vocabulary at the n labels of an example; ``source_at`` counts in the whole of it.

    A case is ``UNLINKED`` also where the source has nothing of the label: tokens of the pivot's template, text beyond
    the source's cut. Labels of one stretch of text have one ``source_at``.

    Attributes:
        linked: bool [n], whether a source position has consumed the same text as the one that predicts the label.
    """

    linked: BoolArray

    @classmethod
    def of(cls, own: CapturedRow) -> LabelRows:
        """What the pivot itself said, which it knows of every label."""
        n = len(own.actual)
        return cls(own.rows, np.full(n, int(Case.SAME)), own.tokens.label_positions - 1, np.ones(n, bool))


def label_rows(
    row: Row, pivot: TokenizedRow, source: CapturedRow, projection: Projection, own: CapturedRow | None = None
) -> LabelRows:
    """The source's rows at the pivot's labels.

    The row that predicts the label at position p stands at p - 1, on either side. Both sides of a message are aligned
    from the token before its content to its end; labels outside that, which only a template writes, have no teacher.
    The source may end earlier than the pivot. own: what the pivot said, for a projection whose ``tail`` is the pivot's.
    Raises AlignmentError: the captured rows are not distributions, or of another vocabulary than the map's.
    """
    theirs_of = _Asked(source, np.nan if projection.of_chunks else 0.0)
    ours_of = None if own is None else _Asked(own, np.nan)
    number = _label_numbers(pivot)
    pieces: list[tuple[IntArray, LabelRows]] = []
    for message in np.unique(pivot.message[pivot.labels]).tolist():
        if message >= len(row.messages):
            continue  # what the template writes after the last message
        (ours, start), (theirs, source_start) = pivot.content(message), source.tokens.content(message)
        if len(ours) < 2 or len(theirs) < 2:
            continue
        labels = number[start + 1 : start + len(ours)]
        at = np.flatnonzero(labels >= 0)
        alignment = align_tokens(row.messages[message].content, ours, theirs)
        said, missing = theirs_of.after(source_start, len(theirs))
        pivots = None if ours_of is None else ours_of.after(start, len(ours))[0]
        found = projection.apply(alignment, said, pivots)
        if projection.of_chunks:
            partly = np.setdiff1d(np.flatnonzero(found.taught), at)  # a stretch is taught whole or not at all
            certain = ~np.isin(found.source_at, found.source_at[partly])
        else:
            certain = _certain(alignment, found, missing, projection)
        cases = np.where(certain, found.cases, int(Case.UNLINKED))[at]
        base, linked = found.source_at[at], alignment.source_at[at] >= 0
        base = np.where(base >= 0, base + source_start, -1)
        pieces.append((labels[at], LabelRows(found.rows.select(at), cases, base, linked)))
    n, width = len(pivot.label_positions), max((piece.rows.ids.shape[1] for _, piece in pieces), default=0)
    ids, logprobs, tail = np.full((n, width), -1, np.int64), np.full((n, width), -np.inf), np.ones(n)
    cases, base, linked = np.full(n, int(Case.UNLINKED), np.int64), np.full(n, -1, np.int64), np.zeros(n, bool)
    for labels, piece in pieces:
        cases[labels], linked[labels] = piece.cases, piece.linked
        to, k = labels[piece.taught], piece.rows.ids.shape[1]
        ids[to, :k], logprobs[to, :k], tail[to] = piece.rows.select(piece.taught)
        base[to] = piece.source_at[piece.taught]
    return LabelRows(TopK(ids, logprobs, tail), cases, base, linked)


def _label_numbers(tokens: TokenizedRow) -> IntArray:
    """The number of the label at each position, -1 where there is none: int64 [T]."""
    return np.where(tokens.labels, np.cumsum(tokens.labels) - 1, -1)


class _Asked:
    """What a model said, by position. unknown: its log-probability of what it was not asked about."""

    def __init__(self, said: CapturedRow, unknown: float) -> None:
        ids, logprobs, tail = said.rows
        width = ids.shape[1]
        # One row of nothing at the end, for the label number -1.
        self.rows = TopK(
            np.concatenate([ids, np.full((1, width), -1)]),
            np.concatenate([logprobs, np.full((1, width), -np.inf)]),
            np.append(tail, 1.0),
        )
        self.actual, self.number = np.append(said.actual, unknown), _label_numbers(said.tokens)

    def after(self, start: int, m: int) -> tuple[Predictions, BoolArray]:
        """After each of m tokens from ``start``, and where it said nothing, since it is no label of it (bool [m])."""
        at = np.append(self.number[start + 1 : start + m], -1)
        return Predictions(self.rows.select(at), self.actual[at]), at < 0


def _certain(alignment: TokenAlignment, aligned: AlignedRows, missing: BoolArray, how: Projection) -> BoolArray:
    """bool [n]: the positions whose row took nothing that the source was not asked about."""
    base = aligned.source_at
    if not missing[:-1].any():
        return np.ones(len(base), bool)
    gaps = np.concatenate([[0], np.cumsum(missing)])
    first = np.maximum(base, 0)
    stop = first + 1
    if how.tokens == "span" and how.vocabulary_map is not None:
        steps = plan_rows(alignment, how.conditioning)
        # The row at ``base``, the probabilities of the tokens that spell the label, the row before the one crossed.
        stop = np.maximum(stop, np.where(steps.base >= 0, steps.spelled + (steps.overhang > 0), 0))
    certain: BoolArray = (base < 0) | (gaps[stop] == gaps[first])
    return certain


def _at_links(alignment: TokenAlignment, rows: TopK) -> AlignedRows:
    at = alignment.source_at
    linked = (at >= 0) & (at < len(alignment.source) - 1)
    taken = rows.select(np.maximum(at, 0))
    return AlignedRows(taken, np.where(linked, int(Case.RULE), int(Case.UNLINKED)), np.where(linked, at, -1))


def _matched(alignment: TokenAlignment, rows: TopK, into: VocabularyMap) -> AlignedRows:
    known, targets = len(into.pivot), into.targets[np.maximum(rows.ids, 0)]
    # Apart while the probabilities of source tokens with equal strings are added.
    targets = np.where(targets >= 0, targets, known + rows.ids)
    merged = merge_entries(np.where(rows.ids >= 0, targets, -1), np.exp(rows.logprobs), rows.tail)
    return _at_links(alignment, merged._replace(ids=np.where(merged.ids >= known, NO_ID, merged.ids)))


def _by_chunks(alignment: TokenAlignment, rows: TopK, actual: FloatArray, how: Projection) -> AlignedRows:
    """The row of a stretch of text at every position that predicts a token of it; ``source_at`` tells which it is."""
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
    cases = np.where(there, int(Case.RULE), int(Case.UNLINKED))
    return AlignedRows(merged.select(number), cases, base)


def _means(rows: TopK, stretches: list[slice], how: Projection) -> TopK:
    """The mean of the rows of each stretch, without entries that no pivot token stands for."""
    assert how.members is not None
    sizes = np.array([part.stop - part.start for part in stretches], np.int64)
    steps = np.arange(sizes.max(initial=0))
    at = np.array([part.start for part in stretches], np.int64)[:, None] + np.minimum(steps, sizes[:, None] - 1)
    inside = steps < sizes[:, None]
    ids = np.where(inside[..., None], rows.ids[at], -1).reshape(len(sizes), -1)
    mass = np.exp(np.where(inside[..., None], rows.logprobs[at], -np.inf)).reshape(len(sizes), -1) / sizes[:, None]
    known = (ids >= 0) & (np.diff(how.members.starts.numpy())[np.maximum(ids, 0)] > 0)
    tail = np.where(inside, rows.tail[at], 0.0).sum(axis=1) / sizes
    return merge_entries(np.where(known, ids, -1), mass, tail + np.where(~known, mass, 0.0).sum(axis=1))


def _warped(alignment: TokenAlignment, vocabulary_map: VocabularyMap) -> TokenAlignment:
    """The alignment by dynamic time warping of a content's tokens, opened and perhaps closed on either side.

    The tokens before the content correspond by their place, and so do the tokens that end it where both sides have one:
    the papers compare strings, and role strings of two templates have nothing to compare.
    """
    size = len(alignment.text.encode())
    (ours, pivot), (theirs, source) = _inside(alignment.pivot, size), _inside(alignment.source, size)
    n, m = len(alignment.pivot), len(alignment.source)
    found = warped(alignment.text, pivot, source, (vocabulary_map.pivot, vocabulary_map.source))
    at, first, stop = np.full(n, -1, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
    at[ours] = np.where(found.source_at >= 0, found.source_at + theirs.start, -1)
    first[ours], stop[ours] = (part + theirs.start for part in found.matched)
    if ours.start and theirs.start:
        at[0], first[0], stop[0] = 0, 0, 1
    if ours.stop < n and theirs.stop < m:
        at[n - 1], first[n - 1], stop[n - 1] = m - 1, m - 1, m
    return TokenAlignment(alignment.text, alignment.pivot, alignment.source, at, "dtw", (first, stop))


def _inside(tokens: TokenizedText, size: int) -> tuple[slice, TokenizedText]:
    """The tokens between the one that opens a content of ``size`` bytes and those that end it."""
    opened = int(len(tokens) > 0 and tokens.ends[0] == 0)
    part = slice(opened, max(opened, int(np.searchsorted(tokens.ends, size, side="right"))))
    return part, TokenizedText.of(tokens.ids[part], tokens.ends[part], tokens.lows[part])


NAME = "vocabulary_map.npz"
SAMPLED = 16
"""Rows that tell how a model ends a turn."""
COUNTED_TEXTS = 10_000  # of which the statistics of an MS map are made

Sample = Sequence[tuple[Row, TokenizedRow]]


def _roles(sample: Sample) -> dict[str, int]:
    """The tokens that end a turn and a text, as the model's template wrote them; a template may be foreign."""
    found: dict[str, Counter[int]] = {"end_of_turn": Counter(), "eos": Counter()}
    for row, tokens in sample:
        ending = (tokens.part == Part.END) & tokens.labels
        found["eos" if row.is_text else "end_of_turn"].update(tokens.ids[ending].tolist())
    return {role: ids.most_common(1)[0][0] for role, ids in found.items() if ids}


def make_map(
    method: str, pivot: Any, source: Any, rows: Sequence[Row], *, samples: tuple[Sample, Sample], size: int
) -> VocabularyMap:
    """The map of a ``method`` that a run trains with, of two tokenizers.

    rows: of the run; the statistics of ``ms`` are counted over their first texts. samples: some of them as each model
    reads them. size: ids of the source's model, which may be more than its tokenizer has.
    """
    statistics = None
    if method in ("ms", "ms_released"):
        texts = islice((message.content for row in rows for message in row.messages if message.content), COUNTED_TEXTS)
        statistics = count_mappings(texts, pivot, source)
    return build_vocabulary_map(
        pivot,
        source,
        method=method,
        statistics=statistics,
        pivot_roles=_roles(samples[0]),
        source_roles=_roles(samples[1]),
        source_size=size,
    )


def write_map(folder: Path, made: VocabularyMap) -> None:
    """Write ``vocabulary_map.npz``: the array ``targets``, int64 [V_source]."""
    with (folder / NAME).open("wb") as file:
        np.savez(file, targets=made.targets)


def read_map(folder: Path, method: str, pivot: Any, source: Any) -> VocabularyMap:
    """The map that :func:`write_map` wrote, of these tokenizers by this method. StorageError: missing or damaged."""
    surfaces = vocabulary_surfaces(pivot), vocabulary_surfaces(source)
    try:
        return VocabularyMap(read_targets(folder / NAME, *surfaces), method, *surfaces)
    except FileNotFoundError:
        raise StorageError(f"{folder / NAME} is missing: the stage `align` comes first") from None
    except StorageError as error:
        raise StorageError(f"{error}; remove {folder}, and the stage `align` makes it again") from error
