"""TrainingArguments from settings: every field can be set, each in one place, and a misspelled one is an error."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from transformers import SchedulerType, Trainer, TrainingArguments

from fusekit.devices import shared
from fusekit.distillation.settings import CHECKPOINTS_KEPT, TrainingSettings
from fusekit.errors import DistillationError
from fusekit.yaml import nearest

# Fields that the settings have under another name, or that the trainer decides.
_ELSEWHERE = {
    "output_dir": "the output folder of the command",
    "gradient_accumulation_steps": "batch_size",
    "gradient_checkpointing": "activation_checkpointing",
    "resume_from_checkpoint": "--resume",
}
IMPOSSIBLE = {
    "remove_unused_columns": "what the loss needs is no argument of the model",
    "save_only_model": "such checkpoints cannot be resumed from; save_strategy: 'no' saves the room",
    "label_smoothing_factor": "fusekit computes the loss",
    "auto_find_batch_size": "it would change the examples of an optimizer step",
    "use_liger_kernel": "it computes a loss of its own",
    "eval_strategy": "nothing is held out while training; the section evaluate scores the models",
}
_DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "logging_first_step": True,
    "save_strategy": "steps",
    "save_steps": 0.1,  # a tenth of the run
    "save_total_limit": CHECKPOINTS_KEPT,
    "report_to": "none",
}


def training_arguments(settings: TrainingSettings, folder: Path) -> TrainingArguments:
    """The arguments of a run whose checkpoints go to ``folder``.

    Args:
        settings: of the run. Rows per optimizer step are divided among the processes that the launcher started
            (``WORLD_SIZE``) and ``per_device_train_batch_size``; what is left over is accumulation.
        folder: for checkpoints.

    Raises:
        DistillationError: a field that transformers does not know (with the nearest), that belongs elsewhere, whose
            value it refuses, or a batch that cannot be divided.
    """
    if wrong := wrong_fields(settings.trainer):
        raise DistillationError("; ".join(wrong.values()))
    known = _known_fields()
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": settings.num_train_epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation(settings, processes()),
        "bf16": settings.bf16,
        # The newer name of the two; the older is an alias that warns.
        ("activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"): (
            settings.activation_checkpointing
        ),
        "seed": settings.seed,
        "dataloader_num_workers": settings.dataloader_num_workers,
    }
    # Without a device there is nothing to pin memory for, and bfloat16 has to be told that it is the CPU's.
    there = torch.accelerator.is_available()
    defaults = _DEFAULTS | {"dataloader_pin_memory": there, "use_cpu": not there}
    try:
        return TrainingArguments(**fields, **{**defaults, **settings.trainer})
    except (ValueError, TypeError, ImportError) as error:
        raise DistillationError(f"transformers refuses the training arguments: {error}") from error


def refused(settings: TrainingSettings) -> tuple[str | None, str] | None:
    """What would keep these settings from training on this machine once the model is loaded, None where nothing would.

    The arguments, and with them a trainer, its optimizer and its scheduler, are made for a model of two parameters:
    transformers, accelerate and torch each refuse some values, some of them (fp16, tf32, 8-bit optimizers) by device or
    package.

    Args:
        settings: whose fields are all known (:func:`wrong_fields`) and whose batch can be divided.

    Returns:
        The field that it is due to, ``optim`` for one, None where it is no single one; and what was said.
    """
    if processes() > 1 and not shared():
        return None  # the arguments would wait for the other processes
    said = _refusal(settings)
    if said is None:
        return None
    values = settings.model_dump()
    for name in [*settings.trainer, "bf16", "lr_scheduler_type"]:
        if _refusal(TrainingSettings(**{key: value for key, value in values.items() if key != name})) is None:
            return name, said
    return None, said


def _refusal(settings: TrainingSettings) -> str | None:
    with _environment_kept(), tempfile.TemporaryDirectory() as folder:
        try:
            args = training_arguments(settings, Path(folder))
            args.push_to_hub = False  # a trial leaves nothing outside
            # Sharded optimizers, and those for some modules alone, need the model itself.
            if not (args.fsdp or args.deepspeed or args.optim_target_modules):
                Trainer(torch.nn.Linear(1, 1), args).create_optimizer_and_scheduler(num_training_steps=10)
        except DistillationError as error:
            return str(error)
        except Exception as error:  # whatever a package of an optimizer or of a logger raises
            return f"these training arguments cannot be used here: {' '.join(str(error).split())}"
    return None


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Training arguments tell transformers by variables how models are loaded; captures come before training."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def wrong_fields(trainer: Mapping[str, Any]) -> dict[str, str]:
    """Why each field of TrainingArguments that cannot be set cannot, by its name."""
    known, wrong = _known_fields(), {}
    near = known | set(TrainingSettings.model_fields)
    kinds = get_type_hints(TrainingArguments)
    for name, value in trainer.items():
        if name in _ELSEWHERE:
            wrong[name] = f"{name} is set by {_ELSEWHERE[name]}"
        elif name in IMPOSSIBLE:
            wrong[name] = f"{name} cannot be set: {IMPOSSIBLE[name]}"
        elif name not in known:
            wrong[name] = f"{name} is no setting of fusekit and no field of TrainingArguments{nearest(name, near)}"
        elif not _is_of(value, kinds[name]):
            wrong[name] = f"{name} is {value!r}, not {getattr(kinds[name], '__name__', kinds[name])}"
    return wrong


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of a field's kind, as far as that is a number or a truth value: others transformers checks."""
    kinds = get_args(kind) or (kind,)
    if not {*kinds} <= {int, float, bool, type(None)}:
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


def _known_fields() -> set[str]:
    return {field.name for field in dataclasses.fields(TrainingArguments)}


def wrong_scheduler(name: str) -> str | None:
    """Why transformers has no scheduler of this name, None where it has."""
    known = [scheduler.value for scheduler in SchedulerType]
    return None if name in known else f"lr_scheduler_type {name!r} is unknown to transformers{nearest(name, known)}"


def processes() -> int:
    """How many the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation(settings: TrainingSettings, processes: int) -> int:
    """How many micro-batches each process adds up for an optimizer step.

    Raises:
        DistillationError: the rows of a step cannot be divided evenly.
    """
    at_once = settings.per_device_train_batch_size * processes
    if settings.batch_size % at_once:
        raise DistillationError(
            f"batch_size {settings.batch_size} (examples per optimizer step) cannot be divided by "
            f"per_device_train_batch_size {settings.per_device_train_batch_size} x {processes} processes: change one"
        )
    return settings.batch_size // at_once
