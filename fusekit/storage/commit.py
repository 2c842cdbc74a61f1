"""A file that is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fusekit.errors import StorageError
from fusekit.storage.faults import disk_fault
from fusekit.storage.publish import sync_folder


def commit_file(path: Path, write: Callable[[BinaryIO], object], *, rank: int = 0) -> None:
    """Write a file beside its path, make it durable, and move it there in one step.

    Args:
        path: in a folder that exists. After a crash at any moment it holds what it held before, or all of the new.
        write: given the open file.
        rank: of the process; what a process leaves behind when it dies is told apart by it (:func:`sweep`).

    Raises:
        StorageError: the disk failed; names the path and the bytes free. What was written is removed.
    """
    temporary = path.with_name(f".{path.name}.{rank}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise disk_fault(error, path) or StorageError(f"{path}: cannot be written: {error}") from error


def sweep(folder: Path, rank: int = 0, world: int = 1) -> list[Path]:
    """Remove what earlier processes of this rank left half-written in a folder; returns those files.

    Rank 0 also removes what belongs to ranks that are not of this ``world``.
    """
    swept = []
    for path in sorted(folder.glob(".*.tmp")):
        owner = path.name.split(".")[-2]
        if owner.isdecimal() and (int(owner) == rank or (rank == 0 and int(owner) >= world)):
            remove(path)
            swept.append(path)
    return swept


def remove(path: Path) -> None:
    """Remove a file that may have gone already. Raises StorageError when the disk refuses."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_fault(error, path) or StorageError(f"{path}: cannot be removed: {error}") from error
