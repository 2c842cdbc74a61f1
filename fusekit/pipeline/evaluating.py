"""The stage ``evaluate``: scores of every model on held-out rows, and on tasks of lm-eval."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs, weights_hash
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer
from fusekit.data.reading import is_on_hub
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Need
from fusekit.disk import commit_file, counted
from fusekit.distillation.outputs import PLAIN
from fusekit.errors import FusekitError, RecipeError
from fusekit.evaluation import lm_eval
from fusekit.evaluation.settings import LmEval, held_out_hash, held_out_rows, kept_scores
from fusekit.layout import BASELINE, MERGED, PIVOT, Layout
from fusekit.pipeline.plan import Planner
from fusekit.pipeline.stage import DONE, MISSING, Context, Stage, Status, Step, hash_of, unreadable
from fusekit.recipe import Recipe
from fusekit.recipe.sections import Mistake
from fusekit.types import Row

SCORE_BYTES = 1000
"""Bytes of the scores of one model."""
Model = tuple[ModelChoice, str]
"""A model, and the chat template that it is scored under."""


def models_of(context: Context) -> dict[str, Model]:
    """The models that are scored by name, each with its chat template."""
    recipe, layout = context.recipe, context.layout
    choice, template = context.choice(PIVOT), recipe.pivot.chat_template

    def made(path: Path) -> Model:  # of the pivot, so it is loaded as the pivot is
        return replace(choice, model=str(path), revision=None, dequantised=None), template

    models = {PIVOT: (choice, template)}
    models |= {BASELINE: made(layout.baselines / PLAIN)} if recipe.wants_baseline else {}
    for source in recipe.sources:
        of_source = "own" if source.chat_template == PIVOT else source.chat_template
        models[f"sources/{source.label}"] = (context.choice(source.label), of_source)
    models |= {f"targets/{path.name}": made(path) for path in context.targets}
    return models | ({MERGED: made(layout.merged)} if recipe.merge is not None else {})


class Evaluate(Stage):
    """Scores of every model on held-out examples and on tasks of lm-eval, where the recipe evaluates."""

    name = "evaluate"
    needs = ("data", "distill", "merge")

    def artifacts(self, context: Context) -> dict[str, Path]:
        names = models_of(context) if context.recipe.evaluate is not None else ()
        return {name: context.layout.evaluation(name) for name in names}

    def wanted(self, context: Context) -> list[Path]:
        section, place = context.recipe.evaluate, context.layout.evaluation(lm_eval.FOLDER)
        tasks = section.lm_eval.tasks if section is not None and section.lm_eval is not None else []
        return super().wanted(context) + [
            place / name / lm_eval.folder_of(task.task) for name in models_of(context) for task in tasks
        ]

    def made(self, layout: Layout) -> list[Path]:
        folder = layout.evaluation("")
        places = [path.parent for path in sorted(folder.rglob(artifact.MANIFEST))]
        places = [place for place in places if place not in (folder, folder / lm_eval.FOLDER)]  # not of a run there
        hidden = [place for place in places if any(part.startswith(".") for part in place.relative_to(folder).parts)]
        return [*(place for place in places if place not in hidden), layout.results]

    def status(self, context: Context, name: str) -> Status:
        """Whether a model has scores. They are made again, not refused, if the model or the rows changed."""
        folder = context.layout.evaluation(name)
        return Status(folder, MISSING if artifact.read(folder) is None else DONE)

    def make(self, context: Context, only: Collection[str] | None = None) -> None:
        """Score every model, or some, and write ``results.json``; scores of equal inputs stay."""
        from fusekit.evaluation.metrics import results_of

        section = context.recipe.evaluate
        if section is None:
            return
        how = section.model_dump(include={"limit", "split", "revision", "name"})
        read = {path: held_out_rows(path, **how) for path in section.paths}
        hashes = {path: held_out_hash(path, hash_of(path), section.limit, rows) for path, rows in read.items()}
        rows, asked = list(chain.from_iterable(read.values())), section.model_dump(include={"metrics", "limit"})
        models = {name: model for name, model in models_of(context).items() if only is None or name in only}
        identities = {name: _identity(context, name, model) for name, model in models.items()}

        def scores(name: str) -> dict[str, Any]:
            inputs = identities[name] | asked | {"held_out": hashes}
            return _scores(context, name, models[name], inputs, rows)

        def figures(name: str, settings: LmEval) -> dict[str, Any]:
            return _lm_eval(context, settings, name, models[name], identities[name])

        document = results_of(models, section, rows, scores, figures)
        data = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
        commit_file(context.layout.results, lambda file: file.write(data))

    def mistakes(self, recipe: Recipe, _layout: Layout | None = None) -> list[Mistake]:
        """Held-out examples that are missing or cannot be read, as far as they are read, and impossible tasks.

        The hub is not asked.
        """
        section = recipe.evaluate
        if section is None:
            return []
        found = unreadable(section, ("evaluate", "path"))
        if section.lm_eval is not None:
            try:
                lm_eval.check(section.lm_eval)
            except RecipeError as error:
                found += [Mistake(line, ("evaluate", "lm_eval")) for line in str(error).splitlines()]
        return found

    def plan(self, planner: Planner) -> None:
        """One step for all models."""
        if planner.recipe.evaluate is None:
            return
        context, names = planner.context, list(self.artifacts(planner.context))
        step = Step(self.name, counted(len(names), "model"))
        planner.plan.steps.append(step)

        def look() -> int:
            for name in names:
                self.check_place(context, name)
            return sum(self.status(context, name).state == DONE for name in names)

        if done := planner.there and planner.tried(step, look):
            step.notes.append(f"{done} have scores, which are kept unless the model or the examples changed")
        self.estimate(planner, step)

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        section, reader, names = (
            planner.recipe.evaluate,
            planner.tokenizers.get(PIVOT),
            list(models_of(planner.context)),
        )
        assert section is not None
        try:
            here = [path for path in section.paths if not is_on_hub(path)]
            rows = list(chain.from_iterable(held_out_rows(path, limit=section.limit) for path in here))
            some = rows[:: max(1, len(rows) // 200)]
            if reader is not None and some:
                step.tokens = sum(len(reader.tokenize(row)) for row in some) * len(rows) // len(some)
        except FusekitError as error:
            planner.plan.refused.append(f"evaluate: {error}")
            return []
        if not rows:
            planner.plan.unknown.append("evaluate: how many examples are held out")
            return []
        step.rows, step.disk = len(rows), SCORE_BYTES * len(names)
        each = [name.removeprefix("sources/") if name.startswith("sources/") else PIVOT for name in names]
        if step.tokens is not None and all(name in planner.models for name in each):
            step.pflop = sum(2 * planner.active(name) for name in each) * step.tokens / 1e15
        return []


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
    from fusekit.evaluation.metrics import evaluate_model, values_of

    section, folder, (choice, template) = context.recipe.evaluate, context.layout.evaluation(name), model
    assert section is not None

    def score() -> dict[str, dict[str, float]]:
        _require_whole(name, choice)
        how: Any = section.model_dump(include={"metrics", "batch_tokens"})
        return values_of(evaluate_model(choice, rows, template=template, date=context.date, **how))

    found, is_new = kept_scores(folder, inputs, score, context.made)
    if is_new:
        means = (f"{metric} {math.fsum(of.values()) / len(of):.4f}" for metric, of in found.items())
        context.say(f"evaluate {name}: {', '.join(means)}")
    scores: dict[str, Any] = found
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
