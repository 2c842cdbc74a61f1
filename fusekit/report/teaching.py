"""Who taught: the rows that the fusion function gave to the pivot and to each source, per source of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusekit.pipeline.layout import PIVOT
from fusekit.report.facts import Facts
from fusekit.report.records import Training
from fusekit.storage import Store

CHOSEN = "chosen/"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Taught:
    """The rows of one source of data. rows: how many. shares: of them by candidate; sums to 1."""

    dataset: str
    rows: int
    shares: dict[str, float]


@dataclass(frozen=True)
class Teachers:
    """Who taught a target.

    Attributes:
        target: its name.
        candidates: the pivot, where it takes part, and the sources.
        counted: the trainer's own count over all rows that it read: candidate -> share; empty where it kept none.
        visits: rows that it read, over all epochs.
        by_data: the same from the stores' cross-entropies, once per row; empty where they do not decide.
        total: of ``by_data``.
    """

    target: str
    candidates: list[str]
    counted: dict[str, float]
    visits: int
    by_data: list[Taught]
    total: Taught | None


def teachers_of(facts: Facts) -> list[Teachers]:
    """Who taught each target that is trained."""
    return [_teachers(facts, name, record) for name, record in facts.targets.items() if record.sources]


def _teachers(facts: Facts, name: str, record: Training) -> Teachers:
    fusion = record.settings.get("fusion")
    fusion = fusion if isinstance(fusion, dict) else {}
    pivot = [PIVOT] if fusion.get("include_pivot", True) else []
    candidates = [*pivot, *record.sources]
    visits = record.counts.get("rows", 0.0)
    counted = {c: record.counts.get(CHOSEN + c, 0.0) / visits for c in candidates} if visits > 0 else {}
    stores = {c: facts.stores[c] for c in candidates if c in facts.stores}
    choose = _WEIGHTS.get(str(fusion.get("function")))
    by_data: list[Taught] = []
    if choose is not None and fusion.get("level") == "sequence" and len(stores) == len(candidates) > 1:
        by_data = _by_data(stores, choose, str(fusion.get("metric")))
    return Teachers(name, candidates, counted, round(visits), by_data, _total(by_data, candidates))


def _min_ce(scores: Floats) -> Floats:
    """The candidate of lowest cross-entropy, the first of equal ones. [N, K] -> [N, K]."""
    chosen: Floats = np.eye(scores.shape[1])[scores.argmin(axis=1)]
    chosen[~np.isfinite(scores.min(axis=1))] = 0.0
    return chosen


def _avg_ce(scores: Floats) -> Floats:
    """softmax(exp(-CE)) over the candidates that have the row. [N, K] -> [N, K]."""
    powers = np.where(np.isfinite(scores), np.exp(np.exp(-scores)), 0.0)
    total = powers.sum(axis=1, keepdims=True)
    shares: Floats = np.divide(powers, total, out=np.zeros_like(powers), where=total > 0)
    return shares


_WEIGHTS = {"min_ce": _min_ce, "avg_ce": _avg_ce}


def _by_data(stores: dict[str, Store], weigh: Callable[[Floats], Floats], metric: str) -> list[Taught]:
    places: dict[str, dict[str, int]] = {name: {k: at for at, k in enumerate(s.keys)} for name, s in stores.items()}
    keys = list(dict.fromkeys(key for known in places.values() for key in known))
    scores = np.stack([_scores(store, places[name], keys, metric) for name, store in stores.items()], axis=1)
    shares = weigh(scores)
    datasets = _datasets(list(stores.values()), list(places.values()), keys)
    found = []
    for dataset in sorted(set(datasets)):
        at = np.array([known == dataset for known in datasets])
        mean = shares[at].mean(axis=0).tolist()
        found.append(Taught(dataset, int(at.sum()), dict(zip(stores, mean, strict=True))))
    return found


def _scores(store: Store, places: dict[str, int], keys: Sequence[str], metric: str) -> Floats:
    """float64 [N], the cross-entropy of each row by the metric; infinite where the store lacks it."""
    summary = store.summary
    per = summary.labels if metric == "token_ce" else summary.bytes * math.log(2.0)
    values = summary.cross_entropy / np.maximum(per, 1 if metric == "token_ce" else math.log(2.0))
    at = np.array([places.get(key, -1) for key in keys], np.int64)
    found: Floats = np.where(at >= 0, values[at], np.inf) if len(values) else np.full(len(keys), np.inf)
    return found


def _datasets(stores: list[Store], places: list[dict[str, int]], keys: Sequence[str]) -> list[str]:
    found = []
    for key in keys:
        store, known = next((s, k) for s, k in zip(stores, places, strict=True) if key in k)
        found.append(store.summary.datasets[int(store.summary.dataset[known[key]])])
    return found


def _total(by_data: list[Taught], candidates: Sequence[str]) -> Taught | None:
    rows = sum(part.rows for part in by_data)
    if not rows:
        return None
    shares = {name: math.fsum(part.rows * part.shares[name] for part in by_data) / rows for name in candidates}
    return Taught("all rows", rows, shares)
