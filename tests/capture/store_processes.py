"""Writers of small stores in child processes that can be killed and starved for real."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fusekit.capturing.store import StoreSpec
from fusekit.capturing.writer import StoreWriter
from fusekit.errors import StorageError
from fusekit.types import CapturedRow
from tests.capture.rows import captured, key
from tests.processes import Process

ROWS = 10
SPEC = StoreSpec(model="model", data="data", vocabulary=60, top_k=4, rows_per_shard=3)
KEYS = [key(number) for number in range(ROWS)]
BAD = {KEYS[4]: "NaN at label 2"}


def rows(start: int = 0, stop: int = ROWS) -> list[CapturedRow]:
    """Rows of the data, the same in every process; number 4 is quarantined."""
    return [
        captured(np.random.default_rng(number), 60, 4, 12, number=number, dataset="ab"[number % 2], ragged=True)
        for number in range(start, stop)
        if KEYS[number] not in BAD
    ]


def write(path: Path, rank: int = 0, world: int = 1, spec: StoreSpec = SPEC, finish: bool = True) -> list[int]:
    """Write what is missing; returns the numbers of the shards that were written."""
    writer = StoreWriter(path, spec, KEYS[:ROWS], rank, world)
    written = []
    for plan in writer.missing_shards():
        bad = {bad_key: why for bad_key, why in BAD.items() if bad_key in KEYS[plan.start : plan.stop]}
        writer.write_shard(plan, rows(plan.start, plan.stop), bad)
        written.append(plan.index)
    if finish:
        writer.finish()
    return written


def listing(path: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.exists() else {}


def start(*arguments: Any, before: Callable[[], object] | None = None) -> Process:
    """A process that calls ``write(*arguments)`` after ``before()``; a StorageError ends it with status 1."""
    return Process(_write, before, arguments)


def _write(before: Callable[[], object] | None, arguments: tuple[Any, ...]) -> None:
    if before is not None:
        before()
    try:
        write(*arguments)
    except StorageError as error:
        sys.exit(str(error))
