"""Scores of several models as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusekit.evaluation.metrics import Score

_TITLES = {
    "bits_per_byte": "bits per byte (lower is better)",
    "exact_match": "exact match in per cent",
    "lm_eval": "lm-eval",
}


def table(
    results: Mapping[str, Mapping[str, Mapping[str, Score]]],
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    ends: Mapping[str, bool] | None = None,
) -> str:
    """Markdown, one table per metric: a row per model, a column per source of data, and their plain mean.

    results: model -> metric -> source of data -> score. tasks: of lm-eval, what ``results.json`` says of each; they
    measure different things, so they have no mean. ends: source of data -> whether bits per byte count ends there.
    """
    metrics = list(dict.fromkeys(metric for found in results.values() for metric in found))
    return "\n\n".join(
        _one(metric, {model: found.get(metric, {}) for model, found in results.items()}, tasks or {})
        + (_note(ends) if metric == "bits_per_byte" and ends else "")
        for metric in metrics
    )


def _note(ends: Mapping[str, bool]) -> str:
    counted, others = ([name for name, counts in ends.items() if counts is which] for which in (True, False))
    said = [f"The ends of turns count ({', '.join(counted)})."] if counted else []
    said += [f"No end of a text counts ({', '.join(others)})."] if others else []
    return "\n\n" + " ".join(said)


def table_of(document: Mapping[str, Any]) -> str:
    """:func:`table` of a ``results.json``: plain values instead of scores."""
    return table(
        {
            model: {
                metric: {name: Score(value, 0) for name, value in scores.items()} for metric, scores in found.items()
            }
            for model, found in document["models"].items()
        },
        document.get("lm_eval"),
        document.get("ends_counted"),
    )


def _one(metric: str, scores: Mapping[str, Mapping[str, Score]], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    columns = sorted({name for found in scores.values() for name in found})
    mean = ["mean"] if len(columns) > 1 and metric != "lm_eval" else []
    heads = [_task(name, tasks[name]) if metric == "lm_eval" and name in tasks else name for name in columns]
    lines = [f"| {_TITLES.get(metric, metric)} | {' | '.join([*heads, *mean])} |"]
    lines.append(f"|---|{'---:|' * (len(columns) + len(mean))}")
    for model, found in scores.items():
        values = [found[name].value for name in columns if name in found]
        cells = [_shown(metric, found[name].value) if name in found else "-" for name in columns]
        cells += [_shown(metric, sum(values) / len(values)) if len(values) == len(columns) else "-"] if mean else []
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _task(name: str, task: Mapping[str, Any]) -> str:
    lower = ", lower is better" if task.get("higher_is_better") is False else ""
    return f"{name} ({task['metric']}{lower})"


def _shown(metric: str, value: float) -> str:
    return f"{100 * value:.1f}" if metric == "exact_match" else f"{value:.3f}"
