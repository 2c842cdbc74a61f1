"""How well a model predicted a row, over the bytes that all models of a comparison have read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fusekit.alignment.row_cases import Case
from fusekit.capturing.store import Store
from fusekit.distillation.fusion import METRICS
from fusekit.distillation.joining import Captures
from fusekit.distillation.label_rows import LabelRows
from fusekit.errors import DistillationError
from fusekit.types import CapturedRow, FloatArray, Part, Row, TokenizedRow, TopK

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
