"""Writing a store: shard by shard, by several processes, interrupted at any moment. docs/store.md says how.

Processes write different shards, so they need no lock between them; the caller holds
:func:`fusekit.disk.output_lock` against a second run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

import fusekit
from fusekit.artifacts import refuse_changes
from fusekit.capturing.shards import Codec, Columns, Quarantined, ShardRecord, footer_hash, hash_of, shard_bytes
from fusekit.capturing.store import (
    MANIFEST,
    CommittedShard,
    Manifest,
    Store,
    StoreSpec,
    keys_hash,
    own_record,
    plan_hash,
    read_json,
    shard_name,
    write_json,
)
from fusekit.disk import commit_file, disk_fault, remove, sweep
from fusekit.errors import StorageError
from fusekit.types import CapturedRow

OF_STORES = re.compile(r"manifest\.json|shard-\d{5,}\.(parquet|json)|\..*\.\d+\.tmp")
"""Names of the files of a store, and of what an interrupted writer leaves."""

_SHARD = re.compile(r"shard-\d{5,}\.(parquet|json)")
_MOST_SHOWN = 5


@dataclass(frozen=True)
class ShardPlan:
    """A shard to write: number ``index``, for the rows ``start`` to ``stop`` of the data."""

    index: int
    start: int
    stop: int


class StoreWriter:
    """Writes the shards of one process of ``world``; resumes where an earlier run stopped.

    Args:
        path: the folder; made if it is not there.
        spec: what the store is made from.
        keys: of all rows of the data, in order, each once.
        rank, world: this process among how many; shard i is written by process i % world.
        joins: others may have begun the store and not yet committed a shard: what its manifest names holds.

    Raises:
        StorageError: the folder holds something else, or a store of another spec or other rows (says what differs);
            the disk failed.
    """

    def __init__(
        self,
        path: Path | str,
        spec: StoreSpec,
        keys: Sequence[str],
        rank: int = 0,
        world: int = 1,
        *,
        joins: bool = False,
    ) -> None:
        self.path, self.spec, self.keys = Path(path), spec, list(keys)
        self.rank, self.world = rank, world
        self.codec = Codec(spec.vocabulary, spec.top_k, spec.max_error)
        self._keys_hash = keys_hash(self.keys)
        self._plan_hash = plan_hash(spec, self._keys_hash)
        places: dict[str, int] = {}
        for at, key in enumerate(self.keys):
            if places.setdefault(key, at) != at:
                raise StorageError(f"row {at} has the key {key} of a row before: every row may be there once")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_fault(error, self.path) or StorageError(f"{self.path}: cannot be made: {error}") from error
        manifest = read_json(self.path / MANIFEST, Manifest)
        begun = manifest and (manifest.complete or manifest.shards or any(self.path.glob("shard-*.json")))
        if not begun and rank == 0 and not joins:
            manifest = None  # of a run that ended before its first shard: nothing was made from what it names
        if manifest is None:
            refuse_foreign(self.path)
        else:
            changed = manifest.changes(spec.model_dump(), self.keys)
            refuse_changes(self.path, changed, f"remove {self.path} to start over, or choose another folder")
        sweep(self.path, rank, world)
        rows = len(self.keys)
        self._bounds = manifest.bounds if manifest else [*range(0, rows, spec.rows_per_shard), rows]
        self._plans = [ShardPlan(at, start, stop) for at, (start, stop) in enumerate(pairwise(self._bounds))]
        self._records = {record.file: record for record in manifest.shards} if manifest else {}
        self._was_complete = bool(manifest and manifest.complete)
        self._done = self._whole_shards()
        if manifest is None or (manifest.complete and len(self._records) < len(manifest.shards)):
            self._write_manifest(complete=False)
        if rank == 0:
            self._remove_strays()

    def missing_shards(self) -> list[ShardPlan]:
        """What this process has still to write, in order."""
        return [plan for plan in self._plans if plan.index % self.world == self.rank and plan.index not in self._done]

    def write_shard(
        self, plan: ShardPlan, rows: Iterable[CapturedRow | Columns], quarantined: Mapping[str, str] | None = None
    ) -> None:
        """Commit a shard and its record.

        Args:
            plan: one of :meth:`missing_shards`.
            rows: of ``keys[plan.start:plan.stop]``, in order, without the quarantined ones; or their columns, as this
                store's codec encodes them.
            quarantined: key -> reason of rows that the store is not to hold.

        Raises:
            StorageError: rows missing, repeated, out of order or unfit to be stored (names the key); the disk failed.
        """
        encoded = [row if isinstance(row, dict) else self.codec.encode(row) for row in rows]
        planned = self.keys[plan.start : plan.stop]
        quarantined = quarantined or {}
        _compare_keys([key for key in planned if key not in quarantined], [row["key"] for row in encoded])
        if unknown := sorted(quarantined.keys() - set(planned)):
            raise StorageError(f"quarantined row {unknown[0]} is not among the rows of shard {plan.index}")
        path = self.path / shard_name(plan.index)
        data = shard_bytes(encoded, self.codec.exact)
        commit_file(path, lambda file: file.write(data), rank=self.rank)
        record = ShardRecord(
            file=path.name,
            size=len(data),
            xxh3=xxhash.xxh3_128_hexdigest(data),
            footer_xxh3=footer_hash(data),
            start=plan.start,
            stop=plan.stop,
            rows=len(encoded),
            **{name: sum(row[name] for row in encoded) for name in ("tokens", "labels", "bytes")},
            quarantined=[
                Quarantined(row=plan.start + at, key=key, reason=quarantined[key])
                for at, key in enumerate(planned)
                if key in quarantined
            ],
        )
        write_json(path.with_suffix(".json"), CommittedShard(plan_xxh3=self._plan_hash, shard=record), self.rank)
        self._done.add(plan.index)

    def quarantined(self) -> dict[str, str]:
        """key -> reason of the rows that the shards written so far, by any process and run, are not to hold."""
        records = (self._record(plan) for plan in self._plans)
        return {row.key: row.reason for record in records if record for row in record.quarantined}

    def lacking(self) -> list[str]:
        """The files of the shards that no process has written yet."""
        return [
            shard_name(plan.index)
            for plan in self._plans
            if not ((record := self._record(plan)) and record.is_there(self.path))
        ]

    def finish(self) -> None:
        """Make the store complete: rank 0, once all have written. Raises StorageError naming the shards that lack."""
        if lacking := self.lacking():
            raise StorageError(
                f"{self.path}: {len(lacking)} of {len(self._plans)} shards are not written yet: "
                f"{', '.join(lacking[:_MOST_SHOWN])}{', ...' if len(lacking) > _MOST_SHOWN else ''}. "
                "Run the same command again; it writes only those"
            )
        records = [record for plan in self._plans if (record := self._record(plan))]
        if not (self._was_complete and self._records == {record.file: record for record in records}):
            self._records = {record.file: record for record in records}
            self._write_manifest(complete=True)
        for record in records:
            remove((self.path / record.file).with_suffix(".json"))
        for rank in range(self.world):
            sweep(self.path, rank)

    def _record(self, plan: ShardPlan) -> ShardRecord | None:
        """A shard's record: its own file's if that is of this plan, else the manifest's."""
        name = shard_name(plan.index)
        found = None
        with suppress(StorageError):  # damaged: it counts for nothing
            found = own_record(self.path, name, self._plan_hash)
        found = found or self._records.get(name)
        return found if found and (found.file, found.start, found.stop) == (name, plan.start, plan.stop) else None

    def _whole_shards(self) -> set[int]:
        """This process's shards that are as recorded; what stands in the place of others is removed."""
        whole = set()
        for plan in self._plans:
            if plan.index % self.world != self.rank:
                continue
            path = self.path / shard_name(plan.index)
            record = self._record(plan)
            if record and record.is_there(self.path) and hash_of(path) == record.xxh3:
                whole.add(plan.index)
                continue
            self._records.pop(path.name, None)
            remove(path.with_suffix(".json"))
            remove(path)
        return whole

    def _write_manifest(self, complete: bool) -> None:
        shards = [self._records[name] for name in sorted(self._records, key=_shard_number)]
        manifest = Manifest(
            complete=complete,
            spec=self.spec,
            bounds=self._bounds,
            keys_xxh3=self._keys_hash,
            shards=shards,
            made={"by": f"fusekit {fusekit.__version__}"},
        )
        write_json(self.path / MANIFEST, manifest, self.rank)

    def _remove_strays(self) -> None:
        """Shards of a longer plan that was given up."""
        for path in sorted(self.path.iterdir()):
            if _SHARD.fullmatch(path.name) and _shard_number(path.name) >= len(self._plans):
                remove(path)


def remove_store(path: Path | str) -> None:
    """Remove a store, whole or not, and nothing else from its folder; the manifest first, so that no half counts.

    Raises StorageError for a folder that is no store but holds files.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    try:
        known = read_json(folder / MANIFEST, Manifest) is not None
    except StorageError:  # a damaged one
        known = any(folder.glob("shard-*.parquet"))
    if not known:
        if (folder / MANIFEST).exists():
            raise StorageError(
                f"{folder / MANIFEST} does not belong to a store of captures: nothing was removed; choose another "
                "folder, or remove that one yourself"
            )
        refuse_foreign(folder)
    remove(folder / MANIFEST)
    for file in sorted(folder.iterdir()):
        if OF_STORES.fullmatch(file.name):
            remove(file)


def _shard_number(name: str) -> int:
    return int(name.removeprefix("shard-").partition(".")[0])


def refuse_foreign(path: Path) -> None:
    """Refuse a folder without a manifest that is not empty but for what an interrupted writer leaves: StorageError."""
    foreign = sorted(file.name for file in path.iterdir() if not OF_STORES.fullmatch(file.name))
    if foreign:
        raise StorageError(f"{path} is no store, but holds {foreign[0]} (of {len(foreign)}): choose another folder")


def _compare_keys(planned: list[str], given: list[str]) -> None:
    if planned == given:
        return
    if missing := [key for key in planned if key not in set(given)]:
        raise StorageError(f"row {missing[0]} is missing (and {len(missing) - 1} more): write it or quarantine it")
    if unplanned := [key for key in given if key not in set(planned)]:
        raise StorageError(f"row {unplanned[0]} is not one of this shard's rows")
    raise StorageError("the rows of a shard are repeated or not in the order of the data")


def combine_stores(paths: Sequence[Path | str], out: Path | str) -> Store:
    """Write the rows of several stores into one, as they are, without rounding them again.

    Rows that several stores hold have to be equal and are kept once. A row is quarantined only if no store holds it.
    After an interruption the same call resumes.

    Args:
        paths: complete stores whose specs differ in ``data`` at most.
        out: a folder that is empty, missing, or left by the same call.

    Raises:
        StorageError: specs differ (says how), a row differs between two stores (names it), the disk failed.
    """
    if not paths:
        raise StorageError("no stores to combine were given")
    stores = [Store.open(path) for path in paths]
    holders, reasons = _rows(stores)
    keys = list(dict.fromkeys([*holders, *reasons]))
    writer = StoreWriter(out, _spec(stores), keys)
    for plan in writer.missing_shards():
        held = [holders[key] for key in keys[plan.start : plan.stop] if key in holders]
        rows = [stores[number].columns(at) for number, at in held]
        absent = {key: reasons[key] for key in keys[plan.start : plan.stop] if key not in holders}
        writer.write_shard(plan, rows, absent)
    writer.finish()
    return Store.open(out)


def _spec(stores: list[Store]) -> StoreSpec:
    """The common spec; its data fingerprint is of all of theirs, in order, where they differ."""
    first = stores[0].spec
    for other in stores[1:]:
        if changed := [line for line in first.differences(other.spec) if not line.startswith("data: ")]:
            raise StorageError(
                f"{stores[0].path} and {other.path} were not made the same way:\n  " + "\n  ".join(changed)
            )
    data = list(dict.fromkeys(store.spec.data for store in stores))
    joined = data[0] if len(data) == 1 else xxhash.xxh3_128_hexdigest("\n".join(data).encode())
    return first.model_copy(update={"data": joined})


def _rows(stores: list[Store]) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Which store holds a key, and where; why a key is held by none."""
    holders: dict[str, tuple[int, int]] = {}
    for number, store in enumerate(stores):
        for at, key in enumerate(store.keys):
            other, there = holders.setdefault(key, (number, at))
            if other == number:
                continue
            ours, theirs = store.columns(at), stores[other].columns(there)
            if not all(np.array_equal(ours[name], theirs[name]) for name in ours):
                raise StorageError(
                    f"row {key} is in {stores[other].path} and in {store.path}, and they differ: the models, their "
                    "precision or their devices were not the same. Capture it once, or leave one of the stores out"
                )
    reasons = {row.key: row.reason for store in stores for row in store.quarantined if row.key not in holders}
    return holders, reasons
