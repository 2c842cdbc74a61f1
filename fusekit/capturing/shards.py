"""A shard: the columns of examples in one Parquet file, which docs/store.md describes.

Equal examples make equal files: nothing in a shard depends on time, machine or the order of a dictionary.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from fusekit.alignment.rows import MASS_TOLERANCE
from fusekit.artifacts import file_hash
from fusekit.capturing.settings import DEFAULT_MAX_ERROR
from fusekit.disk import disk_fault
from fusekit.errors import StorageError
from fusekit.types import BoolArray, CapturedRow, FloatArray, IntArray, Part, TokenizedRow, TopK

KEY_BYTES = 16

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Quarantined(Strict):
    """A row that the store does not hold, and why. row: its place in the data, from 0."""

    row: Count
    key: Hash
    reason: str


class ShardRecord(Strict):
    """A shard that was committed: for the rows ``start`` to ``stop`` of the data, of which it lacks the quarantined.

    size: bytes of the file. xxh3, footer_xxh3: xxh3-128 of it and of its Parquet footer. bytes: of content that its
    labels cover.
    """

    file: str = Field(pattern=r"^shard-[0-9]{5,}\.parquet$")
    size: Count
    xxh3: Hash
    footer_xxh3: Hash
    start: Count
    stop: Count
    rows: Count
    tokens: Count
    labels: Count
    bytes: Count
    quarantined: list[Quarantined]

    def is_there(self, folder: Path) -> bool:
        """Whether the file is there, as far as its size tells. Raises StorageError when the disk fails."""
        path = folder / self.file
        try:
            return path.stat().st_size == self.size
        except FileNotFoundError:
            return False
        except OSError as error:
            raise disk_fault(error, path) or StorageError(f"{path}: cannot be read: {error}") from error


def key_bytes(key: str) -> bytes:
    """The 16 bytes of a row's key. Raises StorageError for anything but 32 lower-case hexadecimal digits."""
    try:
        data = bytes.fromhex(key)
    except ValueError:
        data = b""
    if len(data) != KEY_BYTES or data.hex() != key:
        raise StorageError(f"a row has the key {key!r}, but keys are 32 hexadecimal digits (Row.key)")
    return data


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

    def _position(self, logprobs: FloatArray) -> FloatArray:
        near = (1 - np.exp(np.maximum(logprobs, _KNEE) / 2)) * (2 / (_FINEST * self.step))
        far = np.minimum(logprobs, _KNEE) - _KNEE
        return near - far / self.step

    def _value(self, positions: FloatArray) -> FloatArray:
        near = 2 * np.log1p(-np.minimum(positions, self._knee_depth) * (_FINEST * self.step / 2))
        far = np.maximum(positions, self._knee_depth) - self._knee_depth
        return np.asarray(near - far * self.step)

    def depths(self, logprobs: FloatArray) -> IntArray:
        """The nearest grid points, int64, 0 for probability 1. logprobs: at most 0 (what is above counts as 0)."""
        return np.rint(self._position(np.minimum(logprobs, 0.0))).astype(np.int64)

    def logprobs(self, depths: IntArray) -> FloatArray:
        """The log-probabilities of grid points, float64."""
        deepest = int(depths.max(initial=0))
        if deepest > max(_TABLE, depths.size):
            return self._value(depths.astype(np.float64))
        return self._value(np.arange(deepest + 1, dtype=np.float64))[depths]

    def rounding(self, logprobs: FloatArray) -> FloatArray:
        """The largest error of rounding at these log-probabilities, at most half of ``max_error``."""
        logprobs = np.minimum(logprobs, 0.0)
        # The side away from 0 has the larger steps.
        return logprobs - self._value(self._position(logprobs) + 0.5)


class ExactGrid(Grid):
    """Every float32 a grid point of its own: the depth is the pattern of bits of minus the log-probability."""

    def __init__(self) -> None:
        self.step = 0.0

    def depths(self, logprobs: FloatArray) -> IntArray:
        return np.abs(np.minimum(logprobs, 0.0)).astype(np.float32).view(np.uint32).astype(np.int64)

    def logprobs(self, depths: IntArray) -> FloatArray:
        return -depths.astype(np.uint32).view(np.float32).astype(np.float64)

    def rounding(self, logprobs: FloatArray) -> FloatArray:
        return np.abs(logprobs) * 2.0**-24


LOWEST = -1e4
"""Log-probabilities below this are refused."""

Columns = dict[str, Any]
"""An example as it is stored: a value or an array per column of docs/store.md."""


class Codec:
    """Examples of one model to columns and back.

    Keys, ids, coordinates and cross-entropies come back exactly; log-probabilities and log of the tail within
    :meth:`error_bound`, at most ``max_error`` nats: half of it rounding, half normalisation, as decoded entries and
    tail sum to 1 (docs/store.md). A tail of 0 stays 0. Entries come back by falling decoded probability, equal ones by
    rising id. ``max_error=0``: float32, neither rounded further nor normalised.

    Args:
        vocabulary: ids are below it.
        top_k: no label has more entries.
        max_error: nats.

    Raises:
        StorageError: arguments out of range.
    """

    def __init__(self, vocabulary: int, top_k: int, max_error: float = DEFAULT_MAX_ERROR) -> None:
        if not 1 <= top_k <= vocabulary < 1 << 31:
            raise StorageError(
                f"top_k is {top_k} and the vocabulary {vocabulary}, but 1 <= top_k <= vocabulary < 2^31 is needed"
            )
        if max_error != 0 and not 1e-4 <= max_error <= 1:
            raise StorageError(f"max_error is {max_error}, but has to be 0 (exact) or between 0.0001 and 1 nats")
        self.vocabulary, self.top_k, self.max_error, self.exact = vocabulary, top_k, max_error, max_error == 0
        self._grid = ExactGrid() if self.exact else Grid(max_error)

    def error_bound(self, logprobs: FloatArray) -> FloatArray:
        """How far a decoded log-probability can be from the one given, nats: float64, shaped like ``logprobs``.

        Of rows whose given mass is not 1, besides the logarithm of that mass.
        """
        return self._grid.rounding(np.asarray(logprobs, np.float64)) + self.max_error / 2

    def encode(self, row: CapturedRow) -> Columns:
        """The columns of a row. Raises StorageError naming the row and what cannot be stored."""
        try:
            key_bytes(row.tokens.key)
            return self._places(row) | self._entries(row)
        except StorageError as error:
            raise StorageError(f"row {row.tokens.key}: {error}") from error

    def decode(self, columns: Columns) -> CapturedRow:
        """The row of its columns, as wide as the most entries of any label. Raises StorageError for other columns."""
        try:
            return self._decode(columns)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise StorageError(f"its columns do not fit together: {error}") from error

    def _places(self, row: CapturedRow) -> Columns:
        tokens = row.tokens
        T = len(tokens.ids)
        for name in ("message", "part", "ends", "lows", "labels"):
            if np.shape(getattr(tokens, name)) != (T,):
                raise StorageError(f"{T} ids, but {name} of shape {np.shape(getattr(tokens, name))}")
        if not math.isfinite(row.cross_entropy):
            raise StorageError(f"its cross-entropy is {row.cross_entropy}")
        ids = np.asarray(tokens.ids)
        if T and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            wrong = ids.max() if ids.max() >= self.vocabulary else ids.min()
            raise StorageError(f"token id {wrong} is outside the vocabulary of {self.vocabulary}")
        ends, lows = np.asarray(tokens.ends, np.int64), np.asarray(tokens.lows, np.int64)
        return {
            "key": tokens.key,
            "dataset": row.dataset,
            "cross_entropy": float(row.cross_entropy),
            "tokens": T,
            "labels": int(np.count_nonzero(tokens.labels)),
            "bytes": tokens.label_bytes,
            "token_ids": ids.astype(np.int32),
            "message": np.asarray(tokens.message, np.int32),
            "part": np.asarray(tokens.part, np.int8),
            "ends": ends,
            "lows": lows[:0] if np.array_equal(ends, lows) else lows,
            "is_label": np.asarray(tokens.labels, bool),
        }

    def _entries(self, row: CapturedRow) -> Columns:
        """The entries of each label by rising id, tails, and the labels' own log-probabilities."""
        n = int(np.count_nonzero(row.tokens.labels))
        rows = row.rows
        if rows.ids.shape != rows.logprobs.shape or not len(rows.ids) == len(rows.tail) == len(row.actual) == n:
            raise StorageError(
                f"{n} labels, but ids {rows.ids.shape}, logprobs {rows.logprobs.shape}, tail {rows.tail.shape} "
                f"and actual {row.actual.shape}"
            )
        ids = np.asarray(rows.ids, np.int64)
        logprobs, tail = np.asarray(rows.logprobs, np.float64), np.asarray(rows.tail, np.float64)
        actual = np.asarray(row.actual, np.float64)
        used = (ids >= 0) & (logprobs != -np.inf)
        counts = used.sum(axis=1)
        order = np.argsort(np.where(used, ids, self.vocabulary), axis=1)[:, : int(counts.max(initial=0))]
        used = np.arange(order.shape[1]) < counts[:, None]
        ids = np.where(used, np.take_along_axis(ids, order, 1), self.vocabulary)
        logprobs = np.where(used, np.take_along_axis(logprobs, order, 1), -np.inf)
        gaps = np.diff(ids, axis=1, prepend=-1) - 1
        if (highest := int(np.max(ids, where=used, initial=0))) >= self.vocabulary:
            raise StorageError(f"token id {highest} is outside the vocabulary of {self.vocabulary}")
        if ids.shape[1] > self.top_k:
            raise StorageError(f"{ids.shape[1]} entries for one label, more than top_k {self.top_k}")
        if len(repeated := np.argwhere(used & (gaps < 0))):
            label, at = repeated[0].tolist()
            raise StorageError(f"label {label} has the token id {ids[label, at]} twice")
        _check_values(logprobs, tail, np.concatenate([logprobs[used], actual]))
        found: Columns = {"entries": counts.astype(np.int32), "id_gaps": gaps[used].astype(np.int32)}
        if self.exact:
            return found | {
                "logprobs": np.minimum(logprobs[used], 0).astype(np.float32),
                "tail": tail.astype(np.float32),
                "label_logprob": np.minimum(actual, 0).astype(np.float32),
            }
        # The logarithm of a tail of 0 has no depth: it is kept as depth -1.
        tails = np.where(tail > 0, self._grid.depths(np.log(np.where(tail > 0, tail, 1))), -1)
        return found | {
            "depths": self._grid.depths(logprobs[used]).astype(np.int32),
            "tail_depth": tails.astype(np.int32),
            "label_depth": self._grid.depths(actual).astype(np.int32),
        }

    def _decode(self, columns: Columns) -> CapturedRow:
        is_label, ids = columns["is_label"], columns["token_ids"].astype(np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise StorageError(f"its token ids are outside the vocabulary of {self.vocabulary}")
        part = columns["part"].astype(np.int64)
        if len(part) and not 0 <= part.min() <= part.max() <= Part.END:
            raise StorageError(f"a token's part is {int(part.max())}")
        ends = columns["ends"]
        lows = columns["lows"] if len(columns["lows"]) else ends
        message = columns["message"].astype(np.int64)
        tokens = TokenizedRow(columns["key"], ids, message, part, ends, lows, is_label)
        if not all(len(column) == len(ids) for column in (message, part, ends, lows, is_label)):
            raise StorageError("its columns have different numbers of tokens")
        rows, actual = self._decode_entries(columns, ids[is_label])
        return CapturedRow(tokens, columns["dataset"], rows, actual, columns["cross_entropy"])

    def _decode_entries(self, columns: Columns, labels: IntArray) -> tuple[TopK, FloatArray]:
        """Rows of n labels with the ids ``labels`` [n], and their own log-probabilities [n]."""
        counts = columns["entries"]
        n, most = len(counts), int(counts.max(initial=0))
        if n != len(labels) or counts.min(initial=0) < 0 or most > self.top_k:
            raise StorageError(f"{n} labels with up to {most} entries, not {len(labels)} with up to {self.top_k}")
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
        if ids.max(initial=-1) >= self.vocabulary or min(depths.min(initial=0), own.min(initial=0)) < 0:
            raise StorageError(f"its entries are not of a vocabulary of {self.vocabulary}")
        logprobs, actual = self._grid.logprobs(depths), self._grid.logprobs(own)
        if not full:
            logprobs[~used] = -np.inf
        if self.exact:
            return TopK(ids, logprobs, columns["tail"].astype(np.float64)), actual
        tails = columns["tail_depth"]
        tail = np.where(tails < 0, 0.0, np.exp(self._grid.logprobs(np.maximum(tails, 0))))
        total = np.exp(logprobs).sum(axis=1) + tail
        if len(total) and not total.min() > 0:
            raise StorageError(f"label {int(total.argmin())} has no mass")
        shift = np.log(total)
        # A label that is an entry with the same value takes the entry's, which is normalised; another keeps its own.
        listed = ((ids == labels[:, None]) & (depths == own[:, None])).any(axis=1)
        rows = TopK(ids, logprobs - shift[:, None], tail / total)
        return rows, actual - np.where(listed, shift, 0.0)


def _padded(flat: IntArray, used: BoolArray) -> IntArray:
    """The entries of n labels, one after the other, as int64 [n, most], 0 where not ``used``."""
    if len(flat) == used.size:
        return flat.reshape(used.shape)
    wide = np.zeros(used.shape, np.int64)
    wide[used] = flat
    return wide


def _check_values(logprobs: FloatArray, tail: FloatArray, values: FloatArray) -> None:
    """logprobs: [n, most], -inf where there is no entry. values: all that are to be finite."""
    mass = np.exp(logprobs).sum(axis=1) + tail
    wrong = ~(np.abs(mass - 1) <= MASS_TOLERANCE) | ~(tail >= 0)
    if wrong.any():
        label = int(wrong.argmax())
        raise StorageError(
            f"label {label} has no distribution: its entries and its tail of {tail[label]:.6g} sum to "
            f"{mass[label]:.6g}, not 1"
        )
    unfit = values[~((values >= LOWEST) & (values <= MASS_TOLERANCE))]
    if len(unfit):
        raise StorageError(f"a log-probability is {unfit[0]:.6g}, but finite ones from {LOWEST:g} to 0 are stored")


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
