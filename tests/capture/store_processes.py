"""Writers of small stores in child processes that can be killed and starved for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusekit.capturing.manifest import StoreSpec
from fusekit.capturing.writer import StoreWriter
from fusekit.errors import StorageError
from fusekit.types import CapturedRow
from tests.capture.rows import captured, key
from tests.forks import CONTEXT
from tests.merging.processes import is_stopped, stop_self, wait_until

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


@dataclass
class Child:
    """A process that calls ``write(*arguments)`` after ``before(*given)``; StorageErrors end it with status 1."""

    log: Path
    arguments: tuple[Any, ...]
    before: Callable[..., None] | None = None
    given: tuple[Any, ...] = ()
    process: Any = field(init=False)

    def __post_init__(self) -> None:
        self.process = CONTEXT.Process(target=_main, args=(self.log, self.arguments, self.before, self.given))
        self.process.start()

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        self.process.join(60)
        assert self.process.exitcode is not None, "still running"
        return int(self.process.exitcode)


def _main(log: Path, arguments: tuple[Any, ...], before: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    if before is not None:
        before(*given)
    try:
        write(*arguments)
    except StorageError as error:
        log.write_text(str(error))
        sys.exit(1)


def kill_at(number: int, counter: str) -> None:
    """SIGKILL at the number-th time that a file of the store is about to be opened, renamed or removed; 0 counts."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.mkdir") or "/out" not in str(args[0]):
            return
        seen += 1
        if number == 0:
            descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, str(seen).encode())
            os.close(descriptor)
        elif seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def under_strace(folder: Path, inject: str, *arguments: Any) -> tuple[int, str, str]:
    """Write with faults injected into system calls: exit code, the error, and what strace saw."""
    log, trace = folder / "log", folder / "trace"
    log.write_text("")
    child = Child(log, arguments, stop_self)
    wait_until(lambda: is_stopped(child.process.pid))
    calls = inject.split(":", maxsplit=1)[0]
    command = [
        "strace",
        "-f",
        "-o",
        trace,
        "-e",
        f"trace={calls}",
        "-e",
        f"inject={inject}",
        "-p",
        str(child.process.pid),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        os.kill(child.process.pid, signal.SIGCONT)
        code = child.wait()
    return code, log.read_text(), trace.read_text()
