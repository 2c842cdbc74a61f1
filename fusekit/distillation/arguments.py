"""TrainingArguments from settings: every field can be set, each in one place, and a misspelled one is an error."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments

from fusekit.distillation.settings import CHECKPOINTS_KEPT, TrainingSettings
from fusekit.errors import DistillationError
from fusekit.problems import nearest

# Fields that the settings have under another name, or that the trainer decides.
_ELSEWHERE = {
    "output_dir": "the output folder of the command",
    "num_train_epochs": "epochs",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "scheduler",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "bf16": "bf16",
    "activation_checkpointing": "activation_checkpointing",
    "gradient_checkpointing": "activation_checkpointing",
    "seed": "seed",
    "dataloader_num_workers": "workers",
    "resume_from_checkpoint": "--resume",
}
_IMPOSSIBLE = {
    "remove_unused_columns": "what the loss needs is no argument of the model",
    "save_only_model": "such checkpoints cannot be resumed from; save_strategy: 'no' saves the room",
    "label_smoothing_factor": "fusekit computes the loss",
    "auto_find_batch_size": "it would change the rows of an optimizer step",
    "use_liger_kernel": "it computes a loss of its own",
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
            (``WORLD_SIZE``) and ``micro_batch_size``; what is left over is accumulation.
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
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.scheduler,
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation(settings, processes()),
        "bf16": settings.bf16,
        # The newer name of the two; the older is an alias that warns.
        ("activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"): (
            settings.activation_checkpointing
        ),
        "seed": settings.seed,
        "dataloader_num_workers": settings.workers,
    }
    # Without a device there is nothing to pin memory for, and torch warns about it.
    defaults = _DEFAULTS | {"dataloader_pin_memory": torch.accelerator.is_available()}
    try:
        return TrainingArguments(**fields, **{**defaults, **settings.trainer})
    except (ValueError, TypeError, ImportError) as error:
        raise DistillationError(f"transformers refuses the training arguments: {error}") from error


def wrong_fields(trainer: Mapping[str, Any]) -> dict[str, str]:
    """Why each field of ``trainer`` that cannot be set there cannot, by its name."""
    known, wrong = _known_fields(), {}
    for name in trainer:
        if name in _ELSEWHERE:
            wrong[name] = f"trainer.{name} is set by {_ELSEWHERE[name]}"
        elif name in _IMPOSSIBLE:
            wrong[name] = f"trainer.{name} cannot be set: {_IMPOSSIBLE[name]}"
        elif name not in known:
            wrong[name] = f"trainer.{name} is no field of TrainingArguments{nearest(name, known)}"
    return wrong


def _known_fields() -> set[str]:
    return {field.name for field in dataclasses.fields(TrainingArguments)}


def wrong_scheduler(name: str) -> str | None:
    """Why transformers has no scheduler of this name, None where it has."""
    known = [scheduler.value for scheduler in SchedulerType]
    return None if name in known else f"scheduler {name!r} is none that transformers knows{nearest(name, known)}"


def processes() -> int:
    """How many the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation(settings: TrainingSettings, processes: int) -> int:
    """How many micro-batches each process adds up for an optimizer step.

    Raises:
        DistillationError: the rows of a step cannot be divided evenly.
    """
    at_once = settings.micro_batch_size * processes
    if settings.batch_size % at_once:
        raise DistillationError(
            f"batch_size {settings.batch_size} (rows per optimizer step) cannot be divided by micro_batch_size "
            f"{settings.micro_batch_size} x {processes} processes: change one of them"
        )
    return settings.batch_size // at_once
