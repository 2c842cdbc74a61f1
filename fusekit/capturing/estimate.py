"""Memory and disk that a capture will take, from sizes of files alone, against what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusekit.capturing.engine import CHUNK_BYTES, batch_tokens_on
from fusekit.capturing.models import Checkpoint
from fusekit.capturing.settings import CaptureSettings
from fusekit.capturing.topk import CACHED_BYTES, GROUP, group_bytes
from fusekit.devices import Need, Processes, disk, main_memory, memory_limits, refuse_lacking
from fusekit.disk import human
from fusekit.errors import CaptureError

_BLOCK_COPIES = 3
"""Of a block of logits: themselves, their exponentials, and the head's weights or what the model makes of them."""

_GROUP_BYTES = 28
"""Of a group of ids while the best groups of a position are sought."""

_HIDDEN_COPIES = 6
"""Tensors as wide as the hidden states that live at one time within a layer, its residual included."""

_ROW_BYTES = 64
_TOKEN_BYTES = 12
_VALUE_BITS = 10
"""Of a stored row: beside its entries; per token (id, coordinates, label); of one stored log-probability."""


def refuse(needs: Sequence[Need]) -> None:
    """Raise CaptureError if something does not fit."""
    way_out = (
        "Free some, write elsewhere, load the model smaller (--dtype bfloat16, --quantization) or over several devices "
        "(--device-map auto), or take smaller batches (--batch-tokens); --ignore-estimates starts it all the same"
    )
    refuse_lacking(needs, "this capture does not fit:", way_out, CaptureError)


def store_bytes(*, rows: int, tokens: int, labels: int, vocabulary: int, top_k: int) -> int:
    """Bytes of a store at most: of so many rows and tokens, of which ``labels`` have ``top_k`` entries."""
    top_k = min(top_k, vocabulary)
    bits = top_k * (max(vocabulary // top_k, 1).bit_length() + 1 + _VALUE_BITS)
    return rows * _ROW_BYTES + tokens * _TOKEN_BYTES + labels * (bits // 8)


def disk_needs(checkpoint: Checkpoint, out: Path, **sizes: int) -> list[Need]:
    """Of a store of these sizes, as for :func:`store_bytes`, and of the download."""
    store = store_bytes(**sizes)
    if out.is_dir():  # what an interrupted run has written already
        store = max(0, store - sum(file.stat().st_size for file in out.glob("shard-*.parquet")))
    wanted = [(out, store, f"{sizes['rows']} captured examples, at most")]
    if checkpoint.snapshot and checkpoint.download_bytes:
        wanted.append((checkpoint.snapshot.cache, checkpoint.download_bytes, f"download of {checkpoint.choice.model}"))
    return disk(wanted)


def memory_needs(checkpoint: Checkpoint, settings: CaptureSettings, processes: Processes) -> list[Need]:
    """Of the loaded model and one batch: on this process's device, or on all of them together for a device map."""
    batch_tokens = settings.batch_tokens or batch_tokens_on(processes.device.type)
    weights = loaded_bytes(checkpoint)
    working = working_bytes(checkpoint, batch_tokens, processes.device.type, settings.top_k)
    needed = weights + max(working, dequantising_bytes(checkpoint))
    what = f"memory of {checkpoint.choice.model} ({human(weights)} of weights) and a batch of {batch_tokens} tokens"
    if processes.device.type == "cuda":
        count = torch.cuda.device_count()
        devices = range(count) if checkpoint.choice.device_map else [processes.device.index or 0]
        free = sum(torch.cuda.mem_get_info(i)[0] for i in devices)
        if checkpoint.choice.device_map:  # what does not fit on the GPUs stays in main memory
            free += min(limit.available for limit in memory_limits())
        needs = [Need(what, needed, free, f"free on {processes.device if len(devices) == 1 else f'{count} GPUs'}")]
        return needs + (_host_needs(checkpoint) if checkpoint.gguf is not None else [])
    if processes.device.type != "cpu":
        return []
    what += f" in {processes.local} processes" if processes.local > 1 else ""
    return [main_memory(what, needed, processes.local, mapped=max(checkpoint.weights.values(), default=0))]


def dequantise_needs(checkpoint: Checkpoint, folder: Path) -> list[Need]:
    """Of the dequantised weights of a GGUF file: in main memory, and on the disk of ``folder``."""
    return [
        *_host_needs(checkpoint),
        *disk([(folder, loaded_bytes(checkpoint), f"{checkpoint.choice.model}, dequantised")]),
    ]


def _host_needs(checkpoint: Checkpoint) -> list[Need]:
    """Main memory to dequantise a GGUF file, wherever its weights go from there."""
    needed = loaded_bytes(checkpoint) + dequantising_bytes(checkpoint)
    return [main_memory(f"main memory to dequantise {checkpoint.choice.model}", needed)]


def dequantising_bytes(checkpoint: Checkpoint) -> int:
    """Bytes besides the weights while a GGUF file is loaded: its largest tensor in float32, twice. Else 0."""
    return 2 * 4 * checkpoint.gguf.largest if checkpoint.gguf is not None else 0


def loaded_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the weights once they are loaded."""
    choice = checkpoint.choice
    stored = itemsize(stored_dtype(checkpoint))
    if choice.quantization:
        fields = choice.quantization
        bits = 4 if fields.get("load_in_4bit") else fields.get("bits") or fields.get("w_bit") or 8
        # Embeddings, norms and the head usually stay as they are: a tenth of a large model.
        return int(checkpoint.weight_bytes * (0.9 * float(bits) / 8 / stored + 0.1))
    return checkpoint.weight_bytes * (stored if choice.dtype == "auto" else itemsize(choice.dtype)) // stored


def working_bytes(checkpoint: Checkpoint, batch_tokens: int, device: str, top_k: int) -> int:
    """Bytes of one batch: hidden states of a layer, its feed-forward, and blocks of logits. device: its type."""
    shape = shape_of(checkpoint.config)
    width = itemsize(stored_dtype(checkpoint) if checkpoint.choice.dtype == "auto" else checkpoint.choice.dtype)
    row = group_bytes(shape.vocabulary, top_k)
    rows = min(batch_tokens, max(1, CHUNK_BYTES // row))
    block = min(CACHED_BYTES if device == "cpu" else CHUNK_BYTES, rows * 4 * shape.vocabulary)
    scoring = rows * (row + _GROUP_BYTES * shape.vocabulary // GROUP) + _BLOCK_COPIES * block
    # What a layer takes is free again when the logits are computed from the last hidden states.
    layer = batch_tokens * (_HIDDEN_COPIES * shape.hidden + 2 * shape.wide) * width
    return max(layer, batch_tokens * shape.hidden * (2 * width + 4) + scoring)


class Shape(NamedTuple):
    """Of a decoder: width of its hidden states and of its feed-forward, layers, vocabulary."""

    hidden: int
    wide: int
    layers: int
    vocabulary: int


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes, whatever names it uses; a 7B model's where it says nothing."""
    text = config.get("text_config")
    known = {**config, **text} if isinstance(text, dict) else config

    def first(*names: str) -> int | None:
        return next((value for name in names if isinstance(value := known.get(name), int) and value > 0), None)

    hidden = first("hidden_size", "n_embd", "d_model") or 4096
    wide = first("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    layers = first("num_hidden_layers", "n_layer", "n_layers") or 32
    return Shape(hidden, wide, layers, first("vocab_size") or 32000)


def head_dtype(settings: CaptureSettings, config: Mapping[str, Any], parameters: int) -> str:
    """As set; else float32 where that costs little beside the rest of the model, whatever the machine."""
    shape = shape_of(config)
    small = 8 * shape.hidden * shape.vocabulary <= parameters
    return settings.head_dtype or ("float32" if small else "model")


def parameters(checkpoint: Checkpoint) -> int:
    """How many parameters a checkpoint's files hold."""
    return checkpoint.weight_bytes // itemsize(stored_dtype(checkpoint))


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that a checkpoint's configuration names; float32 where it names none."""
    return str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")


def itemsize(dtype: str) -> int:
    """Bytes of an element of a dtype by torch's name; 4 for an unknown name."""
    found = getattr(torch, str(dtype).removeprefix("torch."), torch.float32)
    return int(found.itemsize) if isinstance(found, torch.dtype) else 4
