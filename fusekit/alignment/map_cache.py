"""Vocabulary maps on disk, found by the hashes of the two vocabularies.

A file is written beside its name and moved over it, so a reader sees a whole file or none; what cannot be read, or does
not carry the hash of its own content, is made again. A folder that cannot be written costs the cache, not the map.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fusekit.alignment.surfaces import Surfaces
from fusekit.types import IntArray

log = logging.getLogger(__name__)
FORMAT = "fusekit vocabulary map 1"


def default_folder() -> Path:
    """``$FUSEKIT_CACHE``, else ``fusekit`` in the user's cache folder."""
    named = os.environ.get("FUSEKIT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(named) if named else base / "fusekit") / "vocabulary-maps"


def remembered(
    cache: bool | str | Path,
    method: str,
    pivot: Surfaces,
    source: Surfaces,
    *,
    statistics: str,
    make: Callable[[], IntArray],
) -> IntArray:
    """The targets int64 [V_source] of a map: from disk, or made and kept there.

    Args:
        cache: True for the default folder, a folder, or False for none.
        method, pivot, source, statistics: what the map depends on.
        make: makes the targets.
    """
    if cache is False:
        return make()
    key = "\n".join([FORMAT, method, pivot.fingerprint, source.fingerprint, statistics])
    folder = default_folder() if cache is True else Path(cache)
    path = folder / f"{method}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    targets = _read(path, key, len(source), len(pivot))
    if targets is None:
        targets = make()
        _write(path, key, targets)
    return targets


def _digest(targets: IntArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(targets).tobytes()).hexdigest()


def _read(path: Path, key: str, rows: int, columns: int) -> IntArray | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            targets: IntArray = stored["targets"].astype(np.int64)
            whole = str(stored["key"]) == key and str(stored["digest"]) == _digest(targets)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("vocabulary map %s cannot be read (%s); it is made again", path, error)
        return None
    if not whole or targets.shape != (rows,) or targets.max(initial=-1) >= columns:
        log.warning("vocabulary map %s is damaged; it is made again", path)
        return None
    return targets


def _write(path: Path, key: str, targets: IntArray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, targets=targets, key=np.array(key), digest=np.array(_digest(targets)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105  # temporary is a string
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        log.warning("vocabulary map is not kept: %s cannot be written (%s)", path, error)
