"""Build a folder beside its final path, then move it there in one step.

Names beside an output ``models/out`` (all in ``models/``):

* ``.out.staging-XXXX``: being built, or left behind by a process that died; swept by the next writer, who holds the
  lock, so that no living process can own it.
* ``.out.previous-XXXX``: the former output, for the moment between two renames where the kernel cannot exchange two
  folders; if a process dies in that moment, the next start puts it back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusekit.errors import StorageError
from fusekit.storage.faults import disk_fault

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# No kernel or file system support for the flag: the caller renames twice instead.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV)


@dataclass
class Staging:
    """A folder that is being built.

    path: where to write. final: where ``publish`` moves it. on_published: called as soon as it stands there.
    """

    path: Path
    final: Path
    on_published: Callable[[], None] = lambda: None

    def publish(self) -> None:
        """Make everything durable and move it to the final path in one step, replacing what is there.

        After a crash at any moment the final path holds the old folder, whole, or the new one, whole. Raises
        StorageError with the path and the free bytes when the disk fails.
        """
        try:
            sync_tree(self.path)
            _replace_folder(self.path, self.final, self.on_published)
            sync_folder(self.final.parent)
        except OSError as error:
            raise disk_fault(error, self.final) or StorageError(f"{self.final}: cannot publish: {error}") from error


@contextmanager
def staging(final: Path, on_published: Callable[[], None] = lambda: None) -> Iterator[Staging]:
    """A new, empty staging folder beside ``final``; removed at the end, whether it was published or not.

    on_published: called as soon as the folder stands at its final path, before anything is tidied up.

    The caller holds ``output_lock(final)``. Raises StorageError when the folder cannot be made.
    """
    path = final.parent / f".{final.name}.staging-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir()
    except OSError as error:
        raise disk_fault(error, final.parent) or StorageError(f"{path}: cannot be made: {error}") from error
    try:
        yield Staging(path, final, on_published)
    finally:
        # After an exchange the former output is here.
        shutil.rmtree(path, ignore_errors=True)


def recover(final: Path) -> list[Path]:
    """Clean up after writers of ``final`` that died; returns the folders that were removed.

    A former output that was moved aside and never replaced is put back. The caller holds ``output_lock(final)``.
    """
    for previous in sorted(final.parent.glob(f".{_escaped(final.name)}.previous-*")):
        if final.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(final)
    stale = sorted(final.parent.glob(f".{_escaped(final.name)}.staging-*"))
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    return stale


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below ``folder``, and itself."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            _sync(path, os.O_RDONLY)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power cut."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(descriptor)


def _replace_folder(new: Path, final: Path, on_published: Callable[[], None]) -> None:
    if not final.exists():
        new.rename(final)
        on_published()
    elif _exchange(new, final):
        on_published()
    else:
        aside = final.parent / f".{final.name}.previous-{uuid.uuid4().hex[:8]}"
        final.rename(aside)
        new.rename(final)
        on_published()
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux renameat2). False where the kernel or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
