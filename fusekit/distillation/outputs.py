"""The models that a run makes: their places, how they begin, and how they are written."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fusekit import artifacts as artifact
from fusekit.capturing.models import Checkpoint, load_model, stored_dtype
from fusekit.disk import commit_file, disk_errors, sync_tree
from fusekit.distillation.arguments import with_adapter
from fusekit.distillation.settings import Target, TrainingSettings
from fusekit.errors import StorageError

OVERWRITING = "overwriting"
"""In the folder of a model's checkpoints while the one that is published is a former one, which is to be replaced."""


def begin_overwriting(targets: Sequence[Target]) -> None:
    """Delete checkpoints, and mark the models that are published: a run that resumes makes those again."""
    for target in targets:
        shutil.rmtree(target.work, ignore_errors=True)
        if target.folder.exists():
            with disk_errors(target.work):
                target.work.mkdir()
                commit_file(target.work / OVERWRITING, b"")


def is_former(target: Target) -> bool:
    """Whether the published model is one that was to be replaced, and has not been yet."""
    return target.folder.exists() and (target.work / OVERWRITING).exists()


ADAPTER = "adapter"
"""Folder of the LoRA adapter beside the merged weights."""
RECORD = "training.json"
"""What a published model was made from, and the log of its training."""


def load_pivot(checkpoint: Checkpoint, settings: TrainingSettings) -> Any:
    """The pivot on the CPU, in ``settings.dtype``, with a fresh adapter where the settings ask for one."""
    choice = dataclasses.replace(checkpoint.choice, dtype=settings.dtype)
    model = load_model(dataclasses.replace(checkpoint, choice=choice), torch.device("cpu"))
    if settings.lora is None:
        return model
    if settings.activation_checkpointing:
        model.enable_input_require_grads()  # frozen embeddings would leave the checkpointed layers without gradient
    return with_adapter(model, settings.lora)


def write_result(
    model: Any, state: dict[str, torch.Tensor] | None, checkpoint: Checkpoint, settings: TrainingSettings, folder: Path
) -> None:
    """Write a trained model, not wrapped, in the dtype of the checkpoint that it began as; an adapter is merged in.

    state: its tensors, gathered, where the model itself holds only a part of them; else None.
    """
    named = getattr(torch, stored_dtype(checkpoint), None)
    dtype = named if isinstance(named, torch.dtype) else torch.float32
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


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, good or not, as (step, path), latest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted(((int(name[1]), path) for name, path in found if name and path.is_dir()), reverse=True)


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Make a checkpoint durable and write its manifest, with what it was made under (``facts``)."""
    with disk_errors(checkpoint, "cannot be made durable"):
        sync_tree(checkpoint)
    artifact.seal(checkpoint, "checkpoint", facts)


def _manifest(checkpoint: Path) -> artifact.Artifact:
    if (known := artifact.read(checkpoint)) is None:
        raise StorageError(f"{checkpoint / artifact.MANIFEST} is missing: the checkpoint was not finished")
    return known


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was made under. Raises StorageError where its manifest is missing or damaged."""
    return _manifest(checkpoint).inputs


def problems_of(checkpoint: Path, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, file by file. hashes: read every file through, beyond looking at its size."""
    try:
        files = _manifest(checkpoint).files
    except StorageError as error:
        return [str(error)]
    return artifact.differing(checkpoint, files, hashes=hashes)


def last_good(folder: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The latest checkpoint in a folder that is as it was written. say: told of each later one, and what is wrong."""
    for step, path in checkpoints(folder):
        problems = problems_of(path)
        if not problems:
            return path
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        say(f"warning: checkpoint-{step} is not used: {problems[0]}{more}")
    return None


def rotate(folder: Path, keep: int, also: Path | None = None) -> list[Path]:
    """Delete old checkpoints but ``also`` and the latest ``keep`` that have all files in full; returns those deleted.

    Unfinished ones do not count, so the last good one is never among the deleted, and nothing is while there is none.
    """
    found = checkpoints(folder)
    whole = [step for step, path in found if not problems_of(path, hashes=False)]
    oldest = min(whole[: max(keep, 1)], default=0)
    deleted = [path for step, path in found if step < oldest and path != also]
    for path in deleted:
        # The manifest first: a deletion that is cut short leaves no checkpoint that looks finished.
        (path / artifact.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    return deleted
