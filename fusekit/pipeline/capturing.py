"""The stages ``data`` and ``capture``, and the plain checkpoint of a pivot that is a GGUF file."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs
from fusekit.capturing.capture import Capture as CaptureJob
from fusekit.capturing.capture import data_fingerprint, details_of, store_bytes, vocabulary_size
from fusekit.capturing.models import dequantise, dequantise_needs, dequantised_from, find_checkpoint, loading_mistakes
from fusekit.capturing.store import Store, manifest_of
from fusekit.capturing.teacher import memory_needs
from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import DataCounts, files_of, is_on_hub, read_rows
from fusekit.data.templates import ChatTemplate
from fusekit.devices import Need, disk_need
from fusekit.disk import commit_file, counted
from fusekit.errors import CaptureError, DataError, FusekitError, RecipeError
from fusekit.gguf import SUFFIX
from fusekit.hub import is_repository
from fusekit.layout import PIVOT, Layout
from fusekit.pipeline.plan import Planner, count_rows
from fusekit.pipeline.stage import (
    BEGUN,
    DONE,
    STALE,
    Context,
    Stage,
    Status,
    Step,
    choice_of,
    write_json,
    write_rows,
)
from fusekit.recipe import Recipe, sections
from fusekit.recipe.sections import UNREAD
from fusekit.settings import CaptureSettings
from fusekit.types import Row
from fusekit.yaml import KeyPath, Mistake

LOOKED_AT = 10_000
"""Examples of local data that are read to check a recipe."""
ROW_BYTES, TOKEN_BYTES = 128, 4
"""Bytes of an example as JSON beside its contents; of a token of text, about."""


class DequantisedPivot(Stage):
    """The plain checkpoint of a pivot that is a GGUF file, which every stage reads."""

    name = PIVOT
    places = ("pivot",)

    def artifacts(self, context: Context) -> dict[str, Path]:
        return {"dequantised": context.layout.pivot} if context.recipe.pivot.path.endswith(SUFFIX) else {}

    def inputs(self, context: Context, _name: str, _before: Inputs) -> Inputs:
        return dequantised_from(context.choice(PIVOT), artifact.read(context.layout.pivot))

    def make(self, context: Context) -> None:
        for name, folder in self.artifacts(context).items():
            self.status(context, name).is_done()
            dequantise(context.choice(PIVOT), folder, ignore_estimates=context.ignore_estimates, say=context.say)

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        checkpoint = planner.models.get(PIVOT)
        if not step.work or checkpoint is None:
            return []
        memory, disk = dequantise_needs(checkpoint, planner.place)
        step.memory, step.disk = memory.needed, disk.needed
        return [memory, disk]


class Data(Stage):
    """The examples that all models read, filtered and cut alike."""

    name = "data"
    places = ("data",)

    def artifacts(self, context: Context) -> dict[str, Path]:
        return {"rows": context.layout.data}

    def inputs(self, context: Context, _name: str, before: Inputs) -> Inputs:
        """A file that is not here, but was read before, is taken to be the same."""
        section, known = context.recipe.data, before.get("files") or {}
        files = {path: hash_of(path) or known.get(path) for path in section.paths}
        return section.model_dump(mode="json", exclude={"size"}) | {"files": files}

    def make(self, context: Context) -> None:
        super().make(context)
        _ = context.rows  # which may be damaged

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
        artifact.publish(context.layout.data, self.name, self.inputs(context, name, {}), write, made)
        for line in counts.lines:
            context.say(f"data: {line}")

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        """Count examples and tokens; the run's own examples, where they are there."""
        prepared = planner.tried(step, lambda: planner.context.rows) if step.state == DONE else None
        planner.rows = found = count_rows(planner.recipe.data, planner.tokenizers, prepared)
        planner.plan.refused += found.problems
        planner.plan.unknown += found.unknown
        step.rows, step.tokens = found.rows, found.of(found.tokens, PIVOT)
        content = found.content_bytes
        if content is None and step.tokens is not None:
            content = TOKEN_BYTES * step.tokens
        if content is not None and step.rows is not None:
            step.disk = content + ROW_BYTES * step.rows
        return []


def unreadable(section: sections.Data | sections.Evaluate, place: KeyPath) -> list[Mistake]:
    """What is wrong with a section's data: missing, empty, or an example that is unusable. The hub is not asked."""
    each = isinstance(section, sections.Evaluate)  # whose limit is that of each file
    found, counts = [], DataCounts(getattr(section, "on_bad_row", "error"))
    left = min(section.limit or LOOKED_AT, LOOKED_AT)
    for path in section.paths:
        if path.startswith(UNREAD) or is_on_hub(path) or not left:
            continue
        try:
            files = files_of(path) if each else [path]
            read = sum(1 for file in files for _ in read_rows(file, limit=left, counts=counts))
            left -= 0 if each else read
            if not read:
                found.append(Mistake(f"there are no examples in {path}", place))
        except FusekitError as error:
            found.append(Mistake(str(error), place))
    return found


def hash_of(path: str) -> str | None:
    """xxh3-128 of a local file, or of the files of a folder; None for a data set on the hub. Raises FusekitError."""
    local = Path(path).expanduser()
    try:
        if local.is_file():
            return artifact.file_hash(local)
        if local.is_dir():
            files = sorted(file for file in local.iterdir() if file.is_file())
            return artifact.joined_hash(f"{file.name} {artifact.file_hash(file)}" for file in files)
    except OSError as error:
        raise FusekitError(f"{path}: cannot be read: {error}") from error
    return None


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
    place, unless ``thorough``. A folder of another name is the same if its weights are. Raises CaptureError for a model
    that is gone, and had another name, or is pinned to another commit than it was.

    before: the same of what is there, as far as it is known.
    """
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
    if has_its_name and checkpoint.snapshot is None and not thorough:
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
        """Capture what each model says about the examples, or what is missing of it, and describe the models."""

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
        """Models, templates and data here that are missing or cannot be used, and ways of loading that are not there.

        layout: of the run, whose captures and rows stay although what they were made from may be gone.
        """

        def kept(folder: str) -> bool:
            return layout is not None and (layout.out / folder / artifact.MANIFEST).is_file()

        found: list[Mistake] = []
        for index, (name, model) in enumerate(recipe.models.items(), -1):
            at: KeyPath = ("pivot",) if index < 0 else ("sources", index)
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
            step.disk = round(share * store_bytes(tokens=tokens, labels=labels, **sizes))
            # The stage asks for as much as if every token were a label.
            most = round(share * store_bytes(tokens=tokens, labels=tokens, **sizes))
            what = f"disk ({counted(found.rows, 'captured example')} of {name}, at most)"
            needs.append(disk_need(what, most, planner.place))
            step.pflop = 2 * planner.active(name) * share * tokens / 1e15
        memory = memory_needs(checkpoint, settings, planner.processes)
        step.memory = max((need.needed for need in memory), default=None)
        return needs + memory


def not_looked_at(recipe: Recipe) -> list[str]:
    """What of a recipe is on the hub, where :meth:`Capture.mistakes` does not look."""
    models = [model.path for model in recipe.models.values() if is_repository(model.path)]
    data = [*recipe.data.paths, *(recipe.evaluate.paths if recipe.evaluate is not None else [])]
    return list(dict.fromkeys([*models, *filter(is_on_hub, data)]))


def check_store_place(folder: Path) -> None:
    """Refuse a folder that a store is to come to, if it holds other files. Raises StorageError."""
    from fusekit.capturing.writer import refuse_foreign

    if folder.is_dir() and not (folder / artifact.MANIFEST).exists():
        refuse_foreign(folder)


def store_status(context: Context, name: str, folder: Path, rows: list[Row]) -> Status:
    """The status of a model's store over some examples. Raises StorageError for a damaged one."""
    manifest = manifest_of(folder)
    if manifest is None:
        return Status(folder)
    before = artifact.flat(manifest.inputs)
    now = before | store_facts(context, name, before, thorough=True) | {"data": data_fingerprint(rows)}
    if changed := manifest.changes(now, [row.key for row in rows]):
        return Status(folder, STALE, tuple(changed))
    done = sum(record.stop - record.start for record in Store.open(folder, incomplete=True).records.values())
    if manifest.complete:
        return Status(folder, DONE)
    note = f"{done} of {counted(len(rows), 'example')} captured"
    return Status(folder, BEGUN, note=note, left=len(rows) - done) if done else Status(folder)


def captured(
    context: Context, name: str, rows: Sequence[Row], out: Path, settings: CaptureSettings, **options: Any
) -> Store:
    """What a model of the run says about some examples, captured where it is missing."""
    options |= {"ignore_estimates": context.ignore_estimates, "quiet": context.quiet}
    return CaptureJob(context.checkpoint(name), context.reader(name), rows, out, settings, **options).run()


def describe(context: Context) -> None:
    """Describe the pivot and the sources for the report; of a model that is gone, what was known stays."""
    from fusekit.report.facts import ModelFacts, facts_of

    path, known = context.layout.models, {}
    with suppress(OSError, ValueError):
        known = TypeAdapter(dict[str, ModelFacts]).validate_json(path.read_bytes())
    for name in context.names:
        with suppress(FusekitError):
            known[name] = facts_of(context.checkpoint(name), context.reader(name).tokenizer)
    found = {name: known[name].model_dump(exclude_defaults=True) for name in context.names if name in known}
    data = (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()
    if not path.is_file() or path.read_bytes() != data:
        commit_file(path, data)
