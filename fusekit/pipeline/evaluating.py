"""The stage ``evaluate``: scores of every model on held-out examples, and on tasks of lm-eval."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib.metadata import version
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
from fusekit.distillation.settings import PLAIN
from fusekit.errors import FusekitError, RecipeError
from fusekit.evaluation.metrics import check_tasks, evaluate_model, held_out_rows, lm_eval_figures
from fusekit.evaluation.table import LM_EVAL, document_of
from fusekit.layout import BASELINE, MERGED, PIVOT, Layout
from fusekit.pipeline.capturing import hash_of, unreadable
from fusekit.pipeline.plan import Planner
from fusekit.pipeline.stage import DONE, MISSING, Context, Stage, Status, Step, write_json
from fusekit.recipe import Recipe
from fusekit.settings import LmEval
from fusekit.types import Row
from fusekit.yaml import Mistake

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
        section, place = context.recipe.evaluate, context.layout.evaluation(LM_EVAL)
        scored = section is not None and section.lm_eval is not None
        return super().wanted(context) + ([place / name for name in models_of(context)] if scored else [])

    def made(self, layout: Layout) -> list[Path]:
        folder = layout.evaluation("")
        places = [path.parent for path in sorted(folder.rglob(artifact.MANIFEST))]
        places = [place for place in places if place not in (folder, folder / LM_EVAL)]  # not of a run there
        hidden = [place for place in places if any(part.startswith(".") for part in place.relative_to(folder).parts)]
        return [*(place for place in places if place not in hidden), layout.results]

    def status(self, context: Context, name: str) -> Status:
        """Whether a model has scores. They are made again, not refused, if the model or the examples changed."""
        folder = context.layout.evaluation(name)
        return Status(folder, MISSING if artifact.read(folder) is None else DONE)

    def make(self, context: Context, only: Collection[str] | None = None) -> None:
        """Score every model, or some, and write ``results.json``; scores of equal inputs stay."""
        section = context.recipe.evaluate
        if section is None:
            return
        read = {path: held_out_rows(section, [path]) for path in section.paths}
        rows, asked = list(chain.from_iterable(read.values())), section.model_dump(include={"metrics", "limit"})
        # A data set on the hub can change under its name, so the examples identify it.
        asked["held_out"] = {
            path: artifact.joined_hash(f"{row.key} {row.dataset!a}" for row in some) for path, some in read.items()
        }
        models = {name: model for name, model in models_of(context).items() if only is None or name in only}
        scores: dict[str, dict[str, Any]] = {}
        figures: dict[str, dict[str, Any]] = {}
        for name, model in models.items():
            identity = _identity(context, name, model)
            scores[name] = _scores(context, name, model, identity | asked, rows) if section.paths else {}
            if section.lm_eval is not None:
                figures[name] = _lm_eval(context, section.lm_eval, name, model, identity)
        document = document_of(scores, figures)
        data = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
        commit_file(context.layout.results, data)

    def mistakes(self, recipe: Recipe, _layout: Layout | None = None) -> list[Mistake]:
        """Held-out examples that are missing or cannot be read, and impossible tasks."""
        section = recipe.evaluate
        if section is None:
            return []
        found = unreadable(section, ("evaluate", "path"))
        if section.lm_eval is not None:
            try:
                check_tasks(section.lm_eval)
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
            step.note = f"{done} have scores, which stay unless the model or the examples changed"
        self.estimate(planner, step)

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        section, reader = planner.recipe.evaluate, planner.tokenizers.get(PIVOT)
        assert section is not None
        try:
            here = [path for path in section.paths if not is_on_hub(path)]
            rows = held_out_rows(section, here)
            some = rows[:: max(1, len(rows) // 200)]
            if reader is not None and some:
                step.tokens = sum(len(reader.tokenize(row)) for row in some) * len(rows) // len(some)
        except FusekitError as error:
            planner.plan.refused.append(f"evaluate: {error}")
            return []
        if not rows:
            planner.plan.unknown.append("evaluate: how many examples are held out")
            return []
        names = list(models_of(planner.context))
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
    section, (choice, template) = context.recipe.evaluate, model
    assert section is not None
    how: Any = section.model_dump(include={"metrics", "batch_tokens"})

    def score() -> dict[str, dict[str, float]]:
        _require_whole(name, choice)
        scores = evaluate_model(choice, rows, template=template, date=context.date, **how)
        means = (f"{metric} {math.fsum(of.values()) / len(of):.4f}" for metric, of in scores.items())
        context.say(f"evaluate {name}: {', '.join(means)}")
        return scores

    return _kept(context, context.layout.evaluation(name), inputs, score)


def _lm_eval(context: Context, settings: LmEval, name: str, model: Model, identity: Inputs) -> dict[str, Any]:
    """A model's figures on the tasks of lm-eval, by task."""
    own = hash_of(settings.include_path) if settings.include_path is not None else None
    asked = settings.model_dump(exclude={"batch_size"}) | {"lm_eval": version("lm_eval"), "own_tasks": own}

    def score() -> dict[str, dict[str, Any]]:
        _require_whole(name, model[0])
        figures = lm_eval_figures(*model, settings, context.date)
        shown = (f"{task} {figure['metric']} {figure['value']:.4f}" for task, figure in figures.items())
        context.say(f"evaluate {name}: {', '.join(shown)}")
        return figures

    return _kept(context, context.layout.evaluation(f"{LM_EVAL}/{name}"), identity | asked, score)


def _kept(context: Context, folder: Path, inputs: Inputs, score: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The scores in a folder where they are whole and of these inputs, else new ones, which are put there."""
    if not artifact.is_kept(folder, Evaluate.name, inputs):
        artifact.refuse_foreign(folder, Evaluate.name)  # now, not once the scores are there
        started = time.monotonic()
        scores = score()

        def write(into: Path) -> None:
            write_json(into / "scores.json", scores)

        artifact.publish(folder, Evaluate.name, inputs, write, context.made(started))
    found: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return found


def _require_whole(name: str, choice: ModelChoice) -> None:
    """Refuse a model that the run has made and whose bytes are not those that its scores would be kept for."""
    if not _is_input(name):
        artifact.require_whole(Path(choice.model))


def _is_input(name: str) -> bool:
    """Whether a model that is evaluated was given to the run, not made by it."""
    return name == PIVOT or name.startswith("sources/")
