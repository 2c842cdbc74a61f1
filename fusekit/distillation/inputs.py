"""What a training reads, opened and checked against each other: stores by name, or whatever a trainer is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from fusekit import artifacts as artifact
from fusekit.alignment.ends import tokenize
from fusekit.capturing.capture import Tokenizes, capture_rows
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint, load_tokenizer
from fusekit.capturing.store import STAGE, Store, StoreSpec, date_of
from fusekit.data.prepare import prepare
from fusekit.data.reading import DataCounts, rows_of
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes
from fusekit.disk import with_article
from fusekit.distillation.arguments import FusionConfig, OneDevice
from fusekit.distillation.batching import BLANK, Example
from fusekit.distillation.dataset import FusionDataset, characters
from fusekit.distillation.live import LiveTeacher, Loaded, live_teacher
from fusekit.distillation.projections import SAMPLED, Projection, make_map, needs_pivot, read_map
from fusekit.distillation.settings import (
    VOCABULARIES,
    AlignmentSettings,
    DistillSettings,
    TrainingSettings,
    refuse_names,
    refuse_nobody,
)
from fusekit.errors import DataError, DistillationError
from fusekit.generation.respond import questions_of, respond
from fusekit.layout import PIVOT
from fusekit.settings import CaptureSettings, RespondSettings
from fusekit.types import Part, Row, TokenizedRow

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A model that teaches.

    Attributes:
        store: folder of what it said about the rows; None to score it while training reads.
        tokenizer: the model that has its tokenizer, a folder or hub name where nothing else has to be said of it; None
            for the model that the store names.
        alignment: settings of its own; None for the run's.
        reader: how it reads conversations, for ``on_policy`` and without a store; None for its own template.
        vocabulary_map: folder of the map that was made of the same rows
            (:func:`fusekit.distillation.projections.write_map`); None to make it here.
        live: what is kept of its distributions, where there is no store; None for the defaults. ``tokenizer`` is then
            the model.
        rows: as this model reads them, where there is no store; None for the run's.
    """

    store: Path | None
    tokenizer: ModelChoice | str | None = None
    alignment: AlignmentSettings | None = None
    reader: RowTokenizer | None = None
    vocabulary_map: Path | None = None
    live: CaptureSettings | None = None
    rows: Sequence[Row] | None = None

    def tokenizer_choice(self, stored: str) -> ModelChoice:
        """The model that has its tokenizer. stored: the one that the store names."""
        choice = self.tokenizer or stored
        return choice if isinstance(choice, ModelChoice) else ModelChoice(choice)


@dataclass(frozen=True)
class Responses:
    """Models' own answers to the questions of the data, the best of each: ``rows``, and by key their ``writers``.

    stores: by model, the folder of what it said about the answers: the pivot about all, a source about its own.
    """

    rows: Sequence[Row]
    writers: Mapping[str, str]
    stores: Mapping[str, Path]


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        pivot: the model to train.
        rows: the data that the stores were captured from; rows that no store has may be among them.
        pivot_store: folder of what the pivot said about them; None where that is not wanted.
        sources: by name.
        row_tokenizer: how the pivot reads rows that its store lacks; needed without a store.
        responses: what a schedule also trains on.
        max_length: most tokens of an example, for ``on_policy``.
    """

    pivot: ModelChoice
    rows: Sequence[Row]
    pivot_store: Path | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    row_tokenizer: Tokenizes | None = None
    responses: Responses | None = None
    max_length: int = 2048


@dataclass(frozen=True, eq=False)
class Opened:
    """Inputs that fit each other. fingerprint, tokenizer: the pivot's."""

    inputs: Inputs
    settings: DistillSettings
    checkpoint: Checkpoint
    fingerprint: str
    tokenizer: Any
    pivot_store: Store | None
    stores: dict[str, Store | LiveTeacher]
    projections: dict[str, Projection]

    def examples(self, sources: Sequence[str]) -> tuple[FusionDataset, FusionDataset | None]:
        """Those of the model that these sources teach, and of a schedule the answers, each taught by its writer."""
        given, training = self.inputs.responses, self.settings.training
        of = partial(
            FusionDataset,
            projections=self.projections,
            tokenizer=self.inputs.row_tokenizer,
            fusion=self.settings.fusion,
            relative=training.lm_weighting == "relative",
        )
        stores = {name: self.stores[name] for name in sources}
        data = of(self.inputs.rows, pivot=self.pivot_store, sources=stores)
        if training.schedule is None:
            return data, None
        if given is None:
            raise DistillationError(
                "a schedule trains on models' own answers, but there are none: `fusekit run` makes them from the "
                "recipe's section `respond`"
            )
        if live := [name for name, store in stores.items() if isinstance(store, LiveTeacher)]:
            raise DistillationError(
                f"a schedule reads stores, but {live[0]} is scored on the fly: capture it, or drop the schedule"
            )
        opened = {name: Store.open(given.stores[name]) for name in (PIVOT, *sources) if name in given.stores}
        return data, of(given.rows, pivot=opened.pop(PIVOT, None), sources=opened, writers=given.writers)


def open_inputs(inputs: Inputs, settings: DistillSettings, sources: Sequence[str], say: Say = lambda _: None) -> Opened:
    """Find the pivot, open the stores of ``sources``, and make their vocabulary maps.

    Raises DistillationError: stores of another temperature, pivot or tokenizer than the run's.
    """
    if settings.training.lm_weighting == "relative" and inputs.pivot_store is None and sources:
        raise DistillationError(
            "lm_weighting relative compares the teachers with the pivot, but there is no store of the pivot: capture "
            "it, or use lm_weighting constant"
        )
    checkpoint, processes = find_checkpoint(inputs.pivot), Processes.current()
    processes.first_then_all(checkpoint.fetch)
    fingerprint = processes.first_then_all(checkpoint.fingerprint)
    own = Store.open(inputs.pivot_store) if inputs.pivot_store is not None else None
    stores: dict[str, Store | LiveTeacher] = {}
    for name in sources:
        source = inputs.sources[name]
        if source.store is not None:
            stores[name] = Store.open(source.store)
        else:
            model, rows = source.tokenizer_choice(""), source.rows if source.rows is not None else inputs.rows
            kept = source.live or CaptureSettings()
            stores[name] = live_teacher(name, model, rows, kept, reader=source.reader, say=say)
    _refuse_temperatures({**({} if own is None else {PIVOT: own}), **stores}, settings)
    if own is not None and own.spec.model_fingerprint not in ("", fingerprint):
        raise DistillationError(
            f"the pivot's store was captured from {own.spec.model} ({own.spec.model_fingerprint}), but the pivot is "
            f"{checkpoint.choice.model} ({fingerprint}): capture it again, or train the model that it was captured from"
        )
    tokenizer = load_tokenizer(checkpoint)
    ours = Reading.of(PIVOT, tokenizer, own, inputs.rows)
    projections = _projections(settings, inputs.rows, ours, stores, inputs.sources)
    return Opened(inputs, settings, checkpoint, fingerprint, tokenizer, own, stores, projections)


def _refuse_temperatures(stores: Mapping[str, Store | LiveTeacher], settings: DistillSettings) -> None:
    for name, store in stores.items():
        if store.spec.temperature != settings.training.temperature:
            raise DistillationError(
                f"the store of {name} holds rows of temperature {store.spec.temperature}, but the loss has temperature "
                f"{settings.training.temperature}: capture it at that temperature, or set it to the store's"
            )


def _projections(
    settings: DistillSettings,
    rows: Sequence[Row],
    ours: Reading,
    stores: Mapping[str, Store | LiveTeacher],
    sources: Mapping[str, Source],
) -> dict[str, Projection]:
    """How the rows of each store come to stand at the pivot's positions."""
    processes, found = Processes.current(), {}
    for name, store in stores.items():
        source = sources.get(name, Source(None))
        if isinstance(store, LiveTeacher):
            tokenizer = store.reader.tokenizer
        else:
            tokenizer = load_tokenizer(find_checkpoint(source.tokenizer_choice(store.spec.model), weights=False))
        how, theirs = source.alignment or settings.alignment, Reading.of(name, tokenizer, store, rows)
        make = partial(projection_of, how, ours, theirs, rows, source.vocabulary_map)
        if processes.world > 1:
            processes.first_then_all(lambda make=make: make() and None)  # type: ignore[misc]
        found[name] = make()  # the others find the map in the cache
    return found


class Reading(NamedTuple):
    """A model's tokenizer, some rows as the model reads them, and how many ids its store may have (0: no store)."""

    name: str
    tokenizer: Any
    sample: Sequence[tuple[Row, TokenizedRow]]
    vocabulary: int

    @classmethod
    def of(cls, name: str, tokenizer: Any, store: Store | LiveTeacher | None, rows: Sequence[Row]) -> Reading:
        """The tokenizer of a model with what it has of the rows.

        Raises DistillationError when they were read with another tokenizer than this. Tokens at the seams of a template
        may differ from those of the content alone, so not all have to be equal.
        """
        if store is None:
            return cls(name, tokenizer, (), 0)
        read = store.tokens if isinstance(store, LiveTeacher) else lambda key: store.get(key).tokens
        by_key = {row.key: row for row in rows}
        sample = [(by_key[key], read(key)) for key in islice((key for key in store.keys if key in by_key), SAMPLED)]
        equal = total = 0
        for row, tokens in sample:
            for number, message in enumerate(row.messages):
                ids = tokens.ids[(tokens.message == number) & (tokens.part == Part.CONTENT)]
                total += len(ids)
                equal += int(np.isin(ids, tokenize(message.content, tokenizer).ids[: len(ids) + 1]).sum())
        if equal < total / 2:
            place = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise DistillationError(
                f"the store of {name} was captured with another tokenizer than {place}: of {total} of its tokens "
                f"{equal} are what that tokenizer makes of the same text; name the right one"
            )
        return cls(name, tokenizer, sample, store.spec.vocabulary)


def projection_of(
    how: AlignmentSettings, ours: Reading, theirs: Reading, rows: Sequence[Row], folder: Path | None = None
) -> Projection:
    """How a source's rows come to stand at the pivot's positions. folder: of the vocabulary map; None to make it."""
    if how.map_method is None:
        return Projection(None)
    if folder is not None:
        made = read_map(folder, how.map_method, ours.tokenizer, theirs.tokenizer)
        if len(made.targets) < theirs.vocabulary:
            raise DistillationError(
                f"{folder}: the vocabulary map has {len(made.targets)} rows, but the store of {theirs.name} has ids "
                f"up to {theirs.vocabulary}: remove {folder}, and the stage `align` makes it again"
            )
    else:
        samples, size = (ours.sample, theirs.sample), theirs.vocabulary
        made = make_map(how.map_method, ours.tokenizer, theirs.tokenizer, rows, samples=samples, size=size)
    tokens = how.vocabulary if how.vocabulary in VOCABULARIES.values() else how.tokens
    return Projection(made, tokens, how.tail, how.conditioning, how.one_hot, how.collisions)


def fusion_dataset(
    student: Loaded,
    dataset: Any,
    teachers: Any,
    args: FusionConfig,
    *,
    fits: Callable[[int, Sequence[LiveTeacher]], None],
    say: Say = lambda _: None,
) -> FusionDataset:
    """Examples for a student to train on, with the targets that its teachers give: see :class:`~fusekit.FusionTrainer`.

    fits: refuses what takes too much memory, told the tokens of the longest example and the teachers that are loaded.
    """
    settings, own = args.settings, None
    if isinstance(teachers, Sequence) and not isinstance(teachers, str):
        raise DistillationError(f"teachers is {with_article(type(teachers).__name__)}: give a mapping from names")
    given = dict(teachers) if isinstance(teachers, Mapping) else {} if teachers is None else {"teacher": teachers}
    refuse_names(given)
    stores = {name: Store.open(teacher) if _is_store(teacher) else teacher for name, teacher in given.items()}
    # A template that prints the day prints that of the captures that are there.
    there = [own_folder(args), *(store.path for store in stores.values() if isinstance(store, Store))]
    reader = RowTokenizer(student.tokenizer, date=next(filter(None, map(date_of, there)), None))
    rows = _prepared(dataset, reader, args, say)
    refuse_nobody(settings, given)
    how = CaptureSettings(top_k=args.top_k, temperature=settings.training.temperature)
    sources: dict[str, Store | LiveTeacher] = {}
    for name, teacher in stores.items():
        if teacher is student.model:
            raise DistillationError(f"the teacher {name} is the model that is trained: give its name or path")
        if isinstance(teacher, Store):
            sources[name] = teacher
            continue
        sources[name] = live_teacher(name, teacher, rows, how, max_length=args.max_length, say=say)
    live = [source for source in sources.values() if isinstance(source, LiveTeacher)]
    fits(len(reader.tokenize(max(rows, key=characters))), live)
    for source in live:
        source.open()
    _refuse_temperatures(sources, settings)
    relative = settings.training.lm_weighting == "relative"
    if not settings.plain and (relative or settings.fusion.include_pivot or needs_pivot(settings.alignment)):
        own = capture_student(student, reader, rows, args, how)
    ours = Reading.of(PIVOT, student.tokenizer, own, rows)
    data = FusionDataset(
        rows,
        pivot=own,
        sources=sources,
        projections=_projections(settings, rows, ours, sources, {}),
        tokenizer=reader,
        fusion=settings.fusion,
        relative=relative,
    )
    for line in data.joined.report if given else ():
        say(line)
    return data


def text_dataset(student: Loaded, dataset: Any, args: FusionConfig) -> FusionDataset:
    """Examples whose text alone a student is evaluated on."""
    reader = RowTokenizer(student.tokenizer)
    return FusionDataset(_prepared(dataset, reader, args), tokenizer=reader, fusion=args.settings.fusion)


def _prepared(dataset: Any, reader: RowTokenizer, args: FusionConfig, say: Say = lambda _: None) -> list[Row]:
    counts = DataCounts()
    prepared = prepare(rows_of(dataset, counts), [reader], args.max_length, counts=counts)
    if not prepared.rows:
        raise DistillationError(f"no example is left: {counts}")
    if counts.dropped or counts.unused:
        say("\n".join(counts.lines))
    return prepared.rows


def _is_store(teacher: Any) -> bool:
    """Whether a path is that of a store. A model that a run made has a manifest too, of another stage."""
    known = artifact.read(Path(teacher)) if isinstance(teacher, (str, Path)) else None
    return known is not None and known.stage == STAGE


def own_folder(args: OneDevice) -> Path:
    """Where a trainer's model is captured before training."""
    return Path(args.output_dir) / "captures" / PIVOT


def capture_student(
    student: Loaded, reader: RowTokenizer, rows: Sequence[Row], args: OneDevice, how: CaptureSettings
) -> Store:
    """What the student says about the rows before training, in :func:`own_folder`."""
    spec, training = student.spec(reader, rows, how), student.model.training
    student.model.to(args.device)
    load = partial(student.teacher, how, spec.top_k, "the model", lambda _: None)
    try:
        return capture_rows(rows, reader, load, own_folder(args), lambda: spec, quiet=args.disable_tqdm)
    finally:
        student.model.train(training)


class OnPolicy:
    """Makes the examples of the optimizer steps that learn from the trained model's own answers.

    The model, in evaluation mode, samples an answer at temperature 1 to the last question of each conversation of the
    step. Teachers score the answers, and their rows are projected and fused as those of any example, with two
    exceptions, since what the trained model said before training about a new text is not known: it is no candidate, and
    the mass outside a teacher's entries is shared as by ``tail: listed_share``.

    data: the examples, whose questions are asked, with their teachers; one that is a store is loaded. tokenizer: the
    trained model's, which reads conversations under its own template unless ``data`` reads them. max_length: most
    tokens of a question with its answer, for any of the models. sources: of teachers that are stores, where more is
    known than the stores say. Raises DistillationError: nothing to ask, or nobody to teach; a model or its template is
    not that of a store.
    """

    def __init__(
        self,
        data: FusionDataset,
        tokenizer: Any,
        settings: TrainingSettings,
        max_length: int,
        *,
        sources: Mapping[str, Source] | None = None,
        say: Say = lambda _: None,
    ) -> None:
        self.data, self.settings, self.max_length = data, settings, max_length
        self.reader = data.tokenizer if isinstance(data.tokenizer, RowTokenizer) else RowTokenizer(tokenizer)
        if not questions_of(data.rows):
            raise DistillationError(
                f"on_policy is {settings.on_policy:g}, but none of the {len(data)} examples is a conversation that "
                "ends with an answer: set it to 0"
            )
        self.teachers: dict[str, LiveTeacher] = {}
        for name, source in data.sources.items():
            if isinstance(source, LiveTeacher):
                self.teachers[name] = source
            elif isinstance(source, Store):
                self.teachers[name] = self._loaded(name, source.spec, (sources or {}).get(name), say)
        if not self.teachers:
            raise DistillationError(f"on_policy is {settings.on_policy:g}, but there is no teacher: set it to 0")
        self._projections = {
            name: replace(how, tail="listed_share") if needs_pivot(how) else how
            for name, how in data.projections.items()
        }
        self._fusion = data.fusion.model_copy(update={"include_pivot": False})

    def _loaded(self, name: str, spec: StoreSpec, source: Source | None, say: Say) -> LiveTeacher:
        dtype = spec.details.get("dtype")
        choice = ModelChoice(spec.model, dtype=dtype if isinstance(dtype, str) else "auto")
        if source is not None:
            choice = source.tokenizer_choice(spec.model)
        how = CaptureSettings(top_k=spec.top_k, keep_mass=spec.keep_mass or 1.0, temperature=spec.temperature)
        reader = source.reader if source is not None else None
        made = live_teacher(name, choice, self.data.rows, how, max_length=self.max_length, reader=reader, say=say)
        if spec.model_fingerprint not in ("", made.spec.model_fingerprint):
            raise DistillationError(
                f"the store of {name} was captured from {spec.model} ({spec.model_fingerprint}), but {choice.model} is "
                f"{made.spec.model_fingerprint} now: capture it again, or set on_policy to 0"
            )
        captured, own = (facts.get("chat_template") for facts in (spec.details, made.reader.facts))
        if captured not in (None, own):
            raise DistillationError(
                f"the store of {name} was captured under the chat template {captured!r}, but {choice.model} would read "
                f"new answers under {own!r}: run a recipe, which says chat_template for each source, or set on_policy "
                "to 0"
            )
        return made

    def chosen(self, epoch: int, step: int) -> bool:
        """Whether a step of an epoch learns from own answers: drawn by the seed, the same in every process."""
        drawn = xxhash.xxh3_64_intdigest(f"{self.settings.seed} {epoch} {step}".encode())
        return drawn < self.settings.on_policy * 2.0**64

    def examples(self, model: Any, indices: Sequence[int], step: int) -> list[Example]:
        """New examples in place of those with these numbers; a blank where no answer can be learned from.

        The same weights, numbers and ``step`` (of the run) give the same answers, and nothing else draws from another
        random state. model: unwrapped. indices: into ``data``; numbers beyond are blanks.
        """
        questions = [question for i in indices if i < len(self.data) for question in questions_of([self.data.rows[i]])]
        if not questions:
            return [dict(BLANK)]
        how = RespondSettings(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=1.0,
            seed=xxhash.xxh3_64_intdigest(f"{self.settings.seed} {step}".encode()) >> 1,
            batch_size=len(questions),
        )
        training = model.training
        model.eval()
        try:
            with torch.random.fork_rng():
                answers = respond(model, self.reader, questions, how)
        finally:
            model.train(training)
        written = [q.answered(a.text, whole=a.finish == "end") for q, a in zip(questions, answers, strict=True)]
        readers = [self.reader, *(teacher.reader for teacher in self.teachers.values())]
        try:
            rows = prepare(written, readers, self.max_length).rows
        except DataError:  # none is left: all are empty
            return [dict(BLANK)]
        said = {name: found for name, teacher in self.teachers.items() if (found := teacher.said(rows))}
        data = FusionDataset(
            rows,
            sources=said,
            projections=self._projections,
            tokenizer=self.reader,
            fusion=self._fusion,
            relative=False,
        )
        return [self._counted(data, data[i]) for i in range(len(data))]

    def _counted(self, data: FusionDataset, example: Example) -> Example:
        counts = dict(zip(data.count_names, example["counts"], strict=True))
        return {**example, "counts": np.array([counts.get(name, 0.0) for name in self.data.count_names])}
