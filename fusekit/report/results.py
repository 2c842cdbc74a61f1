"""Scores as tables: models by skills for every metric, what changed against the pivot and plain fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fusekit.pipeline.layout import BASELINE, MERGED, PIVOT
from fusekit.report import text
from fusekit.report.records import Results, Task

MEAN = "mean"
REFERENCES = (PIVOT, BASELINE)

LOWER_IS_BETTER = ("bits_per_byte",)
LM_EVAL = "lm_eval"
_TITLES = {"bits_per_byte": "Bits per byte", "exact_match": "Exact match in per cent", LM_EVAL: "Tasks of lm-eval"}
_UNITS = {
    "bits_per_byte": "bits per byte of held-out answers",
    "exact_match": "per cent of held-out questions answered exactly",
}
_AS_SHARE = ("exact_match",)
_SAME = 5e-4  # of a relative change: less is shown as none


@dataclass(frozen=True)
class Change:
    """A value against a reference. shown: with its sign. better: None where there is no difference worth the name."""

    shown: str
    better: bool | None

    @property
    def word(self) -> str:
        return "same" if self.better is None else "better" if self.better else "worse"


@dataclass(frozen=True)
class Cell:
    """A model's value at a skill; None where it has none. changes: by reference."""

    value: float | None
    shown: str
    best: bool
    changes: dict[str, Change]


@dataclass(frozen=True)
class Line:
    """A model's row. kind: pivot, baseline, source, target or merged."""

    model: str
    kind: str
    cells: list[Cell]


@dataclass(frozen=True)
class Metric:
    """One metric's table. columns: skills, and their plain mean last where there are several that measure the same.

    lower: whether less is better in every column; None where columns differ, whose heads then say so.
    """

    name: str
    title: str
    lower: bool | None
    columns: list[str]
    lines: list[Line]

    @property
    def direction(self) -> str:
        return {True: "lower is better", False: "higher is better", None: "each column says which way"}[self.lower]

    @property
    def references(self) -> list[str]:
        """Which of the pivot and the baseline there are."""
        return [line.model for line in self.lines if line.model in REFERENCES]

    def line(self, model: str) -> Line | None:
        return next((line for line in self.lines if line.model == model), None)

    def mean(self, model: str) -> Cell | None:
        """A model's mean over the skills, or its value at the only one; None where it lacks one or none is made."""
        if len(self.columns) > 1 and self.columns[-1] != MEAN:
            return None
        line = self.line(model)
        return line.cells[-1] if line is not None and line.cells and line.cells[-1].value is not None else None

    @property
    def skills(self) -> int:
        return len(self.columns) - (self.columns[-1:] == [MEAN] and len(self.columns) > 1)


def metrics_of(results: Results) -> list[Metric]:
    """A table per metric, in the order in which models have them."""
    names = list(dict.fromkeys(name for scores in results.models.values() for name in scores))
    return [found for name in names if (found := _metric(name, results)).columns]


def _metric(name: str, results: Results) -> Metric:
    scores = {model: found[name] for model, found in results.models.items() if name in found}
    skills = sorted({skill for found in scores.values() for skill in found})
    tasks = {skill: results.lm_eval[skill] for skill in skills if name == LM_EVAL and skill in results.lm_eval}
    lower = [name in LOWER_IS_BETTER or (s in tasks and tasks[s].higher_is_better is False) for s in skills]
    mixed = any(lower) and not all(lower)
    columns = [_head(skill, tasks.get(skill), mixed and less) for skill, less in zip(skills, lower, strict=True)]
    if len(skills) > 1 and name != LM_EVAL:  # tasks of lm-eval measure different things
        columns.append(MEAN)
        lower.append(lower[0])
    values = {model: _values(found, skills, len(columns) > len(skills)) for model, found in scores.items()}
    lines = [Line(model, kind_of(model), _cells(name, values, model, lower)) for model in scores]
    return Metric(name, _TITLES.get(name, name), None if mixed else any(lower), columns, lines)


def _head(skill: str, task: Task | None, lower: bool) -> str:
    """``wikitext (word_perplexity,none, lower is better)``."""
    said = [task.metric if task else "", "lower is better" if lower else ""]
    return f"{skill} ({', '.join(filter(None, said))})" if any(said) else skill


def kind_of(model: str) -> str:
    """``source`` of ``sources/llama``; other names stand for themselves."""
    return {"sources": "source", "targets": "target"}.get(model.partition("/")[0], model)


def _values(found: Mapping[str, float | None], skills: list[str], with_mean: bool) -> list[float | None]:
    values = [_number(found.get(skill)) for skill in skills]
    known = [value for value in values if value is not None]
    mean = [math.fsum(known) / len(known) if len(known) == len(values) else None] if with_mean else []
    return values + mean


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _best(column: list[float | None], lower: bool) -> float | None:
    known = [value for value in column if value is not None]
    return (min(known) if lower else max(known)) if len(known) > 1 else None


def _cells(metric: str, values: Mapping[str, list[float | None]], model: str, lower: list[bool]) -> list[Cell]:
    """A model's row. values: of every model, by column. lower: whether less is better, by column."""
    references = [name for name in REFERENCES if name in values and name != model]
    cells = []
    for i, value in enumerate(values[model]):
        best = _best([row[i] for row in values.values()], lower[i])
        changes = {
            name: change(metric, before, value, lower[i])
            for name in references
            if value is not None and (before := values[name][i]) is not None
        }
        cells.append(Cell(value, shown(metric, value), value is not None and value == best, changes))
    return cells


def shown(metric: str, value: float | None) -> str:
    """A value as its metric is read: shares in per cent."""
    return text.fixed(100 * value, 1) if metric in _AS_SHARE and value is not None else text.fixed(value)


def change(metric: str, before: float, after: float, lower: bool) -> Change:
    """``after`` against ``before``: points of per cent for shares, else relative to ``before``."""
    difference = after - before
    if metric in _AS_SHARE:
        said, size = f"{text.signed(100 * difference, 1)} points", abs(difference)
    elif before > 0:
        said, size = f"{text.signed(100 * difference / before, 1)} %", abs(difference) / before
    else:
        said, size = text.signed(difference), abs(difference)
    return Change(said, None if size < _SAME else (difference < 0) == lower)


@dataclass(frozen=True)
class Headline:
    """What the run came to, by its first metric.

    Attributes:
        metric: the table that it is of.
        unit: of the values.
        merged: the mean of the merged model. tiles: title, mean and change of the references.
        wins: reference -> at how many skills the merged model is better.
        best: the best model on average.
    """

    metric: Metric
    unit: str
    merged: Cell
    tiles: list[tuple[str, Cell, Change]]
    wins: dict[str, int]
    best: str


def headline(metrics: list[Metric]) -> Headline | None:
    """None where no metric has a merged model with a mean."""
    for metric in metrics:
        line, mean = metric.line(MERGED), metric.mean(MERGED)
        if line is None or mean is None:
            continue
        tiles, wins = [], {}
        for reference in metric.references:
            other = metric.mean(reference)
            if other is None or reference not in mean.changes:
                continue
            tiles.append((reference, other, mean.changes[reference]))
            of_skills = line.cells[: metric.skills]
            wins[reference] = sum(c.changes[reference].better is True for c in of_skills if reference in c.changes)
        means = {other.model: metric.mean(other.model) for other in metric.lines}
        known = {model: cell.value for model, cell in means.items() if cell is not None and cell.value is not None}
        best = (min if metric.lower else max)(known, key=lambda model: known[model])
        return Headline(metric, _UNITS.get(metric.name, metric.title), mean, tiles, wins, best)
    return None
