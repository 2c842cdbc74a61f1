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

from fusekit.artifacts import commit_file, disk_fault, sync_tree
from fusekit.errors import StorageError

LISTING = "fusekit.json"
_BLOCK = 1 << 22
_NAME = re.compile(r"checkpoint-(\d+)")


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, hexadecimal. Raises StorageError when the disk does not give them."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise disk_fault(error, path) or StorageError(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, good or not, as (step, path), latest first."""
    if not folder.is_dir():
        return []
    found = [(int(name.group(1)), path) for path in folder.iterdir() if (name := _NAME.fullmatch(path.name))]
    return sorted((item for item in found if item[1].is_dir()), reverse=True)


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Make a checkpoint durable and write the list of its files, with what it was made under (``facts``).

    Raises:
        StorageError: the disk failed.
    """
    try:
        sync_tree(checkpoint)
    except OSError as error:
        raise disk_fault(error, checkpoint) or StorageError(f"{checkpoint}: cannot be made durable: {error}") from error
    files = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "xxh3": hash_file(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != LISTING
    }
    content = {"facts": facts, "files": files}
    data = json.dumps({**content, "xxh3": _digest(content)}, indent=1, sort_keys=True).encode() + b"\n"
    commit_file(checkpoint / LISTING, lambda file: file.write(data))


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was made under. Raises StorageError when its list cannot be read."""
    return dict(_listing(checkpoint)["facts"])


def problems_of(checkpoint: Path, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, file by file; empty when it is as it was written.

    hashes: read every file through; otherwise only its size is looked at.
    """
    try:
        files = _listing(checkpoint)["files"]
    except StorageError as error:
        return [str(error)]
    problems = []
    for name, said in files.items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != said["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {said['size']}")
        elif hashes and hash_file(path) != said["xxh3"]:
            problems.append(f"{name} has been damaged: its hash is not the one that was written")
    return problems


def _listing(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / LISTING
    try:
        found = json.loads(path.read_bytes())
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
    """The latest checkpoint in a folder that is as it was written, or None.

    say: told of every later one that is not, and why.
    """
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
    whole = [(step, path) for step, path in found if not problems_of(path, hashes=False)]
    if not whole:
        return []
    oldest = whole[: max(keep, 1)][-1][0]
    deleted = [path for step, path in found if step < oldest and path != also]
    for path in deleted:
        # A list that is gone first: a deletion that is cut short leaves no checkpoint that looks finished.
        (path / LISTING).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    return deleted
