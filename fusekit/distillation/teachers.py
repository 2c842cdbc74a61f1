"""A trainer's arguments made into examples with targets: a model, a data set, and teachers of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import xxhash

from fusekit.alignment import vocabulary_surfaces
from fusekit.alignment.rows import NEED_PIVOT
from fusekit.api import capture
from fusekit.artifacts import is_stage
from fusekit.capturing.capture import capture_rows, data_fingerprint
from fusekit.capturing.engine import Teacher
from fusekit.capturing.load import load_model, load_tokenizer, valid_ids
from fusekit.capturing.manifest import MANIFEST, StoreSpec, date_of
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.capturing.settings import Selection
from fusekit.capturing.store import Store
from fusekit.data.prepare import prepare
from fusekit.data.reading import rows_of
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import on_main
from fusekit.distillation.arguments import with_adapter
from fusekit.distillation.config import FusionConfig
from fusekit.distillation.dataset import PIVOT, FusionDataset
from fusekit.distillation.inputs import Reading, projection_of, refuse_rewards, refuse_temperature
from fusekit.distillation.outputs import refuse_names, refuse_nobody
from fusekit.errors import DistillationError
from fusekit.types import Row

CAPTURES = "captures"
"""Folder of the output in which models are captured that are given in place of stores."""


@dataclass(frozen=True, eq=False)
class Student:
    """The model that is trained, loaded, with its tokenizer.

    checkpoint: the files that the weights are from; None for a model that was given loaded.
    """

    model: Any
    tokenizer: Any
    checkpoint: Checkpoint | None = None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, dtype: str) -> Student:
        """From a name, a path or a loaded model; DistillationError for anything else."""
        if isinstance(model, (str, Path)):
            checkpoint = find_checkpoint(ModelChoice(str(model), dtype=dtype))
            on_main(checkpoint.fetch)
            loaded = load_model(checkpoint, torch.device("cpu"))
            own = tokenizer if tokenizer is not None else load_tokenizer(checkpoint)
            return cls(loaded, own, checkpoint)
        if not (isinstance(model, torch.nn.Module) and hasattr(model, "get_output_embeddings")):
            raise DistillationError(
                f"model is {type(model).__name__}: give a causal language model of transformers, or its name or path"
            )
        if tokenizer is None:
            name = getattr(getattr(model, "config", None), "_name_or_path", "")
            if not name:
                raise DistillationError("the loaded model does not say where it came from: give processing_class")
            tokenizer = load_tokenizer(find_checkpoint(ModelChoice(name), weights=False))
        return cls(model, tokenizer)

    def with_adapter(self, peft_config: Any) -> Any:
        """The model, with a fresh adapter where one is asked for."""
        return self.model if peft_config is None else with_adapter(self.model, peft_config)

    def fingerprint(self) -> str:
        """What identifies the weights: as a capture names files, else the xxh3-128 of the tensors."""
        if self.checkpoint is not None:
            return self.checkpoint.fingerprint()
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return f"xxh3:{digest.hexdigest()}"


def fusion_dataset(
    student: Student, dataset: Any, teachers: Any, args: FusionConfig, say: Callable[[str], None] = lambda _: None
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
    # A template that prints the day prints that of the captures that are there.
    own_folder = Path(args.output_dir) / CAPTURES / PIVOT
    there = [own_folder, *(teacher.path for teacher in given.values() if isinstance(teacher, Store))]
    there += [Path(teacher) for teacher in given.values() if _is_store(teacher)]
    reader = RowTokenizer(student.tokenizer, date=next(filter(None, map(date_of, there)), None))
    rows, stores = _prepared(dataset, reader, args), {}
    refuse_nobody(settings, given)
    for name, teacher in given.items():
        stores[name] = _store_of(name, teacher, rows, args, say=say)
        refuse_temperature(name, stores[name], settings)
    if not stores:
        return FusionDataset(rows, tokenizer=reader, fusion=settings.fusion)
    by_key = {row.key: row for row in rows}
    own = _capture_student(student, reader, rows, own_folder, args) if _needs_pivot(args) else None
    ours = Reading.of(PIVOT, student.tokenizer, own, by_key)
    projections = {}
    for name, store in stores.items():
        theirs = load_tokenizer(find_checkpoint(ModelChoice(store.spec.model), weights=False))
        projections[name] = projection_of(settings.alignment, ours, Reading.of(name, theirs, store, by_key), rows)
    made = FusionDataset(
        rows, pivot=own, sources=stores, projections=projections, tokenizer=reader, fusion=settings.fusion
    )
    for line in made.joined.report():
        say(line)
    return made


def text_dataset(student: Student, dataset: Any, args: FusionConfig) -> FusionDataset:
    """Examples whose text alone a student is evaluated on. Arguments and errors as :func:`fusion_dataset`."""
    reader = RowTokenizer(student.tokenizer)
    return FusionDataset(_prepared(dataset, reader, args), tokenizer=reader, fusion=args.settings.fusion)


def _prepared(dataset: Any, reader: RowTokenizer, args: FusionConfig) -> list[Row]:
    prepared = prepare(rows_of(dataset), [reader], args.max_length or 2048)
    if not prepared.rows:
        raise DistillationError(f"no example is left: {prepared.counts}")
    return prepared.rows


def _is_store(teacher: Any) -> TypeGuard[str | Path]:
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
        raise DistillationError(f"teachers is a {type(teachers).__name__}: give a mapping from names to teachers")
    return {"teacher": teachers}


def _store_of(name: str, teacher: Any, rows: Sequence[Row], args: FusionConfig, *, say: Callable[[str], None]) -> Store:
    """The store of a teacher, captured here where it is a model."""
    if isinstance(teacher, Store):
        return teacher
    if not isinstance(teacher, (str, Path, ModelChoice)):
        raise DistillationError(
            f"the teacher {name} is {type(teacher).__name__}: give a Store, the path of one, or the name or path of a "
            "model"
        )
    if _is_store(teacher):
        return Store.open(teacher)
    out = Path(args.output_dir) / CAPTURES / name
    say(f"capturing {name} into {out}")
    how: dict[str, Any] = {"top_k": args.top_k, "max_length": args.max_length}
    how["temperature"] = args.settings.training.temperature
    return capture(teacher, rows, out, quiet=args.disable_tqdm, say=say, **how)


def _needs_pivot(args: FusionConfig) -> bool:
    """Whether the settings compare with what the student says before training, or take a part of it."""
    settings = args.settings
    if settings.plain:
        return False
    how = settings.alignment
    projected = how.vocabulary not in ("none", "matched") and how.tokens == "span"
    return (
        settings.fusion.include_pivot
        or (projected and how.tail in NEED_PIVOT)
        or settings.training.lm_weighting == "relative"
    )


def _capture_student(
    student: Student, reader: RowTokenizer, rows: Sequence[Row], out: Path, args: FusionConfig
) -> Store:
    """What the student says about the rows before training."""
    selection = Selection(int(args.top_k or 10), 1.0, args.settings.training.temperature)
    vocabulary = max(
        int(student.model.config.get_text_config().vocab_size), len(vocabulary_surfaces(student.tokenizer))
    )
    spec = StoreSpec(
        model=str(getattr(student.model.config, "_name_or_path", "") or type(student.model).__name__),
        model_fingerprint=student.fingerprint(),
        tokenizer=reader.fingerprint,
        data=data_fingerprint(rows),
        vocabulary=vocabulary,
        top_k=min(selection.k, vocabulary),
        temperature=selection.temperature,
        details=dict(reader.facts),
    )
    training = student.model.training
    student.model.to(args.device)
    try:
        return capture_rows(
            rows,
            reader,
            lambda: Teacher(student.model, valid_ids(student.tokenizer), selection, name="the model"),
            out,
            lambda: spec,
            quiet=args.disable_tqdm,
        )
    finally:
        student.model.train(training)
