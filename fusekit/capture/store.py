"""Reading a store: rows by number or by key, straight from memory-mapped files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusekit.capture.bits import Bytes
from fusekit.capture.codec import Codec
from fusekit.capture.manifest import (
    MANIFEST,
    Manifest,
    Quarantined,
    ShardRecord,
    ShardVoucher,
    StoreSpec,
    keys_hash,
    plan_hash,
    read_json,
    shard_name,
)
from fusekit.capture.places import KEY_BYTES, key_bytes
from fusekit.capture.shards import Facts, Shard, facts_of, file_hash, map_data, open_shard
from fusekit.errors import StorageError
from fusekit.types import CapturedRow


class Problem(NamedTuple):
    """What is wrong with a file of a store."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


class Summary(NamedTuple):
    """What is known of N rows without decoding them.

    Attributes:
        tokens, labels: int64 [N].
        bytes: int64 [N], bytes of content that the labels cover.
        cross_entropy: float64 [N], nats over the labels, at temperature 1 and before any rounding.
        dataset: int64 [N], index into ``datasets``, the names of the sources of data.
        size: int64 [N], bytes of each row on disk.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    cross_entropy: npt.NDArray[np.float64]
    dataset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    datasets: list[str]


class Store:
    """A store that is open for reading. Made by :meth:`open`.

    ``len(store)``, ``store[i]``, ``store.get(key)``, ``for row in store``. It can be pickled: processes that load data
    map the files themselves.

    Attributes:
        path: the folder.
        manifest: what it says of itself.
        summary: arrays over all rows.
        keys: of all rows, in order.
    """

    def __init__(self, path: Path, manifest: Manifest, records: list[ShardRecord], shards: list[Shard]) -> None:
        self.path, self.manifest, self.records, self._shards = path, manifest, records, shards
        self.codec = Codec(self.spec.vocabulary, self.spec.top_k, self.spec.max_error)
        self._starts = np.cumsum([0, *(len(shard.index.labels) for shard in shards)])
        self._data: dict[int, Bytes] = {}

    @classmethod
    def open(cls, path: Path | str, verify: bool = False, incomplete: bool = False) -> Store:
        """Open a store.

        Sizes and indices of all shards are checked, and each row's checksum when it is read.

        Args:
            path: the folder.
            verify: read everything and check it (:meth:`verify`).
            incomplete: also a store that is still being written; the rows of the shards that are there.

        Raises:
            StorageError: no store, damaged (names the file), or not complete.
        """
        folder = Path(path)
        manifest = read_json(folder / MANIFEST, Manifest)
        if manifest is None:
            raise StorageError(f"{folder} is no store of captured rows: it has no {MANIFEST}")
        records = _records(folder, manifest)
        if not incomplete:
            _refuse_incomplete(folder, manifest, records)
        try:
            shards = [open_shard(folder / record.file, record.size, record.index_xxh3) for record in records]
            store = cls(folder, manifest, records, shards)
        except StorageError as error:
            raise StorageError(
                f"{error}. `fusekit represent` with the same arguments makes damaged shards again"
            ) from error
        if verify and (problems := store.verify()):
            raise StorageError("\n".join([f"{folder} is damaged:", *map(str, problems)]))
        return store

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> CapturedRow:
        """Row number ``row``, as :class:`Codec` decodes it. Raises IndexError, or StorageError for a damaged one."""
        shard, at = self._place(row)
        return self._decode(shard, at)

    def get(self, key: str) -> CapturedRow:
        """The row of a key. Raises StorageError for a key that is not there."""
        return self[self.position(key)]

    def __contains__(self, key: str) -> bool:
        return key_bytes(key) in self._positions

    def position(self, key: str) -> int:
        """The number of a key's row. Raises StorageError for a key that is not there."""
        try:
            return self._positions[key_bytes(key)]
        except KeyError:
            reasons = {row.key: row.reason for row in self.quarantined}
            why = f": quarantined, {reasons[key]}" if key in reasons else ""
            raise StorageError(f"{self.path} has no row {key}{why}") from None

    def __iter__(self) -> Iterator[CapturedRow]:
        for shard in range(len(self._shards)):
            yield from self.iter_shard(shard)

    def iter_shards(self) -> Iterator[Iterator[CapturedRow]]:
        """Per shard, its rows in order."""
        return (self.iter_shard(shard) for shard in range(len(self._shards)))

    def iter_shard(self, shard: int) -> Iterator[CapturedRow]:
        """The rows of one shard, in order."""
        return (self._decode(shard, at) for at in range(len(self._shards[shard].index.labels)))

    def blob(self, row: int) -> bytes:
        """Row number ``row`` as it is stored."""
        return self._blob(*self._place(row))

    def facts(self, row: int) -> Facts:
        """What the index says of row number ``row``."""
        shard, at = self._place(row)
        return self._shards[shard].facts(at)

    @property
    def spec(self) -> StoreSpec:
        """What the store is made from."""
        return self.manifest.spec

    @property
    def complete(self) -> bool:
        """Whether all rows of the data are there, or quarantined."""
        return self.manifest.complete

    @property
    def quarantined(self) -> list[Quarantined]:
        """Rows of the data that the store does not hold, and why."""
        return [row for record in self.records for row in record.quarantined]

    @cached_property
    def keys(self) -> list[str]:
        """Of all rows, in order."""
        packed = b"".join(shard.index.keys.tobytes() for shard in self._shards).hex()
        return [packed[at : at + 2 * KEY_BYTES] for at in range(0, len(packed), 2 * KEY_BYTES)]

    @cached_property
    def _positions(self) -> dict[bytes, int]:
        return {key_bytes(key): at for at, key in enumerate(self.keys)}

    @cached_property
    def summary(self) -> Summary:
        """Arrays over all rows."""
        datasets = sorted({name for shard in self._shards for name in shard.datasets})
        numbers = [
            np.array([datasets.index(name) for name in shard.datasets], np.int64)[shard.index.dataset]
            for shard in self._shards
        ]
        columns = {
            name: _joined([getattr(shard.index, name) for shard in self._shards])
            for name in ("tokens", "labels", "bytes")
        }
        entropy = np.concatenate([np.zeros(0), *(shard.index.cross_entropy for shard in self._shards)])
        sizes = _joined([np.diff(shard.index.offsets) for shard in self._shards])
        return Summary(**columns, cross_entropy=entropy, dataset=_joined(numbers), size=sizes, datasets=datasets)

    def verify(self) -> list[Problem]:
        """Read everything and compare it with the manifest; returns what is wrong, by file."""
        problems = []
        seen: dict[str, str] = {}
        for number, record in enumerate(self.records):
            problems += [Problem(record.file, what) for what in self._verify_shard(number, record, seen)]
        return problems

    def _verify_shard(self, number: int, record: ShardRecord, seen: dict[str, str]) -> list[str]:
        path = self.path / record.file
        try:
            shard = open_shard(path, record.size, record.index_xxh3)
            if file_hash(path) != record.xxh3:
                return ["its hash is not the one that was committed", *self._broken_rows(number)]
        except StorageError as error:
            return [str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")]
        wrong = self._broken_rows(number)
        index = shard.index
        held: dict[str, Any] = {
            "rows": len(index.labels),
            "tokens": index.tokens,
            "labels": index.labels,
            "bytes": index.bytes,
        }
        for name, found in held.items():
            total = int(np.sum(found, dtype=np.int64))
            if total != getattr(record, name):
                wrong.append(f"it has {total} {name}, the manifest says {getattr(record, name)}")
        keys = [row.tobytes().hex() for row in index.keys]
        for key in keys:
            if key in seen:
                wrong.append(f"row {key} is also in {seen[key]}")
            seen[key] = record.file
        for row in record.quarantined:
            keys.insert(row.row - record.start, row.key)
        if len(keys) != record.stop - record.start or keys_hash(keys) != record.planned_xxh3:
            wrong.append("its rows are not those of the data")
        return wrong

    def _broken_rows(self, number: int) -> list[str]:
        shard = self._shards[number]
        wrong = []
        for at in range(len(shard.index.labels)):
            key = shard.index.keys[at].tobytes().hex()
            try:
                if facts_of(self._decode(number, at)) != shard.facts(at):
                    wrong.append(f"row {key} is not what the index says of it")
            except StorageError as error:
                wrong.append(str(error).removeprefix(f"{shard.path}: "))
        return wrong

    def _place(self, row: int) -> tuple[int, int]:
        """Shard and place in it of a row."""
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, not {row}")
        shard = int(np.searchsorted(self._starts, row, "right")) - 1
        return shard, row - int(self._starts[shard])

    def _blob(self, shard: int, at: int) -> bytes:
        if shard not in self._data:
            self._data[shard] = map_data(self._shards[shard])
        offsets = self._shards[shard].index.offsets
        return self._data[shard][offsets[at] : offsets[at + 1]].tobytes()

    def _decode(self, shard: int, at: int) -> CapturedRow:
        key = self._shards[shard].index.keys[at].tobytes().hex()
        try:
            row = self.codec.decode(self._blob(shard, at))
        except StorageError as error:
            raise StorageError(f"{self._shards[shard].path}: row {key}: {error}") from error
        if row.tokens.key != key:
            raise StorageError(f"{self._shards[shard].path}: row {row.tokens.key} stands where {key} should")
        return row

    def __getstate__(self) -> dict[str, Any]:
        # Maps would be pickled as the bytes that they show.
        return self.__dict__ | {"_data": {}}


def _joined(columns: list[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *columns]).astype(np.int64)


def _records(folder: Path, manifest: Manifest) -> list[ShardRecord]:
    """The records of shards that are vouched for, in order."""
    records = {record.file: record for record in manifest.shards}
    if not manifest.complete:
        plan = plan_hash(manifest.spec, manifest.keys_xxh3)
        for number in range(len(manifest.bounds) - 1):
            name = shard_name(number)
            voucher = read_json((folder / name).with_suffix(".json"), ShardVoucher)
            if voucher and voucher.plan_xxh3 == plan:
                records[name] = voucher.shard
    found = []
    for number, (start, stop) in enumerate(zip(manifest.bounds, manifest.bounds[1:], strict=False)):
        record = records.pop(shard_name(number), None)
        if record and (record.start, record.stop) != (start, stop):
            raise StorageError(
                f"{folder / MANIFEST} is damaged: {record.file} is for rows {record.start} to {record.stop}, "
                f"not {start} to {stop}"
            )
        found += [record] if record else []
    if records:
        raise StorageError(f"{folder / MANIFEST} is damaged: {next(iter(records))} is no part of its plan")
    return found


def _refuse_incomplete(folder: Path, manifest: Manifest, records: list[ShardRecord]) -> None:
    planned = len(manifest.bounds) - 1
    if manifest.complete and len(records) < planned:
        raise StorageError(f"{folder / MANIFEST} is damaged: complete, but with {len(records)} of {planned} shards")
    if not manifest.complete:
        raise StorageError(
            f"{folder} is not finished: {len(records)} of {planned} shards are there; run the same command again"
        )
