"""The stages ``data``, ``capture`` and ``align``, and the plain checkpoint of a pivot that is a GGUF file."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs
from fusekit.capturing.models import find_checkpoint
from fusekit.capturing.settings import CaptureSettings
from fusekit.capturing.store import Manifest, Store, read_json
from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import DataCounts, is_on_hub, read_rows
from fusekit.data.templates import ChatTemplate
from fusekit.devices import Need, disk_need
from fusekit.disk import commit_file, counted, recover
from fusekit.distillation.settings import AlignmentSettings
from fusekit.errors import CaptureError, DataError, FusekitError, RecipeError, StorageError
from fusekit.gguf import SUFFIX
from fusekit.hub import is_repository
from fusekit.layout import PIVOT, Layout
from fusekit.pipeline.plan import Planner
from fusekit.pipeline.stage import (
    BEGUN,
    DONE,
    STALE,
    Context,
    Stage,
    Status,
    Step,
    choice_of,
    hash_of,
    unreadable,
    write_json,
    write_rows,
)
from fusekit.recipe import Recipe
from fusekit.recipe.sections import Mistake
from fusekit.types import Row
from fusekit.yaml import KeyPath

ALIGNED_TEXTS = 2000
"""Texts of which the quality of a pair is counted, at most."""
SHOWN_TEXTS, SHOWN_OF_EACH, SHOWN_GROUPS = 8, 2, 60
"""In the report of an alignment, at most: texts, texts of each data set, groups of each text."""
WORTH_EXAMPLES = 256
"""Rows, evenly spaced, that the worth of a teacher is measured on: some ten thousands of labels."""
PAGE_BYTES, MAP_BYTES = 110_000, 8
"""Bytes of an alignment's figures, page and samples; of its vocabulary map, per token of the source."""
ROW_BYTES, TOKEN_BYTES = 128, 4
"""Bytes of a row as JSON beside its contents; of a token of text, about."""


class DequantisedPivot(Stage):
    """The plain checkpoint of a pivot that is a GGUF file, which every stage reads."""

    name = PIVOT
    places = ("pivot",)

    def artifacts(self, context: Context) -> dict[str, Path]:
        return {"dequantised": context.layout.pivot} if context.recipe.pivot.path.endswith(SUFFIX) else {}

    def inputs(self, context: Context, _name: str, _before: Inputs) -> Inputs:
        """Raises CaptureError where the GGUF file cannot be found, and was called otherwise before."""
        from fusekit.capturing.models import dequantised_from

        return dequantised_from(context.choice(PIVOT), artifact.read(context.layout.pivot))

    def make(self, context: Context) -> None:
        """Dequantise the file, once; read through what is there."""
        from fusekit.capturing.models import dequantise

        for name, folder in self.artifacts(context).items():
            self.status(context, name).is_done()
            dequantise(context.choice(PIVOT), folder, ignore_estimates=context.ignore_estimates, say=context.say)

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        from fusekit.capturing.models import dequantise_needs

        checkpoint = planner.models.get(PIVOT)
        if not step.work or checkpoint is None:
            return []
        memory, disk = dequantise_needs(checkpoint, planner.place)
        step.memory, step.disk, step.disk_at_most = memory.needed, disk.needed, disk.needed
        return [memory, disk]


class Data(Stage):
    """The rows that all models read, filtered and cut alike."""

    name = "data"
    places = ("data",)

    def artifacts(self, context: Context) -> dict[str, Path]:
        return {"rows": context.layout.data}

    def inputs(self, context: Context, _name: str, before: Inputs) -> Inputs:
        """A file that is not here, but was read before, is taken to be the same."""
        section, known = context.recipe.data, before.get("files") or {}
        files = {path: hash_of(path) or known.get(path) for path in section.paths}
        # A size is for plans alone; with on_bad_row: error all examples were usable, as in runs before it was a choice.
        unnamed = {"size"} if section.on_bad_row == "skip" else {"size", "on_bad_row"}
        return section.model_dump(mode="json", exclude=unnamed) | {"files": files}

    def make(self, context: Context) -> None:
        super().make(context)
        _ = context.rows  # read through, since they may be damaged

    def make_one(self, context: Context, name: str) -> None:
        section, started, counts = context.recipe.data, time.monotonic(), DataCounts(context.recipe.data.on_bad_row)
        readers = [context.reader(name) for name in context.names]
        how = section.model_dump(include={"split", "revision", "streaming", "name", "limit"})
        rows = read_rows(section.paths, counts=counts, **how)
        if section.pack:
            rows = iter(pack_text(rows, readers, section.max_length))
        prepared = prepare(rows, readers, section.max_length, section.overlong, counts)
        if not prepared.rows:
            raise RecipeError(f"data: there are no examples in {', '.join(section.paths)}")

        def write(into: Path) -> None:
            write_rows(into, prepared.rows)
            write_json(into / "counts.json", dataclasses.asdict(prepared.counts))

        made = context.made(started) | {
            "for": {name: reader.fingerprint for name, reader in zip(context.names, readers, strict=True)},
            "date": context.date.isoformat(),
        }
        artifact.publish(context.layout.data, "data", self.inputs(context, name, {}), write, made)
        for line in counts.lines:
            context.say(f"data: {line}")

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        """Count examples and tokens; the run's own examples, where they are there."""
        from fusekit.pipeline.plan import count_rows

        prepared: list[Row] | None = None
        if step.state == DONE:
            prepared = planner.tried(step, lambda: planner.context.rows)
            step.notes += [counted(len(prepared), "example")] if prepared is not None else []
        planner.rows = found = count_rows(planner.recipe.data, planner.tokenizers, prepared)
        planner.plan.refused += found.problems
        step.rows, step.tokens = found.rows, found.of(found.tokens, PIVOT)
        known = step.rows is not None or found.problems
        (planner.plan.basis if known else planner.plan.unknown).extend(found.said)
        content = found.content_bytes
        if content is None and step.tokens is not None:
            content = TOKEN_BYTES * step.tokens
        if content is not None and step.rows is not None:
            step.disk = step.disk_at_most = content + ROW_BYTES * step.rows
        return []


def rows_of(context: Context, name: str) -> list[Row]:
    """The examples as one model reads them: cut again where it was added later and needs more tokens for them."""
    section, reader = context.recipe.data, context.reader(name)
    known = artifact.read(context.layout.data)
    made_for = known.made.get("for") if known is not None else None
    if isinstance(made_for, dict) and made_for.get(name) == reader.fingerprint:
        return context.rows
    prepared = prepare(context.rows, [reader], section.max_length, section.overlong)
    if prepared.counts.dropped:
        context.say(f"data for {name}: {prepared.counts}")
    return prepared.rows


def store_facts(context: Context, name: str, before: Mapping[str, Any], *, thorough: bool) -> Inputs:
    """What a store of this recipe would say of itself, by the names of StoreSpec; a detail is ``details.dtype``.

    A model that is not at hand, but has the name that it had, is taken to be the same; so is a folder at its former
    place, unless ``thorough``. A folder of another name is the same if its weights are.

    Args:
        context: of the run.
        name: of the model.
        before: the same of what is there, as far as it is known.
        thorough: read the weights of a folder through.

    Raises:
        CaptureError: the model cannot be found, and has another name than before, or a revision that is not the commit
            that it was.
    """
    from fusekit.capturing.capture import details_of, vocabulary_size

    section, choice = context.recipe.capture, context.choice(name)
    details = details_of(choice, context.recipe.data.train_on, section)
    facts: Inputs = {
        **section.kept(before.get("vocabulary", section.top_k)),
        **({} if section.rows_per_shard is None else {"rows_per_shard": section.rows_per_shard}),
        **{f"details.{key}": value for key, value in details.items() if key != "head_dtype" or value is not None},
    }
    has_its_name = choice.model == before.get("model")
    try:
        checkpoint, reader = context.checkpoint(name), context.reader(name)
    except CaptureError:
        commit = str(before.get("model_fingerprint")).split()[:2]  # a GGUF file's name may follow
        if not has_its_name or (choice.revision is not None and commit != ["commit", choice.revision]):
            raise
        return facts  # it has served, and may be gone
    facts |= {"tokenizer": reader.fingerprint, "vocabulary": vocabulary_size(checkpoint, reader)}
    if has_its_name and checkpoint.snapshot is None:
        too_large = context.most_hashed is not None and checkpoint.weight_bytes > context.most_hashed
        if too_large or not thorough:
            return facts
    if (fingerprint := context.fingerprint(name)) != before.get("model_fingerprint"):
        facts |= {"model": choice.model, "model_fingerprint": fingerprint}
    return facts


class Capture(Stage):
    """A store of every model, but for sources that are scored while training reads."""

    name = "capture"
    places = ("captures/",)
    needs = ("data",)
    shared = True

    def artifacts(self, context: Context) -> dict[str, Path]:
        live = {source.label for source in context.recipe.sources if source.on_the_fly}
        return {name: context.layout.store(name) for name in context.names if name not in live}

    def check_place(self, context: Context, name: str) -> None:
        check_store_place(context.layout.store(name))

    def status(self, context: Context, name: str) -> Status:
        return store_status(context, name, context.layout.store(name), rows_of(context, name))

    def make(self, context: Context) -> None:
        """Capture what each model says about the examples, or what is missing of it; note down the models' facts."""

        def say(name: str, line: str) -> None:
            context.say(f"capture {name}: {line}")

        for name, folder in self.artifacts(context).items():
            for line in context.checkpoint(name).notices:
                say(name, line)
            rows, settings = rows_of(context, name), context.recipe.capture
            store = captured(context, name, rows, folder, settings, notify=partial(say, name))
            say(name, f"{counted(len(store), 'example')} in {store.path}")
        context.processes.first_then_all(partial(describe, context))

    def mistakes(self, recipe: Recipe, layout: Layout | None = None) -> list[Mistake]:
        """Local models, templates and data that are missing or cannot be used, and ways of loading that are not there.

        layout: of the run, whose captures and rows are kept although what they were made from may be gone.
        """
        from fusekit.capturing.models import loading_mistakes

        def kept(folder: str) -> bool:
            return layout is not None and (layout.out / folder / artifact.MANIFEST).is_file()

        found: list[Mistake] = []
        for index, model in enumerate((recipe.pivot, *recipe.sources), -1):
            at: KeyPath = ("pivot",) if index < 0 else ("sources", index)
            name = PIVOT if index < 0 else recipe.sources[index].label
            found += [Mistake(says, (*at, "load", key)) for key, says in loading_mistakes(model.load)]
            if model.chat_template != PIVOT or index < 0:
                try:
                    ChatTemplate.chosen(model.chat_template)
                except DataError as error:
                    found.append(Mistake(str(error), (*at, "chat_template")))
            if is_repository(model.path) or kept(f"captures/{name}"):
                continue
            try:
                find_checkpoint(choice_of(model), weights=not model.path.endswith(SUFFIX), download=False)
            except FusekitError as error:
                found.append(Mistake(str(error), (*at, "model")))
        if not kept("data"):
            found += unreadable(recipe.data, ("data", "path"))
        return found

    def can_compare(self, planner: Planner, name: str) -> bool:
        return planner.done("data") and name in planner.tokenizers

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        from fusekit.capturing.capture import store_bytes
        from fusekit.capturing.engine import memory_needs

        if not step.work:
            return []
        name, found, settings = step.name, planner.rows, planner.recipe.capture
        tokens, labels = found.of(found.tokens, name), found.of(found.labels, name)
        checkpoint = planner.models.get(name)
        share = step.rows / found.rows if step.rows is not None and found.rows else 1.0
        step.rows = step.rows if step.rows is not None else found.rows
        step.tokens = round(tokens * share) if tokens is not None else None
        if checkpoint is None:
            planner.plan.unknown.append(f"capture {name}: how large {planner.context.model(name).path} is")
            return []
        needs = []
        if tokens is not None and labels is not None and found.rows is not None:
            sizes = {"rows": found.rows, "vocabulary": planner.vocabulary(name), "top_k": settings.top_k}
            # What the stage asks for takes every token for a label; what is expected does not.
            step.disk_at_most = round(share * store_bytes(tokens=tokens, labels=tokens, **sizes))
            step.disk = round(share * store_bytes(tokens=tokens, labels=labels, **sizes))
            what = f"disk ({counted(found.rows, 'captured example')} of {name}, at most)"
            needs.append(disk_need(what, step.disk_at_most, planner.place))
            step.pflop = 2 * planner.active(name) * share * tokens / 1e15
        memory = memory_needs(checkpoint, settings, planner.processes)
        step.memory = max((need.needed for need in memory), default=None)
        return needs + memory


def not_looked_at(recipe: Recipe) -> list[str]:
    """What of a recipe is on the hub, where :meth:`Capture.mistakes` does not look."""
    models = [model.path for model in (recipe.pivot, *recipe.sources) if is_repository(model.path)]
    data = [*recipe.data.paths, *(recipe.evaluate.paths if recipe.evaluate is not None else [])]
    return list(dict.fromkeys([*models, *filter(is_on_hub, data)]))


def check_store_place(folder: Path) -> None:
    """Refuse a folder that a store is to come to, if it holds other files. Raises StorageError."""
    from fusekit.capturing.writer import refuse_foreign

    if folder.is_dir() and not (folder / artifact.MANIFEST).exists():
        refuse_foreign(folder)


def store_status(context: Context, name: str, folder: Path, rows: list[Row]) -> Status:
    """Of a store of a model over some rows. Raises StorageError for a damaged one."""
    from fusekit.capturing.capture import data_fingerprint

    manifest = read_json(folder / artifact.MANIFEST, Manifest)
    if manifest is None:
        return Status(folder)
    before = artifact.flat(manifest.spec.model_dump())
    now = before | store_facts(context, name, before, thorough=True) | {"data": data_fingerprint(rows)}
    if changed := manifest.changes(now, [row.key for row in rows]):
        return Status(folder, STALE, tuple(changed))
    done = sum(record.stop - record.start for record in Store.open(folder, incomplete=True).records)
    if manifest.complete:
        return Status(folder, DONE)
    note = f"{done} of {counted(len(rows), 'example')} captured"
    return Status(folder, BEGUN, note=note, left=len(rows) - done) if done else Status(folder)


def captured(
    context: Context, name: str, rows: Sequence[Row], out: Path, settings: CaptureSettings, **options: Any
) -> Store:
    """What a model of the run says about some examples, captured where it is missing."""
    from fusekit.capturing.capture import Capture

    options |= {"ignore_estimates": context.ignore_estimates, "quiet": context.quiet}
    return Capture(context.checkpoint(name), context.reader(name), rows, out, settings, **options).run()


def describe(context: Context) -> None:
    """Describe the pivot and the sources for the report; of a model that is gone, what was known stays."""
    from fusekit.report.facts import ModelFacts, facts_of

    path, known = context.layout.models, {}
    with suppress(OSError, ValueError):
        known = TypeAdapter(dict[str, ModelFacts]).validate_json(path.read_bytes())
    for name in context.names:
        with suppress(FusekitError):
            checkpoint = context.checkpoint(name)
            if name not in known or known[name].commit != checkpoint.commit:
                known[name] = facts_of(checkpoint, context.reader(name).tokenizer)
    found = {name: known[name].model_dump(exclude_defaults=True) for name in context.names if name in known}
    data = (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()
    if not path.is_file() or path.read_bytes() != data:
        commit_file(path, data)


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
        from fusekit.capturing.capture import vocabulary_size

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
        shown: dict[str, list[Any]] = {}  # by data set, so that each has its examples
        more: list[Any] = []
        texts = (
            (message.content, row.dataset)
            for row in context.rows
            for message in row.messages
            if message.content and (row.is_text or message.role == "assistant")
        )
        for text, dataset in islice(texts, ALIGNED_TEXTS):
            found = align(text, pivot, theirs)
            quality.add(found)
            if len(shown.setdefault(dataset, [])) < SHOWN_OF_EACH and sum(map(len, shown.values())) < SHOWN_TEXTS:
                shown[dataset].append(found)
            elif len(more) < SHOWN_TEXTS:
                more.append(found)

        def write(into: Path) -> None:
            if made is not None:
                write_map(into, made)
            (into / "quality.json").write_text(json.dumps(quality.to_dict(), indent=2) + "\n", encoding="utf-8")
            surfaces = vocabulary_surfaces(pivot), vocabulary_surfaces(theirs)
            samples = [*chain.from_iterable(shown.values()), *more][:SHOWN_TEXTS]
            drawn = [sample_of(sample, surfaces, SHOWN_GROUPS) for sample in samples]
            write_samples(into / "samples.json", drawn)

        inputs = self.inputs(context, source, {})
        artifact.publish(context.layout.alignment(source), "align", inputs, write, context.made(started))
        share = quality.total.to_dict()
        context.say(f"align {source}: {share['row_share']:.1%} of {quality.pivot_tokens} pivot tokens get a row")

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        if step.work:
            step.disk = step.disk_at_most = PAGE_BYTES + MAP_BYTES * planner.vocabulary(step.name)
            step.rows = min(planner.rows.rows, ALIGNED_TEXTS) if planner.rows.rows is not None else None
        return []


def _vocabulary_map(context: Context, source: str) -> Any:
    """The map of a source into the pivot's vocabulary; None where the recipe wants none. It needs no captures."""
    from fusekit.capturing.capture import vocabulary_size
    from fusekit.distillation.inputs import Reading, projection_of
    from fusekit.distillation.projections import SAMPLED

    def reading(name: str) -> Reading:
        reader = context.reader(name)
        sample = [(row, reader.tokenize(row)) for row in context.rows[:SAMPLED]]
        return Reading(name, reader.tokenizer, sample, vocabulary_size(context.checkpoint(name), reader))

    how = alignment_of(context, source)
    return projection_of(how, reading(PIVOT), reading(source), context.rows).vocabulary_map


def _measure_worth(context: Context, source: str) -> None:
    """Measure, say and keep what a source's projected rows know; nothing where a model is not captured as it reads now.

    The result is a file of the pair's alignment, which itself needs no captures; it is made again when what it was
    measured on has changed. Raises StorageError for a damaged store, DistillationError for unusable rows.
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
    shards = [artifact.joined_hash(record.xxh3 for record in store.records) for store in stores]
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
