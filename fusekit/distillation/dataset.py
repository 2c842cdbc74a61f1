"""Examples to train on: rows of data with what several models say about them, fused into one target per label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fusekit.capturing.capture import Tokenizes
from fusekit.distillation.batching import IGNORED
from fusekit.distillation.counts import CASE, CASES, CHOSEN, count_names, of_data
from fusekit.distillation.fusion import FUSION_FUNCTIONS, Candidate
from fusekit.distillation.label_rows import LabelRows, label_rows
from fusekit.distillation.live import LiveTeacher
from fusekit.distillation.matching import (
    PROJECTED,
    Captures,
    Joined,
    join,
    metrics_of,
    projected_ce,
    typical_bits_per_byte,
)
from fusekit.distillation.projections import Projection
from fusekit.distillation.settings import FusionSettings
from fusekit.distillation.targets import Members
from fusekit.errors import AlignmentError, DistillationError
from fusekit.types import CapturedRow, FloatArray, IntArray, Row, TokenizedRow

PIVOT = "pivot"
KEPT_BYTES = 128 << 20
"""Of examples that a process keeps from the first epoch on; a row beyond that is made again every time."""

MOST_DATA = 64
"""Sources of data with counts of their own: those of most rows. A run may have one for each of a thousand files."""
OTHERS = "(others)"

Example = dict[str, Any]
"""A row to train on: ``input_ids`` and ``labels`` int64 [T]; ``counts``; and where it has targets, for its n labels
``target_ids`` int64 [n, k], ``target_logprobs`` float32 [n, k], ``target_tail`` float32 [n], ``target_taught`` bool [n]
and for losses of stretches of text ``target_chunks`` int64 [n] (:class:`fusekit.distillation.targets.SparseTargets`),
the candidates' ``cross_entropies`` by the metric, and the ``typical`` bits per byte of its data set, the pivot's and
the best models', float64 [2] (empty without the pivot's)."""


class FusionDataset(Dataset[Example]):
    """Rows with what several models say about them, fused in the pivot's tokens and vocabulary.

    Nothing of it is written: an access aligns and projects the sources' captured rows, which is quicker than reading a
    third copy of the logits, and gives the same arrays every time. The first rows asked for are kept, up to
    :data:`KEPT_BYTES`, so that later epochs of a small data set cost nothing. It can be pickled if its stores can; what
    is kept stays behind. The arrays of an example are not to be written to.

    Args:
        rows: the data; rows that are equal count once.
        pivot: what the pivot said about them, before training; None where neither its opinion is wanted nor the ids
            that it was asked about, which then come from ``tokenizer``.
        sources: name to what each said.
        projections: name to how its rows come into the pivot's vocabulary.
        tokenizer: reads rows that ``pivot`` lacks; without it those are left out.
        fusion: what becomes of several models' rows; ``mode`` is the caller's business.
        rewards: candidate to key to a reward model's number, for ``reward_softmax``.
        relative: whether ``lm_weighting`` is relative, which needs the ``typical`` bits per byte of examples. Live
            teachers score all examples for it first.
        writers: key to the one model that teaches a row, since it wrote it; others teach what they have.

    Attributes:
        joined: the rows, and which of them each model lacks. A source that lacks a row takes no part in it; a row that
            all lack is learned from its text alone.
        count_names: names of the examples' counts.

    Raises:
        DistillationError: a model has none of the rows; a source without a projection; a name used twice.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        pivot: Captures | None = None,
        sources: Mapping[str, Captures] | None = None,
        projections: Mapping[str, Projection] | None = None,
        tokenizer: Tokenizes | None = None,
        fusion: FusionSettings | None = None,
        rewards: Mapping[str, Mapping[str, float]] | None = None,
        relative: bool = True,
        writers: Mapping[str, str] | None = None,
    ) -> None:
        self.pivot, self.tokenizer = pivot, tokenizer
        self.sources, self.projections = dict(sources or {}), dict(projections or {})
        self.fusion = fusion or FusionSettings()
        self.rewards, self.writers = dict(rewards or {}), dict(writers or {})
        if PIVOT in self.sources:
            raise DistillationError(f"a source cannot be called {PIVOT!r}: that is the pivot's own opinion")
        if lacking := sorted(self.sources.keys() - self.projections.keys()):
            raise DistillationError(f"there is no projection into the pivot's vocabulary for {', '.join(lacking)}")
        if pivot is None and tokenizer is None:
            raise DistillationError("the rows need the pivot's tokens: give its store, or its tokenizer")
        if pivot is None and self.sources and self.fusion.include_pivot:
            raise DistillationError(
                "the pivot's own opinion is asked for, but there is no store of it: capture it, or set include_pivot "
                "to false"
            )
        for name in self.sources:
            if pivot is None and self.projections[name].needs_pivot:
                raise DistillationError(
                    f"alignment.tail is {self.projections[name].tail} for {name}, which needs what the pivot said, but "
                    "there is no store of it: capture the pivot, or use listed_share"
                )
        if len(self.sources) > 1 and any(how.own_ids for how in self.projections.values()):
            raise DistillationError(
                f"the rows of {' and '.join(self.sources)} are in groups or vocabularies of their own, which cannot be "
                "taught to one target: use mode pairwise"
            )
        self.joined: Joined = join(rows, ({PIVOT: pivot} if pivot is not None else {}) | self.sources)
        self.rows = self.joined.rows
        if pivot is not None and tokenizer is None:
            self.rows = tuple(row for row in self.rows if row.key in pivot)
        self.candidates = ([PIVOT] if self.fusion.include_pivot and self.sources else []) + list(self.sources)
        sizes = Counter(row.dataset for row in self.rows)
        self._data = {name for name, _ in sizes.most_common(MOST_DATA)}
        data = sorted(self._data) + ([OTHERS] if len(sizes) > MOST_DATA else [])
        self.count_names = count_names(self.candidates, data if self.candidates else ())
        self.relative = relative
        self._kept: dict[int, Example] = {}
        # What is scored together differs by epoch, and in its last bits: a run that resumes keeps nothing either.
        live = any(isinstance(source, LiveTeacher) for source in self.sources.values())
        self._room = 0 if live else KEPT_BYTES

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_room": KEPT_BYTES}

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> IntArray:
        """Characters of each row, int64 [N]: near enough to its tokens to put those of one length together."""
        return np.array([sum(len(message.content) for message in row.messages) for row in self.rows], np.int64)

    def __getitem__(self, index: int) -> Example:
        """Example number ``index``.

        Raises:
            IndexError: there is no such row.
            DistillationError: what a source said about it is not usable; names the row and the source.
        """
        if index in self._kept:
            return dict(self._kept[index])
        example = self._made(index)
        size = sum(array.nbytes for array in example.values())
        if size <= self._room:
            self._kept[index], self._room = example, self._room - size
        return dict(example)

    @cached_property
    def members(self) -> Members | None:
        """Which tokens of the pivot stand for an id of the targets, for the losses ``grouped_kl`` and ``p_kl``."""
        for how in self.projections.values():
            if how.members is not None:
                starts, tokens, shares = how.members
                weights = None if shares is None else torch.from_numpy(shares).float()
                return Members(torch.from_numpy(starts), torch.from_numpy(tokens), weights)
        return None

    @cached_property
    def typical(self) -> dict[str, FloatArray]:
        """:func:`~fusekit.distillation.matching.typical_bits_per_byte` of the rows; empty without the pivot's store."""
        if self.pivot is None or not self.relative:
            return {}
        return typical_bits_per_byte(self.rows, self.pivot, self.sources.values())

    def read(self, index: int) -> tuple[Row, CapturedRow | None, TokenizedRow]:
        """Row number ``index``, what the pivot said about it, and its tokens."""
        row = self.rows[index]
        own = self.pivot.get(row.key) if self.pivot is not None and row.key in self.pivot else None
        if own is not None:
            return row, own, own.tokens
        assert self.tokenizer is not None  # rows that the pivot's store lacks are left out without it
        return row, None, self.tokenizer.tokenize(row)

    def _made(self, index: int) -> Example:
        row, own, tokens = self.read(index)
        example: Example = {
            "input_ids": tokens.ids.astype(np.int64),
            "labels": np.where(tokens.labels, tokens.ids, IGNORED).astype(np.int64),
        }
        counts = {"rows": 1.0, "labels": float(len(tokens.label_positions))}
        if self.sources and counts["labels"]:
            example |= self._targets(row, tokens, own, counts)
        data = row.dataset if row.dataset in self._data else OTHERS
        counts |= {of_data(data, name): n for name, n in counts.items() if name == "rows" or name.startswith(CHOSEN)}
        example["counts"] = np.array([counts.get(name, 0.0) for name in self.count_names])
        return example

    def _targets(self, row: Row, tokens: TokenizedRow, own: CapturedRow | None, counts: dict[str, float]) -> Example:
        """Adds to ``counts``. Empty where no model has the row."""
        labels = tokens.ids[tokens.label_positions]
        said: dict[str, CapturedRow] = {}
        given: dict[str, LabelRows] = {}
        losses: dict[str, FloatArray | None] = {}
        writer = self.writers.get(row.key)
        if own is not None and self.fusion.include_pivot and writer in (None, PIVOT):
            said[PIVOT], given[PIVOT] = own, LabelRows.of(own)
            losses[PIVOT] = -own.actual  # known also where the label is not listed, where the rows have only a bound
            for how in self.projections.values():
                if how.groups is not None:
                    rows = how.grouped(own.rows)
                    known = rows.ids == how.groups[labels][:, None]
                    listed = np.where(known, rows.logprobs, -np.inf).max(axis=1, initial=-np.inf)
                    given[PIVOT], losses[PIVOT] = replace(given[PIVOT], rows=rows), -np.maximum(own.actual, listed)
        for name, source in self.sources.items():
            if row.key not in source or writer not in (None, name):
                continue
            captured, how = source.get(row.key), self.projections[name]
            assert captured is not None  # the key is in it
            try:
                projected = label_rows(row, tokens, captured, how, own)
            except AlignmentError as error:
                raise DistillationError(f"row {row.key} of {name}: {error}") from error
            said[name], given[name] = captured, projected
            losses[name] = how.nll(projected.rows, labels)
            _count(counts, projected)
        if not said:
            return {}
        if self.fusion.metric == PROJECTED:
            metrics = projected_ce([*given.values()], [*losses.values()])
        else:
            metrics = metrics_of([*said.values()], self.fusion.metric)
        candidates = [
            Candidate(name, rows.rows, rows.taught, metric, losses[name], self.rewards.get(name, {}).get(row.key))
            for (name, rows), metric in zip(given.items(), metrics, strict=True)
        ]
        fused = FUSION_FUNCTIONS[self.fusion.function](candidates, level=self.fusion.level)
        taught = fused.taught
        counts["taught"] = float(taught.sum())  # by any candidate, the pivot too
        if counts["taught"]:
            by_candidate = fused.weights[taught].mean(axis=0).tolist()
            counts |= {CHOSEN + name: share for name, share in zip(given, by_candidate, strict=True)}
        if not self.fusion.pivot_teaches and PIVOT in given:
            taught = taught & (fused.weights[:, list(given).index(PIVOT)] < 1)
        chunks = given[list(given)[int(fused.weights.sum(axis=0).argmax())]].chunks
        return {
            **({} if chunks is None else {"target_chunks": chunks}),
            "target_ids": fused.rows.ids.astype(np.int64),
            "target_logprobs": fused.rows.logprobs.astype(np.float32),
            "target_tail": fused.rows.tail.astype(np.float32),
            "target_taught": taught,
            "cross_entropies": np.array(metrics),
            "typical": self.typical.get(row.dataset, np.zeros(0)),
        }


def _count(counts: dict[str, float], given: LabelRows) -> None:
    found = {"asked": len(given.taught), "linked": given.linked.sum(), "given": given.taught.sum()}
    cases = np.bincount(given.cases, minlength=len(CASES))
    found |= {CASE + case: number for case, number in zip(CASES, cases, strict=True)}
    counts |= {name: counts.get(name, 0.0) + float(number) for name, number in found.items()}
