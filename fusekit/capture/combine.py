"""One store of several of the same model, made on other machines or of other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import xxhash

from fusekit.capture.manifest import StoreSpec
from fusekit.capture.shards import Blobs
from fusekit.capture.store import Store
from fusekit.capture.writer import StoreWriter
from fusekit.errors import StorageError


def combine_stores(paths: Sequence[Path | str], out: Path | str) -> Store:
    """Write the rows of several stores into one, as they are, without decoding them.

    Rows that several stores hold have to be equal and are kept once. A row is quarantined only if no store holds it.
    Interrupted, the same call goes on.

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
        rows = Blobs([stores[s].blob(at) for s, at in held], [stores[s].facts(at) for s, at in held])
        absent = {key: reasons[key] for key in keys[plan.start : plan.stop] if key not in holders}
        writer.write_blobs(plan, rows, absent)
    writer.finish()
    return Store.open(out)


def _spec(stores: list[Store]) -> StoreSpec:
    """The common spec; its data fingerprint is of all of theirs, in order, where they differ."""
    first = stores[0].spec
    for other in stores[1:]:
        changed = [line for line in first.differences(other.spec) if not line.startswith("data: ")]
        if changed:
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
            if key not in holders:
                holders[key] = (number, at)
                continue
            other, there = holders[key]
            if store.blob(at) != stores[other].blob(there):
                raise StorageError(
                    f"row {key} is in {stores[other].path} and in {store.path}, and they differ: the models, their "
                    "precision or their devices were not the same. Capture it once, or leave one of the stores out"
                )
    reasons = {row.key: row.reason for store in stores for row in store.quarantined if row.key not in holders}
    return holders, reasons
