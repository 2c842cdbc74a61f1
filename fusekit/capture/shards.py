"""A shard: one safetensors file of rows, the blobs last, an index of them before.

Equal rows make equal files: nothing in a shard depends on time, machine or the order of a dictionary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from fusekit.artifacts import commit_file, disk_fault
from fusekit.capture.bits import Bytes
from fusekit.capture.places import KEY_BYTES, key_bytes
from fusekit.errors import StorageError
from fusekit.types import CapturedRow

FORMAT = "1"
_LARGEST_HEADER = 100 << 20
_CHUNK = 1 << 22


class Index(NamedTuple):
    """What is known of m rows without decoding them.

    Attributes:
        offsets: int64 [m + 1], where each row's blob starts within ``data``; the last one is its end.
        cross_entropy: float64 [m], nats over the labels.
        keys: uint8 [m, 16].
        tokens, labels: int32 [m].
        bytes: int32 [m], bytes of content that the labels cover.
        dataset: int32 [m], index of the source of data.
    """

    offsets: npt.NDArray[np.int64]
    cross_entropy: npt.NDArray[np.float64]
    keys: Bytes
    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    bytes: npt.NDArray[np.int32]
    dataset: npt.NDArray[np.int32]


# Widest first: whatever the number of rows, every column starts at a multiple of its width.
_COLUMNS: dict[str, tuple[str, np.dtype[Any]]] = {
    "offsets": ("I64", np.dtype("<i8")),
    "cross_entropy": ("F64", np.dtype("<f8")),
    "keys": ("U8", np.dtype("u1")),
    "tokens": ("I32", np.dtype("<i4")),
    "labels": ("I32", np.dtype("<i4")),
    "bytes": ("I32", np.dtype("<i4")),
    "dataset": ("I32", np.dtype("<i4")),
}


def _shape(name: str, rows: int) -> list[int]:
    return {"offsets": [rows + 1], "keys": [rows, KEY_BYTES]}.get(name, [rows])


@dataclass(frozen=True)
class Written:
    """A shard that was committed: size in bytes, xxh3-128 of the file and of what is before the blobs."""

    size: int
    xxh3: str
    index_xxh3: str


class Facts(NamedTuple):
    """What the index says of a row."""

    key: str
    cross_entropy: float
    tokens: int
    labels: int
    bytes: int
    dataset: str


@dataclass(frozen=True)
class Blobs:
    """Encoded rows, and what the index says of each."""

    blobs: Sequence[bytes]
    facts: Sequence[Facts]


def facts_of(row: CapturedRow) -> Facts:
    """What the index is to say of a row."""
    tokens = row.tokens
    return Facts(
        tokens.key, float(row.cross_entropy), len(tokens.ids), len(row.actual), tokens.label_bytes, row.dataset
    )


def write_shard(path: Path, rows: Blobs, rank: int = 0) -> Written:
    """Commit a shard. Raises StorageError when the disk fails."""
    facts = rows.facts
    datasets = sorted({fact.dataset for fact in facts})
    columns: dict[str, Any] = {
        "offsets": np.cumsum([0, *map(len, rows.blobs)]),
        "cross_entropy": [fact.cross_entropy for fact in facts],
        "keys": np.frombuffer(b"".join(key_bytes(fact.key) for fact in facts), np.uint8),
        "tokens": [fact.tokens for fact in facts],
        "labels": [fact.labels for fact in facts],
        "bytes": [fact.bytes for fact in facts],
        "dataset": [datasets.index(fact.dataset) for fact in facts],
    }
    index = b"".join(np.asarray(columns[name], dtype).tobytes() for name, (_, dtype) in _COLUMNS.items())
    header = _header(len(facts), datasets, int(columns["offsets"][-1]))
    index_hash, whole = xxhash.xxh3_128(header + index), xxhash.xxh3_128(header + index)

    def write(file: BinaryIO) -> None:
        file.write(header + index)
        for blob in rows.blobs:
            file.write(blob)
            whole.update(blob)

    commit_file(path, write, rank=rank)
    size = len(header) + len(index) + int(columns["offsets"][-1])
    return Written(size, whole.hexdigest(), index_hash.hexdigest())


def _header(rows: int, datasets: list[str], data: int) -> bytes:
    at = 0
    header: dict[str, Any] = {"__metadata__": {"datasets": json.dumps(datasets), "format": FORMAT}}
    for name, (dtype, numpy_dtype) in _COLUMNS.items():
        shape = _shape(name, rows)
        size = int(np.prod(shape)) * numpy_dtype.itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header["data"] = {"dtype": "U8", "shape": [data], "data_offsets": [at, at + data]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard's index, and where its blobs are.

    Attributes:
        path: the file.
        index: see :class:`Index`.
        datasets: names of the sources of data.
        data_start: where in the file the blobs start.
    """

    path: Path
    index: Index
    datasets: list[str]
    data_start: int

    def facts(self, at: int) -> Facts:
        """What the index says of row ``at`` of this shard."""
        index = self.index
        return Facts(
            index.keys[at].tobytes().hex(),
            float(index.cross_entropy[at]),
            int(index.tokens[at]),
            int(index.labels[at]),
            int(index.bytes[at]),
            self.datasets[int(index.dataset[at])],
        )


def open_shard(path: Path, size: int | None = None, index_xxh3: str | None = None) -> Shard:
    """Read a shard's index.

    size, index_xxh3: what the manifest says of it, checked where given. Raises StorageError naming the file and what is
    missing or damaged.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if size is not None and found != size:
                raise StorageError(f"{path} has {found} bytes, but {size} were committed")
            return _parse(path, file, found, index_xxh3)
    except FileNotFoundError:
        raise StorageError(f"{path} is missing") from None
    except OSError as error:
        raise disk_fault(error, path) or StorageError(f"{path}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, OverflowError) as error:
        raise StorageError(f"{path} is damaged: {error}") from error


def _parse(path: Path, file: BinaryIO, size: int, index_xxh3: str | None) -> Shard:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise StorageError(f"{path} is damaged: {size} bytes, of which the header alone needs {length + 8}")
    text = file.read(length)
    header = json.loads(text)
    rows, data = header["cross_entropy"]["shape"][0], header["data"]["shape"][0]
    datasets = json.loads(header["__metadata__"]["datasets"])
    if not (type(rows) is int and type(data) is int and 0 <= rows <= size and 0 <= data <= size):
        raise StorageError(f"{path} is damaged: {rows} rows in {data} bytes")
    if prefix + text != _header(rows, datasets, data):
        raise StorageError(f"{path} is damaged: its header is not that of {rows} rows of format {FORMAT}")
    data_start = size - data
    index = file.read(data_start - 8 - length)
    widths = [int(np.prod(_shape(name, rows))) * dtype.itemsize for name, (_, dtype) in _COLUMNS.items()]
    if sum(widths) != len(index):
        raise StorageError(f"{path} is damaged: its index has {len(index)} bytes, {rows} rows need {sum(widths)}")
    if index_xxh3 is not None and xxhash.xxh3_128_hexdigest(prefix + text + index) != index_xxh3:
        raise StorageError(f"{path} is damaged: its index is not the one that was committed")
    columns, at = {}, 0
    for (name, (_, dtype)), width in zip(_COLUMNS.items(), widths, strict=True):
        columns[name] = np.frombuffer(index, dtype, width // dtype.itemsize, at).reshape(_shape(name, rows))
        at += width
    shard = Shard(path, Index(**columns), datasets, data_start)
    offsets = shard.index.offsets
    if offsets[0] != 0 or offsets[-1] != data or (np.diff(offsets) < 0).any():
        raise StorageError(f"{path} is damaged: the offsets of its rows do not rise from 0 to {data}")
    dataset = shard.index.dataset
    if rows and not 0 <= dataset.min() <= dataset.max() < len(datasets):
        raise StorageError(f"{path} is damaged: it names a source of data that it does not have")
    return shard


def file_hash(path: Path) -> str:
    """xxh3-128 of a file. Raises StorageError when it cannot be read."""
    state = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                state.update(chunk)
    except FileNotFoundError:
        raise StorageError(f"{path} is missing") from None
    except OSError as error:
        raise disk_fault(error, path) or StorageError(f"{path}: cannot be read: {error}") from error
    return state.hexdigest()


def map_data(shard: Shard) -> Bytes:
    """The blobs of a shard, mapped into memory: uint8. Raises StorageError when it cannot be."""
    size = int(shard.index.offsets[-1])
    if not size:
        return np.zeros(0, np.uint8)
    try:
        return np.memmap(shard.path, np.uint8, "r", shard.data_start, (size,))
    except (OSError, ValueError) as error:
        raise StorageError(f"{shard.path}: cannot be mapped into memory: {error}") from error
