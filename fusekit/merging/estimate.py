"""Disk and memory that a merge will take, from headers alone, against what there is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from mergekit.options import MergeOptions

from fusekit.artifacts import existing_parent, free_bytes
from fusekit.errors import MergeError
from fusekit.hub import Limit, memory_limits
from fusekit.merging.models import Model
from fusekit.merging.plan import Plan
from fusekit.resources import Need, refuse_lacking

SMALL_FILES_BYTES = 1 << 20
"""Config, card, provenance and the like, without the tokenizer."""

WORKSPACE_COPIES = 4.5
"""Copies of its inputs that a method of mergekit works with; the worst one (`sce`) takes 4.2, see docs/merge.md."""

FRUGAL = ("fusechat_sce", "varm", "linear", "passthrough")
FRUGAL_COPIES, FRUGAL_BYTES = 3, 64 << 20
"""Methods that hold a few tensors of the size of the result and a fixed workspace, however many inputs there are."""


def estimate(plan: Plan, models: Iterable[Model], options: MergeOptions, final: Path) -> list[Need]:
    """Everything that the merge needs, compared with what is free now. Nothing is read or allocated."""
    models = list(models)
    return [*_disk(plan, models, options, final), *_memory(plan, models, options)]


def refuse(needs: list[Need]) -> None:
    """Raise MergeError with the numbers if something does not fit."""
    way_out = (
        "Free some, merge elsewhere, or lower the need (--out-shard-size 1B writes smaller shards from less memory); "
        "`--ignore-estimates` starts it all the same."
    )
    refuse_lacking(needs, "this merge does not fit:", way_out, MergeError)


def _disk(plan: Plan, models: list[Model], options: MergeOptions, final: Path) -> list[Need]:
    wanted: list[tuple[Path, int, str]] = [(final.parent, _output_bytes(plan, models), "the result")]
    for model in models:
        if model.download_bytes and model.snapshot:
            wanted.append((model.snapshot.cache, model.download_bytes, f"the download of {model.name}"))
        if model.adapter and not model.lora and options.lora_merge_cache:
            size = sum(header.nbytes for header in model.headers.values())
            wanted.append((Path(options.lora_merge_cache), size, f"{model.name} with its adapter merged"))
    by_device: dict[int, list[tuple[Path, int, str]]] = {}
    for path, size, reason in wanted:
        by_device.setdefault(existing_parent(path).stat().st_dev, []).append((path, size, reason))
    return [
        Need(
            "disk, for " + ", ".join(reason for _, _, reason in items),
            sum(size for _, size, _ in items),
            free_bytes(items[0][0]),
            f"free on the disk of {items[0][0]}",
        )
        for items in by_device.values()
    ]


def _output_bytes(plan: Plan, models: list[Model]) -> int:
    tokenizer = max((_tokenizer_bytes(model) for model in models), default=0)
    return plan.nbytes + tokenizer + SMALL_FILES_BYTES


def _tokenizer_bytes(model: Model) -> int:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    return sum((model.folder / name).stat().st_size for name in names if (model.folder / name).is_file())


def _memory(plan: Plan, models: list[Model], options: MergeOptions) -> list[Need]:
    working, shard = working_bytes(plan), shard_bytes(plan, options)
    on_device = str(options.device).startswith("cuda") and torch.cuda.is_available()
    needs: list[Need] = []
    host = shard + working
    if on_device:
        device = working + largest_inputs(plan) + (shard if options.low_cpu_memory else 0)
        host = largest_inputs(plan) + (0 if options.low_cpu_memory else shard)
        free, _ = torch.cuda.mem_get_info(options.device)
        needs.append(Need("memory of the accelerator", device, free, f"free on {options.device}"))
    candidates = [_host_need(limit, host, models) for limit in memory_limits()]
    # One line, of the limit that is nearest to being hit.
    return [max(candidates, key=lambda need: need.needed - need.free), *needs]


def _host_need(limit: Limit, host: int, models: list[Model]) -> Need:
    mapped = 0
    if limit.address_space:
        mapped = sum(_largest_file(model) for model in models)
    return Need("memory", host + mapped, limit.available, limit.source)


def _largest_file(model: Model) -> int:
    sizes: dict[str, int] = {}
    for header in model.headers.values():
        sizes[header.file] = sizes.get(header.file, 0) + header.nbytes
    return max(sizes.values(), default=0)


def shard_bytes(plan: Plan, options: MergeOptions) -> int:
    """Results that wait to be written: one shard, or everything when shards are written in the background."""
    limit = int(options.out_shard_size)
    if options.async_write or limit <= 0:
        return plan.nbytes
    largest = max((tensor.nbytes for tensor in plan.tensors), default=0)
    return min(plan.nbytes, max(limit, largest))


def largest_inputs(plan: Plan) -> int:
    """Bytes of the inputs of the largest tensor, as they are loaded."""
    return max((tensor.loaded_bytes for tensor in plan.tensors), default=0)


def working_bytes(plan: Plan) -> int:
    """What the largest tensor takes while it is merged; inputs that are read from the mapped file do not count."""
    if plan.name in FRUGAL:
        return max((t.copied_bytes + FRUGAL_COPIES * t.nbytes for t in plan.tensors), default=0) + FRUGAL_BYTES
    return int(WORKSPACE_COPIES * largest_inputs(plan))
