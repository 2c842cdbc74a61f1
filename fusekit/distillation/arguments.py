"""TrainingArguments and adapters from settings, each field in one place, and all that is wrong with them at once."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from fusekit.capturing.load import longest_input
from fusekit.capturing.models import Checkpoint
from fusekit.distillation.settings import CHECKPOINTS_KEPT, TrainingSettings
from fusekit.errors import DistillationError
from fusekit.yaml import KeyPath, nearest

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


class OneDevice(TrainingArguments):
    """Arguments of a process that trains on one device: several are one process each.

    DataParallel, which transformers takes where a process sees several GPUs, would scatter the targets.
    """

    @property
    def n_gpu(self) -> int:
        """At most one."""
        return min(int(super().n_gpu), 1)


def training_arguments(settings: TrainingSettings, folder: Path) -> OneDevice:
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
        # A schedule has all its epochs, in their order.
        "num_train_epochs": settings.num_train_epochs if settings.schedule is None else 1.0,
        **({} if settings.schedule is None else {"train_sampling_strategy": "sequential"}),
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
        return OneDevice(**fields, **{**defaults, **settings.trainer})
    except (ValueError, TypeError, ImportError) as error:
        raise DistillationError(f"transformers refuses the training arguments: {_shorter(error)}") from error


def _shorter(error: Exception) -> str:
    """What was said, with the nearest of forty names in place of them all."""
    text = " ".join(str(error).split())
    listed = re.fullmatch(r"(\S+) is not a valid (\w+), please select one of \[(.*)\]", text)
    if listed is None:
        return text
    known = re.findall(r"'([^']*)'", listed[3])
    return f"{listed[1]!r} is unknown{nearest(listed[1], known)}"


def problems(
    training: TrainingSettings, pivot: Checkpoint | None = None, max_length: int | None = None
) -> list[tuple[KeyPath, str]]:
    """All that would keep settings from training on this machine once the model is loaded.

    The arguments, and with them a trainer, its optimizer and its scheduler, are made for a model of two parameters:
    transformers, accelerate and torch each refuse some values, some of them (fp16, tf32, 8-bit optimizers) by device or
    package. An adapter is put on the pivot's modules without its weights.

    Args:
        training: the settings.
        pivot: the model to train, found but not loaded; without it ``lora`` is tried on two linear layers, and modules
            are not looked up.
        max_length: most tokens of an example, where that was asked for.

    Returns:
        The place of a setting in a recipe, ``("distill", "lora", "r")`` for one, and what is wrong with it.
    """
    wrong = wrong_fields(training.trainer)
    given = {name: value for name, value in training.model_dump(exclude_unset=True).items() if name not in wrong}
    found: list[tuple[KeyPath, str]] = [(("distill", name), says) for name, says in wrong.items()]
    try:
        accumulation(training, processes())
    except DistillationError as error:
        sizes = [name for name in ("batch_size", "per_device_train_batch_size") if given.pop(name, None) is not None]
        found.append((("distill", (sizes or ["batch_size"])[0]), str(error)))
    refused = _each(given, lambda fields: _refusal(TrainingSettings(**fields)))
    found += [(("distill", *(field or "").split(".")), says) for field, says in refused]
    if training.lora is not None:
        refused = _each(training.lora, partial(_lora_refusal, pivot))
        found += [(("distill", "lora", *([field] if field else [])), says) for field, says in refused]
    most = longest_input(pivot) if pivot is not None else None
    if pivot is not None and most is not None and max_length is not None and max_length > most:
        says = (
            f"max_length is {max_length}, but {pivot.choice.model} was made for {most} tokens: set it to at most {most}"
        )
        found.append((("data", "max_length"), says))
    return found


def _each(fields: Mapping[str, Any], refusal: Callable[[dict[str, Any]], str | None]) -> list[tuple[str | None, str]]:
    """Every refusal, with the field that it is due to: without it nothing, or something else, is refused.

    None where it is due to no single field; what comes after that is not found.
    """
    found: list[tuple[str | None, str]] = []
    left = dict(fields)
    while (says := refusal(left)) is not None:
        without = {name: refusal({key: value for key, value in left.items() if key != name}) for name in left}
        blamed = [name for name, other in without.items() if other is None]
        blamed += [name for name, other in without.items() if other != says]
        if not blamed:
            return [*found, (None, says)]
        found.append((blamed[0], says))
        del left[blamed[0]]
    return found


def _refusal(settings: TrainingSettings) -> str | None:
    if processes() > 1 and not torch.distributed.is_initialized():
        return None  # the arguments would wait for the other processes
    settings = settings.model_copy(update={"batch_size": settings.per_device_train_batch_size * processes()})
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
            return f"these training arguments cannot be used here: {_shorter(error)}"
    return None


def _lora_refusal(pivot: Checkpoint | None, fields: dict[str, Any]) -> str | None:
    try:
        with torch.device("meta"):
            if pivot is None:
                model: Any = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1))
                fields = {**fields, "target_modules": "all-linear"}
            else:
                model = skeleton(pivot)
            with_adapter(model, fields)
    except DistillationError as error:
        return str(error)
    return None


def skeleton(checkpoint: Checkpoint) -> Any:
    """A model without its weights: all modules and shapes, on the device ``meta``."""
    trusted = {"trust_remote_code": checkpoint.choice.trust_remote_code}
    if checkpoint.gguf is not None or not (checkpoint.folder / "config.json").is_file():
        config = AutoConfig.for_model(**checkpoint.config)
    else:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, **trusted)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **trusted)


def with_adapter(model: Any, config: Any) -> Any:
    """A model with a fresh adapter. config: a peft config, or the fields of a LoraConfig.

    Raises DistillationError for fields that peft does not know or refuses.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model

    if isinstance(config, PeftConfig):
        return get_peft_model(model, config)
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if unknown := [name for name in config if name not in known]:
        raise DistillationError(f"lora.{unknown[0]} is no field of peft's LoraConfig{nearest(unknown[0], known)}")
    try:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **config})
        return get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, re.error) as error:  # names of modules are patterns
        raise DistillationError(f"peft refuses the lora settings: {error}") from error


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
        elif isinstance(value, float) and not math.isfinite(value):
            wrong[name] = f"{name} is {value!r}: give a finite number"
        elif name == "data_seed" and not 0 <= (value or 0) < 1 << 32:
            wrong[name] = f"data_seed is {value}: give a number from 0 to {(1 << 32) - 1}"
    return wrong


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of a field's kind, as far as that is a number or a truth value: others transformers checks."""
    kinds = get_args(kind) or (kind,)
    if not {*kinds} <= {int, float, bool, type(None)}:
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


def _known_fields() -> set[str]:
    return {field.name for field in dataclasses.fields(TrainingArguments)}


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
