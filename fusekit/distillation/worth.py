"""What a source is worth as a teacher, measured on what it and the pivot said about the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        pivot: float64 [cases], the pivot's own nats on the same labels.
        source: the source's own nats over the same text.
        carried: of each example, the share of the listed mass of its rows that the map carries over.
    """

    vocabulary: str
    tokens: str = "span"
    tail: str = "listed_share"
    examples: int = 0
    labels: IntArray = field(default_factory=lambda: np.zeros(len(Case), np.int64))
    taught: BoolArray = field(default_factory=lambda: np.zeros(len(Case), bool))
    teacher: FloatArray = field(default_factory=lambda: np.zeros(len(Case)))
    pivot: FloatArray = field(default_factory=lambda: np.zeros(len(Case)))
    source: float = 0.0
    carried: list[FloatArray] = field(default_factory=list)

    def add(
        self,
        cases: IntArray,
        taught: BoolArray,
        *,
        teacher: FloatArray,
        pivot: FloatArray,
        source: float,
        carried: FloatArray,
    ) -> None:
        """Count one example of n labels.

        Args:
            cases: int64 [n].
            taught: bool [n], whether the teacher has a row, the same for all labels of a case. A one-hot on the label
                says nothing of the teacher: not taught.
            teacher: float64 [n], nats: minus the log-probability that its row gives to the label, where taught.
            pivot: float64 [n], the same of the pivot itself.
            source: nats of the source over its own tokens of the text.
            carried: float64 [r], of each of its rows, the share of the listed mass that the map carries over.
        """
        size = len(Case)
        self.examples += 1
        self.labels += np.bincount(cases, minlength=size)
        self.taught[cases[taught]] = True
        self.teacher += np.bincount(cases, np.where(taught, np.minimum(teacher, MOST_NATS), 0.0), minlength=size)
        self.pivot += np.bincount(cases, np.minimum(pivot, MOST_NATS), minlength=size)
        self.source += source
        self.carried.append(carried)

    @property
    def ratio(self) -> float | None:
        """Nats of the projected teacher over the source's own; labels without a row count as the pivot has them."""
        nats = float(self.teacher.sum()) + float(self.pivot[~self.taught].sum())
        return nats / self.source if self.source > 0 else None

    def per_label(self, case: Case) -> tuple[float | None, float | None]:
        """Nats per label of the teacher and of the pivot; None for one that has nothing to say there."""
        n = int(self.labels[case])
        teacher = float(self.teacher[case]) / n if n and self.taught[case] else None
        return teacher, float(self.pivot[case]) / n if n else None

    def is_worse(self, case: Case) -> bool:
        """Whether the teacher knows labels of this case less well than the pivot that it is to teach."""
        return bool(self.taught[case] and self.teacher[case] > self.pivot[case])

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
            if (n := int(self.labels[case])) >= FEWEST_LABELS:
                teacher, pivot = self.per_label(case)
                found.append(
                    f"the teacher predicts labels of the case {case.name.lower()} worse than the pivot: {teacher:.3f} "
                    f"against {pivot:.3f} nats per label, over {n:,} labels"
                )
        return found

    @property
    def summary(self) -> str:
        """How much the teacher knows, in a sentence."""
        known = f"{self.ratio:.2f} times the source's own nats" if self.ratio is not None else "no nats to compare"
        mean = self.mass_carried["mean"]
        carried = "nothing" if mean is None else f"{mean:.1%}"
        return (
            f"Over {self.examples:,} examples with {int(self.labels.sum()):,} labels of the pivot, the projected "
            f"teacher has {known}; the vocabulary map ({self.vocabulary}) carries {carried} of a row's listed mass."
        )

    @property
    def mass_carried(self) -> dict[str, float | None]:
        """The share of a row's listed mass that the map carries over: mean and percentiles, None without rows."""
        shares = np.concatenate([*self.carried, np.zeros(0)])
        figures = [shares.mean(), *np.percentile(shares, (1, 10, 50))] if len(shares) else [None] * 4
        return dict(zip(("mean", "p1", "p10", "p50"), map(_rounded, figures), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        cases = {}
        for case in Case:
            if n := int(self.labels[case]):
                teacher, pivot = map(_rounded, self.per_label(case))
                worse = self.is_worse(case)
                cases[case.name.lower()] = {"labels": n, "teacher": teacher, "pivot": pivot, "worse": worse}
        return {
            "vocabulary": self.vocabulary,
            "tokens": self.tokens,
            "tail": self.tail,
            "examples": self.examples,
            "labels": int(self.labels.sum()),
            "ratio": _rounded(self.ratio),
            "source_nats": _rounded(self.source),
            "cases": cases,
            "mass_carried": self.mass_carried,
            "summary": self.summary,
            "warnings": self.warnings,
        }


def _rounded(value: float | None) -> float | None:
    """Without the last digits, which depend on how a machine adds."""
    return None if value is None else round(float(value), 6)


def measure_stores(
    rows: Sequence[Row],
    names: tuple[str, str],
    tokenizers: tuple[Any, Any],
    stores: tuple[Store, Store],
    how: AlignmentSettings,
    *,
    folder: Path | None = None,
    most: int | None = None,
) -> TeacherWorth:
    """As :func:`measure`, of the pivot's and the source's stores, which are checked first.

    names: for messages. folder: of the vocabulary map; None to make it. Raises StorageError: the map is not there or
    damaged. DistillationError: as :func:`measure`; a store was captured with another tokenizer.
    """
    ours, theirs = (Reading.of(*model, rows) for model in zip(names, tokenizers, stores, strict=True))
    return measure(rows, *stores, projection_of(how, ours, theirs, rows, folder), most)


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
            raise DistillationError(f"example {row.key}: {error}") from error
        mass = np.where(said.rows.ids >= 0, np.exp(said.rows.logprobs), 0.0)
        listed, lost = mass.sum(axis=1), into.spread(said.rows.ids, mass)[2]
        worth.add(
            taught.cases,
            taught.taught & (taught.cases != Case.ONE_HOT),
            teacher=label_nll(taught.rows, own.tokens.ids[own.tokens.label_positions]),
            pivot=-own.actual,
            source=-float(said.actual.sum()),
            carried=1.0 - np.divide(lost, listed, out=np.zeros_like(listed), where=listed > 0),
        )
    return worth
