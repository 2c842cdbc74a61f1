"""The JSON files of a run that a report reads, each as a model that takes what it needs and refuses what is damaged."""

from __future__ import annotations

from typing import Any, TypeGuard

from pydantic import BaseModel, ConfigDict, RootModel


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Counts(_Record):
    """``data/counts.json``: what became of the rows (:class:`fusekit.data.prepare.DataCounts`)."""

    seen: int
    kept: int
    reasons: dict[str, int] = {}
    keys: dict[str, list[str]] = {}
    first_refusal: str = ""


class Share(_Record):
    """Pivot positions of an alignment: how many, and the shares that are linked and that get a row."""

    positions: int
    linked_share: float
    row_share: float


class Quality(Share):
    """``alignment/SOURCE/quality.json`` (:class:`fusekit.alignment.quality.AlignmentQuality`)."""

    pivot: str
    source: str
    texts: int
    pivot_tokens: int
    source_tokens: int
    cases: dict[str, int]
    data: dict[str, Share] = {}


class CaseWorth(_Record):
    """Labels of one case: how many, nats per label of the teacher and of the pivot, None where there are none."""

    labels: int
    teacher: float | None = None
    pivot: float | None = None
    worse: bool = False


class Worth(_Record):
    """``alignment/SOURCE/worth.json`` (:class:`fusekit.alignment.worth.TeacherWorth`)."""

    vocabulary: str
    tokens: str
    tail: str
    examples: int
    ratio: float | None = None
    cases: dict[str, CaseWorth]
    summary: list[str]
    warnings: list[str]


class Training(_Record):
    """``training.json`` of a target (:mod:`fusekit.distillation.run`)."""

    target: str
    sources: list[str] = []
    settings: dict[str, Any] = {}
    made_from: dict[str, Any] = {}
    rows: list[str] = []
    unmatched: dict[str, list[str]] = {}
    counts: dict[str, float] = {}
    skipped_steps: int = 0
    log: list[dict[str, Any]] = []

    def points(self, name: str) -> list[tuple[float, float]]:
        """``(step, value)`` of every line of the log that has this value, as far as both are finite numbers."""
        return [
            (float(step), float(value))
            for line in self.log
            if "loss" in line and _finite(step := line.get("step")) and _finite(value := line.get(name))
        ]

    def last(self, name: str) -> float | None:
        """The last finite value of this name in the log."""
        values = [float(value) for line in self.log if _finite(value := line.get(name))]
        return values[-1] if values else None


class Tensor(_Record):
    """How one tensor was merged (:class:`fusekit.merge_methods.provenance.TensorRecord`)."""

    method: str
    coefficients: dict[str, float]
    parameters: dict[str, Any] = {}
    selected: float | None = None
    erased: dict[str, float] | None = None


class Coefficients(_Record):
    """``merged/coefficients.json``."""

    fusekit: str = ""
    base: str | None = None
    tensors: dict[str, Tensor]


class Task(_Record):
    """A task of lm-eval: which of its metrics the figure is, and which way it is better."""

    metric: str = ""
    higher_is_better: bool | None = None


class Results(_Record):
    """``results.json``: model -> metric -> skill -> value; what each task of lm-eval measures."""

    models: dict[str, dict[str, dict[str, float | None]]]
    lm_eval: dict[str, Task] = {}


class Scores(RootModel[dict[str, dict[str, float | None]]]):
    """``evaluation/MODEL/scores.json``: metric -> skill -> value."""


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
