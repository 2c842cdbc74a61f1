"""The stages of a run. Each leaves its artifact, and does nothing where that is there and made from the same inputs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact
from fusekit.artifacts import Artifact, Inputs
from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import read_rows
from fusekit.distillation.settings import AlignmentSettings
from fusekit.environment import circumstances
from fusekit.errors import FusekitError, RecipeError, StorageError
from fusekit.gguf import split
from fusekit.pipeline.layout import PIVOT, Layout
from fusekit.pipeline.readers import Readers
from fusekit.pipeline.rows_file import read_rows_file, write_rows
from fusekit.pipeline.vouching import weights_hash
from fusekit.recipe import Recipe
from fusekit.types import Row

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


def dequantised_pivot(context: Context) -> None:
    """Make a plain checkpoint of a pivot that is a GGUF file, once: it is what every stage reads."""
    from fusekit.capturing.load import dequantise

    choice = context.readers.choice(PIVOT)
    if choice.dequantised is not None and split(choice.model) is not None:
        dequantise(choice, choice.dequantised, ignore_estimates=context.ignore_estimates, say=context.say)


def data(context: Context) -> list[Row]:
    """Read, filter and cut the rows, alike for the models of the recipe."""
    section = context.recipe.data
    paths = paths_of(section.path)
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
            write_json(into / "counts.json", prepared.counts.as_dict())

        made = context.made(started) | {
            "for": {n: context.readers.reader(n).fingerprint for n in context.readers.names},
            "date": context.readers.date.isoformat(),
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
    return said | {"files": {path: hash_of(path) for path in paths_of(section.path)}}


def paths_of(path: str | list[str]) -> list[str]:
    """The paths of a recipe's ``path``, which may be one."""
    return [path] if isinstance(path, str) else path


def capture(context: Context, name: str, rows: list[Row]) -> None:
    """Capture what a model says about the rows, or what is missing of it."""
    from fusekit.capturing.capture import capture as capture_model

    reader = context.readers.reader(name)
    own = rows_of(context, name, rows)
    store = capture_model(
        context.readers.checkpoint(name),
        reader,
        own,
        context.layout.store(name),
        context.recipe.capture,
        ignore_estimates=context.ignore_estimates,
        quiet=context.quiet,
        notify=lambda line: context.say(f"capture {name}: {line}"),
    )
    context.say(f"capture {name}: {len(store)} rows in {store.path}")


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
    """Make the vocabulary map that a pair is distilled with, count what its alignment links and loses, and measure what
    the teacher is worth where the models' rows are captured."""
    from fusekit.pipeline.worth import measure_worth

    inputs = align_inputs(context, source, rows)
    if context.done(context.layout.alignment(source), inputs) is None:
        _align(context, source, rows, inputs)
    measure_worth(context, source, rows)


def _align(context: Context, source: str, rows: list[Row], inputs: Inputs) -> None:
    from fusekit.alignment import vocabulary_surfaces
    from fusekit.alignment.alignment import align as align_text
    from fusekit.alignment.quality import AlignmentQuality
    from fusekit.alignment.samples import sample_of, write_samples
    from fusekit.distillation.vocabulary_maps import write_map
    from fusekit.pipeline.vocabulary import vocabulary_map

    recipe = context.recipe
    pivot, theirs = context.readers.reader(PIVOT), context.readers.reader(source)
    started = time.monotonic()
    made = vocabulary_map(context, source, rows)
    quality = AlignmentQuality(recipe.pivot.path, context.readers.model(source).path)
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
        drawn = [sample_of(sample, surfaces).beginning(SHOWN_GROUPS) for sample in samples]
        write_samples(into / "samples.json", drawn)

    artifact.publish(context.layout.alignment(source), "align", inputs, write, context.made(started))
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
    from fusekit.capturing.capture import vocabulary_size

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


def hash_of(path: str) -> str | None:
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


def write_json(path: Path, value: Any) -> None:
    """Write a value to a file of an artifact that is being made."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
