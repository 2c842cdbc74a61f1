"""The stage that scores models on held-out rows, and on tasks of lm-eval."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs, commit_file
from fusekit.capturing.load import load_tokenizer
from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.data.reading import is_on_hub, read_rows
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.distillation.outputs import PLAIN
from fusekit.errors import RecipeError
from fusekit.evaluation import lm_eval
from fusekit.evaluation.settings import EvaluateSettings, LmEval
from fusekit.pipeline.layout import BASELINE, MERGED, PIVOT
from fusekit.pipeline.stages import Context, hash_of, paths_of, write_json
from fusekit.pipeline.vouching import weights_hash
from fusekit.types import Row


def check_held_out(context: Context) -> None:
    """Refuse held-out rows that are not there or no rows, as far as the first of each file tells; the hub is not asked.

    Raises DataError, RecipeError.
    """
    section = context.recipe.evaluate
    for path in paths_of(section.path) if section is not None else []:
        if not is_on_hub(path) and next(read_rows(path, limit=1), None) is None:
            raise RecipeError(f"evaluate: there are no rows in {path}")


def models_of(context: Context) -> dict[str, tuple[ModelChoice, str]]:
    """The models that are scored by name, each with its chat template."""
    recipe, layout = context.recipe, context.layout
    pivot, choice = recipe.pivot, context.readers.choice(PIVOT)
    models = {PIVOT: (choice, pivot.chat_template)}
    own = replace(choice, revision=None, dequantised=None)  # what was made of the pivot is loaded as the pivot is
    if recipe.wants_baseline:
        models[BASELINE] = (replace(own, model=str(layout.baselines / PLAIN)), pivot.chat_template)
    for source in recipe.sources:
        template = "own" if source.chat_template == PIVOT else source.chat_template
        models[f"sources/{source.label}"] = (context.readers.choice(source.label), template)
    for path in context.targets:
        models[f"targets/{path.name}"] = (replace(own, model=str(path)), pivot.chat_template)
    if recipe.merge is not None:
        models[MERGED] = (replace(own, model=str(layout.merged)), pivot.chat_template)
    return models


def evaluate(context: Context, models: Mapping[str, tuple[ModelChoice, str]] | None = None) -> dict[str, Any] | None:
    """Score every model on the held-out rows; those that are scored already are not scored again.

    Args:
        context: of the run.
        models: some of :func:`models_of`; without it, all of them.

    Returns what ``results.json`` says, None where the recipe asks for no evaluation.
    """
    from fusekit.evaluation.metrics import ends_counted

    section = context.recipe.evaluate
    if section is None:
        return None
    rows, held_out = _held_out(section)
    results: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for name, (choice, template) in (models if models is not None else models_of(context)).items():
        identity = {
            "model": _identity(choice.model, context, name),
            "load": {"dtype": choice.dtype, "quantization": choice.quantization},
            "chat_template": template,
            "reads": _reads(choice, template, context.readers.date),
        }
        inputs = identity | {"metrics": list(section.metrics), "held_out": held_out, "limit": section.limit}
        results[name] = _scores(context, name, (choice, template), inputs, rows)
        if section.lm_eval is not None:
            figures[name] = _lm_eval(context, section.lm_eval, name, (choice, template), identity)
            results[name]["lm_eval"] = {task: shown["value"] for task, shown in figures[name].items()}
    document: dict[str, Any] = {"models": results}
    if "bits_per_byte" in section.metrics:
        document["ends_counted"] = ends_counted(rows)
    if section.lm_eval is not None:
        document["lm_eval"] = lm_eval.described(figures)
    data = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    commit_file(context.layout.results, lambda file: file.write(data))
    return document


def _held_out(section: EvaluateSettings) -> tuple[list[Row], Inputs]:
    """The rows, and by path what tells whether they are still the same."""
    from fusekit.evaluation.settings import held_out_hash, held_out_rows

    how = section.model_dump(include={"limit", "split", "revision", "name"})
    read = {path: held_out_rows(path, **how) for path in paths_of(section.path)}
    hashes = {path: held_out_hash(path, hash_of(path), section.limit, rows) for path, rows in read.items()}
    return list(chain.from_iterable(read.values())), hashes


def _scores(
    context: Context, name: str, model: tuple[ModelChoice, str], inputs: Inputs, rows: list[Row]
) -> dict[str, Any]:
    """A model's scores by metric and source of data."""
    from fusekit.evaluation.metrics import evaluate_model

    section, folder, (choice, template) = context.recipe.evaluate, context.layout.evaluation(name), model
    assert section is not None
    if not artifact.is_kept(folder, inputs):
        artifact.refuse_foreign(folder)  # now, not once the scores are there
        started = time.monotonic()
        _require_whole(name, choice)
        found = evaluate_model(
            choice,
            rows,
            metrics=section.metrics,
            template=template,
            batch_tokens=section.batch_tokens,
            date=context.readers.date,
        )
        plain = {metric: {key: score.value for key, score in by_key.items()} for metric, by_key in found.items()}
        made = context.made(started)
        artifact.publish(folder, "evaluate", inputs, lambda into: write_json(into / "scores.json", plain), made)
        context.say(f"evaluate {name}: {_means(plain)}")
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return scores


def _lm_eval(
    context: Context, settings: LmEval, name: str, model: tuple[ModelChoice, str], identity: Inputs
) -> dict[str, dict[str, Any]]:
    """A model's figures on the tasks of lm-eval, by task."""

    def say(line: str) -> None:
        context.say(f"evaluate {name}: {line}")

    def load() -> lm_eval.Harness:
        _require_whole(name, model[0])
        return lm_eval.load_harness(*model, settings, say, context.readers.date)

    return lm_eval.cached_scores(
        settings,
        context.layout.evaluation(f"{lm_eval.FOLDER}/{name}"),
        identity,
        load=load,
        made=context.made,
        say=say,
    )


def _means(scores: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{metric} {math.fsum(found.values()) / len(found):.4f}" for metric, found in scores.items())


def _identity(model: str, context: Context, name: str) -> str:
    if _is_input(name):
        return context.readers.fingerprint(name.removeprefix("sources/"))
    return weights_hash(Path(model))


def _require_whole(name: str, choice: ModelChoice) -> None:
    """Refuse a model that the run has made and whose bytes are not those that its scores would be kept for."""
    if not _is_input(name):
        artifact.require_whole(Path(choice.model))


def _is_input(name: str) -> bool:
    """Whether a model that is evaluated was given to the run, not made by it."""
    return name == PIVOT or name.startswith("sources/")


def _reads(choice: ModelChoice, template: str, date: datetime.date) -> str:
    """Of a model's tokenizer and the content of its chat template, whatever file they are in."""
    tokenizer = load_tokenizer(find_checkpoint(choice))
    return RowTokenizer(tokenizer, ChatTemplate.chosen(template), date=date).fingerprint
