"""A shard: examples as the columns of a Parquet file, which docs/store.md describes.

Equal examples make equal files: nothing in a shard depends on time, machine or the order of a dictionary.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from fusekit.alignment.rows import MASS_TOLERANCE
from fusekit.artifacts import Count, File, Hash, Strict, file_hash
from fusekit.disk import disk_errors, disk_fault
from fusekit.errors import StorageError
from fusekit.settings import DEFAULT_MAX_ERROR
from fusekit.types import BoolArray, CapturedRow, FloatArray, IntArray, TokenizedRow, TopK

LAYOUT = 1
"""Version of the columns."""

GROUP_VALUES = 1 << 17
"""Entries and tokens of a row group, about: what is decoded at once to read one row at random."""

LOWEST = -1e4
"""Log-probabilities below this are refused."""

Columns = dict[str, Any]
"""An example as it is stored: a value or an array per column of docs/store.md."""


class Quarantined(Strict):
    """A row that the store does not hold, and why. row: its place in the data, from 0."""

    row: Count
    key: Hash
    reason: str


class ShardRecord(File):
    """A shard that was committed: for the rows ``start`` to ``stop`` of the data, of which it lacks the quarantined.

    footer_xxh3: xxh3-128 of its Parquet footer. bytes: of content that its labels cover.
    """

    footer_xxh3: Hash
    start: Count
    stop: Count
    rows: Count
    tokens: Count
    labels: Count
    bytes: Count
    quarantined: list[Quarantined]

    def is_at(self, path: Path) -> bool:
        """Whether the file is there, as far as its size tells. Raises StorageError when the disk fails."""
        with disk_errors(path, "cannot be read"), suppress(FileNotFoundError):
            return path.stat().st_size == self.size
        return False


# Steps grow as 1 / sqrt(p) from a quarter of the largest at p = 1, until p = 1/16.
_FINEST = 0.25
_KNEE = -2 * float(np.log(1 / _FINEST))
_TABLE = 1 << 16


class Grid:
    """Log-probabilities rounded to a companded grid.

    Between l and the next grid point lies about ``step(l) = min(s, s/4 * exp(-l/2))``, with s = ``max_error``. To the
    second order the KL divergence is the sum of p times the squared error, so a step that grows as 1/sqrt(p) gives
    every entry an equal share in it; below p = 1/16 the step stays at s, as errors of single entries count too.

    Depth d stands for the log-probability that solves f(l) = -d, with f the integral of 1/step and f(0) = 0:
    ``f(l) = -(8/s) (1 - exp(l/2))`` down to the knee l = -2 ln 4, where f = -6/s, and ``-6/s + (l + 2 ln 4)/s`` below.
    """

    def __init__(self, max_error: float) -> None:
        self.step = max_error
        self._knee_depth = 2 * (1 - _FINEST) / (_FINEST * max_error)

    def depths(self, logprobs: FloatArray) -> IntArray:
        """The nearest grid points, int64, 0 for probability 1. logprobs: at most 0 (what is above counts as 0)."""
        logprobs = np.minimum(logprobs, 0.0)
        near = (1 - np.exp(np.maximum(logprobs, _KNEE) / 2)) * (2 / (_FINEST * self.step))
        far = np.minimum(logprobs, _KNEE) - _KNEE
        return np.rint(near - far / self.step).astype(np.int64)

    def logprobs(self, depths: IntArray) -> FloatArray:
        """The log-probabilities of grid points, float64."""
        deepest = int(depths.max(initial=0))
        if deepest > max(_TABLE, depths.size):
            return self._values(depths.astype(np.float64))
        return self._values(np.arange(deepest + 1, dtype=np.float64))[depths]

    def _values(self, depths: FloatArray) -> FloatArray:
        near = 2 * np.log1p(-np.minimum(depths, self._knee_depth) * (_FINEST * self.step / 2))
        far = np.maximum(depths, self._knee_depth) - self._knee_depth
        return np.asarray(near - far * self.step)


class ExactGrid(Grid):
    """Every float32 a grid point of its own: the depth is the pattern of bits of minus the log-probability."""

    def __init__(self) -> None:
        self.step = 0.0

    def depths(self, logprobs: FloatArray) -> IntArray:
        return np.abs(np.minimum(logprobs, 0.0)).astype(np.float32).view(np.uint32).astype(np.int64)

    def logprobs(self, depths: IntArray) -> FloatArray:
        return -depths.astype(np.uint32).view(np.float32).astype(np.float64)


class Codec:
    """Examples of one model to columns and back.

    Keys, ids, coordinates and cross-entropies come back exactly; log-probabilities and log of the tail within
    ``max_error`` nats: half of it rounding, half normalisation, as decoded entries and tail sum to 1 (docs/store.md). A
    tail of 0 stays 0. Entries come back by falling decoded probability, equal ones by rising id. ``max_error=0``:
    float32, neither rounded further nor normalised.

    Args:
        vocabulary: ids are below it.
        top_k: no label has more entries.
        max_error: nats.

    Raises:
        StorageError: ``max_error`` is out of range.
    """

    def __init__(self, vocabulary: int, top_k: int, max_error: float = DEFAULT_MAX_ERROR) -> None:
        if max_error != 0 and not 1e-4 <= max_error <= 1:
            raise StorageError(f"max_error is {max_error}, but has to be 0 (exact) or between 0.0001 and 1 nats")
        self.vocabulary, self.top_k, self.exact = vocabulary, top_k, max_error == 0
        self._grid = ExactGrid() if self.exact else Grid(max_error)

    def encode(self, row: CapturedRow) -> Columns:
        """The columns of a row. Raises StorageError naming the row and what cannot be stored."""
        tokens = row.tokens
        ends, lows = np.asarray(tokens.ends, np.int64), np.asarray(tokens.lows, np.int64)
        return {
            "key": tokens.key,
            "dataset": row.dataset,
            "cross_entropy": float(row.cross_entropy),
            "tokens": len(tokens),
            "labels": int(np.count_nonzero(tokens.labels)),
            "bytes": tokens.label_bytes,
            "token_ids": tokens.ids.astype(np.int32),
            "message": np.asarray(tokens.message, np.int32),
            "part": np.asarray(tokens.part, np.int8),
            "ends": ends,
            "lows": lows[:0] if np.array_equal(ends, lows) else lows,
            "is_label": np.asarray(tokens.labels, bool),
            **self._entries(row),
        }

    def _entries(self, row: CapturedRow) -> Columns:
        """The entries of each label by rising id, tails, and the labels' own log-probabilities."""
        ids = np.asarray(row.rows.ids, np.int64)
        logprobs, tail = np.asarray(row.rows.logprobs, np.float64), np.asarray(row.rows.tail, np.float64)
        actual = np.asarray(row.actual, np.float64)
        used = (ids >= 0) & (logprobs != -np.inf)
        counts = used.sum(axis=1)
        self._check(row, np.where(used, ids, 0), np.where(used, logprobs, -np.inf), used)
        order = np.argsort(np.where(used, ids, self.vocabulary), axis=1)[:, : int(counts.max(initial=0))]
        used = np.arange(order.shape[1]) < counts[:, None]
        ids = np.where(used, np.take_along_axis(ids, order, 1), self.vocabulary)
        logprobs = np.take_along_axis(logprobs, order, 1)[used]
        gaps = (np.diff(ids, axis=1, prepend=-1) - 1)[used]
        found: Columns = {"entries": counts.astype(np.int32), "id_gaps": gaps.astype(np.int32)}
        if self.exact:
            return found | {
                "logprobs": np.minimum(logprobs, 0).astype(np.float32),
                "tail": tail.astype(np.float32),
                "label_logprob": np.minimum(actual, 0).astype(np.float32),
            }
        # The logarithm of a tail of 0 has no depth: it is kept as depth -1.
        tails = np.where(tail > 0, self._grid.depths(np.log(np.where(tail > 0, tail, 1))), -1)
        return found | {
            "depths": self._grid.depths(logprobs).astype(np.int32),
            "tail_depth": tails.astype(np.int32),
            "label_depth": self._grid.depths(actual).astype(np.int32),
        }

    def _check(self, row: CapturedRow, ids: IntArray, logprobs: FloatArray, used: BoolArray) -> None:
        """ids, logprobs: int64 and float64 [n, m], 0 and -inf where there is no entry."""
        wrong, tail = f"example {row.tokens.key}: ", row.rows.tail
        every = np.concatenate([row.tokens.ids, ids.ravel()])
        if len(outside := every[(every < 0) | (every >= self.vocabulary)]):
            raise StorageError(f"{wrong}token id {outside[0]} is outside the vocabulary of {self.vocabulary}")
        if (most := int(used.sum(axis=1).max(initial=0))) > self.top_k:
            raise StorageError(f"{wrong}{most} entries for one label, more than top_k {self.top_k}")
        mass = np.exp(logprobs).sum(axis=1) + tail
        if len(labels := np.flatnonzero(~(np.abs(mass - 1) <= MASS_TOLERANCE) | ~(tail >= 0))):
            label = int(labels[0])
            raise StorageError(
                f"{wrong}label {label} has no distribution: its entries and its tail of {tail[label]:.6g} sum to "
                f"{mass[label]:.6g}, not 1"
            )
        values = np.concatenate([logprobs[used], row.actual])
        if len(unfit := values[~((values >= LOWEST) & (values <= MASS_TOLERANCE))]):
            raise StorageError(f"{wrong}a log-probability is {unfit[0]:.6g}, but ones from {LOWEST:g} to 0 are stored")

    def decode(self, columns: Columns) -> CapturedRow:
        """The row of its columns, as wide as the most entries of any label. Raises StorageError for other columns."""
        try:
            ids, is_label = columns["token_ids"].astype(np.int64), columns["is_label"]
            message, part = columns["message"].astype(np.int64), columns["part"].astype(np.int64)
            ends = columns["ends"]
            lows = columns["lows"] if len(columns["lows"]) else ends
            tokens = TokenizedRow(columns["key"], ids, message, part, ends, lows, is_label)
            rows, actual = self._decode_entries(columns, ids[is_label])
            return CapturedRow(tokens, columns["dataset"], rows, actual, columns["cross_entropy"])
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise StorageError(f"example {columns.get('key')}: its columns do not fit together: {error}") from error

    def _decode_entries(self, columns: Columns, labels: IntArray) -> tuple[TopK, FloatArray]:
        """Rows of n labels with the ids ``labels`` [n], and their own log-probabilities [n]."""
        counts = columns["entries"]
        most = int(counts.max(initial=0))
        if self.exact:
            depths = self._grid.depths(columns["logprobs"].astype(np.float64))
            own = self._grid.depths(columns["label_logprob"].astype(np.float64))
        else:
            depths, own = columns["depths"].astype(np.int64), columns["label_depth"].astype(np.int64)
        used = np.arange(most) < counts[:, None]
        ids = np.cumsum(_padded(columns["id_gaps"].astype(np.int64) + 1, used), axis=1) - 1
        keys = (_padded(depths, used) << 32) | ids  # by falling probability, then by rising id
        full = bool(used.all())
        if not full:
            keys[~used] = np.iinfo(np.int64).max
        keys.sort(axis=1)
        ids, depths = keys & 0xFFFFFFFF, keys >> 32
        if not full:
            ids, depths = np.where(used, ids, -1), np.where(used, depths, 0)
        logprobs, actual = self._grid.logprobs(depths), self._grid.logprobs(own)
        if not full:
            logprobs[~used] = -np.inf
        if self.exact:
            return TopK(ids, logprobs, columns["tail"].astype(np.float64)), actual
        tails = columns["tail_depth"]
        tail = np.where(tails < 0, 0.0, np.exp(self._grid.logprobs(np.maximum(tails, 0))))
        total = np.exp(logprobs).sum(axis=1) + tail
        shift = np.log(total)
        # A label that is an entry with the same value takes the entry's, which is normalised; another keeps its own.
        listed = ((ids == labels[:, None]) & (depths == own[:, None])).any(axis=1)
        return TopK(ids, logprobs - shift[:, None], tail / total), actual - np.where(listed, shift, 0.0)


def _padded(flat: IntArray, used: BoolArray) -> IntArray:
    """The entries of n labels, one after the other, as int64 [n, most], 0 where not ``used``."""
    if len(flat) == used.size:
        return flat.reshape(used.shape)
    wide = np.zeros(used.shape, np.int64)
    wide[used] = flat
    return wide


SCALARS = {
    "key": pa.string(),
    "dataset": pa.string(),
    "cross_entropy": pa.float64(),
    "tokens": pa.int32(),
    "labels": pa.int32(),
    "bytes": pa.int64(),
}
_LISTS = {
    "token_ids": pa.int32(),
    "message": pa.int32(),
    "part": pa.int8(),
    "ends": pa.int64(),
    "lows": pa.int64(),
    "is_label": pa.bool_(),
    "entries": pa.int32(),
    "id_gaps": pa.int32(),
}
_ROUNDED = {"depths": pa.int32(), "tail_depth": pa.int32(), "label_depth": pa.int32()}
_EXACT = {"logprobs": pa.float32(), "tail": pa.float32(), "label_logprob": pa.float32()}
_DICTIONARY = ("dataset", "message.list.element", "part.list.element")
# Bytes of equal weight beside each other: zstd finds the high ones, which repeat, and leaves the low ones alone.
_SPLIT = ("token_ids", "ends", "lows", "entries", "id_gaps")
_METADATA = b"fusekit"
_FOOTER_END = 8  # the length of the footer, and the magic word


def schema(exact: bool) -> pa.Schema:
    """The columns of a shard. exact: of float32 log-probabilities, not rounded ones."""
    fields = [pa.field(name, kind, nullable=False) for name, kind in SCALARS.items()]
    for name, kind in (_LISTS | (_EXACT if exact else _ROUNDED)).items():
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
            f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in (*_SPLIT, *(_EXACT if exact else _ROUNDED))
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
    """xxh3-128 of a Parquet file's footer and what follows it."""
    length = int.from_bytes(data[-_FOOTER_END:-4], "little") + _FOOTER_END
    return xxhash.xxh3_128_hexdigest(data[-length:])


def check_shard(path: Path, record: ShardRecord) -> None:
    """Compare a shard's size and footer with its record. Raises StorageError naming the file and what is wrong."""
    with _explained(path):
        if (found := path.stat().st_size) != record.size:
            raise StorageError(f"{path} has {found} bytes, but {record.size} were committed")
        with pa.memory_map(str(path)) as file:
            if footer_hash(memoryview(file.read_buffer())) != record.footer_xxh3:
                raise StorageError(f"{path} is damaged: its footer is not the one that was committed")


def hash_of(path: Path) -> str:
    """xxh3-128 of a file. Raises StorageError when it cannot be read."""
    with _explained(path):
        return file_hash(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what reading a file raises into a StorageError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise StorageError(f"{path} is missing") from None
    except (OSError, pa.ArrowException, LookupError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise disk_fault(error, path) or StorageError(f"{path} is damaged: {error}") from error


class Shard:
    """A shard that is open for reading, mapped into memory; its footer is the one that was committed.

    Attributes:
        starts: int64 [groups + 1], the first row of each row group, and the number of rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _explained(path):
            self._file = pa.memory_map(str(path))
            self._parquet = pq.ParquetFile(self._file, page_checksum_verification=True)
            metadata = self._parquet.metadata
            about = json.loads(metadata.metadata[_METADATA])
            self._ends, self._hashes = [0, *about["ends"]], about["xxh3_64"]
            sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            self.starts = np.cumsum([0, *sizes])

    def group(self, number: int) -> Group:
        """A row group, compared with its checksum. Raises StorageError naming the file."""
        start, stop = self._ends[number : number + 2]
        with _explained(self.path):
            self._file.seek(start)
            if xxhash.xxh3_64_hexdigest(self._file.read_buffer(stop - start)) != self._hashes[number]:
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

    def __getitem__(self, at: int) -> Columns:
        columns: Columns = {name: values[at] for name, values in self._scalars.items()}
        for name, (offsets, values) in self._lists.items():
            columns[name] = values[offsets[at] : offsets[at + 1]]
        return columns
