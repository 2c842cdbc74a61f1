"""The stage ``evaluate``: scores of every model on held-out rows, and on tasks of lm-eval."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs, commit_file, weights_hash
from fusekit.capturing.load import load_tokenizer
from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.distillation.outputs import PLAIN
from fusekit.errors import RecipeError
from fusekit.evaluation import lm_eval
from fusekit.evaluation.settings import LmEval
from fusekit.layout import BASELINE, MERGED, PIVOT
from fusekit.pipeline.context import DONE, MISSING, Context, Status, hash_of, paths_of, unreadable, write_json
from fusekit.recipe import Recipe
from fusekit.recipe.sections import Evaluate, Mistake
from fusekit.types import Row

Model = tuple[ModelChoice, str]
"""A model, and the chat template that it is scored under."""


def mistakes(recipe: Recipe) -> list[Mistake]:
    """Held-out files that are missing or empty, as far as the first row of each tells, and impossible tasks of lm-eval.

    The hub is not asked.
    """
    section, found = recipe.evaluate, []
    for path in paths_of(section.path) if section is not None else []:
        found += unreadable(path, ("evaluate", "path"))
    if section is not None and section.lm_eval is not None:
        try:
            lm_eval.check(section.lm_eval)
        except RecipeError as error:
            found += [Mistake(line, ("evaluate", "lm_eval")) for line in str(error).splitlines()]
    return found


def models_of(context: Context) -> dict[str, Model]:
    """The models that are scored by name, each with its chat template."""
    recipe, layout = context.recipe, context.layout
    pivot, choice = recipe.pivot, context.choice(PIVOT)
    models = {PIVOT: (choice, pivot.chat_template)}
    made = {BASELINE: layout.baselines / PLAIN} if recipe.wants_baseline else {}
    own = replace(choice, revision=None, dequantised=None)  # what was made of the pivot is loaded as the pivot is
    models |= {name: (replace(own, model=str(path)), pivot.chat_template) for name, path in made.items()}
    for source in recipe.sources:
        template = "own" if source.chat_template == PIVOT else source.chat_template
        models[f"sources/{source.label}"] = (context.choice(source.label), template)
    made = {f"targets/{path.name}": path for path in context.targets}
    made |= {MERGED: layout.merged} if recipe.merge is not None else {}
    return models | {name: (replace(own, model=str(path)), pivot.chat_template) for name, path in made.items()}


def artifacts(context: Context) -> dict[str, Path]:
    """The scores of every model, where the recipe evaluates."""
    names = models_of(context) if context.recipe.evaluate is not None else ()
    return {name: context.layout.evaluation(name) for name in names}


def lm_eval_folders(context: Context) -> list[Path]:
    """The folders of every model's scores on the tasks of lm-eval."""
    section = context.recipe.evaluate
    tasks = section.lm_eval.tasks if section is not None and section.lm_eval is not None else []
    place = context.layout.evaluation(lm_eval.FOLDER)
    return [place / name / lm_eval.folder_of(task.task) for name in models_of(context) for task in tasks]


def status(context: Context, name: str) -> Status:
    """Whether a model has scores. They are made again, not refused, if the model or the rows changed."""
    folder = context.layout.evaluation(name)
    return Status(folder, MISSING if artifact.read(folder) is None else DONE)


def make(context: Context, models: Mapping[str, Model] | None = None) -> None:
    """Score every model on the held-out rows and write ``results.json``; scores of the same inputs are kept.

    models: some of :func:`models_of`; without it, all of them.
    """
    from fusekit.evaluation.metrics import ends_counted

    section = context.recipe.evaluate
    if section is None:
        return
    rows, held_out = _held_out(section)
    results: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for name, model in (models if models is not None else models_of(context)).items():
        identity = _identity(context, name, model)
        inputs = identity | {"metrics": list(section.metrics), "held_out": held_out, "limit": section.limit}
        results[name] = _scores(context, name, model, inputs, rows)
        if section.lm_eval is not None:
            figures[name] = _lm_eval(context, section.lm_eval, name, model, identity)
            results[name]["lm_eval"] = {task: shown["value"] for task, shown in figures[name].items()}
    document: dict[str, Any] = {"models": results}
    if "bits_per_byte" in section.metrics:
        document["ends_counted"] = ends_counted(rows)
    if section.lm_eval is not None:
        document["lm_eval"] = lm_eval.described(figures)
    data = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    commit_file(context.layout.results, lambda file: file.write(data))


def _held_out(section: Evaluate) -> tuple[list[Row], Inputs]:
    """The rows, and by path what tells whether they are still the same."""
    from fusekit.evaluation.settings import held_out_hash, held_out_rows

    how = section.model_dump(include={"limit", "split", "revision", "name"})
    read = {path: held_out_rows(path, **how) for path in paths_of(section.path)}
    hashes = {path: held_out_hash(path, hash_of(path), section.limit, rows) for path, rows in read.items()}
    return list(chain.from_iterable(read.values())), hashes


def _identity(context: Context, name: str, model: Model) -> Inputs:
    """What a model's scores depend on: its weights, how it is loaded, its tokenizer, and the template's content."""
    choice, template = model
    tokenizer = load_tokenizer(find_checkpoint(choice))
    return {
        "model": (
            context.fingerprint(name.removeprefix("sources/")) if _is_input(name) else weights_hash(Path(choice.model))
        ),
        "load": {"dtype": choice.dtype, "quantization": choice.quantization},
        "chat_template": template,
        "reads": RowTokenizer(tokenizer, ChatTemplate.chosen(template), date=context.date).fingerprint,
    }


def _scores(context: Context, name: str, model: Model, inputs: Inputs, rows: list[Row]) -> dict[str, Any]:
    """A model's scores by metric and data set."""
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
            date=context.date,
        )
        plain = {metric: {key: score.value for key, score in by_key.items()} for metric, by_key in found.items()}
        made = context.made(started)
        artifact.publish(folder, "evaluate", inputs, lambda into: write_json(into / "scores.json", plain), made)
        means = (f"{metric} {math.fsum(of.values()) / len(of):.4f}" for metric, of in plain.items())
        context.say(f"evaluate {name}: {', '.join(means)}")
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return scores


def _lm_eval(context: Context, settings: LmEval, name: str, model: Model, identity: Inputs) -> dict[str, Any]:
    """A model's figures on the tasks of lm-eval, by task."""

    def say(line: str) -> None:
        context.say(f"evaluate {name}: {line}")

    def load() -> lm_eval.Harness:
        _require_whole(name, model[0])
        return lm_eval.Harness(*model, settings, say, context.date)

    folder = context.layout.evaluation(f"{lm_eval.FOLDER}/{name}")
    return lm_eval.cached_scores(settings, folder, identity, load=load, made=context.made, say=say)


def _require_whole(name: str, choice: ModelChoice) -> None:
    """Refuse a model that the run has made and whose bytes are not those that its scores would be kept for."""
    if not _is_input(name):
        artifact.require_whole(Path(choice.model))


def _is_input(name: str) -> bool:
    """Whether a model that is evaluated was given to the run, not made by it."""
    return name == PIVOT or name.startswith("sources/")
