"""Rows of data met with what each model said about them: by the hash of their content, never by their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from fusekit.alignment.cases import Case
from fusekit.capturing.store import Store
from fusekit.distillation.batching import IGNORED
from fusekit.distillation.fusion import FUSION_FUNCTIONS, METRICS, Candidate, Fused
from fusekit.distillation.label_rows import LabelRows, Projection, label_rows
from fusekit.distillation.settings import FusionSettings
from fusekit.errors import AlignmentError, DistillationError
from fusekit.types import CapturedRow, FloatArray, IntArray, Part, Row, TokenizedRow, TopK

SHOWN = 5  # keys in a message


class Captures(Protocol):
    """What a model said about rows, by their keys: a :class:`fusekit.capturing.store.Store`, or a dict.

    ``keys`` may be an attribute or a method.
    """

    @property
    def keys(self) -> Any: ...

    def __contains__(self, key: str, /) -> bool: ...

    def get(self, key: str, /) -> CapturedRow | None:
        """The row of a key that it contains."""


@dataclass(frozen=True)
class Match:
    """How the rows of one model met the examples of data.

    Attributes:
        matched: how many keys both have.
        missing: keys of examples of data that the model has nothing about, in the data's order.
        surplus: keys that the model has and the data has not, sorted.
        duplicates: keys that the model has more than once, sorted; each counts once.
    """

    matched: int
    missing: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.matched} examples matched"]
        for name in ("missing", "surplus", "duplicates"):
            keys = getattr(self, name)
            if keys:
                parts.append(f"{len(keys)} {name} ({_first(keys)})")
        return ", ".join(parts)


def _first(keys: Sequence[str]) -> str:
    return ", ".join([*keys[:SHOWN], *(["..."] if len(keys) > SHOWN else [])])


@dataclass(frozen=True)
class Joined:
    """The rows to train on, and how each model matched them.

    Attributes:
        rows: in the data's order, each key once.
        duplicates: keys that the data has more than once, in order of their second appearance.
        matches: by model.
    """

    rows: tuple[Row, ...]
    duplicates: tuple[str, ...] = ()
    matches: dict[str, Match] = field(default_factory=dict)

    def report(self) -> list[str]:
        """One line for the data and one for each model."""
        lines = [f"{len(self.rows)} examples of data"]
        if self.duplicates:
            lines[0] += f", {len(self.duplicates)} of them given more than once ({_first(self.duplicates)})"
        return lines + [f"{name}: {match}" for name, match in self.matches.items()]


def join(rows: Iterable[Row], models: Mapping[str, Captures]) -> Joined:
    """Match examples of data with the captured rows of models.

    Args:
        rows: the data; of equal rows the first is kept.
        models: name to captured rows.

    Raises:
        DistillationError: there are no rows, or a model has none of them.
    """
    by_key: dict[str, Row] = {}
    copies: dict[str, None] = {}
    for row in rows:
        if row.key in by_key:
            copies[row.key] = None
        else:
            by_key[row.key] = row
    if not by_key:
        raise DistillationError("there are no examples of data to train on")
    matches = {name: _match(by_key, keys_of(captures)) for name, captures in models.items()}
    for name, match in matches.items():
        if not match.matched:
            raise DistillationError(
                f"{name} has none of the {len(by_key)} examples of data: it was captured from other data. The data "
                f"begin with {next(iter(by_key))}, {name} with {', '.join(match.surplus[:1]) or 'nothing'}; capture it "
                "from the same examples, read and cut the same way"
            )
    return Joined(tuple(by_key.values()), tuple(copies), matches)


def keys_of(captures: Captures) -> list[str]:
    """The keys, in the order of the rows."""
    keys = captures.keys
    return list(keys() if callable(keys) else keys)


def _match(by_key: Mapping[str, Row], keys: Sequence[str]) -> Match:
    held: set[str] = set()
    twice: set[str] = set()
    for key in keys:
        (twice if key in held else held).add(key)
    missing = tuple(key for key in by_key if key not in held)
    surplus = tuple(sorted(held - by_key.keys()))
    return Match(len(by_key) - len(missing), missing, surplus, tuple(sorted(twice)))


PROJECTED = "projected_ce"
"""The metric of what is taught, not of the model: see :func:`projected_ce`."""

Place = tuple[int, int, bool]
"""Where a token ends: message, bytes of its content consumed, and whether the turn is ended too."""


def projected_ce(candidates: Sequence[tuple[LabelRows | TopK, FloatArray | None]]) -> list[float]:
    """The mean cross-entropy of each candidate's rows on the pivot's labels, over the labels that all of them teach.

    A one-hot that stands in for a missing row is the label itself and says nothing of a teacher, so it does not count.
    Where no label is taught by all, each candidate's own labels count.

    Args:
        candidates: each one's rows in the pivot's vocabulary (:class:`TopK` teach every label), and minus the
            log-probability that they give to each of the n labels: float64 [n].

    Returns:
        Nats per label, one number per candidate; infinite for one that teaches nothing.

    Raises:
        DistillationError: rows in another vocabulary.
    """
    taught, losses = [], []
    for rows, nll in candidates:
        if nll is None:
            raise DistillationError(f"metric {PROJECTED} needs rows in the pivot's vocabulary: use bits_per_byte")
        losses.append(nll)
        everywhere = np.ones(len(nll), bool)
        taught.append(everywhere if isinstance(rows, TopK) else rows.taught & (rows.cases != Case.ONE_HOT))
    common = np.logical_and.reduce(taught)
    counted = [common if common.any() else own for own in taught]
    return [float(nll[at].mean()) if at.any() else np.inf for nll, at in zip(losses, counted, strict=True)]


def typical_bits_per_byte(rows: Iterable[Row], pivot: Captures, sources: Iterable[Captures]) -> dict[str, FloatArray]:
    """How well a data set is known: bits per byte of the pivot, and of the best model of each row, means over its rows.

    Args:
        rows: of the run; those that the pivot lacks do not count.
        pivot, sources: what each said about them. For a row that a source lacks the others count.

    Returns:
        By the rows' name for their data set, float64 [2]: the pivot's, and the best models', which is no larger.
    """
    own, others = _bits_per_byte(pivot), [_bits_per_byte(source) for source in sources]
    by_name: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.key in own:
            best = min([own[row.key], *(known.get(row.key, np.inf) for known in others)])
            by_name.setdefault(row.dataset, []).append((own[row.key], best))
    return {name: np.mean(found, axis=0) for name, found in by_name.items()}


def _bits_per_byte(captures: Captures) -> dict[str, float]:
    if isinstance(captures, Store):
        summary = captures.summary
        bits = summary.cross_entropy / (np.maximum(summary.bytes, 1) * np.log(2.0))
        return dict(zip(captures.keys, bits.tolist(), strict=True))
    keys = captures.keys() if callable(captures.keys) else captures.keys
    return {key: said.bits_per_byte for key in keys if (said := captures.get(key)) is not None}


def metrics_of(rows: Sequence[CapturedRow], metric: str) -> list[float]:
    """A metric of each model's reading of one row, over what all of them have read of it.

    The models' rows may have been cut at different places. Then only labels up to the first of these places count,
    each model's cross-entropy being shared out by the log-probabilities of its labels.

    Args:
        rows: what each model said about the row.
        metric: ``token_ce`` (nats per label) or ``bits_per_byte`` (of content that the labels cover).

    Raises:
        DistillationError: unknown metric.
    """
    if metric not in METRICS:
        raise DistillationError(f"unknown metric {metric!r}: there are {', '.join(METRICS)}")
    stops = [last_place(row.tokens) for row in rows]
    common = min(stops, default=(0, 0, False))
    measure = METRICS[metric]
    return [measure(row if stop == common else until(row, common)) for row, stop in zip(rows, stops, strict=True)]


def last_place(tokens: TokenizedRow) -> Place:
    """Where a row ends."""
    inside = np.flatnonzero(tokens.part != Part.TEMPLATE)
    if not len(inside):
        return (0, 0, False)
    last = inside[-1]
    return int(tokens.message[last]), int(tokens.ends[last]), bool(tokens.part[last] == Part.END)


def until(row: CapturedRow, place: Place) -> CapturedRow:
    """The beginning of a row: the tokens that end at a place or before."""
    tokens = row.tokens
    message, end, closed = place
    before = (tokens.message < message) | ((tokens.message == message) & (tokens.ends <= end))
    if not closed:
        before &= ~((tokens.message == message) & (tokens.part == Part.END))
    stop = int(np.argmin(before)) if not before.all() else len(tokens)
    cut = TokenizedRow(
        tokens.key,
        tokens.ids[:stop],
        tokens.message[:stop],
        tokens.part[:stop],
        tokens.ends[:stop],
        tokens.lows[:stop],
        tokens.labels[:stop],
    )
    n = int(cut.labels.sum())
    total = float(row.actual.sum())
    share = float(row.actual[:n].sum()) / total if total < 0 else 0.0
    rows = TopK(row.rows.ids[:n], row.rows.logprobs[:n], row.rows.tail[:n])
    return CapturedRow(cut, row.dataset, rows, row.actual[:n], row.cross_entropy * share)


CHOSEN, CASE, DATA = "chosen/", "case/", "data/"


def count_names(candidates: Sequence[str], cases: Sequence[str], data: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of an example's counts.

    ``rows`` and ``labels``; ``asked``: labels times sources, of which ``linked`` have a source position that has read
    the same text, and ``given`` have a row; ``taught``: labels with a target; how many rows each candidate was chosen
    for (shares of a row where several are weighed); labels times sources by case; and ``rows`` and ``chosen`` again for
    each source of data (:func:`of_data`).
    """
    chosen, by_case = [CHOSEN + name for name in candidates], [CASE + name for name in cases]
    by_data = [of_data(name, count) for name in data for count in ("rows", *chosen)]
    return ("rows", "labels", "asked", "linked", "given", "taught", *chosen, *by_case, *by_data)


def of_data(data: str, count: str) -> str:
    """The name of a count over one source of data: ``data/NAME/rows``, ``data/NAME/chosen/CANDIDATE``."""
    return f"{DATA}{data}/{count}"


def counts_by_data(counts: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The counts of each source of data, by its name and theirs, of all counts."""
    found: dict[str, dict[str, float]] = {}
    for name, value in counts.items():
        if name.startswith(DATA):
            data, slash, candidate = name.removeprefix(DATA).rpartition(f"/{CHOSEN}")
            if not slash:
                data, _, candidate = name.removeprefix(DATA).rpartition("/")
            found.setdefault(data, {})[f"{CHOSEN}{candidate}" if slash else candidate] = value
    return found


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    """``linked_share``, ``row_share`` and ``taught_share`` of labels, and per candidate the share of rows."""
    asked, labels, rows = (max(counts.get(name, 0.0), 1.0) for name in ("asked", "labels", "rows"))
    found = {
        "linked_share": counts.get("linked", 0.0) / asked,
        "row_share": counts.get("given", 0.0) / asked,
        "taught_share": counts.get("taught", 0.0) / labels,
    }
    return found | {name: value / rows for name, value in counts.items() if name.startswith(CHOSEN)}


@dataclass
class RunningSums:
    """What this process has seen since the last line.

    Attributes:
        names: of the counts.
        losses: float [2] each, the sums of the CLM and the fusion loss over a micro-batch's labels, on its device.
        labels: how many labels those were.
        counts: float64 [len(names)].
    """

    names: Sequence[str]
    losses: list[torch.Tensor] = field(default_factory=list)
    labels: int = 0
    counts: FloatArray | None = None

    def add(self, lm: torch.Tensor, fusion: torch.Tensor, labels: int, counts: FloatArray | None) -> None:
        """Add a micro-batch, without waiting for its device."""
        self.losses.append(torch.stack([lm.detach().float(), fusion.detach().float()]))
        self.labels += labels
        if counts is not None and self.names:
            self.counts = counts if self.counts is None else self.counts + counts

    def drain(self) -> torch.Tensor:
        """Everything as one float64 vector, and start over."""
        terms = torch.stack(self.losses).double().cpu().sum(0).tolist() if self.losses else [0.0, 0.0]
        counts = np.zeros(len(self.names)) if self.counts is None else self.counts
        vector = torch.tensor([*terms, float(self.labels), *counts.tolist()], dtype=torch.float64)
        self.losses, self.labels, self.counts = [], 0, None
        return vector

    def pending(self) -> torch.Tensor:
        """The counts since the last line, float64 [len(names)]."""
        return torch.from_numpy(np.zeros(len(self.names)) if self.counts is None else np.array(self.counts, np.float64))

    def read(self, vector: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """What the sum of drained vectors says: the values for a line of the log, and the counts by name.

        ``lm_loss`` and ``fusion_loss`` are per label, as in the loss.
        """
        lm, fusion, labels, *counts = vector.tolist()
        named = dict(zip(self.names, counts, strict=True))
        line = {"lm_loss": lm / max(labels, 1.0), "fusion_loss": fusion / max(labels, 1.0)}
        return line | (shares(named) if named else {}), named


PIVOT = "pivot"
KEPT_BYTES = 128 << 20
"""Of examples that a process keeps from the first epoch on; a row beyond that is made again every time."""

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
        """:func:`~fusekit.distillation.dataset.typical_bits_per_byte` of the rows; empty without the pivot's store."""
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
