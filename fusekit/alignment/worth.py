"""What a teacher is worth after projection: its nats on the pivot's labels beside the pivot's and the source's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusekit.alignment.cases import Case
from fusekit.types import BoolArray, FloatArray, IntArray

BINS = 1000  # of the histogram of surviving mass, so that memory does not grow with the corpus
MOST_NATS = 1000.0
"""What counts for a label that a row rules out: exp(-1000) is 0, and an infinity would hide all other labels."""
RATIO_LIMIT = 1.05
"""The chain rule allows no more than 1; a few per cent are the price of a top k."""


@dataclass
class TeacherWorth:
    """Nats over some examples; :meth:`add` each.

    Attributes:
        vocabulary: method of the vocabulary map.
        tokens, tail: how rows are projected (:class:`fusekit.distillation.projections.Projection`).
        examples: how many were added.
        labels: int64 [cases], labels of the pivot by :class:`~fusekit.alignment.cases.Case`.
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
        survived: FloatArray | None = None,
    ) -> None:
        """Count one example of n labels.

        Args:
            cases: int64 [n].
            taught: bool [n], whether the teacher has a row. A one-hot on the label says nothing of it: not taught. It
                is the same for all labels of a case.
            teacher: float64 [n], minus the log-probability that its projected row gives to the label; not read
                elsewhere.
            pivot: float64 [n], the same of the pivot itself; None where that is not known.
            source: minus the log-probability that the source gives to its own tokens of the text.
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
        if survived is not None and len(survived):
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
        ratio = self.ratio
        if ratio is not None and ratio > RATIO_LIMIT:
            found.append(
                f"projected, the teacher has {ratio:.2f} times the source's own nats (more than {RATIO_LIMIT}): "
                f"projection loses what it knows (vocabulary map {self.vocabulary}, tail {self.tail})"
            )
        for case in filter(self.is_worse, Case):
            teacher, pivot = self.per_label(case)
            n = int(self.labels[case])
            found.append(
                f"the teacher predicts labels of the case {case.name.lower()} worse than the pivot: {teacher:.3f} "
                f"against {pivot:.3f} nats per label, over {n:,} label{'s' if n != 1 else ''}"
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
            mean, p10 = self.survival_sum / rows, self.survived(10) or 0.0
            said.append(
                f"The vocabulary map ({self.vocabulary}) carries {100 * mean:.1f} % of a row's listed mass on "
                f"average, {100 * p10:.1f} % or less in a tenth of the rows."
            )
        return said

    def survived(self, percentile: float) -> float | None:
        """A percentile (0 to 100) of the share of a row's mass that the map carried over; None without rows."""
        total = int(self.survival.sum())
        if not total:
            return None
        return float(np.searchsorted(np.cumsum(self.survival), percentile / 100 * total)) / BINS

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        rows = int(self.survival.sum())
        cases = {}
        for case in Case:
            if n := int(self.labels[case]):
                teacher, pivot = self.per_label(case)
                figures = {"teacher": _rounded(teacher), "pivot": _rounded(pivot), "worse": self.is_worse(case)}
                cases[case.name.lower()] = {"labels": n, **figures}
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
                **{f"p{p}": self.survived(p) for p in (1, 10, 50, 90)},
            },
            "summary": self.summary,
            "warnings": self.warnings,
        }


def _rounded(value: float | None) -> float | None:
    """Without the last digits, which depend on how a machine adds."""
    return None if value is None else round(value, 6)
