"""The stages ``align`` and ``distill``: a model per source, or one of all, and plain fine-tuning beside them."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs
from fusekit.capturing.capture import vocabulary_size
from fusekit.capturing.models import find_checkpoint
from fusekit.capturing.store import Store
from fusekit.devices import Need
from fusekit.disk import recover
from fusekit.distillation import outputs
from fusekit.distillation.arguments import disk_needs, memory_needs, problems
from fusekit.distillation.settings import JOINT, PLAIN, AlignmentSettings, DistillSettings, Target
from fusekit.errors import FusekitError, StorageError
from fusekit.gguf import SUFFIX
from fusekit.hub import is_repository
from fusekit.layout import BASELINE, PIVOT, Layout
from fusekit.pipeline.capturing import rows_of, store_facts
from fusekit.pipeline.plan import Planner
from fusekit.pipeline.responding import winners_of
from fusekit.pipeline.stage import BEGUN, DONE, Context, Stage, Status, Step, choice_of, compared, made_from
from fusekit.recipe import Recipe
from fusekit.recipe.sections import Data
from fusekit.yaml import Mistake

ALIGNED_TEXTS = 2000
"""Texts of which the quality of a pair is counted, at most."""
SHOWN_TEXTS, SHOWN_GROUPS = 8, 60
"""In the report of an alignment, at most: texts, groups of each text."""
WORTH_EXAMPLES = 256
"""Examples, evenly spaced, that the worth of a teacher is measured on: tens of thousands of labels."""
FIGURES_BYTES, MAP_BYTES = 110_000, 8
"""Bytes of an alignment's figures and samples; of its vocabulary map, per token of the source."""


def alignment_of(context: Context, source: str) -> AlignmentSettings:
    """How a source's rows come into the pivot's vocabulary."""
    return context.recipe.alignment_of(next(known for known in context.recipe.sources if known.label == source))


class Align(Stage):
    """Vocabulary map and quality of each source with the pivot."""

    name = "align"
    places = ("alignment/",)
    needs = ("data",)

    def artifacts(self, context: Context) -> dict[str, Path]:
        return {source.label: context.layout.alignment(source.label) for source in context.recipe.sources}

    def inputs(self, context: Context, source: str, _before: Inputs) -> Inputs:
        theirs = context.reader(source)
        return {
            "pivot": context.reader(PIVOT).fingerprint,
            "source": theirs.fingerprint,
            "vocabulary": alignment_of(context, source).vocabulary,
            "ids": vocabulary_size(context.checkpoint(source), theirs),
            "data": artifact.joined_hash(f"{row.key} {row.cut}" for row in context.rows),
        }

    def make(self, context: Context) -> None:
        """Align each source with the pivot, and measure what it is worth as a teacher where both are captured."""
        for source in self.artifacts(context):
            if not self.status(context, source).is_done():
                self.make_one(context, source)
            _measure_worth(context, source)

    def make_one(self, context: Context, source: str) -> None:
        """Make the vocabulary map that a pair is distilled with, and count what its alignment links and loses."""
        from fusekit.alignment import align, vocabulary_surfaces
        from fusekit.alignment.quality import AlignmentQuality, sample_of, write_samples
        from fusekit.distillation.projections import write_map

        started, pivot, theirs = time.monotonic(), context.reader(PIVOT).tokenizer, context.reader(source).tokenizer
        made = _vocabulary_map(context, source)
        quality = AlignmentQuality(context.recipe.pivot.path, context.model(source).path)
        texts = [
            (message.content, row.dataset)
            for row in context.rows
            for message in row.messages
            if message.content and (row.is_text or message.role == "assistant")
        ][:ALIGNED_TEXTS]
        shown = []
        for number, (text, dataset) in enumerate(texts):
            found = align(text, pivot, theirs)
            quality.add(found, dataset)
            if number % max(1, len(texts) // SHOWN_TEXTS) == 0:
                shown.append(found)

        def write(into: Path) -> None:
            if made is not None:
                write_map(into, made)
            (into / "quality.json").write_text(json.dumps(quality.to_dict(), indent=2) + "\n", encoding="utf-8")
            surfaces = vocabulary_surfaces(pivot), vocabulary_surfaces(theirs)
            drawn = [sample_of(sample, surfaces, SHOWN_GROUPS) for sample in shown[:SHOWN_TEXTS]]
            write_samples(into / "samples.json", drawn)

        inputs = self.inputs(context, source, {})
        artifact.publish(context.layout.alignment(source), self.name, inputs, write, context.made(started))
        taught = quality.total.row_share
        context.say(f"align {source}: {taught:.1%} of {quality.pivot_tokens} pivot tokens get a row")

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        if step.work:
            step.disk = FIGURES_BYTES + MAP_BYTES * planner.vocabulary(step.name)
            step.rows = min(planner.rows.rows, ALIGNED_TEXTS) if planner.rows.rows is not None else None
        return []


def _vocabulary_map(context: Context, source: str) -> Any:
    """The map of a source into the pivot's vocabulary; None where the recipe wants none. It needs no captures."""
    from fusekit.distillation.inputs import Reading, projection_of
    from fusekit.distillation.projections import SAMPLED

    def reading(name: str) -> Reading:
        reader = context.reader(name)
        sample = [(row, reader.tokenize(row)) for row in context.rows[:SAMPLED]]
        return Reading(name, reader.tokenizer, sample, vocabulary_size(context.checkpoint(name), reader))

    how = alignment_of(context, source)
    return projection_of(how, reading(PIVOT), reading(source), context.rows).vocabulary_map


def _measure_worth(context: Context, source: str) -> None:
    """Measure what a source's projected rows know, where both models are captured as they read now, and keep it.

    It is a file of the pair's alignment, and made again when what it was measured on has changed.
    """
    from fusekit.distillation.worth import measure_stores

    how, stores = alignment_of(context, source), []
    for name in (PIVOT, source):
        folder, reader = context.layout.store(name), context.reader(name)
        if not (folder / artifact.MANIFEST).is_file():
            return
        store = Store.open(folder, incomplete=True)
        of_run = store.spec.tokenizer == reader.fingerprint and any(row.key in store for row in context.rows)
        if not store.complete or not of_run:
            return
        stores.append(store)
    if how.as_they_are or how.vocabulary == "grouped":
        return
    path, folder = context.layout.worth(source), context.layout.alignment(source)
    recover(folder)
    shards = [artifact.joined_hash(record.xxh3 for record in store.records.values()) for store in stores]
    of = {"alignment": how.model_dump(mode="json"), "pivot": shards[0], "source": shards[1]}
    try:
        if json.loads(path.read_bytes()).get("of") == of:
            return
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"{path} is damaged: {error}; remove it, and the stage `align` makes it again") from error
    tokenizers = context.reader(PIVOT).tokenizer, context.reader(source).tokenizer
    pair = (stores[0], stores[1])
    worth = measure_stores(context.rows, (PIVOT, source), tokenizers, pair, how, folder=folder, most=WORTH_EXAMPLES)
    text = json.dumps({**worth.to_dict(), "of": of}, indent=1) + "\n"
    artifact.replace_file(folder, path.name, text.encode())
    context.say(f"align {source}: {worth.summary}")
    if worth.warnings:
        context.say(f"warning: align {source}: {'; '.join(worth.warnings)}")


def settings_of(context: Context, name: str) -> DistillSettings:
    """What a model of the stage is trained with."""
    return plain(context.recipe.settings) if name == BASELINE else context.recipe.settings


def plain(settings: DistillSettings) -> DistillSettings:
    """Settings with nothing but the text to learn from."""
    alone = {"lm_weight": 1.0, "lm_weighting": "constant"}  # `soft` ignores lm_weight
    alone |= {"schedule": None, "on_policy": 0.0, "num_train_epochs": settings.training.passes}
    return settings.model_copy(update={"training": settings.training.model_copy(update=alone)})


def teachers_of(context: Context, target: str) -> list[str]:
    """The sources of a distilled model; none of the baseline."""
    return [source.label for source in context.recipe.sources if target in (source.label, JOINT)]


class Distill(Stage):
    """A distilled model per source, or one of all, and plain fine-tuning to compare them with."""

    name = "distill"
    places = ("targets/", "baselines/")
    needs = ("data", "judge", "capture", "align")
    shared = True

    def artifacts(self, context: Context) -> dict[str, Path]:
        """The distilled models by name, and ``baseline`` where the recipe compares them with plain fine-tuning."""
        found = {folder.name: folder for folder in context.targets}
        return found | ({BASELINE: context.layout.baselines / PLAIN} if context.recipe.wants_baseline else {})

    def check_place(self, context: Context, name: str) -> None:
        """Unless it is a model that is being replaced."""
        folder = self.artifacts(context)[name]
        if not outputs.is_former(Target(folder.name, folder, ())):
            super().check_place(context, name)

    def inputs(self, context: Context, name: str, before: Inputs) -> Inputs:
        """What the recipe, its examples and the captures that are here determine; the rest is as it was before."""
        from fusekit.distillation.dataset import join
        from fusekit.distillation.run import facts_of_alignment, facts_of_run

        target, settings = self.artifacts(context)[name].name, settings_of(context, name)
        models = (PIVOT, *teachers_of(context, target))
        here = [model for model in models if (context.layout.store(model) / artifact.MANIFEST).is_file()]
        opened = {model: Store.open(context.layout.store(model), incomplete=True) for model in here}
        stores = {model: store for model, store in opened.items() if store.complete}
        pivot, rows = context.fingerprint(PIVOT), join(context.rows, {}).rows
        writers = winners_of(context)[1] if settings.training.schedule is not None else None
        facts = {
            key: value
            for key, value in facts_of_run(target, settings, pivot, rows, stores, writers=writers).items()
            if value != {}  # an empty section
        }
        for model in models:  # the captures may be of another recipe, or elsewhere
            of_store = f"stores.{model}."
            captured = {key.removeprefix(of_store): value for key, value in before.items() if key.startswith(of_store)}
            said = store_facts(context, model, captured, thorough=False)
            if any(source.label == model and source.on_the_fly for source in context.recipe.sources):
                said = {key: value for key, value in said.items() if key != "rows_per_shard"} | {"max_error": 0.0}
            facts |= {f"{of_store}{key}": value for key, value in said.items()}
        for teacher in [] if settings.plain else models[1:]:
            how = facts_of_alignment(alignment_of(context, teacher))
            facts |= {f"projections.{teacher}.{key}": value for key, value in how.items()}
        # What the recipe no longer asks for: settings, and teachers, by what models they are.
        own = tuple(f"stores.{model}." for model in models)
        kept = {
            key: value
            for key, value in before.items()
            if value == {}  # an empty section
            or not key.startswith(("training.", "fusion.", "stores."))
            or (key.startswith("stores.") and (key.startswith(own) or not key.endswith(".model")))
        }
        return kept | facts

    def status(self, context: Context, name: str) -> Status:
        """As far as what is at hand can tell: captures may be on another machine."""
        folder = self.artifacts(context)[name]
        target = Target(folder.name, folder, ())
        if outputs.is_former(target):
            return Status(folder)
        known = made_from(folder, self.name)
        before = known if known is not None else artifact.begun(target.work)
        status = compared(folder, before, partial(self.inputs, context, name))
        if known is not None or status.state != DONE:
            return status
        for step, path in outputs.checkpoints(target.work):
            if not outputs.problems_of(path, hashes=False):
                return Status(folder, BEGUN, note=f"resumes at step {step}")
        return Status(folder)

    def make(self, context: Context) -> None:
        """Train what is missing. Models whose inputs changed are refused before any other is trained."""
        from fusekit.distillation.inputs import Inputs as TrainingInputs
        from fusekit.distillation.inputs import Responses, Source
        from fusekit.distillation.run import distill

        def check() -> None:
            for name, folder in self.artifacts(context).items():
                if (folder / artifact.MANIFEST).is_file():
                    self.status(context, name).is_done()

        context.processes.first_then_all(check)
        recipe, layout = context.recipe, context.layout
        sources = {}
        for source in recipe.sources:
            how, label = recipe.alignment_of(source), source.label
            # Of the artifact, so that what is trained with is what the stage `align` shows.
            folder = layout.alignment(label) if how.map_method is not None else None
            made = Source(layout.store(label), context.choice(label), how, context.reader(label), folder)
            if source.on_the_fly:
                made = replace(made, store=None, live=recipe.capture, rows=rows_of(context, label))
            sources[label] = made
        responses = None
        if recipe.respond is not None:
            rows, writers = winners_of(context)
            responses = Responses(rows, writers, {name: layout.winners(name) for name in (PIVOT, *writers.values())})
        pivot, reader = context.choice(PIVOT), context.reader(PIVOT)
        inputs = TrainingInputs(
            pivot, context.rows, layout.store(PIVOT), sources, reader, responses, recipe.data.max_length
        )

        def train(inputs: TrainingInputs, settings: DistillSettings, out: Path, others: tuple[int, int]) -> None:
            distill(
                inputs,
                settings,
                out,
                resume=True,
                ignore_estimates=context.ignore_estimates,
                quiet=context.quiet,
                others=others,
                say=lambda line: context.say(f"distill {line}"),
            )

        train(inputs, recipe.settings, layout.targets, (0, int(recipe.wants_baseline)))
        if recipe.wants_baseline:
            alone = replace(inputs, sources={})
            train(alone, settings_of(context, BASELINE), layout.baselines, (len(context.targets), 0))

    def mistakes(self, recipe: Recipe, _layout: Layout | None = None) -> list[Mistake]:
        """Settings that no training on this machine, in the processes that are there now, can have."""
        values, captured = recipe.distill, recipe.capture.temperature
        section, pivot = recipe.data, None
        if not is_repository(recipe.pivot.path) and not recipe.pivot.path.endswith(SUFFIX):
            with suppress(FusekitError):  # which is a mistake of the pivot
                pivot = find_checkpoint(choice_of(recipe.pivot), weights=False)
        # A resolved recipe has the default, too, which says nothing of the model.
        asked = section.max_length if section.max_length != Data.model_fields["max_length"].default else None
        found = [Mistake(says, path) for path, says in problems(values, pivot, asked)]
        live = [number for number, source in enumerate(recipe.sources) if source.on_the_fly]
        if live and values.dataloader_num_workers:
            says = (
                f"dataloader_num_workers is {values.dataloader_num_workers}, but {recipe.sources[live[0]].label} is "
                "scored on the fly, which loader processes cannot do: set it to 0, or capture the source"
            )
            found.append(Mistake(says, ("distill", "dataloader_num_workers"), ("sources", live[0], "on_the_fly")))
        if captured != values.temperature:
            says = (
                f"capture.temperature is {captured}, but distill.temperature is {values.temperature}: the loss needs "
                "rows captured at its temperature, so set both to one value"
            )
            found.append(Mistake(says, ("distill", "temperature"), ("capture", "temperature")))
        return found

    def plan(self, planner: Planner) -> None:
        steps = [planner.step(self, name) for name in self.artifacts(planner.context)]
        needs = [found for step in steps if (found := self.estimate(planner, step))]
        if needs:  # one is trained after the other
            disk = disk_needs(planner.models[PIVOT], planner.recipe.distill, planner.place)
            planner.plan.needs += max(needs, key=lambda of: of[0].needed) + disk

    def can_compare(self, planner: Planner, _name: str) -> bool:
        """Captures may be elsewhere."""
        return planner.done("data")

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        pivot, found = planner.models.get(PIVOT), planner.rows
        if not step.work or pivot is None:
            return []
        settings = settings_of(planner.context, step.name)
        values = settings.training
        step.rows, step.tokens = found.rows, found.of(found.tokens, PIVOT)
        step.disk = pivot.weight_bytes
        if step.tokens is not None:
            # Forward 2 and backward 4 per parameter and token; 2 more to compute activations again; an adapter leaves
            # out the gradients of the weights.
            times = (4 if values.lora is not None else 6) + (2 if values.activation_checkpointing else 0)
            step.pflop = times * planner.active(PIVOT) * values.passes * step.tokens / 1e15
        loaded = [  # teachers in this machine's memory, as far as they are known
            planner.models[source.label]
            for source in planner.recipe.sources
            if not settings.plain
            and source.label in teachers_of(planner.context, step.name)
            and (source.on_the_fly or values.on_policy)
            and source.engine.kind == "transformers"
            and source.label in planner.models
        ]
        longest = found.longest or planner.recipe.data.max_length
        needs = memory_needs(pivot, values, longest, planner.processes, loaded)
        step.memory = needs[0].needed
        return needs
