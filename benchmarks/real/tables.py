"""The tables of the README beside this file, from the file of figures alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.fusion.scores import Figure
from benchmarks.fusion.tables import put_between_marks, spread

REFERENCE = "fine-tuning"
_Values = dict[str, dict[str, dict[str, float]]]
"""Model -> text -> seed -> bits per byte."""


def _values(figures: Iterable[Figure], setting: str, split: str) -> _Values:
    found: _Values = {}
    for seed, model, text, metric, value in figures:
        if metric == split and model.startswith(f"{setting}/"):
            found.setdefault(model.partition("/")[2], {}).setdefault(text, {})[seed] = value
    return found


def table(figures: Sequence[Figure], setting: str, split: str) -> str:
    """Bits per byte of every model of a setting on every text: mean and standard deviation over the seeds."""
    values = _values(figures, setting, split)
    texts = sorted({text for by_text in values.values() for text in by_text})
    order = sorted(values, key=lambda model: any(seed for by_seed in values[model].values() for seed in by_seed))
    lines = [f"| {setting}, {split} | " + " | ".join(texts) + " |", "|---|" + "---:|" * len(texts)]
    for model in order:
        cells = [spread(list(values[model].get(text, {}).values())) for text in texts]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(figures: Sequence[Figure], setting: str, split: str) -> str:
    """Every arm minus plain fine-tuning on the same examples, paired by seed: mean and standard deviation."""
    values = _values(figures, setting, split)
    if REFERENCE not in values:
        return ""
    texts = sorted(values[REFERENCE])
    lines = [f"| {setting}, {split}: minus {REFERENCE} | " + " | ".join(texts) + " |", "|---|" + "---:|" * len(texts)]
    for model in values:
        if model == REFERENCE or not any(seed for by_seed in values[model].values() for seed in by_seed):
            continue
        cells = []
        for text in texts:
            pairs = values[model].get(text, {})
            paired = [pairs[seed] - value for seed, value in values[REFERENCE][text].items() if seed in pairs]
            cells.append("-" if not paired else f"{statistics.fmean(paired):+.4f} ± {_deviation(paired):.4f}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def put_tables(readme: Path, figures: Sequence[Figure]) -> None:
    """Write the tables between the marks of a README."""
    settings = list(dict.fromkeys(model.partition("/")[0] for _, model, *_ in figures))
    made = [
        text
        for setting in sorted(settings, key=("text", "chat", "pairwise").index)
        for split in ("test", "validation")
        for text in (table(figures, setting, split), differences(figures, setting, split))
        if text
    ]
    between = "\n" + "\n\n".join(made) + "\n"
    readme.write_text(put_between_marks(readme.read_text(encoding="utf-8"), between), encoding="utf-8")
