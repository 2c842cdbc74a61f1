"""A store: what its manifest says of it, and reading its rows by number or by key."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from pydantic import Field, model_validator

from fusekit.artifacts import (
    MANIFEST,
    Artifact,
    Count,
    Hash,
    Inputs,
    Strict,
    differences,
    differing,
    joined_hash,
    read_manifest,
)
from fusekit.capturing.shards import (
    SCALARS,
    Codec,
    Columns,
    Group,
    Quarantined,
    Shard,
    ShardRecord,
    check_shard,
    schema,
)
from fusekit.errors import StorageError
from fusekit.settings import DEFAULT_MAX_ERROR
from fusekit.types import CapturedRow

STAGE = "capture"
"""The stage in the manifest of a store."""

ROWS_PER_SHARD = 1024
"""Unless something else is asked for; what chooses by model and device takes no more."""

CACHE_BYTES = 128 << 20
"""Bytes of row groups that a store keeps in memory once they are read."""

_OPEN_SHARDS = 64

Setting = str | int | float | bool | None


class StoreSpec(Strict, extra="forbid"):
    """What a store is made from. Two runs with equal specs and equal rows make the same store, bit for bit.

    Attributes:
        model: name or path of the model, as the user wrote it.
        model_fingerprint: what identifies its weights (revision, hash).
        tokenizer: fingerprint of tokenizer, chat template and of which tokens are labels.
        data: fingerprint of the data.
        vocabulary: ids are below it.
        top_k: most entries per label.
        keep_mass: entries were kept until they hold this probability; None for always ``top_k``.
        temperature: of the log-probabilities.
        max_error: bound of the rows' rounding in nats, 0 for none (:class:`fusekit.capturing.shards.Codec`).
        rows_per_shard: of the data, quarantined ones included.
        details: whatever else decides what a store holds (dtype, maximal length, ...), by name.
    """

    model: str
    model_fingerprint: str = ""
    tokenizer: str = ""
    data: str = ""
    vocabulary: int = Field(ge=1, lt=1 << 31)
    top_k: int = Field(ge=1)
    keep_mass: float | None = Field(default=None, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    max_error: float = Field(default=DEFAULT_MAX_ERROR, ge=0, le=1)
    rows_per_shard: int = Field(default=ROWS_PER_SHARD, ge=1)
    details: dict[str, Setting] = Field(default_factory=dict)


class ShardManifest(Artifact):
    """``shard-00000.json``: a shard's record while the store is not complete. inputs: the hash of its plan."""

    stage: str = STAGE
    files: Mapping[str, ShardRecord]


class Manifest(ShardManifest):
    """``manifest.json``.

    inputs: the fields of a :class:`StoreSpec`. complete: whether ``files`` has all shards; before, they are recorded
    here or in a file of their own. bounds: shard i is for the rows ``bounds[i]`` to ``bounds[i + 1]``. keys_xxh3: see
    :func:`keys_hash`.
    """

    complete: bool
    bounds: list[Count] = Field(min_length=1)
    keys_xxh3: Hash

    @cached_property
    def spec(self) -> StoreSpec:
        """What the store is made from."""
        return StoreSpec.model_validate(self.inputs)

    @model_validator(mode="after")
    def _agrees(self) -> Manifest:
        _ = self.spec  # raises what is wrong in it
        if strangers := self.files.keys() - self.names:
            raise ValueError(f"files: {min(strangers)} is not one of its shards")
        return self

    @cached_property
    def names(self) -> list[str]:
        """The files of its shards, in order, whether they are there or not."""
        return [shard_name(number) for number in range(len(self.bounds) - 1)]

    def changes(self, made_from: Inputs, keys: Sequence[str]) -> list[str]:
        """A line for each difference from what the store would be made from now, fields of a spec and keys of rows."""
        changed = differences(self.inputs, made_from)
        if not changed and len(keys) != self.bounds[-1]:
            return [f"examples: {self.bounds[-1]}, now {len(keys)}"]
        if not changed and keys_hash(keys) != self.keys_xxh3:
            return ["examples: others, or in another order"]
        return changed


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a store, None where there is none. Raises StorageError if it is damaged, or not a store's."""
    return read_manifest(folder / MANIFEST, Manifest, STAGE)


def plan_hash(spec: StoreSpec, keys_xxh3: str) -> str:
    """xxh3-128 of a spec's JSON and of the hash of the keys."""
    return joined_hash([json.dumps(spec.model_dump(mode="json"), sort_keys=True), keys_xxh3])


def keys_hash(keys: Sequence[str]) -> str:
    """xxh3-128 of rows' keys in order, 16 bytes each."""
    return xxhash.xxh3_128_hexdigest(b"".join(map(bytes.fromhex, keys)))


def shard_name(index: int) -> str:
    """The file of shard number ``index``; its record is the same with ``.json``."""
    return f"shard-{index:05}.parquet"


def own_record(folder: Path, name: str, plan_xxh3: str) -> ShardRecord | None:
    """The record that a shard has in a file of its own, if it is whole and was written for this plan."""
    with suppress(StorageError):  # damaged: its shard is captured again
        committed = read_manifest((folder / name).with_suffix(".json"), ShardManifest, STAGE)
        if committed is not None and committed.inputs == {"plan_xxh3": plan_xxh3}:
            return committed.files.get(name)
    return None


def date_of(store: Path) -> datetime.date | None:
    """The day that the chat template printed when a capture began, to be printed again; None where there is none."""
    from fusekit.data.templates import kept_date

    known = manifest_of(store)
    return None if known is None else kept_date(known.spec.details.get("date"))


class Summary(NamedTuple):
    """What is known of N rows without decoding them.

    Attributes:
        tokens, labels: int64 [N].
        bytes: int64 [N], bytes of content that the labels cover.
        cross_entropy: float64 [N], nats over the labels, at temperature 1 and before any rounding.
        dataset: int64 [N], index into ``datasets``, the names of the sources of data.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    cross_entropy: npt.NDArray[np.float64]
    dataset: npt.NDArray[np.int64]
    datasets: list[str]


class Store:
    """A store that is open for reading: ``len(store)``, ``store[i]``, ``store.get(key)``, ``for row in store``.

    Made by :meth:`open`. It can be pickled: processes that load data map the files themselves. Row groups are decoded
    as they are needed and kept while they fit :data:`CACHE_BYTES`.

    Attributes:
        path: the folder.
        manifest: what it says of itself.
        records: of its shards by the names of their files, in order.
        summary: arrays over all rows.
        keys: of all rows, in order.
    """

    def __init__(self, path: Path, manifest: Manifest, records: dict[str, ShardRecord]) -> None:
        self.path, self.manifest, self.records = path, manifest, records
        self.codec = Codec(self.spec.vocabulary, self.spec.top_k, self.spec.max_error)
        self._names = list(records)
        self._starts = np.cumsum([0, *(record.rows for record in records.values())])
        # Of both the last used are last.
        self._shards: dict[int, Shard] = {}
        self._groups: dict[tuple[int, int], Group] = {}
        self._cached = 0

    @classmethod
    def open(cls, path: Path | str, verify: bool = False, incomplete: bool = False) -> Store:
        """Open a store. Sizes and footers of shards are checked now, the checksum of each row group when it is read.

        Args:
            path: the folder.
            verify: read everything and check it (:meth:`verify`).
            incomplete: also a store that is still being written; the rows of the shards that are there.

        Raises:
            StorageError: there is no store, it is damaged (names the file), or not complete.
        """
        folder = Path(path)
        manifest = manifest_of(folder)
        if manifest is None:
            raise StorageError(f"{folder} is not a store of captures: it has no {MANIFEST}")
        records = dict(manifest.files)
        names = manifest.names
        if not manifest.complete:
            plan = plan_hash(manifest.spec, manifest.keys_xxh3)
            records |= {name: own for name in names if (own := own_record(folder, name, plan))}
        there = {name: records[name] for name in names if name in records}
        if not incomplete and (len(there) < len(names) or not manifest.complete):
            raise StorageError(
                f"{folder} is not finished: {len(there)} of {len(names)} shards are there; run the same command again"
            )
        try:
            for name, record in there.items():
                check_shard(folder / name, record)
        except StorageError as error:
            raise StorageError(f"{error}. `fusekit capture` with the same arguments writes it again") from error
        store = cls(folder, manifest, there)
        if verify and (problems := store.verify()):
            raise StorageError("\n".join([f"{folder} is damaged:", *problems]))
        return store

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> CapturedRow:
        """Row number ``row``, as :class:`Codec` decodes it. Raises IndexError, or StorageError for a damaged one."""
        return self.codec.decode(self.columns(row))

    def columns(self, row: int) -> Columns:
        """Row number ``row`` as it is stored."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.path} has {len(self)} examples, not {row}")
        row %= len(self)
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        shard, at = self._shard(number), row - int(self._starts[number])
        which = int(np.searchsorted(shard.starts, at, "right")) - 1
        group = self._groups.pop((number, which), None)
        if group is None:
            group = shard.group(which)
            self._cached += group.size
        self._groups[number, which] = group
        while self._cached > CACHE_BYTES and len(self._groups) > 1:
            self._cached -= self._groups.pop(next(iter(self._groups))).size
        return group[at - int(shard.starts[which])]

    def get(self, key: str) -> CapturedRow:
        """The row of a key. Raises StorageError for a key that is not there."""
        return self[self.position(key)]

    def position(self, key: str) -> int:
        """The number of a key's row. Raises StorageError for a key that is not there."""
        if key not in self._positions:
            why = "".join(f": quarantined, {row.reason}" for row in self.quarantined if row.key == key)
            raise StorageError(f"{self.path} has no example {key}{why}")
        return self._positions[key]

    def __contains__(self, key: str) -> bool:
        return key in self._positions

    def __iter__(self) -> Iterator[CapturedRow]:
        return (self[row] for row in range(len(self)))

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
        return [row for record in self.records.values() for row in record.quarantined]

    @cached_property
    def _facts(self) -> pa.Table:
        tables = [self._shard(number).facts() for number in range(len(self.records))]
        return pa.concat_tables([schema(self.codec.exact).empty_table().select(list(SCALARS)), *tables])

    @cached_property
    def keys(self) -> list[str]:
        """The keys of all rows, in order."""
        keys: list[str] = self._facts.column("key").to_pylist()
        return keys

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {key: at for at, key in enumerate(self.keys)}

    @cached_property
    def summary(self) -> Summary:
        """Arrays over all rows."""
        names = self._facts.column("dataset").to_pylist()
        datasets = sorted(set(names))
        numbers = {name: number for number, name in enumerate(datasets)}
        tokens, labels, content = (
            self._facts.column(name).to_numpy().astype(np.int64) for name in ("tokens", "labels", "bytes")
        )
        nats = self._facts.column("cross_entropy").to_numpy()
        return Summary(tokens, labels, content, nats, np.array([numbers[name] for name in names], np.int64), datasets)

    def verify(self) -> list[str]:
        """Read everything and compare it with the manifest; returns a line for each file that is wrong."""
        problems = differing(self.path, self.records)
        keys: list[str] = []
        for number, record in enumerate(() if problems else self.records.values()):
            try:
                planned = self._shard(number).facts().column("key").to_pylist()
            except StorageError as error:
                problems.append(str(error))
                continue
            for row in record.quarantined:
                planned.insert(row.row - record.start, row.key)
            keys += planned
        if not problems and self.complete and keys_hash(keys) != self.manifest.keys_xxh3:
            problems.append(f"{self.path / MANIFEST}: the keys in the shards are not those of the data")
        return problems

    def _shard(self, number: int) -> Shard:
        shard = self._shards.pop(number, None)
        if shard is None:
            shard = Shard(self.path / self._names[number])
        self._shards[number] = shard
        if len(self._shards) > _OPEN_SHARDS:
            del self._shards[next(iter(self._shards))]
        return shard

    def __getstate__(self) -> dict[str, Any]:
        # Maps would be pickled as the bytes that they show.
        return self.__dict__ | {"_shards": {}, "_groups": {}, "_cached": 0}
