"""The pivot as it is trained, and the result as it is published: a plain checkpoint that from_pretrained loads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fusekit.capturing.load import load_model
from fusekit.capturing.models import Checkpoint
from fusekit.distillation.settings import TrainingSettings
from fusekit.errors import DistillationError
from fusekit.yaml import nearest

ADAPTER = "adapter"
"""Folder of the LoRA adapter beside the merged weights."""
RECORD = "training.json"
"""What a published model was made from, and the log of its training."""


def load_pivot(checkpoint: Checkpoint, settings: TrainingSettings) -> Any:
    """The pivot on the CPU, in ``settings.dtype``, with a fresh adapter where the settings ask for one.

    Raises:
        CaptureError: it cannot be loaded.
        DistillationError: the LoRA settings are wrong.
    """
    choice = dataclasses.replace(checkpoint.choice, dtype=settings.dtype)
    model = load_model(dataclasses.replace(checkpoint, choice=choice), torch.device("cpu"))
    if settings.lora is None:
        return model
    if settings.activation_checkpointing:
        model.enable_input_require_grads()  # frozen embeddings would leave the checkpointed layers without gradient
    return with_adapter(model, settings.lora)


def with_adapter(model: Any, config: Any) -> Any:
    """A model with a fresh adapter. config: a peft config, or the fields of a LoraConfig.

    Raises DistillationError for fields that peft does not know or refuses.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model

    if isinstance(config, PeftConfig):
        return get_peft_model(model, config)
    fields = dict(config)
    if wrong := wrong_lora_fields(fields):
        raise DistillationError("; ".join(wrong.values()))
    try:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **fields})
        return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise DistillationError(f"peft refuses the lora settings: {error}") from error


def wrong_lora_fields(fields: Mapping[str, Any]) -> dict[str, str]:
    """Why each field of ``lora`` that peft does not know cannot be set, by its name."""
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    return {
        name: f"lora.{name} is no field of peft's LoraConfig{nearest(name, known)}"
        for name in fields
        if name not in known
    }


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that a checkpoint's configuration names; float32 where it names none."""
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = getattr(torch, str(name), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def write_result(
    model: Any,
    state: dict[str, torch.Tensor] | None,
    checkpoint: Checkpoint,
    settings: TrainingSettings,
    folder: Path,
) -> None:
    """Write a trained model into a folder, in the dtype of the checkpoint that it began as.

    An adapter is written to ``adapter/`` and then merged into the weights; the model is changed by that.

    Args:
        model: not wrapped.
        state: its tensors, gathered, where the model itself holds only a part of them; else None.
        checkpoint, settings: what it was made from.
    """
    dtype = stored_dtype(checkpoint)
    if settings.lora is not None:
        model.save_pretrained(folder / ADAPTER, state_dict=state)
        if state is not None:
            from peft import PeftModel

            whole = load_pivot(checkpoint, settings.model_copy(update={"lora": None}))
            model, state = PeftModel.from_pretrained(whole, folder / ADAPTER), None
        model = model.merge_and_unload()
    if state is None:
        model.to(dtype).save_pretrained(folder)
        return
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict={n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()})


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write ``training.json``."""
    (folder / RECORD).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
