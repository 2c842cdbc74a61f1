"""Who taught: the rows that the fusion function gave to the pivot and to each source, as training counted them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusekit.distillation.dataset import CHOSEN, counts_by_data
from fusekit.pipeline.layout import PIVOT
from fusekit.report.facts import Facts
from fusekit.report.records import Training


@dataclass(frozen=True)
class Taught:
    """Rows that were read. rows: how many, over all epochs. shares: of them by candidate; a row may have no teacher."""

    dataset: str
    rows: int
    shares: dict[str, float]


@dataclass(frozen=True)
class Teachers:
    """Who taught a target.

    Attributes:
        target: its name.
        candidates: the pivot, where it takes part, and the sources.
        total: over all rows that were read; None where nothing was counted.
        by_data: the same by source of data; empty where that was not counted.
    """

    target: str
    candidates: list[str]
    total: Taught | None
    by_data: list[Taught]


def teachers_of(facts: Facts) -> list[Teachers]:
    """Who taught each target that is trained."""
    return [_teachers(name, record) for name, record in facts.targets.items() if record.sources]


def _teachers(name: str, record: Training) -> Teachers:
    fusion = record.settings.get("fusion")
    fusion = fusion if isinstance(fusion, dict) else {}
    pivot = [PIVOT] if fusion.get("include_pivot", True) else []
    candidates = [*pivot, *record.sources]
    by_data = [_taught(data, counts, candidates) for data, counts in sorted(counts_by_data(record.counts).items())]
    return Teachers(
        name, candidates, _taught("all rows", record.counts, candidates), [part for part in by_data if part]
    )


def _taught(dataset: str, counts: Mapping[str, float], candidates: Sequence[str]) -> Taught | None:
    rows = counts.get("rows", 0.0)
    if rows <= 0:
        return None
    return Taught(dataset, round(rows), {name: counts.get(CHOSEN + name, 0.0) / rows for name in candidates})
