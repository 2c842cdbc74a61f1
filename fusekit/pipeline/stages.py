"""The stages of a run. Each leaves its artifact, and does nothing where that is there and made from the same inputs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fusekit.diagnosis import circumstances
from fusekit.distillation.settings import AlignmentSettings
from fusekit.errors import FusekitError, RecipeError, StorageError
from fusekit.evaluation import lm_eval
from fusekit.evaluation.settings import LmEval
from fusekit.pipeline.layout import BASELINE, PIVOT, Layout
from fusekit.pipeline.readers import Readers, choice_of
from fusekit.pipeline.rows_file import read_rows_file, write_rows
from fusekit.pipeline.vouching import require_whole, weights_hash
from fusekit.recipe import Recipe
from fusekit.representation import ChatTemplate, Row, RowTokenizer, pack_text, prepare, read_rows
from fusekit.representation.checkpoint import ModelChoice, find_checkpoint
from fusekit.representation.load import load_tokenizer
from fusekit.representation.reading import is_on_hub
from fusekit.storage import artifact, commit_file
from fusekit.storage.artifact import Artifact, Inputs

Say = Callable[[str], None]

ALIGNED_TEXTS = 2000  # of which the quality of a pair is counted
SHOWN_TEXTS, SHOWN_OF_EACH = 8, 2  # at most, and of each source of data
SHOWN_GROUPS = 60  # of each text, in the report

DRAWING = ("dare_", "della")
"""Beginnings of the names of mergekit's methods that draw."""
CHANGE_THE_RESULT = (
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "out_shard_size",
    "copy_tokenizer",
    "write_model_card",
)
"""Options of mergekit whose value is in what it writes."""


@dataclass(eq=False)
class Context:
    """What every stage gets: the recipe, where things go, the models, and how to talk to the user.

    quiet: no progress of captures. merge_options: fields of mergekit's MergeOptions that were asked for.
    ignore_estimates: start stages although disk or memory do not seem to suffice.
    """

    recipe: Recipe
    layout: Layout
    readers: Readers
    say: Say
    quiet: bool = False
    merge_options: Mapping[str, Any] = field(default_factory=dict)
    ignore_estimates: bool = False

    @cached_property
    def rows(self) -> list[Row]:
        """The prepared rows. Raises StorageError where they are damaged."""
        return read_rows_file(self.layout.data)

    @property
    def targets(self) -> list[Path]:
        """Where the targets of the recipe are, or will be."""
        from fusekit.distillation.outputs import targets_of

        names = [source.label for source in self.recipe.sources]
        return [target.folder for target in targets_of(self.recipe.settings, names, self.layout.targets)]

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
    inputs = data_inputs(context)
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
    inputs, before = data_inputs(context), known.inputs.get("files", {})
    inputs["files"] = {path: hash_ or before.get(path) for path, hash_ in inputs["files"].items()}
    context.done(context.layout.data, inputs)


def data_inputs(context: Context) -> Inputs:
    """What the rows are made from."""
    section = context.recipe.data
    said = section.model_dump(mode="json", exclude={"size"})  # a size is for plans alone
    return said | {"files": {path: _file_hash(path) for path in _paths(section.path)}}


def _paths(path: str | list[str]) -> list[str]:
    return [path] if isinstance(path, str) else path


def represent(context: Context, name: str, rows: list[Row]) -> None:
    """Capture what a model says about the rows, or what is missing of it."""
    from fusekit.representation.represent import represent as capture

    settings = capture_settings(context)
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


def capture_settings(context: Context) -> Any:
    """The section ``represent`` as :func:`fusekit.representation.represent.represent` takes it."""
    from fusekit.representation.capture import CaptureOptions
    from fusekit.representation.represent import Settings
    from fusekit.representation.topk import Selection

    section = context.recipe.represent
    return Settings(
        selection=Selection(section.top_k, section.keep_mass, section.temperature),
        max_error=section.max_error,
        batch_tokens=section.batch_tokens,
        rows_per_shard=section.rows_per_shard,
        options=CaptureOptions(quiet=context.quiet, max_quarantined=section.max_quarantined),
        ignore_estimates=context.ignore_estimates,
    )


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
    """Make the vocabulary map that a pair is distilled with, and count what its alignment links and loses."""
    from fusekit.alignment import align as align_text
    from fusekit.alignment import vocabulary_surfaces
    from fusekit.alignment.html import page
    from fusekit.alignment.quality import AlignmentQuality
    from fusekit.alignment.samples import sample_of, write_samples
    from fusekit.distillation.vocabulary_maps import write_map
    from fusekit.pipeline.vocabulary import vocabulary_map

    recipe = context.recipe
    pivot, theirs = context.readers.reader(PIVOT), context.readers.reader(source)
    inputs = align_inputs(context, source, rows)
    folder = context.layout.alignment(source)
    if context.done(folder, inputs):
        return
    started = time.monotonic()
    made = vocabulary_map(context, source, rows)
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
        if made is not None:
            write_map(into, made)
        (into / "quality.json").write_text(quality.to_json() + "\n", encoding="utf-8")
        surfaces = vocabulary_surfaces(pivot.tokenizer), vocabulary_surfaces(theirs.tokenizer)
        samples = [*chain.from_iterable(shown.values()), *more][:SHOWN_TEXTS]
        (into / "quality.html").write_text(page(quality, samples, surfaces), encoding="utf-8")
        drawn = [sample_of(sample, surfaces).beginning(SHOWN_GROUPS) for sample in samples]
        write_samples(into / "samples.json", drawn)

    artifact.publish(folder, "align", inputs, write, context.made(started))
    share = quality.total.to_dict()
    context.say(f"align {source}: {share['row_share']:.1%} of {quality.pivot_tokens} pivot tokens get a row")


def align_inputs(context: Context, source: str, rows: list[Row]) -> Inputs:
    """What the vocabulary map and the quality of a pair are made from."""
    return {
        "pivot": context.readers.reader(PIVOT).fingerprint,
        "source": context.readers.reader(source).fingerprint,
        "vocabulary": alignment_of(context, source).vocabulary,
        "ids": ids_of(context, source),
        "data": _rows_hash(rows),
    }


def alignment_of(context: Context, source: str) -> AlignmentSettings:
    """How a source's rows come to stand in the pivot's vocabulary."""
    return context.recipe.alignment_of(next(known for known in context.recipe.sources if known.label == source))


def ids_of(context: Context, source: str) -> int:
    """Above every id that a source's store can hold."""
    from fusekit.representation.represent import vocabulary_size

    return vocabulary_size(context.readers.checkpoint(source), context.readers.reader(source))


def merge_inputs(context: Context, targets: list[Path]) -> Inputs:
    """What the merged model is made from.

    The seed counts only for methods that draw, and options of mergekit only where they change what is written.
    """
    section = context.recipe.merge or {}
    options = {name: value for name, value in context.merge_options.items() if name in CHANGE_THE_RESULT}
    seed = context.merge_options.get("random_seed", context.recipe.seed)
    drawn = {"seed": seed} if str(section.get("merge_method")).startswith(DRAWING) else {}
    return {
        "merge": dict(context.recipe.merge or {}),
        "pivot": context.readers.fingerprint(PIVOT),
        "targets": {path.name: weights_hash(path) for path in targets},
        **drawn,
        **({"options": options} if options else {}),
    }


def check_held_out(context: Context) -> None:
    """Refuse held-out rows that are not there or no rows, as far as the first of each file tells; the hub is not asked.

    Raises DataError, RecipeError.
    """
    section = context.recipe.evaluate
    for path in _paths(section.path) if section is not None else []:
        if not is_on_hub(path) and next(read_rows(path, limit=1), None) is None:
            raise RecipeError(f"evaluate: there are no rows in {path}")


def evaluate(context: Context, targets: list[Path]) -> dict[str, Any] | None:
    """Score every model on the held-out rows; those that are scored already are not scored again."""
    section = context.recipe.evaluate
    if section is None:
        return None
    from fusekit.evaluation.held_out import held_out_hash, held_out_rows
    from fusekit.evaluation.metrics import evaluate_model

    layout = context.layout
    paths = _paths(section.path)
    how = section.model_dump(include={"limit", "split", "revision", "name"})
    read = {path: held_out_rows(path, **how) for path in paths}
    held_out = {path: held_out_hash(path, _file_hash(path), section.limit, rows) for path, rows in read.items()}
    rows = list(chain.from_iterable(read[path] for path in paths))
    pivot = context.recipe.pivot
    models = {PIVOT: (choice_of(pivot), pivot.chat_template)}
    own = replace(choice_of(pivot), revision=None)  # what was made of the pivot is loaded as the pivot is
    if context.recipe.wants_baseline:
        models[BASELINE] = (replace(own, model=str(layout.baselines / "sft")), pivot.chat_template)
    for source in context.recipe.sources:
        template = "own" if source.chat_template == PIVOT else source.chat_template
        models[f"sources/{source.label}"] = (choice_of(source), template)
    for path in targets:
        models[f"targets/{path.name}"] = (replace(own, model=str(path)), pivot.chat_template)
    if context.recipe.merge is not None:
        models["merged"] = (replace(own, model=str(layout.merged)), pivot.chat_template)
    results: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for name, (choice, template) in models.items():
        identity = {
            "model": _identity(choice.model, context, name),
            "load": {"dtype": choice.dtype, "quantization": choice.quantization},
            "chat_template": template,
            "reads": _reads(choice, template),
        }
        inputs = identity | {"metrics": list(section.metrics), "held_out": held_out, "limit": section.limit}
        folder = layout.evaluation(name)
        if not artifact.is_kept(folder, inputs):
            artifact.refuse_foreign(folder)  # now, not once the scores are there
            started = time.monotonic()
            _require_whole(name, choice)
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
        if section.lm_eval is not None:
            figures[name] = _lm_eval(context, section.lm_eval, name, (choice, template), identity)
            results[name]["lm_eval"] = {task: shown["value"] for task, shown in figures[name].items()}
    document = {"models": results}
    if section.lm_eval is not None:
        document["lm_eval"] = lm_eval.described(figures)
    data_out = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    commit_file(layout.results, lambda file: file.write(data_out))
    return document


def _lm_eval(
    context: Context, settings: LmEval, name: str, model: tuple[ModelChoice, str], identity: Inputs
) -> dict[str, dict[str, Any]]:
    """A model's figures on the tasks of lm-eval, by task."""

    def say(line: str) -> None:
        context.say(f"evaluate {name}: {line}")

    def load() -> lm_eval.Harness:
        _require_whole(name, model[0])
        return lm_eval.load_harness(*model, settings, say)

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
        require_whole(Path(choice.model))


def _is_input(name: str) -> bool:
    """Whether a model that is evaluated was given to the run, not made by it."""
    return name == PIVOT or name.startswith("sources/")


def _reads(choice: ModelChoice, template: str) -> str:
    """Of a model's tokenizer and the content of its chat template, whatever file they are in."""
    tokenizer = load_tokenizer(find_checkpoint(choice))
    return RowTokenizer(tokenizer, ChatTemplate.chosen(template)).fingerprint


def _file_hash(path: str) -> str | None:
    """Of a local file or the files of a folder; None for a data set on the hub."""
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
