"""One writer per output, and an error for the second that names the first."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from fusekit.errors import StorageError
from fusekit.storage.faults import disk_fault


def _lock_file(output: Path) -> Path:
    return output.parent / f".{output.name}.fusekit.lock"


def _holder_file(output: Path) -> Path:
    # Beside the lock, not in it: some versions of filelock truncate the lock file of another process.
    return output.parent / f".{output.name}.fusekit.holder"


def _describe_holder(output: Path) -> str:
    try:
        holder: Any = json.loads(_holder_file(output).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}: {holder['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process (it has just started, or its description cannot be read)"


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Hold the lock of an output folder, which need not exist, while the body runs.

    output: the resolved final path; its parent is created. Raises StorageError naming the holder (process id, host,
    start time, command) when another process has it, and StorageError when the folder cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(_lock_file(output), timeout=0)
        lock.acquire()
    except filelock.Timeout:
        if not _lock_file(output).exists():  # some file systems refuse in a way that filelock takes for a wait
            raise StorageError(f"{output}: cannot be locked: no file can be made in {output.parent}") from None
        raise StorageError(
            f"{output}: already being written by {_describe_holder(output)}. Wait for it or choose another folder."
        ) from None
    except OSError as error:
        raise disk_fault(error, output.parent) or StorageError(f"{output}: cannot be locked: {error}") from error
    try:
        _write_holder(output)
        yield
    finally:
        with suppress(OSError):
            _holder_file(output).unlink()
        lock.release()


def _write_holder(output: Path) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    temporary = _holder_file(output).with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(holder), encoding="utf-8")
        temporary.replace(_holder_file(output))
    except OSError as error:
        raise disk_fault(error, output.parent) or StorageError(f"{output}: cannot be locked: {error}") from error
