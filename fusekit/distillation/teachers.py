"""From what a user gives to examples with targets: a model, a data set, and teachers of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusekit.alignment.rows import NEED_PIVOT
from fusekit.artifacts import is_stage, with_article
from fusekit.capturing.capture import capture_rows
from fusekit.capturing.estimate import memory_needs, refuse
from fusekit.capturing.load import load_tokenizer
from fusekit.capturing.manifest import MANIFEST, StoreSpec, date_of
from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.capturing.settings import CaptureSettings
from fusekit.capturing.store import Store
from fusekit.data.counts import DataCounts
from fusekit.data.prepare import prepare
from fusekit.data.reading import rows_of
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes
from fusekit.distillation.config import FusionConfig
from fusekit.distillation.dataset import PIVOT, FusionDataset
from fusekit.distillation.inputs import Reading, projection_of, refuse_rewards, refuse_temperature
from fusekit.distillation.live import LiveTeacher, Loaded, live_teacher
from fusekit.distillation.on_policy import OnPolicy
from fusekit.distillation.outputs import refuse_names, refuse_nobody
from fusekit.distillation.settings import TrainingSettings
from fusekit.errors import DistillationError
from fusekit.types import Row

CAPTURES = "captures"
"""Folder of the output in which the trained model's own predictions are captured before training."""


def fusion_dataset(
    student: Loaded, dataset: Any, teachers: Any, args: FusionConfig, say: Callable[[str], None] = lambda _: None
) -> FusionDataset:
    """Examples for a student to train on, with the targets that its teachers give.

    Args:
        student: the model.
        dataset: see :func:`fusekit.data.reading.rows_of`.
        teachers: see :class:`~fusekit.FusionTrainer`; None where the settings learn from the text alone.
        args: of the trainer.
        say: told what a user should know.

    Raises:
        DataError: no example that can be read.
        DistillationError: a teacher of a wrong kind, or one without the examples.
        CaptureError, StorageError: a capture fails.
    """
    settings, given = args.settings, _named(teachers)
    refuse_rewards(settings)
    refuse_names(given)
    stores = {name: Store.open(teacher) if _is_store(teacher) else teacher for name, teacher in given.items()}
    # A template that prints the day prints that of the captures that are there.
    there = [_own_folder(args), *(store.path for store in stores.values() if isinstance(store, Store))]
    reader = RowTokenizer(student.tokenizer, date=next(filter(None, map(date_of, there)), None))
    rows = _prepared(dataset, reader, args, say)
    refuse_nobody(settings, given)
    if not given:
        return FusionDataset(rows, tokenizer=reader, fusion=settings.fusion)
    how = CaptureSettings(top_k=args.top_k or 10, temperature=settings.training.temperature)
    sources: dict[str, Store | LiveTeacher] = {}
    for name, teacher in stores.items():
        if teacher is student.model:
            raise DistillationError(f"the teacher {name} is the model that is trained: give its name or path")
        if isinstance(teacher, Store):
            sources[name] = teacher
        else:
            made = live_teacher(name, teacher, rows, how, max_length=args.max_length or 2048, say=say)
            if made.checkpoint is not None:
                refuse(memory_needs(made.checkpoint, how, Processes.current()))
            made.open()
            sources[name] = made
        refuse_temperature(name, sources[name], settings)
    by_key = {row.key: row for row in rows}
    own = _capture_student(student, reader, rows, args, how) if _needs_pivot(args) else None
    ours = Reading.of(PIVOT, student.tokenizer, own, by_key)
    projections = {}
    for name, source in sources.items():
        theirs = source.tokenizer if isinstance(source, LiveTeacher) else _tokenizer_of(source)
        projections[name] = projection_of(settings.alignment, ours, Reading.of(name, theirs, source, by_key), rows)
    data = FusionDataset(
        rows,
        pivot=own,
        sources=sources,
        projections=projections,
        tokenizer=reader,
        fusion=settings.fusion,
        relative=settings.training.lm_weighting == "relative",
    )
    for line in data.joined.report():
        say(line)
    return data


def on_policy_of(
    data: FusionDataset,
    reader: RowTokenizer,
    training: TrainingSettings,
    max_length: int,
    *,
    models: Mapping[str, tuple[ModelChoice, RowTokenizer | None]] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> OnPolicy:
    """What makes the examples of on-policy steps. A teacher that is a store is loaded, by what the store says of it.

    Args:
        data: the examples with their teachers.
        reader: how the trained model reads conversations.
        training: the settings.
        max_length: most tokens of a question with its answer.
        models: of teachers that are stores, where more is known than the stores say: the model, and how it reads.
        say: told what a user should know.

    Raises:
        CaptureError: a teacher cannot be loaded, or does not fit.
        DistillationError: there is nothing to ask, or nobody to teach; a model or its template is not that of a
            store.
    """
    teachers = {}
    for name, source in data.sources.items():
        if isinstance(source, LiveTeacher):
            teachers[name] = source
        elif isinstance(source, Store):
            spec = source.spec
            choice, theirs = (models or {}).get(name, (_choice_of(spec), None))
            how = CaptureSettings(top_k=spec.top_k, keep_mass=spec.keep_mass or 1.0, temperature=spec.temperature)
            rows = data.rows
            made = live_teacher(name, choice, rows, how, max_length=max_length, reader=theirs, say=say)
            if spec.model_fingerprint not in ("", made.spec.model_fingerprint):
                raise DistillationError(
                    f"the store of {name} was captured from {spec.model} ({spec.model_fingerprint}), but "
                    f"{choice.model} is {made.spec.model_fingerprint} now: capture it again, or set on_policy to 0"
                )
            captured, own = (facts.get("chat_template") for facts in (spec.details, made.reader.facts))
            if captured not in (None, own):
                raise DistillationError(
                    f"the store of {name} was captured under the chat template {captured!r}, but {choice.model} would "
                    f"read new answers under {own!r}: run a recipe, which says chat_template for each source, or set "
                    "on_policy to 0"
                )
            teachers[name] = made
    return OnPolicy(data, teachers, reader, training, max_length)


def _choice_of(spec: StoreSpec) -> ModelChoice:
    """The model that a store was captured from."""
    dtype = spec.details.get("dtype")
    return ModelChoice(spec.model, dtype=dtype) if isinstance(dtype, str) else ModelChoice(spec.model)


def _own_folder(args: FusionConfig) -> Path:
    return Path(args.output_dir) / CAPTURES / PIVOT


def _tokenizer_of(store: Store) -> Any:
    return load_tokenizer(find_checkpoint(ModelChoice(store.spec.model), weights=False))


def text_dataset(student: Loaded, dataset: Any, args: FusionConfig) -> FusionDataset:
    """Examples whose text alone a student is evaluated on. Arguments and errors as :func:`fusion_dataset`."""
    reader = RowTokenizer(student.tokenizer)
    return FusionDataset(_prepared(dataset, reader, args), tokenizer=reader, fusion=args.settings.fusion)


def _prepared(
    dataset: Any, reader: RowTokenizer, args: FusionConfig, say: Callable[[str], None] = lambda _: None
) -> list[Row]:
    counts = DataCounts()
    prepared = prepare(rows_of(dataset, counts), [reader], args.max_length or 2048, counts=counts)
    if not prepared.rows:
        raise DistillationError(f"no example is left: {counts}")
    if counts.dropped or counts.unused:
        say("\n".join(counts.lines))
    return prepared.rows


def _is_store(teacher: Any) -> bool:
    """Whether a path is that of a store. A model that a run made has a manifest too, which names a stage."""
    if not isinstance(teacher, (str, Path)):
        return False
    return (Path(teacher) / MANIFEST).is_file() and not is_stage(Path(teacher))


def _named(teachers: Any) -> dict[str, Any]:
    if teachers is None:
        return {}
    if isinstance(teachers, Mapping):
        return dict(teachers)
    if isinstance(teachers, Sequence) and not isinstance(teachers, str):
        raise DistillationError(
            f"teachers is {with_article(type(teachers).__name__)}: give a mapping from names to teachers"
        )
    return {"teacher": teachers}


def _needs_pivot(args: FusionConfig) -> bool:
    """Whether the settings compare with what the student says before training, or take a part of it."""
    settings = args.settings
    if settings.plain:
        return False
    how = settings.alignment
    projected = not how.as_they_are and how.tokens == "span"
    return (
        settings.fusion.include_pivot
        or (projected and how.tail in NEED_PIVOT)
        or settings.training.lm_weighting == "relative"
    )


def _capture_student(
    student: Loaded, reader: RowTokenizer, rows: Sequence[Row], args: FusionConfig, how: CaptureSettings
) -> Store:
    """What the student says about the rows before training."""
    spec = student.spec(reader, rows, how)
    training = student.model.training
    student.model.to(args.device)
    try:
        return capture_rows(
            rows,
            reader,
            lambda: student.teacher(how.model_copy(update={"top_k": spec.top_k}), "the model", lambda _: None),
            _own_folder(args),
            lambda: spec,
            quiet=args.disable_tqdm,
        )
    finally:
        student.model.train(training)
