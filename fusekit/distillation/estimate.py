"""Memory and disk that a distillation will take, from sizes of files alone, against what there is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fusekit.capturing.engine import batch_tokens_on
from fusekit.capturing.estimate import itemsize, loaded_bytes, parameters, shape_of, stored_dtype, working_bytes
from fusekit.capturing.models import Checkpoint
from fusekit.capturing.settings import CaptureSettings
from fusekit.devices import Need, Processes, main_memory, refuse_lacking
from fusekit.disk import existing_parent, free_bytes, human
from fusekit.distillation.settings import CHECKPOINTS_KEPT, TrainingSettings
from fusekit.errors import DistillationError

_HIDDEN_BYTES = {"float32": 40, "16 bits": 24, "autocast": 35}
_WIDE_BYTES = {"float32": 16, "16 bits": 8, "autocast": 8}
"""Of what a layer keeps for its backward, per element of the hidden states and of the feed-forward, by how it computes.
Counted by ``torch.autograd.graph.saved_tensors_hooks`` on layers with sdpa: of the first Llama 42, 25 and 36 (with one
head of keys 36, 22 and 33), Qwen 2 38, 23 and 34, Qwen 3 50, 32 and 43; of the second all of them the same."""

_LOGITS_COPIES = 2  # and their gradient; under autocast accelerate makes float32 of what a model returns
_LINEARS_OF_HIDDEN, _LINEARS_OF_WIDE = 4, 3  # of a layer, for the size of an adapter

_HEAP = 0.05
"""Of what a training takes on a CPU: freed tensors of a few MB that the C library's heap keeps."""

# Bytes per trained parameter that an optimizer keeps; AdamW's two moments in the dtype of the weights where unnamed.
_OPTIMIZERS = {"adafactor": 0.1, "sgd": 0.0, "adagrad": 4.0, "8bit": 2.0, "lion": 4.0}


class States(NamedTuple):
    """Bytes of what a training run holds from its first step to its last, over all devices.

    weights: as they are trained; under autocast with the copies that are computed with. checkpoint: of one on disk.
    """

    weights: int
    gradients: int
    optimizer: int
    checkpoint: int


def states(checkpoint: Checkpoint, settings: TrainingSettings) -> States:
    """Of all parameters, or of an adapter on the linear layers that peft would find."""
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
    """Bytes of a micro-batch of rows of so many tokens: what the layers keep, and the logits with their gradient."""
    shape, width = shape_of(checkpoint.config), _width(checkpoint, settings)
    computes = "16 bits" if width == 2 else "autocast" if settings.bf16 else "float32"
    layer = _HIDDEN_BYTES[computes] * shape.hidden + _WIDE_BYTES[computes] * shape.wide
    # With checkpointing a layer keeps its input alone, and one at a time is computed again.
    kept = shape.layers * shape.hidden * width + layer if settings.activation_checkpointing else shape.layers * layer
    logits = _LOGITS_COPIES * shape.vocabulary * (2 if computes == "16 bits" else 4)
    return settings.per_device_train_batch_size * row_tokens * (kept + logits)


def head_gradient_bytes(checkpoint: Checkpoint, settings: TrainingSettings) -> int:
    """Bytes of a micro-batch's gradients of embedding and head, before they are added to what is there.

    A head of its own has one; of one that is tied to the embedding there are both and their sum. An adapter has none.
    """
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

    row_tokens: of the longest row. teachers: that stay loaded beside the model. loaded: kind of the device that has the
    model's weights already, "cpu" or "cuda".
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
        f"{human(batch)} for {settings.per_device_train_batch_size} rows of {row_tokens} tokens"
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


def disk_needs(
    checkpoint: Checkpoint, settings: TrainingSettings, out: Path, *, results: int, download: bool = True
) -> list[Need]:
    """Of the published models, ``results`` of them yet to be made, and of one run's checkpoints at a time.

    download: count the pivot's weights where they are not here yet.
    """
    work = kept_bytes(checkpoint, settings) if results else 0
    needed = results * checkpoint.weight_bytes + work
    models = f"{results} trained model{'s' if results > 1 else ''} of {human(checkpoint.weight_bytes)}"
    what = f"disk ({models}, {human(work)} of checkpoints"
    if download and results and checkpoint.snapshot and checkpoint.download_bytes:
        cache = existing_parent(checkpoint.snapshot.cache)
        if cache.stat().st_dev == existing_parent(out).stat().st_dev:
            needed += checkpoint.download_bytes
            what += f", download of {checkpoint.choice.model}"
    return [Need(what + ")", needed, free_bytes(out), f"free on the disk of {out}")]


def refuse(needs: Sequence[Need]) -> None:
    """Raise DistillationError with the numbers if something does not fit."""
    way_out = (
        "Free some, write elsewhere, take smaller micro-batches (per_device_train_batch_size), recompute activations "
        "(activation_checkpointing), train an adapter (lora) or in bfloat16 (dtype), or shard it over devices "
        "(accelerate launch with FSDP); ignore_estimates starts it all the same"
    )
    refuse_lacking(needs, "this training does not fit:", way_out, DistillationError)
