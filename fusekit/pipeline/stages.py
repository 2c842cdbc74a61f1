"""The stages of a run. Each leaves its artifact, and does nothing where that is there and made from the same inputs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from fusekit.diagnosis import circumstances
from fusekit.errors import FusekitError, RecipeError, StorageError
from fusekit.pipeline.layout import BASELINE, PIVOT, Layout
from fusekit.pipeline.readers import Readers, choice_of
from fusekit.pipeline.rows_file import read_rows_file, write_rows
from fusekit.recipe import Recipe
from fusekit.representation import ChatTemplate, Row, RowTokenizer, pack_text, prepare, read_rows
from fusekit.representation.checkpoint import ModelChoice, find_checkpoint
from fusekit.representation.load import load_tokenizer
from fusekit.storage import artifact, commit_file
from fusekit.storage.artifact import Artifact, Inputs

Say = Callable[[str], None]

ALIGNED_TEXTS = 2000  # of which the quality of a pair is counted
SHOWN_TEXTS, SHOWN_OF_EACH = 8, 2  # at most, and of each source of data
SHOWN_GROUPS = 60  # of each text, in the report


@dataclass(eq=False)
class Context:
    """What every stage gets: the recipe, where things go, the models, and how to talk to the user.

    quiet: no progress of captures.
    """

    recipe: Recipe
    layout: Layout
    readers: Readers
    say: Say
    quiet: bool = False

    def made(self, started: float) -> Inputs:
        """What may differ between equal artifacts."""
        return {**circumstances(), "seconds": round(time.monotonic() - started, 3)}

    def done(self, folder: Path, inputs: Inputs) -> Artifact | None:
        """The artifact, if it is there and made from these inputs.

        Raises StorageError naming every input that differs, both values, and the way out.
        """
        found = artifact.read(folder)
        if found is None:
            return None
        if changed := artifact.differences(found.inputs, inputs):
            raise StorageError(
                f"{folder} was made from something else:\n  "
                + "\n  ".join(changed)
                + f"\nGo back to what it was, remove {folder} to make it anew, or choose another output"
            )
        return found


def data(context: Context) -> list[Row]:
    """Read, filter and cut the rows, alike for the models of the recipe."""
    section = context.recipe.data
    paths = _paths(section.path)
    inputs = _data_inputs(context)
    folder = context.layout.data
    if context.done(folder, inputs) is None:
        started = time.monotonic()
        readers = [context.readers.reader(name) for name in context.readers.names]
        rows: Iterator[Row] = chain.from_iterable(
            read_rows(
                path,
                split=section.split,
                revision=section.revision,
                streaming=section.streaming,
                name=section.name,
            )
            for path in paths
        )
        rows = rows if section.limit is None else islice(rows, section.limit)
        if section.pack:
            rows = iter(pack_text(rows, readers, section.max_length))
        prepared = prepare(rows, readers, section.max_length, section.overlong)
        if not prepared.rows:
            raise RecipeError(f"data: there are no rows in {', '.join(paths)}")

        def write(into: Path) -> None:
            write_rows(into, prepared.rows)
            _write_json(into / "counts.json", prepared.counts.as_dict())

        made = context.made(started) | {
            "for": {n: context.readers.reader(n).fingerprint for n in context.readers.names}
        }
        artifact.publish(folder, "data", inputs, write, made)
        context.say(f"data: {prepared.counts}")
    return read_rows_file(folder)


def check_data(context: Context) -> None:
    """Refuse rows that another recipe prepared. A file that is not here, on another machine, is not asked about.

    Raises StorageError naming what differs.
    """
    known = artifact.read(context.layout.data)
    if known is None:
        raise StorageError(f"{context.layout.data} is not there: the stage `data` comes first")
    inputs, before = _data_inputs(context), known.inputs.get("files", {})
    inputs["files"] = {path: hash_ or before.get(path) for path, hash_ in inputs["files"].items()}
    context.done(context.layout.data, inputs)


def _data_inputs(context: Context) -> Inputs:
    section = context.recipe.data
    return section.model_dump(mode="json") | {"files": {path: _file_hash(path) for path in _paths(section.path)}}


def _paths(path: str | list[str]) -> list[str]:
    return [path] if isinstance(path, str) else path


def represent(context: Context, name: str, rows: list[Row]) -> None:
    """Capture what a model says about the rows, or what is missing of it."""
    from fusekit.representation.capture import CaptureOptions
    from fusekit.representation.represent import Settings
    from fusekit.representation.represent import represent as capture
    from fusekit.representation.topk import Selection

    section = context.recipe.represent
    settings = Settings(
        selection=Selection(section.top_k, section.keep_mass, section.temperature),
        max_error=section.max_error,
        batch_tokens=section.batch_tokens,
        rows_per_shard=section.rows_per_shard,
        options=CaptureOptions(quiet=context.quiet, max_quarantined=section.max_quarantined),
    )
    reader = context.readers.reader(name)
    own = rows_of(context, name, rows)
    store = capture(
        context.readers.checkpoint(name),
        reader,
        own,
        context.layout.representation(name),
        settings,
        notify=lambda line: context.say(f"represent {name}: {line}"),
    )
    context.say(f"represent {name}: {len(store)} rows in {store.path}")


def rows_of(context: Context, name: str, rows: list[Row]) -> list[Row]:
    """The rows as one model reads them: cut further where it came after they were cut, and needs more tokens."""
    section = context.recipe.data
    known = artifact.read(context.layout.data)
    made_for, reader = known.made.get("for") if known is not None else None, context.readers.reader(name)
    if isinstance(made_for, dict) and made_for.get(name) == reader.fingerprint:
        return rows
    prepared = prepare(rows, [reader], section.max_length, section.overlong)
    if prepared.counts.dropped:
        context.say(f"data for {name}: {prepared.counts}")
    return prepared.rows


def align(context: Context, source: str, rows: list[Row]) -> None:
    """Count what the alignment of a pair links and loses. The vocabulary map is made, and kept, where it is used."""
    from fusekit.alignment import align as align_text
    from fusekit.alignment import vocabulary_surfaces
    from fusekit.alignment.html import page
    from fusekit.alignment.quality import AlignmentQuality
    from fusekit.alignment.samples import sample_of, write_samples

    recipe = context.recipe
    pivot, theirs = context.readers.reader(PIVOT), context.readers.reader(source)
    settings = recipe.alignment_of(next(s for s in recipe.sources if s.label == source))
    inputs = {
        "pivot": pivot.fingerprint,
        "source": theirs.fingerprint,
        "alignment": settings.model_dump(mode="json"),
        "data": _rows_hash(rows),
    }
    folder = context.layout.alignment(source)
    if context.done(folder, inputs):
        return
    started = time.monotonic()
    quality = AlignmentQuality(recipe.pivot.model, context.readers.model(source).model)
    shown: dict[str, list[Any]] = {}  # by the source of data, so that each has its examples
    more: list[Any] = []
    texts = (
        (message.content, row.dataset)
        for row in rows
        for message in row.messages
        if message.content and (row.is_text or message.role == "assistant")
    )
    for text, dataset in islice(texts, ALIGNED_TEXTS):
        found = align_text(text, pivot.tokenizer, theirs.tokenizer)
        quality.add(found, dataset)
        room = len(shown.setdefault(dataset, [])) < SHOWN_OF_EACH and sum(map(len, shown.values())) < SHOWN_TEXTS
        if room:
            shown[dataset].append(found)
        elif len(more) < SHOWN_TEXTS:
            more.append(found)

    def write(into: Path) -> None:
        (into / "quality.json").write_text(quality.to_json() + "\n", encoding="utf-8")
        surfaces = vocabulary_surfaces(pivot.tokenizer), vocabulary_surfaces(theirs.tokenizer)
        samples = [*chain.from_iterable(shown.values()), *more][:SHOWN_TEXTS]
        (into / "quality.html").write_text(page(quality, samples, surfaces), encoding="utf-8")
        drawn = [sample_of(sample, surfaces).beginning(SHOWN_GROUPS) for sample in samples]
        write_samples(into / "samples.json", drawn)

    artifact.publish(folder, "align", inputs, write, context.made(started))
    share = quality.total.to_dict()
    context.say(f"align {source}: {share['row_share']:.1%} of {quality.pivot_tokens} pivot tokens get a row")


def distill(context: Context, rows: list[Row]) -> list[Path]:
    """Train a target per source, or one for all, and plain fine-tuning on the same rows to compare them with."""
    from fusekit.distillation.inputs import Inputs as DistillInputs
    from fusekit.distillation.inputs import Source
    from fusekit.distillation.run import distill as train

    recipe, layout = context.recipe, context.layout
    inputs = DistillInputs(
        choice_of(recipe.pivot),
        rows,
        layout.representation(PIVOT),
        {
            source.label: Source(layout.representation(source.label), source.model, recipe.alignment_of(source))
            for source in recipe.sources
        },
        context.readers.reader(PIVOT),
    )
    settings = recipe.settings
    targets = train(inputs, settings, layout.targets, resume=True, say=lambda line: context.say(f"distill {line}"))
    if recipe.evaluate is not None and recipe.evaluate.baseline and settings.training.lm_weight < 1:
        plain = settings.model_copy(update={"training": settings.training.model_copy(update={"lm_weight": 1.0})})
        alone = replace(inputs, sources={})
        train(alone, plain, layout.baselines, resume=True, say=lambda line: context.say(f"distill {line}"))
    return targets


def merge(context: Context, targets: list[Path]) -> None:
    """Merge the targets into one model by mergekit, and leave the recipe that does it behind."""
    section = context.recipe.merge
    if section is None:
        return
    from mergekit.options import MergeOptions

    from fusekit.merging import Settings
    from fusekit.merging import merge as run_merge

    layout = context.layout
    base = str(context.readers.checkpoint(PIVOT).folder)
    models: dict[str, Any] = {"models": [{"model": str(path)} for path in targets]}
    if _takes_base(str(section.get("merge_method"))):
        models["base_model"] = base
    recipe = models | dict(section)
    text = (
        "# The merge of this run. It can be repeated by mergekit alone: mergekit-yaml "
        f"{layout.merge_recipe.name} OUT\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    )
    inputs = {
        "merge": dict(section),
        "pivot": context.readers.checkpoint(PIVOT).fingerprint(),
        "targets": {path.name: _weights_hash(path) for path in targets},
    }
    final = layout.merged
    known = artifact.read(final)
    if known is not None and not artifact.differences(known.inputs, artifact.plain(inputs)):
        return
    if known is not None and set(known.inputs.get("targets", {})) == set(inputs["targets"]):
        context.done(final, inputs)  # says what differs
    commit_file(layout.merge_recipe, lambda file: file.write(text.encode()))
    started = time.monotonic()

    def finish(folder: Path) -> None:
        artifact.seal(folder, "merge", inputs, context.made(started))

    settings = Settings(
        overwrite=known is not None, say=lambda line: context.say(f"merge: {line}"), before_publishing=finish
    )
    merged = run_merge(layout.merge_recipe, final, MergeOptions(quiet=True), settings)
    context.say(f"merge: {merged}")


def _takes_base(method: str) -> bool:
    """Whether a merge method has a base; where it ignores one, mergekit averages it in like any other model."""
    from mergekit.merge_methods import registered_methods

    import fusekit.merge_methods  # noqa: F401  registers fusekit's methods with mergekit

    found = {known.spec.name: known.spec.contract.base.value for known in registered_methods()}
    return found.get(method) != "ignored"


def evaluate(context: Context, targets: list[Path]) -> dict[str, Any] | None:
    """Score every model on the held-out rows; those that are scored already are not scored again."""
    section = context.recipe.evaluate
    if section is None:
        return None
    from fusekit.evaluation.metrics import evaluate_model

    layout = context.layout
    paths = _paths(section.path)
    held_out = {path: _file_hash(path) for path in paths}
    rows = list(chain.from_iterable(read_rows(path, limit=section.limit) for path in paths))
    pivot = context.recipe.pivot
    models = {PIVOT: (choice_of(pivot), pivot.chat_template)}
    own = replace(choice_of(pivot), revision=None)  # what was made of the pivot is loaded as the pivot is
    if section.baseline and (layout.baselines / "sft").is_dir():
        models[BASELINE] = (replace(own, model=str(layout.baselines / "sft")), pivot.chat_template)
    for source in context.recipe.sources:
        template = "own" if source.chat_template == PIVOT else source.chat_template
        models[f"sources/{source.label}"] = (choice_of(source), template)
    for path in targets:
        models[f"targets/{path.name}"] = (replace(own, model=str(path)), pivot.chat_template)
    if context.recipe.merge is not None and layout.merged.is_dir():
        models["merged"] = (replace(own, model=str(layout.merged)), pivot.chat_template)
    results: dict[str, Any] = {}
    for name, (choice, template) in models.items():
        inputs = {
            "model": _identity(choice.model, context, name),
            "load": {"dtype": choice.dtype, "quantization": choice.quantization},
            "chat_template": template,
            "reads": _reads(choice, template),
            "metrics": list(section.metrics),
            "held_out": held_out,
            "limit": section.limit,
        }
        folder = layout.evaluation(name)
        known = artifact.read(folder)
        if known is None or artifact.differences(known.inputs, inputs):
            started = time.monotonic()
            scores = evaluate_model(
                choice, rows, metrics=section.metrics, template=template, batch_tokens=section.batch_tokens
            )
            plain = {metric: {key: score.value for key, score in found.items()} for metric, found in scores.items()}
            artifact.publish(
                folder,
                "evaluate",
                inputs,
                lambda into, plain=plain: _write_json(into / "scores.json", plain),  # type: ignore[misc]
                context.made(started),
            )
            context.say(f"evaluate {name}: {_means(plain)}")
        results[name] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    document = {"models": results}
    data_out = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    commit_file(layout.results, lambda file: file.write(data_out))
    return document


def _means(scores: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{metric} {math.fsum(found.values()) / len(found):.4f}" for metric, found in scores.items())


def _identity(model: str, context: Context, name: str) -> str:
    if name == PIVOT or name.startswith("sources/"):
        return context.readers.checkpoint(name.removeprefix("sources/")).fingerprint()
    return _weights_hash(Path(model))


def _reads(choice: ModelChoice, template: str) -> str:
    """Of a model's tokenizer and the content of its chat template, whatever file they are in."""
    tokenizer = load_tokenizer(find_checkpoint(choice))
    return RowTokenizer(tokenizer, ChatTemplate.chosen(template)).fingerprint


def _weights_hash(folder: Path) -> str:
    """Of a checkpoint's weights, configuration and tokenizer: what a merge and an evaluation depend on."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".jinja"))
    names += [name for name in ("config.json", "tokenizer.json", "tokenizer_config.json") if (folder / name).is_file()]
    try:
        return artifact.joined_hash(artifact.file_hash(folder / name) for name in names)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read: {error}") from error


def _file_hash(path: str) -> str | None:
    """Of a local file or the files of a folder; None for a data set on the hub, which its revision names."""
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


def _rows_hash(rows: list[Row]) -> str:
    return artifact.joined_hash(f"{row.key} {row.cut}" for row in rows)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
