"""The stage ``distill``: a target per source, or one for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact
from fusekit.distillation import outputs as overwriting
from fusekit.distillation import provenance
from fusekit.distillation.outputs import JOINT, PLAIN
from fusekit.distillation.settings import DistillSettings
from fusekit.errors import DistillationError, RecipeError, StorageError
from fusekit.pipeline.layout import PIVOT
from fusekit.pipeline.stages import Context, alignment_of
from fusekit.pipeline.store_facts import store_facts
from fusekit.recipe import Recipe
from fusekit.yaml import KeyPath


def distill(context: Context) -> list[Path]:
    """Train a target per source, or one for all, and plain fine-tuning on the same rows to compare them with."""
    from fusekit.distillation.inputs import Inputs, Source
    from fusekit.distillation.run import distill as train

    recipe, layout = context.recipe, context.layout
    sources = {}
    for source in recipe.sources:
        how = recipe.alignment_of(source)
        # Of the artifact, so that what is trained with is what the stage `align` shows.
        folder = layout.alignment(source.label) if how.map_method is not None else None
        choice = context.readers.choice(source.label)
        sources[source.label] = Source(layout.store(source.label), choice, how, folder)
    reader = context.readers.reader(PIVOT)
    inputs = Inputs(context.readers.choice(PIVOT), context.rows, layout.store(PIVOT), sources, reader)
    settings = recipe.settings

    def make(inputs: Inputs, settings: DistillSettings, out: Path) -> list[Path]:
        return train(
            inputs,
            settings,
            out,
            resume=True,
            ignore_estimates=context.ignore_estimates,
            say=lambda line: context.say(f"distill {line}"),
        )

    targets = make(inputs, settings, layout.targets)
    if context.recipe.wants_baseline:
        make(replace(inputs, sources={}), plain(settings), layout.baselines)
    return targets


def plain(settings: DistillSettings) -> DistillSettings:
    """Settings with nothing but the text to learn from."""
    alone = {"lm_weight": 1.0, "lm_weighting": "constant"}  # soft has a weight of its own
    return settings.model_copy(update={"training": settings.training.model_copy(update=alone)})


def check_section(recipe: Recipe) -> None:
    """Refuse settings that no training on this machine can have. Raises RecipeError with each and where it was written.

    The rows of a step have to be divided among the processes that are there now.
    """
    from fusekit.distillation.arguments import accumulation, processes, refused, wrong_fields, wrong_scheduler
    from fusekit.distillation.outputs import wrong_lora_fields

    values, captured = recipe.distill, recipe.capture.temperature
    found: dict[KeyPath, str] = {("distill", name): says for name, says in wrong_fields(values.trainer).items()}
    found |= {("distill", "lora", name): says for name, says in wrong_lora_fields(values.lora or {}).items()}
    if says := wrong_scheduler(values.lr_scheduler_type):
        found["distill", "lr_scheduler_type"] = says
    lines = [f"{recipe.place(path)}: {says}" for path, says in found.items()]
    try:
        accumulation(values, processes())
    except DistillationError as error:
        lines.append(f"{recipe.place(('distill', 'batch_size'), ('distill', 'per_device_train_batch_size'))}: {error}")
    if not lines and (found_here := refused(values)) is not None:
        field, says = found_here
        lines.append(f"{recipe.place(('distill', *(field or '').split('.')))}: {says}")
    if captured != values.temperature:
        lines.append(
            f"{recipe.place(('distill', 'temperature'), ('capture', 'temperature'))}: capture.temperature is "
            f"{captured}, but distill.temperature {values.temperature}: a loss needs rows of its own temperature, so "
            "set both alike"
        )
    if lines:
        raise RecipeError(lines[0] if len(lines) == 1 else "\n  ".join([f"distill: {len(lines)} problems", *lines]))


def check_made(context: Context) -> None:
    """Refuse models of the stage that are there, but of something else: before any other is trained for hours.

    Raises StorageError naming what differs, and the way out.
    """
    settings, baseline = context.recipe.settings, context.layout.baselines / PLAIN
    made = [(folder, settings) for folder in context.targets]
    made += [(baseline, plain(settings))] if context.recipe.wants_baseline else []
    for folder, how in made:
        if (folder / artifact.MANIFEST).is_file() and not overwriting.is_former(folder):
            _check(context, folder, how)


def check_targets(context: Context) -> None:
    """Refuse targets that are not there, or were made from something else, as far as what is at hand can tell.

    The captures may be on another machine: what a target has of them is asked about where they are here.

    Raises StorageError naming what differs, and the way out.
    """
    for folder in context.targets:
        _check(context, folder, context.recipe.settings)


def check_baseline(context: Context) -> None:
    """As :func:`check_targets`, of plain fine-tuning where the recipe compares the targets with it."""
    if context.recipe.wants_baseline:
        _check(context, context.layout.baselines / PLAIN, plain(context.recipe.settings))


def _check(context: Context, folder: Path, settings: DistillSettings) -> None:
    known = artifact.read(folder)
    if known is None:
        raise StorageError(f"{folder} is not there: the stage `distill` comes first")
    if changed := differences(context, str(known.inputs.get("target")), settings, known.inputs):
        raise StorageError(
            f"{folder} was made from something else:\n  "
            + "\n  ".join(changed)
            + f"\nGo back to what it was, or remove {folder} and begin with the stage `distill`"
        )


def differences(context: Context, target: str, settings: DistillSettings, before: Mapping[str, Any]) -> list[str]:
    """One line per fact of a target that is otherwise in the recipe, its rows and the captures that are here.

    target: its name. settings: that it is trained with. before: the facts of the one that is there.
    """
    expected = _expected_facts(context, target, settings, before)
    known = {name: before.get(name, "not given") for name in expected}
    return artifact.differences(known | _not_asked_for(context, target, before, expected), expected)


def _not_asked_for(
    context: Context, target: str, before: Mapping[str, Any], expected: Mapping[str, Any]
) -> dict[str, Any]:
    """Facts that a target has and the recipe no longer asks for: settings, and teachers by what models they are."""
    models = tuple(f"stores.{model}." for model in (PIVOT, *_teachers(context, target)))
    settings = ("training.", "fusion.")
    return {
        name: value
        for name, value in before.items()
        if name not in expected
        and value != {}  # an empty section
        and (
            name.startswith(settings)
            or (name.startswith("stores.") and name.endswith(".model") and not name.startswith(models))
        )
    }


def _teachers(context: Context, target: str) -> list[str]:
    return [source.label for source in context.recipe.sources if target in (source.label, JOINT)]


def _expected_facts(
    context: Context, target: str, settings: DistillSettings, before: Mapping[str, Any]
) -> dict[str, Any]:
    """What the recipe, its rows and the captures that are here determine; ``before`` tells how models were called."""
    from fusekit.capturing.store import Store
    from fusekit.distillation.dataset import join

    teachers = _teachers(context, target)
    folders = {model: context.layout.store(model) for model in (PIVOT, *teachers)}
    facts = provenance.facts_of_run(
        target,
        settings,
        context.readers.fingerprint(PIVOT),
        join(context.rows, {}).rows,
        {model: Store.open(folder) for model, folder in folders.items() if (folder / artifact.MANIFEST).is_file()},
    )
    facts = {key: value for key, value in facts.items() if value != {}}  # an empty section
    for model in folders:  # the captures may be of another recipe, or elsewhere
        of_store = f"stores.{model}."
        captured = {key.removeprefix(of_store): value for key, value in before.items() if key.startswith(of_store)}
        said = store_facts(context, model, captured, thorough=False)
        facts |= {f"{of_store}{key}": value for key, value in said.items()}
    for teacher in teachers if not settings.plain else ():
        how = provenance.facts_of_alignment(alignment_of(context, teacher))
        facts |= {f"projections.{teacher}.{key}": value for key, value in how.items()}
    return facts
