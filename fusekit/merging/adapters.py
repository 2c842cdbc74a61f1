"""Models given with a LoRA adapter (``model+adapter``): merged by mergekit into its adapter cache, then described."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from mergekit.options import MergeOptions

from fusekit.artifacts import disk_fault
from fusekit.errors import MergeError
from fusekit.hub import gather, read_headers, read_index, weight_entry
from fusekit.merging.models import Model


def check_adapters(models: Iterable[Model], options: MergeOptions) -> None:
    """Raise MergeError if a model has an adapter and there is no place to keep the merged weights."""
    for model in models:
        if model.adapter and not options.lora_merge_cache:
            raise MergeError(
                f"{model.spelling} has an adapter: say where to keep it merged with --lora-merge-cache FOLDER"
            )


def merge_adapters(models: Iterable[Model], options: MergeOptions) -> bool:
    """Merge every adapter into its model and point the models at the result; returns whether there was any.

    Raises MergeError when that fails. mergekit takes any folder in its cache for a finished one, so a folder that
    was begun and not finished is removed.
    """
    found = False
    for model in models:
        if not model.adapter:
            continue
        found = True
        cache = Path(options.lora_merge_cache)
        before = set(cache.iterdir()) if cache.is_dir() else set()
        try:
            merged = model.pinned.merged(
                cache_dir=str(cache),
                trust_remote_code=options.trust_remote_code,
                lora_merge_dtype=options.lora_merge_dtype,
            )
        except BaseException as error:
            for folder in set(cache.iterdir()) - before if cache.is_dir() else ():
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            raise disk_fault(error, cache) or MergeError(
                f"the adapter of {model.spelling} cannot be merged: {' '.join(str(error).split())}"
            ) from error
        _describe(model, Path(merged.model.path))
    return found


def _describe(model: Model, folder: Path) -> None:
    entry = weight_entry(path.name for path in folder.iterdir())
    if entry is None:
        raise MergeError(f"{folder} was left unfinished by an earlier merge of {model.spelling}: remove it")
    model.folder = folder
    if entry.endswith(".index.json"):
        weight_map = read_index((folder / entry).read_text(encoding="utf-8"), f"{model.spelling}: {entry}")
        model.headers = gather(weight_map, lambda shard: read_headers(folder / shard, model.spelling), model.spelling)
    else:
        model.headers = read_headers(folder / entry, model.spelling)
