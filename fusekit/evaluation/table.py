"""The results of models, and the one table of them: the terminal, the report and the model card all show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LM_EVAL, MEAN = "lm_eval", "mean"
REFERENCES = ("pivot", "baseline")
"""The models that every other model is compared with, where they were scored."""
MINUS, NO_VALUE = "\N{MINUS SIGN}", "\N{EN DASH}"
_SAME = 5e-4  # a smaller relative change is shown as none


class Metric(NamedTuple):
    """How the values of a metric read. lower: lower is better. share: shown in per cent."""

    title: str
    unit: str
    lower: bool = False
    share: bool = False


METRICS = {
    "bits_per_byte": Metric("Bits per byte", "bits per byte of held-out answers and their ends of turn", lower=True),
    "exact_match": Metric("Exact match in per cent", "per cent of held-out questions answered exactly", share=True),
    LM_EVAL: Metric("Tasks of lm-eval", ""),
}


def _in_cell(name: str) -> str:
    """A name on one line of a Markdown table, whatever is in it."""
    return " ".join(name.split()).replace("|", "\\|")


@dataclass(frozen=True)
class Change:
    """A value against a reference. shown: with its sign. better: None where the two are the same."""

    shown: str
    better: bool | None

    @property
    def word(self) -> str:
        """``better``, ``worse`` or ``same``."""
        return "same" if self.better is None else "better" if self.better else "worse"


@dataclass(frozen=True)
class Cell:
    """A model's value in a column, None where it has none. best: of its column. changes: by reference."""

    value: float | None
    shown: str
    best: bool
    changes: dict[str, Change]


@dataclass(frozen=True)
class Table:
    """One metric. lower: lower is better; None where columns differ, whose heads then say so.

    columns: the skills, and last their mean where there are several that measure the same. lines: cells by model.
    """

    name: str
    title: str
    unit: str
    lower: bool | None
    columns: list[str]
    lines: dict[str, list[Cell]]

    @property
    def direction(self) -> str:
        """Which values are better, for a heading."""
        return {True: "lower is better", False: "higher is better", None: "each column says which is better"}[
            self.lower
        ]

    @property
    def skills(self) -> int:
        """How many columns are not the mean."""
        return len(self.columns) - (len(self.columns) > 1 and self.columns[-1] == MEAN)

    @property
    def references(self) -> list[str]:
        """Those of :data:`REFERENCES` that have a line."""
        return [model for model in self.lines if model in REFERENCES]

    def mean(self, model: str) -> Cell | None:
        """A model's mean over the skills, or its value at the only one; None where it lacks one, or none is made."""
        cells = self.lines.get(model)
        if not cells or (len(cells) > 1 and self.columns[-1] != MEAN) or cells[-1].value is None:
            return None
        return cells[-1]

    @property
    def best(self) -> str | None:
        """The model with the best mean; of equals the last, since the merged model comes last."""
        means = {model: cell.value or 0.0 for model in reversed(self.lines) if (cell := self.mean(model)) is not None}
        return (min if self.lower else max)(means, key=lambda model: means[model]) if means else None

    def markdown(self, called: Callable[[str], str] = _in_cell, *, bold: bool = False) -> str:
        """As Markdown. called: what a name from data is written as. bold: mark the best of each column."""
        head = [f"{self.title} ({self.direction})", *self.columns]
        lines = [f"| {' | '.join(map(called, head))} |", f"|---|{'---:|' * len(self.columns)}"]
        for model, cells in self.lines.items():
            shown = [f"**{cell.shown}**" if bold and cell.best else cell.shown for cell in cells]
            lines.append(f"| {called(model)} | {' | '.join(shown)} |")
        return "\n".join(lines)


def document_of(
    scores: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """What ``results.json`` says.

    Args:
        scores: model -> metric -> skill -> value.
        figures: model -> task of lm-eval -> figure (:func:`fusekit.evaluation.metrics.lm_eval_figures`); may be empty.
    """
    models: dict[str, Any] = {model: dict(found) for model, found in scores.items()}
    tasks: dict[str, dict[str, Any]] = {}
    for model, found in figures.items():
        models[model][LM_EVAL] = {task: figure["value"] for task, figure in found.items()}
        for task, figure in found.items():
            same = {key: figure[key] for key in ("metric", "higher_is_better", "num_fewshot", "version")}
            tasks.setdefault(task, same | {"stderr": {}})["stderr"][model] = figure["stderr"]
    return {"models": models} | ({LM_EVAL: tasks} if tasks else {})


def tables(document: Mapping[str, Any]) -> list[Table]:
    """A table per metric, in the order in which the models have them.

    Args:
        document: what ``results.json`` says: ``models`` (model -> metric -> skill -> value, None for no value) and
            ``lm_eval`` (by task its ``metric`` and whether ``higher_is_better``).
    """
    models: Mapping[str, Mapping[str, Mapping[str, float | None]]] = document["models"]
    names = list(dict.fromkeys(name for scores in models.values() for name in scores))
    return [found for name in names if (found := _table(name, models, document.get("lm_eval") or {})).columns]


def table(document: Mapping[str, Any]) -> str:
    """A ``results.json`` as Markdown for the terminal: a table per metric.

    Example:
        >>> from fusekit.evaluation.table import table
        >>> print(table({"models": {"a": {"bits_per_byte": {"code": 1.25}}, "b": {"bits_per_byte": {"code": 1.5}}}}))
        | Bits per byte (lower is better) | code |
        |---|---:|
        | a | 1.250 |
        | b | 1.500 |
    """
    return "\n\n".join(found.markdown() for found in tables(document))


def _table(
    name: str, models: Mapping[str, Mapping[str, Mapping[str, float | None]]], tasks: Mapping[str, Mapping[str, Any]]
) -> Table:
    metric, scores = METRICS.get(name, Metric(name, name)), {m: of[name] for m, of in models.items() if name in of}
    skills = sorted({skill for found in scores.values() for skill in found})
    known = [tasks.get(skill, {}) if name == LM_EVAL else {} for skill in skills]
    lower = [metric.lower or task.get("higher_is_better") is False for task in known]
    mixed = any(lower) and not all(lower)
    columns = []
    for skill, task, less in zip(skills, known, lower, strict=True):
        said = [str(task.get("metric") or ""), "lower is better" if mixed and less else ""]
        columns.append(f"{skill} ({', '.join(filter(None, said))})" if any(said) else skill)
    values = {model: [_finite(found.get(skill)) for skill in skills] for model, found in scores.items()}
    if len(skills) > 1 and name != LM_EVAL:  # tasks of lm-eval measure different things
        columns.append(MEAN)
        lower.append(metric.lower)
        for line in values.values():
            each = [value for value in line if value is not None]
            line.append(math.fsum(each) / len(each) if len(each) == len(line) else None)
    lines = {model: _cells(metric, values, model, lower) for model in scores}
    return Table(name, metric.title, metric.unit, None if mixed else any(lower), columns, lines)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _cells(metric: Metric, values: Mapping[str, list[float | None]], model: str, lower: Sequence[bool]) -> list[Cell]:
    """One model's cells. values: of every model, by column. lower: whether lower is better, by column."""
    cells = []
    for i, value in enumerate(values[model]):
        column = [line[i] for line in values.values() if line[i] is not None]
        best = (min if lower[i] else max)(column) if len(column) > 1 else None  # type: ignore[type-var]
        changes = {
            name: _change(metric, before, value, lower[i])
            for name in REFERENCES
            if name != model and name in values and value is not None and (before := values[name][i]) is not None
        }
        shown = fixed(100 * value, 1) if metric.share and value is not None else fixed(value)
        cells.append(Cell(value, shown, value is not None and value == best, changes))
    return cells


def _change(metric: Metric, before: float, after: float, lower: bool) -> Change:
    """``after`` against ``before``: in points of per cent for shares, else relative to ``before``."""
    difference = after - before
    if metric.share:
        shown, size = f"{signed(100 * difference, 1)} points", abs(difference)
    elif before > 0:
        shown, size = f"{signed(100 * difference / before, 1)} %", abs(difference) / before
    else:
        shown, size = signed(difference), abs(difference)
    return Change(shown, None if size < _SAME else (difference < 0) == lower)


def fixed(value: float | None, digits: int = 3) -> str:
    """``2.031``, with a minus sign; an en dash for None and for what is not finite."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    return f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """``+0.032``, ``−0.032``, ``±0.000``; an en dash as for :func:`fixed`."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    rounded = round(value, digits)
    sign = "±" if rounded == 0 else "+" if rounded > 0 else MINUS
    return f"{sign}{abs(rounded):,.{digits}f}"
