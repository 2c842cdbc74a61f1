"""What a source is worth as a teacher, measured on what it and the pivot said about the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusekit.alignment.cases import Case
from fusekit.alignment.quality import TeacherWorth
from fusekit.capturing.store import Store
from fusekit.distillation.dataset import Captures, join
from fusekit.distillation.fusion import over_the_same_text
from fusekit.distillation.inputs import Reading, projection_of
from fusekit.distillation.projections import Projection, label_nll, label_rows
from fusekit.distillation.settings import AlignmentSettings
from fusekit.errors import AlignmentError, DistillationError
from fusekit.types import Row


class Captured(NamedTuple):
    """A model's tokenizer, and the store of what it said. name: for messages."""

    name: str
    tokenizer: Any
    store: Store


def measure_stores(
    rows: Sequence[Row],
    pivot: Captured,
    source: Captured,
    how: AlignmentSettings,
    *,
    folder: Path | None = None,
    most: int | None = None,
) -> TeacherWorth:
    """As :func:`measure`, of stores that are checked first. folder: of the vocabulary map; None to make it.

    Raises StorageError: the map is not there, damaged or another. DistillationError: as :func:`measure`; a store was
    captured with another tokenizer.
    """
    by_key = {row.key: row for row in rows}
    ours, theirs = (Reading.of(model.name, model.tokenizer, model.store, by_key) for model in (pivot, source))
    return measure(rows, pivot.store, source.store, projection_of(how, ours, theirs, rows, folder), most)


def measure(
    rows: Sequence[Row], pivot: Captures, source: Captures, projection: Projection, most: int | None = None
) -> TeacherWorth:
    """Count the nats of a projected teacher, of its source and of the pivot.

    Args:
        rows: the data.
        pivot, source: what each said about them; an example that one of them lacks does not count.
        projection: into the pivot's vocabulary.
        most: examples to read, evenly spaced over the data; all if None.

    Raises:
        DistillationError: rows in another vocabulary; a model has none of the examples; captured rows are not usable.
    """
    into = projection.vocabulary_map
    if into is None or projection.tokens not in ("span", "dtw"):
        raise DistillationError("rows that no vocabulary map projects have no nats on the pivot's labels")
    worth = TeacherWorth(into.method, projection.tokens, projection.tail)
    joined = join(rows, {"the pivot": pivot, "the source": source}).rows
    both = [row for row in joined if row.key in pivot and row.key in source]
    picked = range(len(both)) if most is None or len(both) <= most else np.linspace(0, len(both) - 1, most, dtype=int)
    for row in (both[at] for at in picked):
        own, said = over_the_same_text([captured for of in (pivot, source) if (captured := of.get(row.key))])
        try:
            taught = label_rows(row, own.tokens, said, projection, own)
        except AlignmentError as error:
            raise DistillationError(f"row {row.key}: {error}") from error
        mass = np.where(said.rows.ids >= 0, np.exp(said.rows.logprobs), 0.0)
        listed, lost = mass.sum(axis=1), into.spread(said.rows.ids, mass)[2]
        worth.add(
            taught.cases,
            taught.taught & (taught.cases != Case.ONE_HOT),
            teacher=label_nll(taught.rows, own.tokens.ids[own.tokens.label_positions]),
            pivot=-own.actual,
            source=-float(said.actual.sum()),
            survived=1.0 - np.divide(lost, listed, out=np.zeros_like(listed), where=listed > 0),
        )
    return worth
