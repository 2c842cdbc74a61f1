"""A shard: the columns of examples in one Parquet file, which docs/store.md describes.

Equal examples make equal files: nothing in a shard depends on time, machine or the order of a dictionary.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from fusekit.artifacts import file_hash
from fusekit.capturing.codec import Columns
from fusekit.capturing.manifest import ShardRecord
from fusekit.disk import disk_fault
from fusekit.errors import StorageError

LAYOUT = 1
"""Version of the columns."""

GROUP_VALUES = 1 << 17
"""Entries and tokens of a row group, about: what is decoded at once to read one row at random."""

_METADATA = b"fusekit"
_FOOTER_END = 8  # the length of the footer, and the magic word

SCALARS = {
    "key": pa.string(),
    "dataset": pa.string(),
    "cross_entropy": pa.float64(),
    "tokens": pa.int32(),
    "labels": pa.int32(),
    "bytes": pa.int64(),
}
_TOKENS = {
    "token_ids": pa.int32(),
    "message": pa.int32(),
    "part": pa.int8(),
    "ends": pa.int64(),
    "lows": pa.int64(),
    "is_label": pa.bool_(),
}
_ENTRIES = {"entries": pa.int32(), "id_gaps": pa.int32()}
_ROUNDED = {"depths": pa.int32(), "tail_depth": pa.int32(), "label_depth": pa.int32()}
_EXACT = {"logprobs": pa.float32(), "tail": pa.float32(), "label_logprob": pa.float32()}
_DICTIONARY = ("dataset", "message.list.element", "part.list.element")
# Bytes of equal weight beside each other: zstd finds the high ones, which repeat, and leaves the low ones alone.
_SPLIT = ("token_ids", "ends", "lows", "entries", "id_gaps", *_ROUNDED, *_EXACT)


def schema(exact: bool) -> pa.Schema:
    """The columns of a shard. exact: of float32 log-probabilities, not rounded ones."""
    fields = [pa.field(name, kind, nullable=False) for name, kind in SCALARS.items()]
    for name, kind in (_TOKENS | _ENTRIES | (_EXACT if exact else _ROUNDED)).items():
        fields.append(pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=False))
    return pa.schema(fields)


def shard_bytes(rows: Sequence[Columns], exact: bool) -> bytes:
    """The file of a shard: rows that one codec encoded, ``exact`` or not."""
    layout, file = schema(exact), io.BytesIO()
    writer = pq.ParquetWriter(
        file,
        layout,
        compression="zstd",
        compression_level=3,
        use_dictionary=list(_DICTIONARY),
        column_encoding={
            f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _SPLIT if layout.get_field_index(name) >= 0
        },
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    )
    ends, hashes = [0], []
    for group in _groups(rows):
        writer.write_table(_table(group, layout))
        ends.append(file.tell())
        with file.getbuffer() as written:
            hashes.append(xxhash.xxh3_64_hexdigest(written[ends[-2] : ends[-1]]))
    about = {"layout": LAYOUT, "ends": ends[1:], "xxh3_64": hashes}
    writer.add_key_value_metadata({_METADATA: json.dumps(about, separators=(",", ":"))})
    writer.close()
    return file.getvalue()


def _groups(rows: Sequence[Columns]) -> Iterator[Sequence[Columns]]:
    start = values = 0
    for at, row in enumerate(rows):
        values += len(row["id_gaps"]) + len(row["token_ids"])
        if values >= GROUP_VALUES:
            yield rows[start : at + 1]
            start, values = at + 1, 0
    if start < len(rows):
        yield rows[start:]


def _table(rows: Sequence[Columns], layout: pa.Schema) -> pa.Table:
    arrays = []
    for field in layout:
        values = [row[field.name] for row in rows]
        if not pa.types.is_list(field.type):
            arrays.append(pa.array(values, field.type))
            continue
        offsets = pa.array(np.cumsum([0, *map(len, values)]).astype(np.int32))
        flat = pa.array(np.concatenate(values), field.type.value_type)
        arrays.append(pa.ListArray.from_arrays(offsets, flat, type=field.type))
    return pa.Table.from_arrays(arrays, schema=layout)


def footer_hash(data: bytes | memoryview) -> str:
    """xxh3-128 of a Parquet file's footer and what follows it. Raises StorageError where there is none."""
    length = int.from_bytes(data[-_FOOTER_END:-4], "little") + _FOOTER_END
    if length > len(data):
        raise StorageError(f"its footer of {length} bytes is longer than the file of {len(data)}")
    return xxhash.xxh3_128_hexdigest(data[len(data) - length :])


def check_shard(path: Path, size: int, footer_xxh3: str) -> None:
    """Compare a shard's size and footer with its record. Raises StorageError naming the file and what is wrong."""
    with _explained(path):
        if (found := path.stat().st_size) != size:
            raise StorageError(f"{path} has {found} bytes, but {size} were committed")
        with pa.memory_map(str(path)) as file:
            if footer_hash(memoryview(file.read_buffer())) != footer_xxh3:
                raise StorageError(f"{path} is damaged: its footer is not the one that was committed")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what reading a file raises into a StorageError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise StorageError(f"{path} is missing") from None
    except StorageError as error:
        raise error if str(path) in str(error) else StorageError(f"{path} is damaged: {error}") from error
    except (OSError, pa.ArrowException, LookupError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise disk_fault(error, path) or StorageError(f"{path} is damaged: {error}") from error


class Shard:
    """A shard that is open for reading, mapped into memory. record: what the manifest says of it. exact: of its codec.

    Attributes:
        starts: int64 [groups + 1], the first row of each row group, and the number of rows.

    Raises StorageError: names the file, and what is missing or damaged.
    """

    def __init__(self, path: Path, record: ShardRecord, exact: bool) -> None:
        self.path = path
        check_shard(path, record.size, record.footer_xxh3)
        with _explained(path):
            self._file = pa.memory_map(str(path))
            self._parquet = pq.ParquetFile(self._file, page_checksum_verification=True)
            metadata = self._parquet.metadata
            about = json.loads(metadata.metadata[_METADATA])
            if about["layout"] != LAYOUT:
                raise StorageError(
                    f"{path} has columns of layout {about['layout']}, but this version of fusekit reads {LAYOUT}"
                )
            self._ends, self._hashes = [0, *about["ends"]], about["xxh3_64"]
            sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            self.starts = np.cumsum([0, *sizes])
            if self.starts[-1] != record.rows:
                raise StorageError(f"{path} has {self.starts[-1]} rows, the manifest says {record.rows}")
            if self._parquet.schema_arrow.names != schema(exact).names:
                raise StorageError(f"{path} has the columns {', '.join(self._parquet.schema_arrow.names)}")

    def _bytes(self, start: int, stop: int) -> memoryview:
        self._file.seek(start)
        return memoryview(self._file.read_buffer(stop - start))

    def group(self, number: int) -> Group:
        """A row group, compared with its checksum. Raises StorageError naming the file."""
        with _explained(self.path):
            if xxhash.xxh3_64_hexdigest(self._bytes(*self._ends[number : number + 2])) != self._hashes[number]:
                raise StorageError(f"{self.path} is damaged: row group {number} has another checksum")
            return Group(self._parquet.read_row_group(number, use_threads=False))

    def facts(self) -> pa.Table:
        """Key, dataset, cross-entropy and counts of its rows, without decoding them. Raises StorageError."""
        with _explained(self.path):
            return self._parquet.read(list(SCALARS), use_threads=False)


class Group:
    """The columns of some rows in memory: ``group[i]`` is what a codec decodes, views of arrays. size: bytes."""

    def __init__(self, table: pa.Table) -> None:
        self.size = int(table.nbytes)
        self._scalars: dict[str, list[Any]] = {}
        self._lists: dict[str, tuple[list[int], npt.NDArray[Any]]] = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            if name in SCALARS:
                self._scalars[name] = column.to_pylist()
            else:
                array = column.combine_chunks()
                values = array.values.to_numpy(zero_copy_only=False)
                self._lists[name] = array.offsets.to_numpy().tolist(), values

    def __len__(self) -> int:
        return len(self._scalars["key"])

    def __iter__(self) -> Iterator[Columns]:
        return (self[at] for at in range(len(self)))

    def __getitem__(self, at: int) -> Columns:
        columns: Columns = {name: values[at] for name, values in self._scalars.items()}
        for name, (offsets, values) in self._lists.items():
            columns[name] = values[offsets[at] : offsets[at + 1]]
        return columns


def hash_of(path: Path) -> str:
    """xxh3-128 of a file. Raises StorageError when it cannot be read."""
    with _explained(path):
        return file_hash(path)
