"""A target that is made anew while the former one still stands: which of the two is there, after a process has died."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import xxhash

from fusekit.artifacts import MANIFEST, commit_file, remove
from fusekit.errors import StorageError

NOTE = ".overwriting.json"
"""In the folder of the targets: by name the identity of each former target that is to be replaced."""


def begin(out: Path, folders: Sequence[Path]) -> None:
    """Note which of these targets stand now: whoever resumes makes those anew. Raises StorageError for a full disk."""
    former = _read(out) | {folder.name: _identity(folder) for folder in folders if folder.exists()}
    if former:
        data = json.dumps(former, indent=1, sort_keys=True).encode() + b"\n"
        commit_file(out / NOTE, lambda file: file.write(data))


def is_former(folder: Path) -> bool:
    """Whether a target is one that was to be replaced, and has not been yet."""
    noted = _read(folder.parent).get(folder.name)
    return noted is not None and folder.exists() and noted == _identity(folder)


def finish(out: Path) -> None:
    """Forget the note once every target in it has been replaced."""
    if not any(is_former(out / name) for name in _read(out)):
        remove(out / NOTE)


def _read(out: Path) -> dict[str, str]:
    try:
        found = json.loads((out / NOTE).read_bytes())
        return {str(name): str(identity) for name, identity in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{out / NOTE} cannot be read ({error}), so it is not known which targets were being made anew: remove it "
            "and give --overwrite"
        ) from error


def _identity(folder: Path) -> str:
    """Of one making of a target: its manifest holds when it was made, and the hashes of its files."""
    try:
        return xxhash.xxh3_128_hexdigest((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return "no manifest"
    except OSError as error:
        raise StorageError(f"{folder / MANIFEST} cannot be read: {error}") from error
