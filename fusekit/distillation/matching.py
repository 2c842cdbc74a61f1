"""Examples of data met with what each model said about them, and the models judged by it.

They are met by the hash of their content, never by their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from fusekit.alignment.cases import Case
from fusekit.artifacts import counted
from fusekit.capturing.store import Store
from fusekit.distillation.label_rows import LabelRows
from fusekit.distillation.live import LiveTeacher
from fusekit.errors import DistillationError
from fusekit.types import CapturedRow, FloatArray, Part, Row, TokenizedRow, TopK

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


class Match(NamedTuple):
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
        named = zip(self._fields[1:], self[1:], strict=True)
        unmatched = [f"{len(keys)} {name} ({_first(keys)})" for name, keys in named if keys]
        return ", ".join([f"{self.matched} examples matched", *unmatched])


def _first(keys: Sequence[str]) -> str:
    return ", ".join([*keys[:SHOWN], *(["..."] if len(keys) > SHOWN else [])])


class Joined(NamedTuple):
    """The rows to train on, and how each model matched them.

    Attributes:
        rows: in the data's order, each key once.
        duplicates: keys that the data has more than once, in order of their second appearance.
        matches: by model.
    """

    rows: tuple[Row, ...]
    duplicates: tuple[str, ...]
    matches: dict[str, Match]

    def report(self) -> list[str]:
        """One line for the data and one for each model."""
        twice = f", {len(self.duplicates)} of them given more than once ({_first(self.duplicates)})"
        data = f"{counted(len(self.rows), 'example')} of data{twice if self.duplicates else ''}"
        return [data, *(f"{name}: {match}" for name, match in self.matches.items())]


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
        by_key.setdefault(row.key, row)
    if not by_key:
        raise DistillationError("there are no examples of data to train on")
    matches = {name: _match(by_key, keys_of(captures)) for name, captures in models.items()}
    for name, match in matches.items():
        if not match.matched:
            raise DistillationError(
                f"{name} has none of {counted(len(by_key), 'example')} of data: it was captured from other data. The "
                f"data begin with {next(iter(by_key))}, {name} with {', '.join(match.surplus[:1]) or 'nothing'}; "
                "capture it from the same examples, read and cut the same way"
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
    return Match(len(by_key) - len(missing), missing, tuple(sorted(held - by_key.keys())), tuple(sorted(twice)))


PROJECTED = "projected_ce"
"""The metric of what is taught, not of the model: see :func:`projected_ce`."""

METRICS = ("token_ce", "bits_per_byte")
"""Those of a model's own reading, properties of :class:`~fusekit.types.CapturedRow`. ``token_ce`` is the papers' (nats
per token of its own tokenizer), and not comparable between tokenizers; ``bits_per_byte`` is."""


def projected_ce(rows: Sequence[LabelRows], losses: Sequence[FloatArray | None]) -> list[float]:
    """The mean cross-entropy of each candidate's rows on the pivot's labels, over the labels that all of them teach.

    A one-hot that stands in for a missing row is the label itself and says nothing of a teacher, so it does not count.
    Where no label is taught by all, each candidate's own labels count.

    Args:
        rows: of each candidate, in the pivot's vocabulary.
        losses: minus the log-probability that they give to each of the n labels, float64 [n].

    Returns:
        Nats per label, one number per candidate; infinite for one that teaches nothing.

    Raises:
        DistillationError: rows in another vocabulary.
    """
    known = [nll for nll in losses if nll is not None]
    if len(known) < len(rows):
        raise DistillationError(f"metric {PROJECTED} needs rows in the pivot's vocabulary: use bits_per_byte")
    taught = [given.taught & (given.cases != Case.ONE_HOT) for given in rows]
    common = np.logical_and.reduce(taught)
    counted = [common if common.any() else own for own in taught]
    return [float(nll[at].mean()) if at.any() else np.inf for nll, at in zip(known, counted, strict=True)]


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
    if isinstance(captures, LiveTeacher):
        return captures.bits_per_byte()
    if isinstance(captures, Store):
        summary = captures.summary
        bits = summary.cross_entropy / (np.maximum(summary.bytes, 1) * np.log(2.0))
        return dict(zip(captures.keys, bits.tolist(), strict=True))
    return {key: said.bits_per_byte for key in keys_of(captures) if (said := captures.get(key)) is not None}


def metrics_of(rows: Sequence[CapturedRow], metric: str) -> list[float]:
    """A metric of each model's reading of one row, over what all of them have read of it.

    The models' rows may have been cut at different places. Then only labels up to the first of these places count,
    each model's cross-entropy being shared out by the log-probabilities of its labels.

    Args:
        rows: what each model said about the row.
        metric: one of :data:`METRICS`.

    Raises:
        DistillationError: unknown metric.
    """
    if metric not in METRICS:
        raise DistillationError(f"unknown metric {metric!r}: there are {', '.join(METRICS)}")
    return [getattr(row, metric) for row in over_the_same_text(rows)]


def over_the_same_text(rows: Sequence[CapturedRow]) -> list[CapturedRow]:
    """What several models said about one row, cut where the first of them ends."""
    stops = [_last_place(row.tokens) for row in rows]
    common = min(stops, default=(0, 0, False))
    return [row if stop == common else _until(row, common) for row, stop in zip(rows, stops, strict=True)]


_Place = tuple[int, int, bool]
"""Where a token ends: message, bytes of its content consumed, and whether the turn is ended too."""


def _last_place(tokens: TokenizedRow) -> _Place:
    inside = np.flatnonzero(tokens.part != Part.TEMPLATE)
    if not len(inside):
        return (0, 0, False)
    last = inside[-1]
    return int(tokens.message[last]), int(tokens.ends[last]), bool(tokens.part[last] == Part.END)


def _until(row: CapturedRow, place: _Place) -> CapturedRow:
    """The beginning of a row: the tokens that end at a place or before."""
    tokens = row.tokens
    message, end, closed = place
    before = (tokens.message < message) | ((tokens.message == message) & (tokens.ends <= end))
    if not closed:
        before &= ~((tokens.message == message) & (tokens.part == Part.END))
    stop = int(np.argmin(before)) if not before.all() else len(tokens)
    arrays = ("ids", "message", "part", "ends", "lows", "labels")
    cut = replace(tokens, **{name: getattr(tokens, name)[:stop] for name in arrays})
    n, total = int(cut.labels.sum()), float(row.actual.sum())
    share = float(row.actual[:n].sum()) / total if total < 0 else 0.0
    rows = TopK(row.rows.ids[:n], row.rows.logprobs[:n], row.rows.tail[:n])
    return replace(row, tokens=cut, rows=rows, actual=row.actual[:n], cross_entropy=row.cross_entropy * share)
