"""How well a model predicted a row, over the bytes that all models of a comparison have read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusekit.errors import DistillationError
from fusekit.representation.tokenized_row import CapturedRow, Part, TokenizedRow

Place = tuple[int, int, bool]
"""Where a token ends: message, bytes of its content consumed, and whether the turn is ended too."""


@dataclass(frozen=True)
class Figures:
    """Cross-entropy in nats over ``labels`` labels that cover ``bytes`` bytes of content."""

    cross_entropy: float
    labels: int
    bytes: int


METRICS: dict[str, Callable[[Figures], float]] = {
    # Nats per label, as the papers choose by; not comparable between tokenizers.
    "token_ce": lambda figures: figures.cross_entropy / max(figures.labels, 1),
    "bits_per_byte": lambda figures: figures.cross_entropy / math.log(2.0) / max(figures.bytes, 1),
}


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
    return [
        METRICS[metric](
            Figures(row.cross_entropy, len(row.actual), row.tokens.label_bytes)
            if stop == common
            else _until(row, common)
        )
        for row, stop in zip(rows, stops, strict=True)
    ]


def last_place(tokens: TokenizedRow) -> Place:
    """Where a row ends."""
    inside = np.flatnonzero(tokens.part != Part.TEMPLATE)
    if not len(inside):
        return (0, 0, False)
    last = inside[-1]
    return int(tokens.message[last]), int(tokens.ends[last]), bool(tokens.part[last] == Part.END)


def _until(row: CapturedRow, common: Place) -> Figures:
    """The figures of the labels that end at ``common`` or before."""
    tokens = row.tokens
    message, end, closed = common
    before = (tokens.message < message) | ((tokens.message == message) & (tokens.ends <= end))
    if not closed:
        before &= ~((tokens.message == message) & (tokens.part == Part.END))
    stop = int(np.argmin(before)) if not before.all() else len(tokens)
    cut = replace(
        tokens,
        ids=tokens.ids[:stop],
        message=tokens.message[:stop],
        part=tokens.part[:stop],
        ends=tokens.ends[:stop],
        lows=tokens.lows[:stop],
        labels=tokens.labels[:stop],
    )
    labels = int(cut.labels.sum())
    total = float(row.actual.sum())
    share = float(row.actual[:labels].sum()) / total if total < 0 else 0.0
    return Figures(row.cross_entropy * share, labels, cut.label_bytes)
