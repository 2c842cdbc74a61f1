"""Locks, files and folders that appear whole or not at all, and what a disk says when it fails.

A file is written beside its place, made durable, and moved there in one step; a folder likewise.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import filelock

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


def refuse_file(folder: Path, output: Path | str) -> None:
    """Raise StorageError naming ``output`` where a folder cannot be, since it or one above it is a file or a device."""
    # Where links lead; Path.resolve raises RuntimeError for those that lead in a circle.
    folder = Path(os.path.realpath(folder))
    for place in (folder, *folder.parents):
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            reason = error.strerror or str(error)
            raise disk_fault(error, place) or StorageError(
                f"{output} cannot be an output: {reason}; choose another one"
            ) from error
        if not place.is_dir():
            raise StorageError(f"{output}: {place} is a file or a device, not a folder: choose another output")
        return


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


def system_errno(error: BaseException) -> int | None:
    """The errno behind an exception: of an OSError, of what caused it, or named in a Rust library's message."""
    seen: set[int] = set()  # `raise error from error` makes a circle
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

    path: where it was written to (an OSError that names its own file wins). needed: bytes to be written, if known.
    """
    code = system_errno(error)
    if code not in _ADVICE:
        return None
    where = Path(path)
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        where = Path(os.fsdecode(error.filename))
    wanted = "" if needed is None else f"{human(needed)} needed, "
    return StorageError(f"{where}: {os.strerror(code)} ({wanted}{human(free_bytes(where))} free); {_ADVICE[code]}")


@contextmanager
def output_lock(output: Path, patience: float = 0) -> Iterator[None]:
    """Hold the lock of an output folder, which need not exist, while the body runs.

    output: the resolved final path; its parent is created. patience: seconds to wait for another process. Raises
    StorageError naming the holder (process id, host, start time, command), or that the folder cannot be written.
    """
    lock_file = output.parent / f".{output.name}.fusekit.lock"
    # Beside the lock, not in it: some versions of filelock truncate the lock file of another process.
    holder = lock_file.with_suffix(".holder")
    temporary = holder.with_suffix(".tmp")
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    lock = filelock.FileLock(lock_file, timeout=patience)
    try:
        refuse_file(output.parent, output)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            temporary.write_text(json.dumps(about), encoding="utf-8")
            temporary.replace(holder)
        except filelock.Timeout:
            if not lock_file.exists():  # some file systems refuse in a way that filelock takes for a wait
                raise StorageError(
                    f"{output}: cannot be locked: no file can be made in {output.parent}; choose another output"
                ) from None
            raise StorageError(
                f"{output}: already being written by {_described(holder)}. Wait for it or choose another folder."
            ) from None
        except OSError as error:
            raise disk_fault(error, output.parent) or StorageError(f"{output}: cannot be locked: {error}") from error
        yield
    finally:
        if lock.is_locked:
            for path in (holder, temporary):  # on a full disk the description is not written
                with suppress(OSError):
                    path.unlink()
            lock.release()


def _described(holder: Path) -> str:
    try:
        found: Any = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} since {found['since']}: {found['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process (it has just started, or its description cannot be read)"


@dataclass
class Staging:
    """A folder that is being built. path: where to write. final: where ``publish`` moves it."""

    path: Path
    final: Path

    def publish(self) -> None:
        """Make everything durable and move it to the final path in one step, replacing what is there.

        After a crash at any moment the final path holds the old folder, whole, or the new one, whole. Raises
        StorageError with the path and the free bytes when the disk fails.
        """
        aside = None
        try:
            sync_tree(self.path)
            if not self.final.exists():
                self.path.rename(self.final)
            elif not _exchange(self.path, self.final):
                aside = self.final.parent / f".{self.final.name}.previous-{uuid.uuid4().hex[:8]}"
                self.final.rename(aside)
                self.path.rename(self.final)
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
            _sync(self.final.parent)
        except OSError as error:
            raise disk_fault(error, self.final) or StorageError(f"{self.final}: cannot publish: {error}") from error


@contextmanager
def staging(final: Path) -> Iterator[Staging]:
    """A new, empty staging folder beside ``final``; removed at the end, whether it was published or not.

    The caller holds ``output_lock(final)``. Raises StorageError when the folder cannot be made.
    """
    path = final.parent / f".{final.name}.staging-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir()
    except OSError as error:
        raise disk_fault(error, final.parent) or StorageError(f"{path}: cannot be made: {error}") from error
    try:
        yield Staging(path, final)
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


def commit_file(path: Path, write: Callable[[BinaryIO], object], *, rank: int = 0) -> None:
    """Write a file beside its path, make it durable, and move it there in one step.

    After a crash at any moment the path holds what it held before, or all of the new. rank: of the process, by which
    :func:`sweep` tells what it left behind. Raises StorageError with the bytes free when the disk fails.
    """
    temporary = path.with_name(f".{path.name}.{rank}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise disk_fault(error, path) or StorageError(f"{path}: cannot be written: {error}") from error


def sweep(folder: Path, rank: int = 0, world: int = 1) -> list[Path]:
    """Remove what earlier processes of this rank left half-written in a folder; returns those files.

    Rank 0 also removes what ranks beyond this ``world`` left.
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
