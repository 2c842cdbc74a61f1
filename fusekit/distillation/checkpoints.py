"""Checkpoints that can be trusted: each with a list of its files and their hashes, written when all else is there.

transformers resumes without a word from a checkpoint that lacks its optimizer or its random state, and safetensors does
not notice a flipped bit. A checkpoint without a list, or that is not what its list says, is not resumed from.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from fusekit.artifacts import File, differing, files_of
from fusekit.disk import commit_file, disk_fault, sync_tree
from fusekit.errors import StorageError

LISTING = "fusekit.json"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, good or not, as (step, path), latest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted(((int(name[1]), path) for name, path in found if name and path.is_dir()), reverse=True)


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Make a checkpoint durable and write the list of its files, with what it was made under (``facts``).

    Raises StorageError: the disk failed.
    """
    try:
        sync_tree(checkpoint)
        files = {name: file.model_dump() for name, file in files_of(checkpoint).items() if name != LISTING}
    except OSError as error:
        raise disk_fault(error, checkpoint) or StorageError(f"{checkpoint}: cannot be made durable: {error}") from error
    content = {"facts": facts, "files": files}
    data = json.dumps({**content, "xxh3": _digest(content)}, indent=1, sort_keys=True).encode() + b"\n"
    commit_file(checkpoint / LISTING, lambda file: file.write(data))


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was made under. Raises StorageError, with its name, when its list cannot be read."""
    try:
        return dict(_listing(checkpoint)["facts"])
    except StorageError as error:
        raise StorageError(f"{checkpoint}: {error}") from error


def problems_of(checkpoint: Path, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, file by file; empty when it is as it was written.

    hashes: read every file through; otherwise only its size is looked at. Raises StorageError: the disk failed.
    """
    try:
        files = {name: File(**said) for name, said in _listing(checkpoint)["files"].items()}
        return differing(checkpoint, files, hashes=hashes)
    except StorageError as error:
        return [str(error)]
    except OSError as error:
        raise disk_fault(error, checkpoint) or StorageError(f"{checkpoint}: cannot be read: {error}") from error


def _listing(checkpoint: Path) -> dict[str, Any]:
    try:
        found = json.loads((checkpoint / LISTING).read_bytes())
    except FileNotFoundError:
        raise StorageError(f"{LISTING} is missing: the checkpoint was not finished") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{LISTING} cannot be read: {error}") from error
    digest = found.pop("xxh3", None) if isinstance(found, dict) else None
    if digest is None or digest != _digest(found):
        raise StorageError(f"{LISTING} has been damaged: its hash is not the one that was written")
    return dict(found)


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def last_good(folder: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The latest checkpoint in a folder that is as it was written. say: told of each later one, and what is wrong."""
    for step, path in checkpoints(folder):
        problems = problems_of(path)
        if not problems:
            return path
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        say(f"warning: checkpoint-{step} is not used: {problems[0]}{more}")
    return None


def rotate(folder: Path, keep: int, also: Path | None = None) -> list[Path]:
    """Delete old checkpoints; returns those deleted.

    The latest ``keep`` (at least one) that have all files in full stay, and ``also``. Unfinished ones do not count, so
    the last good one is never among the deleted, and nothing is deleted while there is none.
    """
    found = checkpoints(folder)
    whole = [step for step, path in found if not problems_of(path, hashes=False)]
    oldest = min(whole[: max(keep, 1)], default=0)
    deleted = [path for step, path in found if step < oldest and path != also]
    for path in deleted:
        # A list that is gone first: a deletion that is cut short leaves no checkpoint that looks finished.
        (path / LISTING).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    return deleted
