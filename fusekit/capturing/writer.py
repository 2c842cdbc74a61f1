"""Writing a store: shard by shard, by several processes, interrupted at any moment. docs/store.md says how.

Processes write different shards, so they need no lock between them; the caller holds
:func:`fusekit.disk.output_lock` against a second run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import xxhash

import fusekit
from fusekit.artifacts import MANIFEST, differences, joined_hash, refuse_changes
from fusekit.artifacts import write as write_manifest
from fusekit.capturing.shards import Codec, Columns, Quarantined, ShardRecord, footer_hash, hash_of, shard_bytes
from fusekit.capturing.store import (
    Manifest,
    ShardManifest,
    Store,
    StoreSpec,
    keys_hash,
    manifest_of,
    own_record,
    plan_hash,
    shard_name,
)
from fusekit.disk import commit_file, disk_errors, remove, sweep
from fusekit.errors import StorageError
from fusekit.types import CapturedRow

OF_STORES = re.compile(r"manifest\.json|shard-\d{5,}\.(parquet|json)|\..*\.\d+\.tmp")
"""Names of the files of a store, and of what an interrupted writer leaves."""


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
        spec: what the store is made from. A store that is there keeps its name of a model of the same fingerprint,
            whose folder may be another one now.
        keys: of all rows of the data, in order, each once.
        rank, world: this process among how many; shard i is written by process i % world.

    Raises:
        StorageError: the folder holds something else, or a store of another spec or other rows (says what differs);
            the disk failed.
    """

    def __init__(self, path: Path | str, spec: StoreSpec, keys: Sequence[str], rank: int = 0, world: int = 1) -> None:
        self.path, self.keys, self.rank, self.world = Path(path), list(keys), rank, world
        with disk_errors(self.path, "cannot be made"):
            self.path.mkdir(parents=True, exist_ok=True)
        manifest = manifest_of(self.path)
        if manifest is None:
            remove_store(self.path)  # what an interrupted --overwrite left of one
        elif manifest.spec.model_fingerprint == spec.model_fingerprint:
            spec = spec.model_copy(update={"model": manifest.spec.model})
        if manifest is not None:
            changed = manifest.changes(spec.model_dump(), self.keys)
            refuse_changes(self.path, changed, f"remove {self.path} to start over, or choose another folder")
        self.spec, self.codec = spec, Codec(spec.vocabulary, spec.top_k, spec.max_error)
        self._keys_hash = keys_hash(self.keys)
        self._plan_hash = plan_hash(spec, self._keys_hash)
        sweep(self.path, rank, world)
        rows = len(self.keys)
        self._bounds = [*range(0, rows, spec.rows_per_shard), rows]
        self._plans = [ShardPlan(at, start, stop) for at, (start, stop) in enumerate(pairwise(self._bounds))]
        self._records = dict(manifest.files) if manifest else {}
        self._was_complete = manifest is not None and manifest.complete
        self._done = self._whole_shards()
        if manifest is None or (manifest.complete and len(self._records) < len(manifest.files)):
            self._write_manifest(complete=False)

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
        planned, quarantined = self.keys[plan.start : plan.stop], quarantined or {}
        wanted, given = [key for key in planned if key not in quarantined], [row["key"] for row in encoded]
        if wanted != given:
            odd = sorted(set(wanted) ^ set(given)) or given
            raise StorageError(
                f"the examples of {shard_name(plan.index)} are not those of its keys in their order: {odd[0]} is "
                "missing, repeated, out of order or of another shard"
            )
        path = self.path / shard_name(plan.index)
        data = shard_bytes(encoded, self.codec.exact)
        commit_file(path, data, rank=self.rank)
        record = ShardRecord(
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
        own = ShardManifest(inputs={"plan_xxh3": self._plan_hash}, files={path.name: record})
        write_manifest(path.with_suffix(".json"), own, self.rank)
        self._done.add(plan.index)

    def quarantined(self) -> dict[str, str]:
        """key -> reason of the rows that the shards written so far, by any process and run, are not to hold."""
        records = (self._record(plan) for plan in self._plans)
        return {row.key: row.reason for record in records if record for row in record.quarantined}

    def lacking(self) -> list[str]:
        """The files of the shards that no process has written yet."""
        names = {shard_name(plan.index): self._record(plan) for plan in self._plans}
        return [name for name, record in names.items() if not (record and record.is_at(self.path / name))]

    def finish(self) -> None:
        """Make the store complete: rank 0, once all have written. Raises StorageError naming a shard that lacks."""
        if lacking := self.lacking():
            raise StorageError(
                f"{self.path}: {len(lacking)} of {len(self._plans)} shards are not written yet, the first is "
                f"{lacking[0]}. Run the same command again; it writes only those"
            )
        records = {shard_name(plan.index): record for plan in self._plans if (record := self._record(plan))}
        if not (self._was_complete and self._records == records):
            self._records = records
            self._write_manifest(complete=True)
        for name in records:
            remove((self.path / name).with_suffix(".json"))
        for rank in range(self.world):
            sweep(self.path, rank)

    def _record(self, plan: ShardPlan) -> ShardRecord | None:
        """A shard's record: its own file's if that is of this plan, else the manifest's."""
        name = shard_name(plan.index)
        return own_record(self.path, name, self._plan_hash) or self._records.get(name)

    def _whole_shards(self) -> set[int]:
        """This process's shards that are as recorded; what stands in the place of others is removed."""
        whole = set()
        for plan in self._plans[self.rank :: self.world]:
            path = self.path / shard_name(plan.index)
            record = self._record(plan)
            if record and record.is_at(path) and hash_of(path) == record.xxh3:
                whole.add(plan.index)
                continue
            self._records.pop(path.name, None)
            remove(path.with_suffix(".json"))
            remove(path)
        return whole

    def _write_manifest(self, complete: bool) -> None:
        names = [shard_name(plan.index) for plan in self._plans]
        manifest = Manifest(
            inputs=self.spec.model_dump(mode="json"),
            files={name: self._records[name] for name in names if name in self._records},
            made={"by": f"fusekit {fusekit.__version__}"},
            complete=complete,
            bounds=self._bounds,
            keys_xxh3=self._keys_hash,
        )
        write_manifest(self.path / MANIFEST, manifest, self.rank)


def combine_stores(paths: Sequence[Path | str], out: Path | str) -> Store:
    """Write the rows of complete stores whose specs differ in ``data`` at most into one, as they are stored.

    A row that several hold comes from the first; one is quarantined only if none holds it. The same call resumes.

    Raises StorageError: specs differ (says how); the disk failed.
    """
    stores = [Store.open(path) for path in paths]
    data = joined_hash(store.spec.data for store in stores)
    specs = [store.spec.model_copy(update={"data": data}) for store in stores]
    for store, spec in zip(stores, specs, strict=True):
        changed = differences(specs[0].model_dump(), spec.model_dump())
        refuse_changes(store.path, changed, f"leave it out: it is not made as {stores[0].path} is")
    holders: dict[str, tuple[Store, int]] = {}
    for store in stores:
        for at, key in enumerate(store.keys):
            holders.setdefault(key, (store, at))
    reasons = {row.key: row.reason for store in stores for row in store.quarantined if row.key not in holders}
    writer = StoreWriter(out, specs[0], [*holders, *reasons])
    for plan in writer.missing_shards():
        keys = writer.keys[plan.start : plan.stop]
        rows = (store.columns(at) for store, at in (holders[key] for key in keys if key in holders))
        writer.write_shard(plan, rows, {key: reasons[key] for key in keys if key in reasons})
    writer.finish()
    return Store.open(out)


def remove_store(folder: Path) -> None:
    """Remove a store, whole or not; the manifest first, so that no half counts.

    Raises StorageError for a folder that holds other files, or another manifest.
    """
    if not folder.is_dir():
        return
    refuse_foreign(folder)
    try:
        manifest_of(folder)
    except StorageError:
        if not any(folder.glob("shard-*.parquet")):  # a damaged one has some
            raise
    for file in sorted(folder.iterdir()):  # manifest.json comes before the shards
        if OF_STORES.fullmatch(file.name):
            remove(file)


def refuse_foreign(path: Path) -> None:
    """Refuse a folder that holds what is not of a store: StorageError."""
    foreign = sorted(file.name for file in path.iterdir() if not OF_STORES.fullmatch(file.name))
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise StorageError(f"{path} holds {foreign[0]}{more}, which is not part of a store: choose another folder")
