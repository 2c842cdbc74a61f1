"""Examples to train on: data met with what several models say about them, fused into one distribution per label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from fusekit.capturing.capture import Tokenizes
from fusekit.capturing.store import Store
from fusekit.disk import counted
from fusekit.distillation.batching import Example
from fusekit.distillation.distances import Members
from fusekit.distillation.fusion import FUSION_FUNCTIONS, PROJECTED, Candidate, metrics_of, projected_ce
from fusekit.distillation.live import LiveTeacher
from fusekit.distillation.losses import IGNORE
from fusekit.distillation.projections import LabelRows, Projection, label_rows, needs_pivot
from fusekit.distillation.settings import FusionSettings
from fusekit.errors import AlignmentError, DistillationError
from fusekit.layout import PIVOT
from fusekit.types import CapturedRow, FloatArray, IntArray, Row, TokenizedRow

CHOSEN = "chosen/"
KEPT_BYTES = 128 << 20
"""Bytes of examples that a process keeps from the first epoch on; one beyond that is made again every time."""

Captures = Store | LiveTeacher | Mapping[str, CapturedRow]
"""What a model said about examples, by their keys."""


def characters(row: Row) -> int:
    """Of all messages: near enough to the tokens of an example to tell which is the longest."""
    return sum(len(message.content) for message in row.messages)


class Joined(NamedTuple):
    """The examples to train on, in the data's order and each key once, and how each model matched them.

    report: a line for the data and for each model. missing: by model the keys that it lacks, if it lacks any.
    """

    rows: tuple[Row, ...]
    report: list[str]
    missing: dict[str, list[str]]


def join(rows: Iterable[Row], models: Mapping[str, Captures]) -> Joined:
    """Match examples of data with what models said about them, by the hash of their content.

    Raises DistillationError: there are no examples, or a model has none of them.
    """
    by_key: dict[str, Row] = {}
    copies = 0
    for row in rows:
        copies += row.key in by_key
        by_key.setdefault(row.key, row)
    if not by_key:
        raise DistillationError("there are no examples of data to train on")
    data, lacking = f"{counted(len(by_key), 'example')} of data", {}
    report = [data + (f", {copies} more are copies of them" if copies else "")]
    for name, captures in models.items():
        keys = list(captures.keys() if isinstance(captures, Mapping) else captures.keys)
        held = set(keys)
        missing = [key for key in by_key if key not in held]
        if len(missing) == len(by_key):
            raise DistillationError(
                f"{name} has none of {data}: it was captured from other data. The data begin with {missing[0]}, "
                f"{name} with {keys[0] if keys else 'nothing'}; capture it from the same examples, read and cut alike"
            )
        lacks = f", {len(missing)} missing" if missing else ""
        report.append(f"{name}: {len(by_key) - len(missing)} examples matched{lacks}")
        if missing:
            lacking[name] = missing
    return Joined(tuple(by_key.values()), report, lacking)


class FusionDataset(Dataset[Example]):
    """Examples with what several models say about them, fused in the pivot's tokens and vocabulary.

    Nothing of it is written: an access aligns and projects the sources' captured rows, which is quicker than reading a
    third copy of the logits, and gives the same arrays every time. They are not to be written to. The first examples
    asked for are kept, up to :data:`KEPT_BYTES`. It can be pickled if its stores can; what is kept stays behind.

    Args:
        rows: the data; examples that are equal count once.
        pivot: what the pivot said about them, before training; None where neither its opinion is wanted nor the ids
            that it was asked about, which then come from ``tokenizer``.
        sources: name to what each said.
        projections: name to how its rows come into the pivot's vocabulary; there may be more than sources.
        tokenizer: reads examples that ``pivot`` lacks; without it those are left out.
        fusion: what becomes of several models' rows; ``mode`` is the caller's business.
        rewards: candidate to key to a reward model's number, for ``reward_softmax``.
        relative: whether ``lm_weighting`` is relative, which needs the ``typical`` bits per byte of examples. Live
            teachers score all examples for it first.
        writers: key to the one model that teaches an example, since it wrote it; others teach what they have.

    Attributes:
        joined: the examples, and which of them each model lacks. A source that lacks one takes no part in it; one that
            all lack is learned from its text alone.
        count_names: what is counted of an example: ``rows`` and ``labels``; ``asked``, labels times sources, of which
            ``linked`` have a source position that has read the same text; ``taught``, labels with a target; and how
            many examples each candidate was chosen for (shares of one where several are weighed).

    Raises:
        DistillationError: a model has none of the examples; a source without a projection; a name used twice.
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
        self.sources, how = dict(sources or {}), projections or {}
        self.rewards = rewards or {}
        self.fusion, self.writers, self.relative = fusion or FusionSettings(), dict(writers or {}), relative
        if PIVOT in self.sources:
            raise DistillationError(f"a source cannot be called {PIVOT!r}: that is the pivot's own opinion")
        if lacking := sorted(self.sources.keys() - how.keys()):
            raise DistillationError(f"there is no projection into the pivot's vocabulary for {', '.join(lacking)}")
        self.projections = {name: how[name] for name in self.sources}
        self._refuse_what_does_not_fit()
        self.joined = join(rows, ({PIVOT: pivot} if pivot is not None else {}) | self.sources)
        self.rows = self.joined.rows
        if pivot is not None and tokenizer is None:
            self.rows = tuple(row for row in self.rows if row.key in pivot)
        self.candidates = ([PIVOT] if self.fusion.include_pivot and self.sources else []) + list(self.sources)
        chosen = (CHOSEN + name for name in self.candidates)
        self.count_names = ("rows", "labels", "asked", "linked", "taught", *chosen)
        self._kept: dict[int, Example] = {}
        # What is scored together differs by epoch, and in its last bits: a run that resumes keeps nothing either.
        live = any(isinstance(source, LiveTeacher) for source in self.sources.values())
        self._room = 0 if live else KEPT_BYTES

    def _refuse_what_does_not_fit(self) -> None:
        if self.pivot is None and self.tokenizer is None:
            raise DistillationError("the examples need the pivot's tokens: give its store, or its tokenizer")
        if self.pivot is None and self.sources:
            needs = ["fusion.include_pivot"] if self.fusion.include_pivot else []
            needs += [f"alignment.tail {how.tail} for {s}" for s, how in self.projections.items() if needs_pivot(how)]
            if needs:
                raise DistillationError(
                    f"{' and '.join(needs)} need what the pivot said, but there is no store of it: capture the pivot, "
                    "or set include_pivot to false and tail to listed_share"
                )
        if len(self.sources) > 1 and any(how.own_ids for how in self.projections.values()):
            raise DistillationError(
                f"the rows of {' and '.join(self.sources)} are in groups or vocabularies of their own, which cannot be "
                "taught to one distilled model: use mode pairwise"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_room": KEPT_BYTES}

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> IntArray:
        """Characters of each example, int64 [N]: near enough to its tokens to put those of one length together."""
        return np.array([characters(row) for row in self.rows], np.int64)

    @property
    def longest(self) -> int:
        """How many tokens the example with the most characters has."""
        return len(self._read(self.rows[int(self.lengths.argmax())])[1])

    def __getitem__(self, index: int) -> Example:
        """Example number ``index``. Raises DistillationError, with example and source, for an unusable row."""
        if index in self._kept:
            return dict(self._kept[index])
        example = self._made(self.rows[index])
        size = sum(array.nbytes for array in example.values())
        if size <= self._room:
            self._kept[index], self._room = example, self._room - size
        return dict(example)

    @cached_property
    def members(self) -> Members | None:
        """Which tokens of the pivot stand for an id of the targets, for the losses ``grouped_kl`` and ``p_kl``."""
        return next((how.members for how in self.projections.values() if how.members is not None), None)

    @cached_property
    def typical(self) -> dict[str, FloatArray]:
        """How well each data set is known, in bits per byte: by its name float64 [2], means over its examples.

        The first is the pivot's, the second that of the best model of each example. Examples that the pivot lacks do
        not count; for one that a source lacks the others do. Empty without the pivot's store, or where it is not asked.
        """
        if self.pivot is None or not self.relative:
            return {}
        own, *others = (self._bits_per_byte(captures) for captures in (self.pivot, *self.sources.values()))
        by_name: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            if row.key in own:
                best = min([own[row.key], *(known.get(row.key, np.inf) for known in others)])
                by_name.setdefault(row.dataset, []).append((own[row.key], best))
        return {name: np.mean(found, axis=0) for name, found in by_name.items()}

    def _bits_per_byte(self, captures: Captures) -> Mapping[str, float]:
        if isinstance(captures, LiveTeacher):
            return captures.bits_per_byte()
        if isinstance(captures, Store):
            summary = captures.summary
            bits = summary.cross_entropy / (np.maximum(summary.bytes, 1) * np.log(2.0))
            return dict(zip(captures.keys, bits.tolist(), strict=True))
        return {row.key: captures[row.key].bits_per_byte for row in self.rows if row.key in captures}

    def _read(self, row: Row) -> tuple[CapturedRow | None, TokenizedRow]:
        """What the pivot said about an example, and its tokens."""
        own = self.pivot.get(row.key) if self.pivot is not None and row.key in self.pivot else None
        if own is not None:
            return own, own.tokens
        assert self.tokenizer is not None  # examples that the pivot's store lacks are left out without it
        return None, self.tokenizer.tokenize(row)

    def _made(self, row: Row) -> Example:
        own, tokens = self._read(row)
        example: Example = {
            "input_ids": tokens.ids.astype(np.int64),
            "labels": np.where(tokens.labels, tokens.ids, IGNORE).astype(np.int64),
        }
        counts = defaultdict(float, {"rows": 1.0, "labels": float(len(tokens.label_positions))})
        if self.sources and counts["labels"]:
            example |= self._targets(row, tokens, own, counts)
        example["counts"] = np.array([counts[name] for name in self.count_names])
        return example

    def _targets(self, row: Row, tokens: TokenizedRow, own: CapturedRow | None, counts: dict[str, float]) -> Example:
        """Adds to ``counts``. Empty where no model has the example."""
        labels = tokens.ids[tokens.label_positions]
        heard: dict[str, tuple[CapturedRow, LabelRows, FloatArray | None]] = {}
        writer = self.writers.get(row.key)
        if own is not None and self.fusion.include_pivot and writer in (None, PIVOT):
            heard[PIVOT] = own, *self._pivots_word(own, labels)
        for name, source in self.sources.items():
            captured = source.get(row.key) if row.key in source and writer in (None, name) else None
            if captured is None:
                continue
            how = self.projections[name]
            try:
                projected = label_rows(row, tokens, captured, how, own)
            except AlignmentError as error:
                raise DistillationError(f"example {row.key} of {name}: {error}") from error
            heard[name] = captured, projected, how.nll(projected.rows, labels)
            counts["asked"] += len(labels)
            counts["linked"] += int(projected.linked.sum())
        if not heard:
            return {}
        if self.fusion.metric == PROJECTED:
            metrics = projected_ce([(given, nll) for _, given, nll in heard.values()])
        else:
            metrics = metrics_of([said for said, _, _ in heard.values()], self.fusion.metric)
        candidates = [
            Candidate(name, given.rows, given.taught, metric, nll, self.rewards.get(name, {}).get(row.key))
            for (name, (_, given, nll)), metric in zip(heard.items(), metrics, strict=True)
        ]
        fused = FUSION_FUNCTIONS[self.fusion.function](candidates, level=self.fusion.level)
        taught = fused.taught
        counts["taught"] = float(taught.sum())  # by any candidate, the pivot too
        if counts["taught"]:
            for name, share in zip(heard, fused.weights[taught].mean(axis=0).tolist(), strict=True):
                counts[CHOSEN + name] = share
        if not self.fusion.pivot_teaches and PIVOT in heard:
            taught = taught & (fused.weights[:, 0] < 1)
        targets = {
            "target_ids": fused.rows.ids.astype(np.int64),
            "target_logprobs": fused.rows.logprobs.astype(np.float32),
            "target_tail": fused.rows.tail.astype(np.float32),
            "target_taught": taught,
            "cross_entropies": np.array(metrics),
            "typical": self.typical.get(row.dataset, np.zeros(0)),
        }
        chosen = [*heard][int(fused.weights.sum(axis=0).argmax())]
        if chosen != PIVOT and self.projections[chosen].of_chunks:
            given = heard[chosen][1]
            targets["target_chunks"] = np.where(given.taught, given.source_at, -1)
        return targets

    def _pivots_word(self, own: CapturedRow, labels: IntArray) -> tuple[LabelRows, FloatArray]:
        """Its rows and its nats per label, which are known also where the label is not listed; perhaps of groups."""
        given = LabelRows.of(own)
        for how in self.projections.values():
            if how.groups is not None:
                rows = how.grouped(own.rows)
                known = rows.ids == how.groups[labels][:, None]
                listed = np.where(known, rows.logprobs, -np.inf).max(axis=1, initial=-np.inf)
                return replace(given, rows=rows), -np.maximum(own.actual, listed)
        return given, -own.actual
