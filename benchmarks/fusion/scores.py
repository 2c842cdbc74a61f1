"""How good a model is on the held-out questions, and the file that keeps every figure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fusion.rows import demo
from fusekit.capturing.models import ModelChoice
from fusekit.data.reading import read_rows
from fusekit.disk import commit_file
from fusekit.evaluation.metrics import evaluate_model

Scores = dict[str, dict[str, float]]
"""Metric -> skill -> value. ``bits_per_byte`` of held-out answers; ``exact_match`` (0 to 1) of skills with one right
answer; ``divergence`` from the true distribution, bits a question, of skills whose answers are drawn at random."""

METRICS = ("bits_per_byte", "divergence", "exact_match")
ONE_ANSWER = ("add", "facts", "reverse")
DRAWN = 50
"""Questions, at most, of which a divergence is the mean. It is computed, not sampled, so few are enough."""
BATCH_TOKENS = 2048


class Figure(NamedTuple):
    """A line of the file. seed: empty for a model that no seed changes."""

    seed: str
    model: str
    skill: str
    metric: str
    value: float


def score(choice: ModelChoice, held_out: Path, questions: int, metrics: Sequence[str] = METRICS) -> Scores:
    """A model's figures. questions: of a skill in ``held_out``, as written by :mod:`benchmarks.fusion.rows`."""
    rows = list(chain.from_iterable(read_rows(str(file)) for file in sorted(held_out.glob("*.jsonl"))))
    scores = evaluate_model(choice, rows, batch_tokens=BATCH_TOKENS)
    if "exact_match" in metrics:
        single = [row for row in rows if row.dataset in ONE_ANSWER]
        scores |= evaluate_model(choice, single, metrics=("exact_match",), batch_tokens=BATCH_TOKENS)
    if "divergence" not in metrics:
        return scores
    evaluate = demo("evaluate")
    model, tokenizer = evaluate.load(choice.model)
    drawn = [skill for skill in demo("tasks").DRAWS if skill in scores["bits_per_byte"]]
    scores["divergence"] = {
        skill: evaluate.divergence(model, tokenizer, skill, min(questions, DRAWN)) for skill in drawn
    }
    return scores


def keep(folder: Path, model: str, seed: int | None, scores: Scores) -> None:
    """Write a model's figures in one step, so that they are there whole or not at all."""
    file = file_of(folder, model, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"model": model, "seed": seed, "scores": scores}, indent=1).encode()
    commit_file(file, data)


def file_of(folder: Path, model: str, seed: int | None) -> Path:
    """Where a model's figures are."""
    return folder / f"{model.replace('/', '~')}.{'any' if seed is None else seed}.json"


def kept(folder: Path) -> list[Figure]:
    """Every figure that there is, sorted."""
    found = []
    for file in folder.glob("*.json"):
        record: dict[str, Any] = json.loads(file.read_bytes())
        seed = "" if record["seed"] is None else str(record["seed"])
        found += [
            Figure(seed, record["model"], skill, metric, value)
            for metric, by_skill in record["scores"].items()
            for skill, value in by_skill.items()
        ]
    return sorted(found)


def write(file: Path, figures: Iterable[Figure]) -> None:
    """One line per seed, model, skill and metric, written in one step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Figure._fields)
    writer.writerows((*figure[:-1], f"{figure.value:.6g}") for figure in figures)
    commit_file(file, text.getvalue().encode())


def read(file: Path) -> list[Figure]:
    """What :func:`write` wrote."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [Figure(**{**line, "value": float(line["value"])}) for line in csv.DictReader(lines)]  # type: ignore[arg-type]
