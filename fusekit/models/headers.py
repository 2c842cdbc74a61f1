"""What a checkpoint contains, from its headers alone: names, shapes, dtypes and files of its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.errors import ModelError

MAX_HEADER_BYTES = 100 << 20  # what safetensors itself accepts

# safetensors dtype -> (torch name, bytes per element)
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor: torch name of its dtype, shape, and the file (name within its folder) that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    itemsize: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize


Headers = dict[str, TensorHeader]


def weight_entry(names: Iterable[str]) -> str | None:
    """The file from which mergekit reads a checkpoint: an index or a single file, safetensors before pickles."""
    present = set(names)
    for single in ("model.safetensors", "pytorch_model.bin"):
        for name in (f"{single}.index.json", single):
            if name in present:
                return name
    return None


def is_pickle(entry: str) -> bool:
    """Whether the entry file of a checkpoint stands for torch pickles."""
    return entry.startswith("pytorch_model.bin")


def read_headers(path: Path, label: str) -> Headers:
    """Headers of one safetensors file on disk. Raises ModelError naming the file when it is cut off or damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelError(
                    f"{label}: {path} is not a whole safetensors file: {size} bytes, of which the header alone "
                    f"needs {length + 8}. Was the download or copy interrupted?"
                )
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{label}: {path} cannot be read: {error.strerror or error}") from error
    headers, end = parse_header(raw, path.name, f"{label}: {path}")
    if 8 + length + end != size:
        raise ModelError(
            f"{label}: {path} is damaged: {size} bytes, but its header describes {8 + length + end}. "
            "Was the download or copy interrupted?"
        )
    return headers


def parse_header(raw: bytes, file: str, label: str) -> tuple[Headers, int]:
    """Headers and the number of data bytes from a safetensors header. Raises ModelError for anything malformed."""
    try:
        header: Any = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        headers = {name: _tensor_header(entry, file) for name, entry in entries.items()}
        spans = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
        sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(f"{label} has a damaged safetensors header: {error}") from error
    end = 0
    for start, stop in spans:
        if start != end or stop < start:
            raise ModelError(f"{label} has a damaged safetensors header: tensors overlap or leave holes")
        end = stop
    for name, tensor in headers.items():
        if tensor.nbytes != sizes[name]:
            raise ModelError(f"{label} has a damaged safetensors header: the size of {name} is not that of its shape")
    return headers, end


def _tensor_header(entry: dict[str, Any], file: str) -> TensorHeader:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"the dtype {entry['dtype']!r} is not one that can be merged")
    name, itemsize = DTYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("a shape or offset is not a whole number")
    return TensorHeader(name, shape, file, itemsize)


def read_index(text: str, label: str) -> dict[str, str]:
    """Tensor name -> shard of an index file. Raises ModelError when it is malformed or names a file elsewhere."""
    try:
        weight_map = json.loads(text)["weight_map"]
        pairs = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{label} is not an index of shards: {error}") from error
    for shard in pairs.values():
        # A name such as ../../other/file.bin would be read, or unpickled, from anywhere.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith((".safetensors", ".bin")):
            raise ModelError(f"{label} names {shard!r}, which is not a weight file in the same folder")
    return pairs


def gather(weight_map: dict[str, str], shard_headers: Callable[[str], Headers], label: str) -> Headers:
    """Headers of a sharded checkpoint. Raises ModelError when the index and the shards disagree."""
    by_shard = {shard: shard_headers(shard) for shard in sorted(set(weight_map.values()))}
    lacking = sorted(name for name, shard in weight_map.items() if name not in by_shard[shard])
    if lacking:
        shard = weight_map[lacking[0]]
        raise ModelError(
            f"{label}: its index says that {lacking[0]} is in {shard}, but it is not there"
            + (f" (and {len(lacking) - 1} tensors more)" if len(lacking) > 1 else "")
        )
    return {name: by_shard[shard][name] for name, shard in weight_map.items()}
