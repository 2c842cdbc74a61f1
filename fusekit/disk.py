"""Locks, files and folders that appear whole or not at all, and what a disk says when it fails.

A file is written beside its place, made durable, and moved there in one step; a folder likewise.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import filelock

from fusekit.errors import StorageError

# Rust libraries (safetensors, tokenizers) and shutil.copytree report the system's error as text.
_OS_ERROR = re.compile(r"(?:\(os error |\[Errno )(\d+)[)\]]")

_ADVICE = {
    errno.ENOSPC: "free some space or ",
    errno.EDQUOT: "free some space or ",
    errno.EFBIG: "raise `ulimit -f` or ",
    errno.EROFS: "",
    errno.EACCES: "check its permissions or ",
    errno.EPERM: "check its permissions or ",
    errno.EIO: "check the disk or ",
}


def existing_parent(path: Path) -> Path:
    """The nearest folder on the way up from ``path`` (itself included) that exists."""
    path = path.resolve()
    while not path.is_dir():
        path = path.parent
    return path


def refuse_file(folder: Path) -> None:
    """Raise StorageError where a folder cannot be made: it or one above it is a file, or its name is too long."""
    try:
        os.lstat(folder)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise StorageError(f"{folder}: {error.strerror}: choose another output") from error
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not os.path.isdir(place):  # noqa: PTH112  pathlib's raises where it may not look
        raise StorageError(f"{folder}: {place} is not a folder: choose another output")


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


def counted(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def with_article(noun: str) -> str:
    """``a list``, ``an int``."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _errno(error: BaseException) -> int | None:
    """The errno behind an exception: of an OSError, of what caused it, or named in a Rust library's message."""
    seen: list[BaseException] = []  # `raise error from error` makes a circle
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        if isinstance(current, OSError) and current.errno:
            return current.errno
        if match := _OS_ERROR.search(str(current)):
            return int(match.group(1))
        current = current.__cause__ or current.__context__
    return None


def disk_fault(error: BaseException, path: Path | str, needed: int | None = None) -> StorageError | None:
    """A StorageError for an exception that came from the disk, or None for any other exception.

    path: where it was written to (an OSError that names its own file wins). needed: bytes to be written, if known.
    """
    code = _errno(error)
    if code not in _ADVICE:
        return None
    where = Path(path)
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        where = Path(os.fsdecode(error.filename))
    wanted = "" if needed is None else f"{human(needed)} needed, "
    free = human(free_bytes(where))
    return StorageError(f"{where}: {os.strerror(code)} ({wanted}{free} free): {_ADVICE[code]}write elsewhere")


@contextmanager
def disk_errors(path: Path, what: str = "cannot be written") -> Iterator[None]:
    """Raise an OSError of the body as a StorageError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise disk_fault(error, path) or StorageError(f"{path} {what}: {error}") from error


@contextmanager
def output_lock(output: Path, patience: float = 0) -> Iterator[None]:
    """Hold the lock of an output folder, which need not exist, while the body runs.

    output: the resolved final path; its parent is created. patience: seconds to wait for another process. Raises
    StorageError naming the holder (process id, host, start time, command), or that the folder cannot be written.
    """
    lock_file = output.parent / f".{output.name}.fusekit.lock"
    # Beside the lock, not in it: some versions of filelock truncate the lock file of another process.
    holder = lock_file.with_suffix(".holder")
    refuse_file(output.parent)
    lock = filelock.FileLock(lock_file, timeout=patience)
    with disk_errors(output, "cannot be locked"):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            if not lock_file.exists():  # in /proc, filelock takes the refusal for a wait
                raise StorageError(
                    f"{output}: cannot be locked: no file can be made in {output.parent}; choose another output"
                ) from None
            by = ""
            with suppress(OSError):  # it has just begun, or ended
                by = holder.read_text("utf-8", "replace")
            raise StorageError(
                f"{output}: already being written by {by or 'another process'}. Wait for it or choose another folder."
            ) from None
    try:
        with disk_errors(holder):
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
            text = f"process {os.getpid()} on {socket.gethostname()} since {since}: {command}"
            holder.write_text(text, "utf-8", "backslashreplace")  # names of files may be no UTF-8
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """A new folder beside ``final``, which takes its place in one step once the body is done without an error.

    After a crash at any moment the final path holds the old folder, whole, or the new one, whole. The caller holds
    ``output_lock(final)``. Raises StorageError with the path and the free bytes when the disk fails.
    """
    path = final.parent / f".{final.name}.staging-{uuid.uuid4().hex[:8]}"
    with disk_errors(path, "cannot be made"):
        path.mkdir(parents=True)
    try:
        yield path
        with disk_errors(final, "cannot be published"):
            sync_tree(path)
            if not final.exists():
                path.rename(final)
            elif not _exchange(path, final):
                aside = final.parent / f".{final.name}.previous-{uuid.uuid4().hex[:8]}"
                final.rename(aside)
                path.rename(final)
                shutil.rmtree(aside, ignore_errors=True)
            _sync(final.parent)
    finally:
        # After an exchange the former output is here.
        shutil.rmtree(path, ignore_errors=True)


def recover(final: Path) -> list[Path]:
    """Clean up after writers of ``final`` that died, and put back what they moved aside; returns what was removed.

    The caller holds ``output_lock(final)``.
    """
    name = glob.escape(final.name)
    for previous in sorted(final.parent.glob(f".{name}.previous-*")):
        if final.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(final)
    stale = sorted(final.parent.glob(f".{name}.staging-*"))
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    return stale


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below ``folder``, and itself."""
    for path in [*sorted(folder.rglob("*")), folder]:
        if path.is_dir() or path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    """fsync a file, or a folder, so that the names in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECTORY if path.is_dir() else 0))
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux renameat2). False where the kernel or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    if rename(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(other))


def commit_file(path: Path, data: bytes, *, rank: int = 0) -> None:
    """Write a file beside its path, make it durable, and move it there in one step.

    After a crash at any moment the path holds what it held before, or all of the new. rank: of the process, by which
    :func:`sweep` tells what it left behind. Raises StorageError with the bytes free when the disk fails.
    """
    temporary = path.with_name(f".{path.name}.{rank}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file, and make it durable. Raises StorageError with the bytes free when the disk fails."""
    with disk_errors(path), path.open("ab") as file:  # closing one that a full disk failed fails again
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sweep(folder: Path, rank: int = 0, world: int = 1) -> None:
    """Remove what earlier processes of this rank left half-written in a folder.

    Rank 0 also removes what ranks beyond this ``world`` left.
    """
    for path in sorted(folder.glob(".*.tmp")):
        owner = path.name.split(".")[-2]
        if owner.isdecimal() and (int(owner) == rank or (rank == 0 and int(owner) >= world)):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file that may have gone already. Raises StorageError when the disk refuses."""
    with disk_errors(path, "cannot be removed"):
        path.unlink(missing_ok=True)
