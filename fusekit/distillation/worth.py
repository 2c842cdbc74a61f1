"""What a source is worth as a teacher, measured on what it and the pivot said about the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusekit.alignment.rows import Case
from fusekit.capturing.store import Store
from fusekit.distillation.dataset import Captures, join
from fusekit.distillation.fusion import over_the_same_text
from fusekit.distillation.inputs import Reading, projection_of
from fusekit.distillation.projections import Projection, label_nll, label_rows
from fusekit.distillation.settings import AlignmentSettings
from fusekit.errors import AlignmentError, DistillationError
from fusekit.types import BoolArray, FloatArray, IntArray, Row

BINS = 1000  # of the histogram of surviving mass, so that memory does not grow with the corpus
MOST_NATS = 1000.0
"""What counts for a label that a row rules out: exp(-1000) is 0, and an infinity would hide all other labels."""
RATIO_LIMIT = 1.05
"""The chain rule allows no more than 1; a few per cent are the price of a top k."""

FEWEST_LABELS = 30
"""Of fewer labels a case is not warned of: their mean tells little."""


@dataclass
class TeacherWorth:
    """What a teacher is worth after projection: nats on the pivot's labels over some examples; :meth:`add` each.

    Attributes:
        vocabulary: method of the vocabulary map.
        tokens, tail: how rows are projected (:class:`fusekit.distillation.projections.Projection`).
        examples: how many were added.
        labels: int64 [cases], labels of the pivot by :class:`~fusekit.alignment.rows.Case`.
        taught: bool [cases], whether the teacher has rows for labels of the case.
        teacher: float64 [cases], nats of the projected rows on the labels, where taught.
        pivot: float64 [cases], the pivot's own nats on the same labels; None once they were not given.
        source: the source's own nats over the same text.
        survival: int64 [BINS + 1], histogram of the share of a row's listed mass that the map carried over.
    """

    vocabulary: str
    tokens: str = "span"
    tail: str = "listed_share"
    examples: int = 0
    labels: IntArray = field(default_factory=lambda: np.zeros(len(Case), np.int64))
    taught: BoolArray = field(default_factory=lambda: np.zeros(len(Case), bool))
    teacher: FloatArray = field(default_factory=lambda: np.zeros(len(Case)))
    pivot: FloatArray | None = field(default_factory=lambda: np.zeros(len(Case)))
    source: float = 0.0
    survival: IntArray = field(default_factory=lambda: np.zeros(BINS + 1, np.int64))
    survival_sum: float = 0.0

    def add(
        self,
        cases: IntArray,
        taught: BoolArray,
        *,
        teacher: FloatArray,
        pivot: FloatArray | None,
        source: float,
        survived: FloatArray,
    ) -> None:
        """Count one example of n labels.

        Args:
            cases: int64 [n].
            taught: bool [n], whether the teacher has a row, the same for all labels of a case. A one-hot on the label
                says nothing of the teacher: not taught.
            teacher: float64 [n], nats: minus the log-probability that its projected row gives to the label, where
                taught.
            pivot: float64 [n], the same of the pivot itself; None where that is not known.
            source: nats of the source over its own tokens of the text.
            survived: float64 [r], of each of its rows, the share of the listed mass that the map carries over.
        """
        size = len(Case)
        self.examples += 1
        self.labels += np.bincount(cases, minlength=size)
        self.taught[cases[taught]] = True
        nats = np.where(taught, np.minimum(teacher, MOST_NATS), 0.0)
        self.teacher += np.bincount(cases, nats, minlength=size)
        if pivot is None:
            self.pivot = None
        elif self.pivot is not None:
            self.pivot += np.bincount(cases, np.minimum(pivot, MOST_NATS), minlength=size)
        self.source += source
        self.survival += np.bincount((np.clip(survived, 0, 1) * BINS).round().astype(np.int64), minlength=BINS + 1)
        self.survival_sum += float(np.sum(survived))

    @property
    def ratio(self) -> float | None:
        """Nats of the projected teacher over the source's own; labels without a row count as the pivot has them.

        None where that is not known, or nothing was counted.
        """
        untaught = ~self.taught
        if self.source <= 0 or (self.pivot is None and self.labels[untaught].any()):
            return None
        rest = float(self.pivot[untaught].sum()) if self.pivot is not None else 0.0
        return (float(self.teacher.sum()) + rest) / self.source

    def per_label(self, case: Case) -> tuple[float | None, float | None]:
        """Nats per label of the teacher and of the pivot; None for one that has nothing to say there."""
        n = int(self.labels[case])
        teacher = float(self.teacher[case]) / n if n and self.taught[case] else None
        return teacher, float(self.pivot[case]) / n if n and self.pivot is not None else None

    def is_worse(self, case: Case) -> bool:
        """Whether the teacher knows labels of this case less well than the pivot that it is to teach."""
        teacher, pivot = self.per_label(case)
        return teacher is not None and pivot is not None and teacher > pivot

    @property
    def warnings(self) -> list[str]:
        """What speaks against learning from this teacher as it is, a line each."""
        found = []
        if self.ratio is not None and self.ratio > RATIO_LIMIT:
            found.append(
                f"projected, the teacher has {self.ratio:.2f} times the source's own nats (more than {RATIO_LIMIT}): "
                f"projection loses what it knows (vocabulary map {self.vocabulary}, tail {self.tail})"
            )
        for case in filter(self.is_worse, Case):
            teacher, pivot = self.per_label(case)
            n = int(self.labels[case])
            if n < FEWEST_LABELS:
                continue
            found.append(
                f"the teacher predicts labels of the case {case.name.lower()} worse than the pivot: {teacher:.3f} "
                f"against {pivot:.3f} nats per label, over {n:,} labels"
            )
        return found

    @property
    def summary(self) -> list[str]:
        """How much the teacher knows, in two sentences."""
        rows, ratio = int(self.survival.sum()), self.ratio
        known = f"{ratio:.2f} times the source's own nats" if ratio is not None else "an unknown number of nats"
        said = [
            f"Over {self.examples:,} examples with {int(self.labels.sum()):,} labels of the pivot, the projected "
            f"teacher has {known}."
        ]
        if rows:
            said.append(
                f"The vocabulary map ({self.vocabulary}) carries {100 * self.survival_sum / rows:.1f} % of a row's "
                f"listed mass on average, {100 * (self._survived(10) or 0.0):.1f} % or less in a tenth of the rows."
            )
        return said

    def _survived(self, percentile: float) -> float | None:
        """A percentile (0 to 100) of the share of a row's mass that the map carried over; None without rows."""
        total = int(self.survival.sum())
        return float(np.searchsorted(np.cumsum(self.survival), percentile / 100 * total)) / BINS if total else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        rows, cases = int(self.survival.sum()), {}
        for case in Case:
            if n := int(self.labels[case]):
                teacher, pivot = map(_rounded, self.per_label(case))
                cases[case.name.lower()] = {
                    "labels": n,
                    "teacher": teacher,
                    "pivot": pivot,
                    "worse": self.is_worse(case),
                }
        return {
            "vocabulary": self.vocabulary,
            "tokens": self.tokens,
            "tail": self.tail,
            "examples": self.examples,
            "labels": int(self.labels.sum()),
            "ratio": _rounded(self.ratio),
            "source_nats": _rounded(self.source),
            "cases": cases,
            "mass_survived": {
                "rows": rows,
                "mean": _rounded(self.survival_sum / rows) if rows else None,
                **{f"p{p}": self._survived(p) for p in (1, 10, 50, 90)},
            },
            "summary": self.summary,
            "warnings": self.warnings,
        }


def _rounded(value: float | None) -> float | None:
    """Without the last digits, which depend on how a machine adds."""
    return None if value is None else round(value, 6)


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
