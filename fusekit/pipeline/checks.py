"""What is in an output before a run: refused where a stage could not build on it, or would replace what is not its."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fusekit import artifacts as artifact
from fusekit.distillation import outputs as overwriting
from fusekit.distillation.outputs import PLAIN
from fusekit.errors import RecipeError, StorageError
from fusekit.pipeline import evaluating
from fusekit.pipeline.layout import PIVOT, STAGES
from fusekit.pipeline.stages import Context, align_inputs, rows_of
from fusekit.pipeline.store_facts import store_facts
from fusekit.recipe import Recipe


def check_recipe(recipe: Recipe, stages: Collection[str] = STAGES) -> None:
    """Refuse now what a late stage would refuse after hours: a training, a merge, tasks of lm-eval that cannot be.

    stages: those that are to be done. Raises RecipeError with every problem and where it was written.
    """
    from fusekit.pipeline import distilling, merging

    found = []
    for stage, check in (("distill", distilling.check_section), ("merge", merging.check_section), ("evaluate", _tasks)):
        try:
            if stage in stages:
                check(recipe)
        except RecipeError as error:
            found.append(str(error))
    if found:
        raise RecipeError("\n".join(found))


def _tasks(recipe: Recipe) -> None:
    from fusekit.evaluation import lm_eval

    if recipe.evaluate is not None and recipe.evaluate.lm_eval is not None:
        lm_eval.check(recipe.evaluate.lm_eval)


def check_places(context: Context, stages: Collection[str] = STAGES) -> None:
    """Refuse folders that these stages are to fill, but that hold what no run made: now, and not after hours.

    Raises StorageError naming the folder, a file in it, and the way out; also for a damaged manifest.
    """
    from fusekit.capturing.writer import refuse_foreign
    from fusekit.pipeline.merging import check_place

    for stage in stages:
        for folder in _places(context, stage):
            if not overwriting.is_former(folder):
                artifact.refuse_occupied(folder)
    if "capture" in stages:
        for folder in map(context.layout.store, context.readers.names):
            if folder.is_dir() and not (folder / artifact.MANIFEST).exists():
                refuse_foreign(folder)
    if "merge" in stages:
        check_place(context)


def _places(context: Context, stage: str) -> list[Path]:
    """The artifacts that a stage publishes."""
    recipe, layout = context.recipe, context.layout
    if stage == "data":
        return [layout.pivot, layout.data]
    if stage == "align":
        return [layout.alignment(source.label) for source in recipe.sources]
    if stage == "distill":
        return [*context.targets, *([layout.baselines / PLAIN] if recipe.wants_baseline else [])]
    if stage == "evaluate" and recipe.evaluate is not None:
        return [layout.evaluation(name) for name in evaluating.models_of(context)]
    return []


def check_stores(context: Context) -> None:
    """Refuse captures that are not whole, or that another recipe made; weights on the hub are not fetched.

    Raises StorageError naming what differs, and the way out.
    """
    from fusekit.capturing.capture import data_fingerprint
    from fusekit.capturing.store import Store

    for name in context.readers.names:
        folder = context.layout.store(name)
        if not (folder / artifact.MANIFEST).is_file():
            raise StorageError(f"{folder} is not there: the stage `capture` comes first")
        try:
            spec = Store.open(folder).spec
        except StorageError as error:
            raise StorageError(f"{error}\nThe stage `capture` makes what is missing") from error
        before = artifact.flat(spec.model_dump())
        expected = store_facts(context, name, before, thorough=True)
        expected["data"] = data_fingerprint(rows_of(context, name, context.rows))
        if changed := artifact.differences({key: before.get(key, "not given") for key in expected}, expected):
            raise StorageError(
                f"{folder} was made from something else:\n  "
                + "\n  ".join(changed)
                + f"\nGo back to what it was, or remove {folder} and begin with the stage `capture`"
            )


def check_alignments(context: Context) -> None:
    """Refuse alignments that are not there or were made from something else. Raises StorageError."""
    for name in context.readers.names:
        if name == PIVOT:
            continue
        folder = context.layout.alignment(name)
        if context.done(folder, align_inputs(context, name, context.rows)) is None:
            raise StorageError(f"{folder} is not there: the stage `align` comes first")
