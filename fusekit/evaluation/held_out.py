"""Rows that nothing is trained on, as models are scored on them."""

from __future__ import annotations

from pathlib import Path

from fusekit import artifacts as artifact
from fusekit.data.reading import files_of, read_rows
from fusekit.types import Row


def held_out_rows(
    path: str, *, limit: int | None = None, split: str = "test", revision: str | None = None, name: str | None = None
) -> list[Row]:
    """Read held-out rows.

    Args:
        path: a file, a folder of files, or the id of a data set on the hub.
        limit: most rows of each file, and of a data set on the hub; None for all.
        split, revision, name: of a data set on the hub; ``name`` is its configuration. Not ``train``, as elsewhere:
            models that are scored may have learnt from it.

    Raises DataError as :func:`fusekit.data.reading.read_rows` does.
    """
    return [
        row
        for file in files_of(path)
        for row in read_rows(file, split=split, revision=revision, name=name, limit=limit)
    ]


def held_out_hash(path: str, files: str | None, limit: int | None, rows: list[Row]) -> str:
    """What identifies held-out rows: the hash of their files, or of the rows themselves where files do not tell them.

    A data set on the hub can change under its name; of a folder a limit takes the beginning of each file.

    Args:
        path: that the rows were read from.
        files: hash of the file or the folder; None for the hub.
        limit: most rows of each file.
        rows: that were read.
    """
    if files is not None and (limit is None or not Path(path).expanduser().is_dir()):
        return files
    return artifact.joined_hash(f"{row.key} {row.dataset!a}" for row in rows)
