"""An engine against transformers, on a few examples: how far their log-probabilities are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fusekit.capturing.engines.replies import Scorer
from fusekit.errors import CaptureError
from fusekit.types import CapturedRow

CHECKED = 4
"""Examples that are scored by both."""

TOLERANCE, ROUNDED_TOLERANCE = 0.01, 0.5
"""Nats, in float32 and in a dtype that rounds; vLLM's sums in bfloat16 depend on the batch by up to about 0.3."""


class Difference(NamedTuple):
    """Of log-probabilities, in nats: the largest, the mean, and over how many values."""

    largest: float
    mean: float
    values: int

    def __str__(self) -> str:
        return f"largest difference {self.largest:.2g} nats, mean {self.mean:.2g}, of {self.values} log-probabilities"


def difference(reference: Sequence[CapturedRow], found: Sequence[CapturedRow]) -> Difference:
    """How far two captures of the same examples are apart, over the labels and all entries of ``reference``.

    An entry that ``found`` does not list counts with its distance to the least that is listed there: 0 for a tie.
    """
    values: list[float] = []
    for ours, theirs in zip(reference, found, strict=True):
        values += np.abs(ours.actual - theirs.actual).tolist()
        for ids, logprobs, other_ids, other in zip(
            ours.rows.ids, ours.rows.logprobs, theirs.rows.ids, theirs.rows.logprobs, strict=True
        ):
            listed = {int(i): float(p) for i, p in zip(other_ids, other, strict=True) if i >= 0}
            least = min(listed.values(), default=-np.inf)
            for i, p in zip(ids.tolist(), logprobs.tolist(), strict=True):
                if i >= 0:
                    values.append(abs(p - listed[i]) if i in listed else max(p - least, 0.0))
    return Difference(max(values, default=0.0), float(np.mean(values)) if values else 0.0, len(values))


def check(engine: Scorer, reference: Sequence[CapturedRow], tolerance: float, what: str) -> Difference:
    """Score the examples of ``reference`` with an engine.

    Args:
        engine: with the selection of ``reference``.
        reference: captured by transformers.
        tolerance: most nats that a log-probability may differ by.
        what: name of the engine and the model, for the error.

    Raises:
        CaptureError: an example has no distribution, or a log-probability differs by more.
    """
    scored = {i: row for batch in engine.score_batches([row.tokens for row in reference]) for i, row in batch}
    found: list[CapturedRow] = []
    for i, row in sorted(scored.items()):
        if isinstance(row, str):
            raise CaptureError(f"{what}: example {reference[i].tokens.key} has no distribution: {row}")
        found.append(row)
    result = difference(reference, found)
    if not result.largest <= tolerance:
        raise CaptureError(
            f"{what} does not say what transformers says on {len(reference)} examples: {result}, more than the "
            f"tolerance of {tolerance:g}. Is it the same model, in the same dtype and without quantization? If the "
            "difference is only rounding, raise engine.tolerance (--engine-tolerance)"
        )
    return result
