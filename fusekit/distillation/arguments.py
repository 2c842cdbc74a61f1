"""TrainingArguments, from the settings of a run or written by hand, what refuses them, and what a training takes."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from fusekit.capturing.models import (
    Checkpoint,
    itemsize,
    loaded_bytes,
    longest_input,
    parameters,
    shape_of,
    stored_dtype,
)
from fusekit.capturing.teacher import batch_tokens_on, working_bytes
from fusekit.devices import Need, Processes, disk_need, main_memory, refuse_lacking
from fusekit.disk import counted, human
from fusekit.distillation.settings import CHECKPOINTS_KEPT, DistillSettings, TrainingSettings
from fusekit.errors import DistillationError
from fusekit.settings import CaptureSettings, DataSettings
from fusekit.yaml import TRUTH, KeyPath, nearest, reasons

# Fields that the settings have under another name, or that the trainer decides.
_ELSEWHERE = {
    "output_dir": "set by the output folder of the command",
    "gradient_accumulation_steps": "set by batch_size",
    "gradient_checkpointing": "set by activation_checkpointing",
    "resume_from_checkpoint": "set by --resume",
}
_IMPOSSIBLE = {
    "save_only_model": "such checkpoints cannot be resumed from; save_strategy: 'no' saves the disk space",
    "label_smoothing_factor": "fusekit computes the loss",
    "auto_find_batch_size": "it would change the examples of an optimizer step",
    "use_liger_kernel": "it replaces the loss",
}
_IMPOSSIBLE_IN_RUNS = _IMPOSSIBLE | {
    "remove_unused_columns": "the loss needs columns that the model does not take",
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
_KNOWN = {item.name: item for item in dataclasses.fields(TrainingArguments)}


class OneDevice(TrainingArguments):
    """Arguments of a process that trains on one device: several are one process each.

    DataParallel, which transformers takes where a process sees several GPUs, would scatter the targets.
    """

    training: TrainingSettings

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():  # bfloat16 has to be told that it is the CPU's
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """At most one."""
        return min(int(super().n_gpu), 1)


def _declared(section: type[BaseModel], name: str) -> Any:
    """A field of a section of the recipe; None is the preset's value."""
    return field(default=None, metadata={"help": section.model_fields[name].description})


@dataclass(repr=False)  # transformers' own hides tokens
class FusionConfig(OneDevice):
    """Arguments of :class:`~fusekit.FusionTrainer`: any of ``transformers.TrainingArguments``, and these.

    ``preset`` gives the values of the loss, of ``alignment`` and of ``fusion`` that are not given; the learning rate,
    epochs and batches are those of TrainingArguments. The values are those of a recipe (docs/distillation.md).

    >>> FusionConfig("out", loss="kl", lm_weight=0.5).lm_weighting
    'relative'

    Attributes:
        preset: a named set of values: fusekit, fusechat, fusellm, uld, gold, grouped_kl, p_kl, alm or sft.
        lm_weight, lm_weighting, loss, truncation, temperature: of L = λ L_CLM + (1 - λ) L_fusion.
        on_policy, max_new_tokens: share of the steps that learn from the model's own answers, and their length.
        alignment: how teachers' rows come into the model's tokens and vocabulary, by name.
        fusion: what becomes of several teachers' rows, by name.
        top_k: entries per label of what is captured here; a store that is given has its own.
        max_length: most tokens of an example; longer ones are cut.
        dtype: data type of the weights of a model that is given by name.
        max_skipped_steps: stop after so many steps in a row with a non-finite loss or gradient.

    Raises:
        DistillationError: an unknown name or an impossible value, with the nearest name; an argument of transformers
            that cannot work with a fusion loss.
    """

    preset: str = field(default="fusekit", metadata={"help": "Named set of values for what is not given."})
    lm_weight: float | None = _declared(TrainingSettings, "lm_weight")
    lm_weighting: str | None = _declared(TrainingSettings, "lm_weighting")
    loss: str | None = _declared(TrainingSettings, "loss")
    truncation: str | None = _declared(TrainingSettings, "truncation")
    temperature: float | None = _declared(TrainingSettings, "temperature")
    dtype: str | None = _declared(TrainingSettings, "dtype")
    on_policy: float | None = _declared(TrainingSettings, "on_policy")
    max_new_tokens: int | None = _declared(TrainingSettings, "max_new_tokens")
    max_skipped_steps: int | None = _declared(TrainingSettings, "max_skipped_steps")
    alignment: dict[str, Any] | None = field(default=None, metadata={"help": "Settings of the section alignment."})
    fusion: dict[str, Any] | None = field(default=None, metadata={"help": "Settings of the section fusion."})
    top_k: int = _declared(CaptureSettings, "top_k")
    max_length: int = _declared(DataSettings, "max_length")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, why in _IMPOSSIBLE.items():
            if name in _KNOWN and getattr(self, name) != _KNOWN[name].default:
                raise DistillationError(f"{name} cannot be set: {why}")
        if mode := (self.fusion or {}).get("mode"):
            raise DistillationError(
                f"fusion.mode is {mode!r}, but a trainer trains one model: leave mode out, and make one trainer per "
                "teacher for pairwise fusion"
            )
        own = [name for name in FusionConfig.__annotations__ if name in TrainingSettings.model_fields]
        # What of transformers' own decides whether these values fit together, and into memory.
        theirs = ("dataloader_num_workers", "train_sampling_strategy", "per_device_train_batch_size", "bf16")
        checked = (*own, *theirs, "optim", "fsdp", "deepspeed")
        training = {name: value for name in checked if (value := getattr(self, name)) is not None}
        training["activation_checkpointing"] = bool(
            getattr(self, "activation_checkpointing", None) or self.gradient_checkpointing
        )
        training["optim"] = getattr(self.optim, "value", self.optim)
        if self.train_sampling_strategy == "random":  # the default, which a schedule would be refused for
            del training["train_sampling_strategy"]
        sections = {"training": training, "alignment": self.alignment or {}, "fusion": self.fusion or {}}
        self.settings = DistillSettings.of(self.preset, sections)
        if self.settings.training.schedule is not None:
            raise DistillationError(
                f"preset {self.preset} trains on the answers of all models, which a trainer does not make: use a recipe"
            )
        self.training = self.settings.training
        for name in own:
            setattr(self, name, getattr(self.training, name))
        for section, name in ((CaptureSettings, "top_k"), (DataSettings, "max_length")):
            value = getattr(self, name)
            try:
                value = section.model_fields[name].default if value is None else _read(name, value, section)
            except ValidationError as error:
                raise DistillationError(f"{name} is {value!r}: {'; '.join(reasons(error))}") from error
            setattr(self, name, value)


def training_arguments(settings: TrainingSettings, folder: Path) -> OneDevice:
    """The arguments of a run whose checkpoints go to ``folder``.

    The examples of an optimizer step are divided among the processes of the launcher (``WORLD_SIZE``) and
    ``per_device_train_batch_size``; what is left over is accumulation.

    Raises DistillationError where transformers refuses a value, or a batch cannot be divided.
    """
    fields = settings.model_dump(include=set(_KNOWN) & set(TrainingSettings.model_fields))
    fields |= {"output_dir": str(folder), "gradient_accumulation_steps": _accumulation(settings)}
    if settings.schedule is not None:  # it has all its epochs, in their order
        fields |= {"num_train_epochs": 1.0, "train_sampling_strategy": "sequential"}
    if "activation_checkpointing" not in _KNOWN:  # its older name, an alias that warns where both are known
        fields["gradient_checkpointing"] = settings.activation_checkpointing
    fields |= {name: _read(name, value) for name, value in settings.trainer.items()}
    try:
        args = OneDevice(**(_DEFAULTS | fields))
    except (ValueError, TypeError, ImportError) as error:
        raise DistillationError(f"transformers refuses the training arguments: {error}") from error
    args.training = settings
    return args


def _processes() -> int:
    """How many the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _accumulation(settings: TrainingSettings) -> int:
    each, world = settings.per_device_train_batch_size, _processes()
    if settings.batch_size % (each * world):
        raise DistillationError(
            f"batch_size {settings.batch_size} (examples per optimizer step) cannot be divided by "
            f"per_device_train_batch_size {each} x {world} processes: change one"
        )
    return settings.batch_size // (each * world)


def _read(name: str, value: Any, owner: type = TrainingArguments) -> Any:
    """A field of a class as its type says; YAML reads 1e-8 as text. Raises ValidationError."""
    return TypeAdapter(get_type_hints(owner, include_extras=True)[name]).validate_python(value)


def wrong_fields(trainer: Mapping[str, Any]) -> dict[str, str]:
    """Why each of these that is no field of TrainingArguments, cannot be set or is of another type is refused."""
    wrong = {}
    for name, value in trainer.items():
        if name in _ELSEWHERE:
            wrong[name] = f"{name} is {_ELSEWHERE[name]}"
        elif name in _IMPOSSIBLE_IN_RUNS:
            wrong[name] = f"{name} cannot be set: {_IMPOSSIBLE_IN_RUNS[name]}"
        elif name not in _KNOWN:
            near = nearest(name, {*_KNOWN, *TrainingSettings.model_fields})
            wrong[name] = f"{name} is neither a setting of fusekit nor a field of TrainingArguments{near}"
        else:
            try:
                _read(name, value)
            except ValidationError as error:
                quotes = TRUTH if isinstance(value, bool) else ""
                wrong[name] = f"{name} is {value!r}: {error.errors()[0]['msg']}{quotes}"
    return wrong


def problems(
    training: TrainingSettings, pivot: Checkpoint | None = None, max_length: int | None = None
) -> list[tuple[KeyPath, str]]:
    """What would keep settings from training on this machine once the model is loaded.

    The arguments, and with them a trainer, its optimizer and its scheduler, are made for a model of two parameters:
    transformers, accelerate and torch each refuse some values, some of them (fp16, tf32, 8-bit optimizers) by device or
    package. An adapter is put on the modules of ``pivot``, which is not loaded; without it on two linear layers.

    Returns the place of each refusal in a recipe, as ``("distill", "lora")``, and what is wrong with it.
    """
    wrong = wrong_fields(training.trainer)
    found: list[tuple[KeyPath, str]] = [(("distill", name), says) for name, says in wrong.items()]
    try:
        _accumulation(training)
    except DistillationError as error:
        found.append((("distill", "batch_size"), str(error)))
    values = training.model_dump(exclude=set(wrong), exclude_unset=True)
    values["batch_size"] = training.per_device_train_batch_size * _processes()
    if says := _refusal(TrainingSettings(**values)):
        found.append((("distill",), says))
    if training.lora is not None:
        try:
            _try_adapter(pivot, training.lora)
        except DistillationError as error:
            found.append((("distill", "lora"), str(error)))
    most = longest_input(pivot) if pivot is not None else None
    if pivot is not None and most is not None and max_length is not None and max_length > most:
        says = f"max_length is {max_length}, but {pivot.choice.model} was made for {most} tokens: set it to at most "
        found.append((("data", "max_length"), f"{says}{most}"))
    return found


def _refusal(settings: TrainingSettings) -> str | None:
    if _processes() > 1 and not torch.distributed.is_initialized():
        return None  # the arguments would wait for the other processes
    # Training arguments tell transformers by variables how models are loaded; captures come before training.
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        try:
            args = training_arguments(settings, Path(folder))
            args.push_to_hub = False  # a trial leaves nothing outside
            # Sharded optimizers, and those for some modules alone, need the model itself.
            if not (args.fsdp or args.deepspeed or args.optim_target_modules):
                Trainer(torch.nn.Linear(1, 1), args).create_optimizer_and_scheduler(num_training_steps=10)
        except DistillationError as error:
            return str(error)
        except Exception as error:  # whatever a package of an optimizer or of a logger raises
            return f"these training arguments cannot be used here: {error}"
        finally:
            os.environ.clear()
            os.environ.update(environment)
    return None


def _try_adapter(pivot: Checkpoint | None, fields: dict[str, Any]) -> None:
    trusted = pivot is not None and pivot.choice.trust_remote_code
    if pivot is None:
        config: Any = LlamaConfig(num_hidden_layers=1)
        fields = {**fields, "target_modules": "all-linear"}
    elif pivot.gguf is not None or not (pivot.folder / "config.json").is_file():
        config = AutoConfig.for_model(**pivot.config)
    else:
        config = AutoConfig.from_pretrained(pivot.folder, local_files_only=True, trust_remote_code=trusted)
    with torch.device("meta"):
        with_adapter(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted), fields)


def with_adapter(model: Any, config: Any) -> Any:
    """A model with a fresh adapter. config: a peft config, or the fields of a LoraConfig.

    Raises DistillationError for fields that peft does not know or refuses.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model

    if isinstance(config, PeftConfig):
        return get_peft_model(model, config)
    try:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **config})
        return get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, re.error) as error:  # names of modules are patterns
        raise DistillationError(f"peft refuses the lora settings: {error}") from error


_HIDDEN_BYTES = {"float32": 40, "16 bits": 24, "autocast": 35}
_WIDE_BYTES = {"float32": 16, "16 bits": 8, "autocast": 8}
"""Of what a layer keeps for its backward, per element of the hidden states and of the feed-forward, by how it computes.
Counted by ``torch.autograd.graph.saved_tensors_hooks`` on layers with sdpa: of the first Llama 42, 25 and 36 (with one
head of keys 36, 22 and 33), Qwen 2 38, 23 and 34, Qwen 3 50, 32 and 43; of the second all of them the same."""

_LOGITS_COPIES = 2  # and their gradient; under autocast accelerate makes float32 of what a model returns
_LINEARS_OF_HIDDEN, _LINEARS_OF_WIDE = 4, 3  # of a layer, for the size of an adapter

_HEAP = 0.05
"""Share of what a training takes on a CPU: freed tensors of a few MB that the C library's heap keeps."""

# Bytes per trained parameter that an optimizer keeps; AdamW's two moments in the dtype of the weights where unnamed.
_OPTIMIZERS = {"adafactor": 0.1, "sgd": 0.0, "adagrad": 4.0, "8bit": 2.0, "lion": 4.0}


class States(NamedTuple):
    """Bytes over all devices. weights: under autocast with the copies that are computed with. checkpoint: on disk."""

    weights: int
    gradients: int
    optimizer: int
    checkpoint: int


def states(checkpoint: Checkpoint, settings: TrainingSettings) -> States:
    """What a training holds: of all parameters, or of an adapter on the linear layers that peft would find."""
    width = own = _width(checkpoint, settings)
    trained, frozen = parameters(checkpoint), 0
    if settings.lora is not None:
        shape, frozen, own = shape_of(checkpoint.config), trained, 4  # peft trains adapters in float32
        layer = _LINEARS_OF_HIDDEN * 2 * shape.hidden + _LINEARS_OF_WIDE * (shape.hidden + shape.wide)
        trained = int(settings.lora.get("r") or 8) * shape.layers * layer
    optimizer = str(settings.trainer.get("optim", "adamw"))
    moments = next((size for name, size in _OPTIMIZERS.items() if name in optimizer), 2.0 * own)
    copies = 2 * (trained + frozen) if settings.bf16 and width > 2 else 0
    weights = frozen * width + trained * own + copies
    return States(weights, trained * own, int(trained * moments), int(trained * (own + moments)))


def activation_bytes(checkpoint: Checkpoint, settings: TrainingSettings, row_tokens: int) -> int:
    """Bytes of a micro-batch of examples of so many tokens: what the layers keep, and the logits and their gradient."""
    shape, width = shape_of(checkpoint.config), _width(checkpoint, settings)
    computes = "16 bits" if width == 2 else "autocast" if settings.bf16 else "float32"
    layer = _HIDDEN_BYTES[computes] * shape.hidden + _WIDE_BYTES[computes] * shape.wide
    # With checkpointing a layer keeps its input alone, and one at a time is computed again.
    kept = shape.layers * shape.hidden * width + layer if settings.activation_checkpointing else shape.layers * layer
    logits = _LOGITS_COPIES * shape.vocabulary * (2 if computes == "16 bits" else 4)
    return settings.per_device_train_batch_size * row_tokens * (kept + logits)


def head_gradient_bytes(checkpoint: Checkpoint, settings: TrainingSettings) -> int:
    """Of a micro-batch, before they are added to what is there; of a tied head both gradients and their sum."""
    if settings.lora is not None:
        return 0
    shape, tied = shape_of(checkpoint.config), checkpoint.config.get("tie_word_embeddings", True)
    return (3 if tied else 1) * shape.vocabulary * shape.hidden * _width(checkpoint, settings)


def _width(checkpoint: Checkpoint, settings: TrainingSettings) -> int:
    """Bytes of a trained weight."""
    return itemsize(stored_dtype(checkpoint) if settings.dtype == "auto" else settings.dtype)


def memory_needs(
    checkpoint: Checkpoint,
    settings: TrainingSettings,
    row_tokens: int,
    processes: Processes,
    teachers: Sequence[Checkpoint] = (),
    *,
    loaded: str | None = None,
) -> list[Need]:
    """Of training on this process's device, and on a GPU of the weights in main memory, where they are loaded first.

    row_tokens: of the longest example. teachers: that stay loaded beside the model. loaded: kind of the device that has
    the model's weights already, "cpu" or "cuda".
    """
    held, kind = states(checkpoint, settings), processes.device.type
    batch = activation_bytes(checkpoint, settings, row_tokens) + head_gradient_bytes(checkpoint, settings)
    # FSDP and DeepSpeed divide the states among the processes.
    told = [os.environ.get(name, "").lower() for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")]
    sharded = {"1", "true"} & {*told} or settings.trainer.get("fsdp") or settings.trainer.get("deepspeed")
    shares, top_k = processes.world if sharded else 1, CaptureSettings().top_k
    beside = sum(loaded_bytes(one) + working_bytes(one, batch_tokens_on(kind), kind, top_k) for one in teachers)
    needed = (held.weights + held.gradients + held.optimizer) // shares + batch + beside
    what = (
        f"memory of training {checkpoint.choice.model} ({human(held.weights)} of weights, {human(held.gradients)} of "
        f"gradients, {human(held.optimizer)} of optimizer{f', over {shares} processes' if shares > 1 else ''}; "
        f"{human(batch)} for {counted(settings.per_device_train_batch_size, 'example')} of {row_tokens} tokens"
        f"{f'; {human(beside)} for teachers that are scored on the fly' if beside else ''})"
    )
    weights = parameters(checkpoint) * _width(checkpoint, settings)
    if kind == "cuda":
        free = torch.cuda.mem_get_info(processes.device.index or 0)[0]
        loading = f"memory to load {checkpoint.choice.model} before training"
        host = [] if loaded else [main_memory(loading, weights, processes.local)]
        return [Need(what, needed - (weights if loaded == kind else 0), free, f"free on {processes.device}"), *host]
    besides = int(needed * (1 + _HEAP)) - (weights if loaded == kind else 0)
    return [main_memory(what, besides, processes.local)] if kind == "cpu" else []


def kept_bytes(checkpoint: Checkpoint, settings: TrainingSettings) -> int:
    """Bytes of the checkpoints that are there at one time: those that are kept and the one being written."""
    if settings.trainer.get("save_strategy") == "no":
        return 0
    limit = settings.trainer.get("save_total_limit", CHECKPOINTS_KEPT)
    return states(checkpoint, settings).checkpoint * (int(limit) + 1 if limit else 10)


def disk_needs(checkpoint: Checkpoint, settings: TrainingSettings, out: Path) -> list[Need]:
    """Of a published model, and of the checkpoints of its run."""
    work = kept_bytes(checkpoint, settings)
    what = f"disk (a trained model of {human(checkpoint.weight_bytes)}, {human(work)} of checkpoints)"
    return [disk_need(what, checkpoint.weight_bytes + work, out)]


def refuse_needs(needs: Sequence[Need]) -> None:
    """Raise DistillationError with the numbers if something does not fit."""
    way_out = (
        "Free some, write elsewhere, take smaller micro-batches (per_device_train_batch_size), recompute activations "
        "(activation_checkpointing), train an adapter (lora) or in bfloat16 (dtype), or shard it over devices "
        "(accelerate launch with FSDP); ignore_estimates starts it all the same"
    )
    refuse_lacking(needs, "this training does not fit:", way_out, DistillationError)
