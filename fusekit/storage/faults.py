"""What the operating system said about a disk, as an error that names the path and the bytes needed and free."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from fusekit.errors import StorageError

# Rust libraries (safetensors, tokenizers) report the system's error as text.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up: free some space or write elsewhere",
    errno.EFBIG: "a file may not grow that large here: raise `ulimit -f` or write smaller shards (--out-shard-size)",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.EACCES: "permission denied: write elsewhere, or have the folder's owner grant it",
    errno.EPERM: "permission denied: write elsewhere, or have the folder's owner grant it",
    errno.EIO: "the disk reported an input/output error: check the disk, then run the same command again",
}


def existing_parent(path: Path) -> Path:
    """The nearest folder on the way up from ``path`` (itself included) that exists."""
    path = path.resolve()
    while not path.is_dir():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write on the file system of ``path``, which need not exist yet."""
    return shutil.disk_usage(existing_parent(path)).free


def human(size: float) -> str:
    """Bytes as people read them: ``14.5 GB`` (powers of 1000), exact below 10 kB."""
    if size < 10_000:
        return f"{int(size)} bytes"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.2f} TB"


def system_errno(error: BaseException) -> int | None:
    """The errno behind an exception: of an OSError, of what caused it, or named in a Rust library's message."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno:
            return current.errno
        if match := _OS_ERROR.search(str(current)):
            return int(match.group(1))
        current = current.__cause__ or current.__context__
    return None


def disk_fault(error: BaseException, path: Path | str, needed: int | None = None) -> StorageError | None:
    """A StorageError for an exception that came from the disk, or None for any other exception.

    path: where the writing was going on (an OSError that names its own file wins). needed: bytes that were to be
    written there, if known.
    """
    code = system_errno(error)
    if code not in _ADVICE:
        return None
    where = Path(path)
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        where = Path(os.fsdecode(error.filename))
    numbers = f"{human(free_bytes(where))} free"
    if needed is not None:
        numbers = f"{human(needed)} needed, {numbers}"
    return StorageError(f"{where}: {os.strerror(code)} ({numbers}); {_ADVICE[code]}")
