"""What the pivot learns from at each label, made while training reads: sources aligned, projected and fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from fusekit.alignment.row_cases import Case
from fusekit.distillation.fusion import FUSION_FUNCTIONS, Candidate, Fused
from fusekit.distillation.joining import Captures, Joined, join
from fusekit.distillation.label_rows import LabelRows, Projection, label_rows
from fusekit.distillation.metrics import PROJECTED, metrics_of, projected_ce, typical_bits_per_byte
from fusekit.distillation.sampling import IGNORED
from fusekit.distillation.settings import FusionSettings
from fusekit.distillation.training_log import CASE, CHOSEN, count_names, of_data
from fusekit.errors import AlignmentError, DistillationError
from fusekit.types import CapturedRow, FloatArray, IntArray, Row, TokenizedRow, TopK

PIVOT = "pivot"
KEPT_BYTES = 128 << 20
"""Of examples that a process keeps from the first epoch on; a row beyond that is made anew every time."""

MOST_DATA = 64
"""Sources of data with counts of their own: those of most rows. A run may have one for each of a thousand files."""
OTHERS = "(others)"

_CASES = [case.name.lower() for case in Case]

Example = dict[str, Any]
"""A row to train on: ``input_ids`` and ``labels`` int64 [T]; ``counts``; and where it has targets, for its n labels
``target_ids`` int64 [n, k], ``target_logprobs`` float32 [n, k], ``target_tail`` float32 [n], ``target_taught`` bool [n]
(:class:`fusekit.distillation.losses.SparseTargets`), the candidates' ``cross_entropies`` by the metric, and the
``typical`` bits per byte of its data set, the pivot's and the best models', float64 [2] (empty without the pivot's)."""


class Tokenizes(Protocol):
    """One model's way to read rows."""

    def tokenize(self, row: Row) -> TokenizedRow:
        """The row's tokens."""


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

    Attributes:
        joined: the rows, and which of them each model lacks. A source that lacks a row takes no part in it; a row that
            all lack is learnt from its text alone.
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
    ) -> None:
        self.pivot, self.tokenizer = pivot, tokenizer
        self.sources, self.projections = dict(sources or {}), dict(projections or {})
        self.fusion = fusion or FusionSettings()
        self.rewards = dict(rewards or {})
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
        self.joined: Joined = join(rows, ({PIVOT: pivot} if pivot is not None else {}) | self.sources)
        self.rows = self.joined.rows
        if pivot is not None and tokenizer is None:
            self.rows = tuple(row for row in self.rows if row.key in pivot)
        self.candidates = ([PIVOT] if self.fusion.include_pivot and self.sources else []) + list(self.sources)
        sizes = Counter(row.dataset for row in self.rows)
        self._data = {name for name, _ in sizes.most_common(MOST_DATA)}
        data = sorted(self._data) + ([OTHERS] if len(sizes) > MOST_DATA else [])
        self.count_names = count_names(self.candidates, _CASES, data if self.candidates else ())
        self._kept: dict[int, Example] = {}
        self._room = KEPT_BYTES

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
    def typical(self) -> dict[str, FloatArray]:
        """:func:`~fusekit.distillation.metrics.typical_bits_per_byte` of the rows; empty without the pivot's store."""
        if self.pivot is None:
            return {}
        return typical_bits_per_byte(self.rows, self.pivot, self.sources.values())

    def _made(self, index: int) -> Example:
        row = self.rows[index]
        own = self.pivot.get(row.key) if self.pivot is not None and row.key in self.pivot else None
        tokens = own.tokens if own is not None else self._tokenized(row)
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

    def _tokenized(self, row: Row) -> TokenizedRow:
        assert self.tokenizer is not None  # rows that the pivot's store lacks are left out without it
        return self.tokenizer.tokenize(row)

    def _targets(self, row: Row, tokens: TokenizedRow, own: CapturedRow | None, counts: dict[str, float]) -> Example:
        """Adds to ``counts``. Empty where no model has the row."""
        labels = tokens.ids[tokens.label_positions]
        captured: dict[str, CapturedRow] = {}
        rows: dict[str, LabelRows | TopK] = {}
        if own is not None and self.fusion.include_pivot:
            captured[PIVOT], rows[PIVOT] = own, own.rows
        for name, source in self.sources.items():
            if row.key in source:
                captured[name], rows[name] = self._projected(row, tokens, own, name, source)
        if not captured:
            return {}
        losses = {name: self._label_nll(captured[name], name, rows[name], labels) for name in captured}
        if self.fusion.metric == PROJECTED:
            metrics = projected_ce([(rows[name], losses[name]) for name in captured])
        else:
            metrics = metrics_of(list(captured.values()), self.fusion.metric)
        candidates = [
            self._candidate(captured[name], name, rows[name], metric, losses[name])
            for name, metric in zip(captured, metrics, strict=True)
        ]
        fused = FUSION_FUNCTIONS[self.fusion.function](candidates, level=self.fusion.level)
        names = [candidate.name for candidate in candidates]
        _add_counts(counts, rows, fused, names)
        taught = fused.taught
        if not self.fusion.pivot_teaches and PIVOT in names:
            taught = taught & (fused.weights[:, names.index(PIVOT)] < 1)
        return {
            "target_ids": fused.rows.ids.astype(np.int64),
            "target_logprobs": fused.rows.logprobs.astype(np.float32),
            "target_tail": fused.rows.tail.astype(np.float32),
            "target_taught": taught,
            "cross_entropies": np.array(metrics),
            "typical": self.typical.get(row.dataset, np.zeros(0)),
        }

    def _projected(
        self, row: Row, tokens: TokenizedRow, own: CapturedRow | None, name: str, source: Captures
    ) -> tuple[CapturedRow, LabelRows]:
        captured = source.get(row.key)
        assert captured is not None  # the key is in it
        try:
            return captured, label_rows(row, tokens, captured, self.projections[name], own)
        except AlignmentError as error:
            raise DistillationError(f"row {row.key} of {name}: {error}") from error

    def _candidate(
        self, said: CapturedRow, name: str, given: LabelRows | TopK, metric: float, nll: FloatArray | None
    ) -> Candidate:
        taught = given.taught if isinstance(given, LabelRows) else np.ones(len(said.actual), bool)
        rows = given.rows if isinstance(given, LabelRows) else given
        return Candidate(name, rows, taught, metric, nll, self.rewards.get(name, {}).get(said.tokens.key))

    def _label_nll(self, said: CapturedRow, name: str, given: LabelRows | TopK, labels: IntArray) -> FloatArray | None:
        """Nats per label of the pivot; None for rows in another vocabulary."""
        if isinstance(given, TopK):
            return -said.actual  # known also where the label is not listed, where the rows have only a bound
        return label_nll(given.rows, labels) if self.projections[name].into_pivot else None


def label_nll(rows: TopK, labels: IntArray) -> FloatArray:
    """Minus the log-probability that rows give to labels: nats, float64 [n].

    A label outside the entries has at most the tail and the least entry; that bound stands in for it.
    """
    if not rows.ids.shape[1]:
        found, bound = np.zeros(len(labels)), rows.tail
    else:
        hit = rows.ids == labels[:, None]
        found = np.where(hit, np.exp(rows.logprobs), 0.0).sum(axis=1)
        used = rows.ids >= 0
        least = np.exp(np.where(used, rows.logprobs, 0.0)).min(axis=1)
        bound = np.minimum(rows.tail, least)
    with np.errstate(divide="ignore"):
        nll: FloatArray = -np.log(np.where(found > 0, found, bound))
    return nll


def _add_counts(counts: dict[str, float], rows: Mapping[str, LabelRows | TopK], fused: Fused, names: list[str]) -> None:
    counts["taught"] = float(np.sum(fused.taught))  # by any candidate, the pivot too
    if counts["taught"]:
        for name, share in zip(names, np.mean(fused.weights[fused.taught], axis=0), strict=True):
            counts[CHOSEN + name] = float(share)
    for given in rows.values():
        if isinstance(given, LabelRows):
            found = {"asked": len(given.taught), "linked": given.linked.sum(), "given": given.taught.sum()}
            cases = np.bincount(given.cases, minlength=len(_CASES))
            found |= {CASE + case: number for case, number in zip(_CASES, cases, strict=True)}
            for name, number in found.items():
                counts[name] = counts.get(name, 0.0) + float(number)
